// Sparse 3x3 convolution on a CPU, for inference: indirect convolution (Dukhan, 2019) over neighbour tables.
//
// A tile of a few output sites by one or two vectors of output channels is accumulated in registers. For every tap the
// tile takes the addresses of its input rows from the table (a missing site has a row of zeros), and for every input
// channel it multiplies one number a row with a vector of weights. Nothing is gathered into a buffer first, and what a
// layer has to add, normalise or clip happens before the tile leaves the registers.
//
// Shape shorthand: cin, cout channels; c2 channels of the 1x1 shortcut's input; a panel is a tile's output channels.

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS_2 8   // rows of a tile of two vectors: 16 accumulators of 32 registers
#define ROWS_1 12  // and of one vector
#elif defined(__AVX2__)
#define LANES 8
#define ROWS_2 4
#define ROWS_1 8
#else
#define LANES 4
#define ROWS_2 8
#define ROWS_1 12
#endif
#define MAX_ROWS 12
#define MAX_OUTPUTS 4

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));

struct output {
    float *data;
    int64_t stride;
    const float *scale, *shift;  // [cout], or NULL
    int64_t relu;
};

struct layer {
    const float *x;
    int64_t x_stride, n_in;
    const int32_t *table;  // [n, taps_count] input rows, n_in where there is no site
    const int64_t *rows;   // [n] output rows, or NULL: in order
    int64_t taps_count, taps[9];
    int64_t cin, cout, c2;
    const float *weight;  // [panels][9][cin][panel]
    const float *x2;      // the shortcut's input, or NULL
    int64_t x2_stride;
    const float *weight2;  // [panels][c2][panel]
    const float *add;      // or NULL
    int64_t add_stride;
    const float *zeros;  // cin of them
    int64_t outputs_count;
    struct output outputs[MAX_OUTPUTS];
};

int64_t sr_panel(int64_t cout) { return cout > LANES ? 2 * LANES : LANES; }

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from, int64_t count) {
    if (count >= LANES) return *(const vec *)from;
    vec value = {0};
    for (int i = 0; i < count; i++) value[i] = from[i];
    return value;
}

INLINE void store(float *to, vec value, int64_t count) {
    if (count >= LANES) *(vec *)to = value;
    else
        for (int i = 0; i < count; i++) to[i] = value[i];
}

// sums[r][v] += a[r][c] * weight[c][v], over all channels c.
INLINE void multiply(
    const int rows, const int vectors, vec sums[MAX_ROWS][2], const float *const *a, const float *weight,
    int64_t channels
) {
    for (int64_t c = 0; c < channels; c++, weight += vectors * LANES) {
        vec w0 = *(const vec *)weight, w1 = *(const vec *)(weight + (vectors - 1) * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vec s = a[r][c] - (vec){0};
            sums[r][0] += s * w0;
            if (vectors == 2) sums[r][1] += s * w1;
        }
    }
}

// Output rows first..first+count (count <= rows) of one panel.
INLINE void tile(const int rows, const int vectors, const struct layer *l, int64_t first, int count, int64_t panel) {
    const int width = vectors * LANES;
    const float *a[MAX_ROWS], *weight = l->weight + panel * 9 * l->cin * width;
    vec sums[MAX_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (vec){0};
    for (int64_t t = 0; t < l->taps_count; t++) {
        int present = 0;
        for (int r = 0; r < rows; r++) {
            int64_t from = l->table[(first + (r < count ? r : 0)) * l->taps_count + t];
            a[r] = from == l->n_in ? l->zeros : l->x + from * l->x_stride;
            present |= from != l->n_in;
        }
        if (present) multiply(rows, vectors, sums, a, weight + l->taps[t] * l->cin * width, l->cin);
    }
    int64_t at[MAX_ROWS];
    for (int r = 0; r < rows; r++) at[r] = first + (r < count ? r : 0);
    if (l->rows)
        for (int r = 0; r < rows; r++) at[r] = l->rows[at[r]];
    if (l->x2) {
        for (int r = 0; r < rows; r++) a[r] = l->x2 + at[r] * l->x2_stride;
        multiply(rows, vectors, sums, a, l->weight2 + panel * l->c2 * width, l->c2);
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
        const int64_t channel = panel * width + v * LANES, live = l->cout - channel;
        if (live <= 0) break;
        if (l->add)
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
                sums[r][v] += load(l->add + at[r] * l->add_stride + channel, live);
        for (int64_t o = 0; o < l->outputs_count; o++) {
            const struct output *out = &l->outputs[o];
            vec scale = (vec){0} + 1.0f, shift = {0};
            if (out->scale) scale = load(out->scale + channel, live);
            if (out->shift) shift = load(out->shift + channel, live);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                vec y = sums[r][v] * scale + shift;
                if (out->relu) y = (vec)((mask)y & ~(y < 0));  // a NaN stays
                if (r < count) store(out->data + at[r] * out->stride + channel, y, live);
            }
        }
    }
}

static void tiles_1(const struct layer *l, int64_t first, int64_t last, int64_t panel) {
    for (int64_t at = first; at < last; at += ROWS_1)
        tile(ROWS_1, 1, l, at, last - at < ROWS_1 ? (int)(last - at) : ROWS_1, panel);
}

static void tiles_2(const struct layer *l, int64_t first, int64_t last, int64_t panel) {
    for (int64_t at = first; at < last; at += ROWS_2)
        tile(ROWS_2, 2, l, at, last - at < ROWS_2 ? (int)(last - at) : ROWS_2, panel);
}

// Output rows first..last of a layer.
void sr_conv(const struct layer *l, int64_t first, int64_t last) {
    const int64_t width = sr_panel(l->cout);
    for (int64_t panel = 0; panel * width < l->cout; panel++)
        (width > LANES ? tiles_2 : tiles_1)(l, first, last, panel);
}
