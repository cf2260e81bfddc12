// Sparse 3x3 convolution on a CPU, for inference: indirect convolution (Dukhan, 2019) over neighbour tables.
//
// A tile of a few output sites by one or two vectors of output channels is accumulated in registers. For every tap the
// tile takes the addresses of its input rows from the table (a missing site has a row of zeros), and for every input
// channel it multiplies one number a row with a vector of weights. Nothing is gathered into a buffer first, and what a
// layer has to add, normalise or clip happens before the tile leaves the registers.
//
// Where sites fill 2x2 blocks, four pixels are computed from their common 4x4 patch in 16 products a pair of channels in
// place of 36: Winograd's F(2x2, 3x3) (Lavin and Gray, 2016). Sharing loads alone, 16 rows a block in place of 36, would
// gain nothing: the tiles above are bound by their multiplications. What is left of those is 44 % where blocks are full;
// for 32 channels the way there and back adds half as much again, for 512 a twentieth.
//
// Shape shorthand: cin, cout channels; c2 channels of the 1x1 shortcut's input; a panel is a tile's output channels.

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS_2 8   // rows of a tile of two vectors: 16 accumulators of 32 registers
#define ROWS_1 12  // and of one vector
#define TALL 12    // rows of a tile of two vectors that has no epilogue
#elif defined(__AVX2__)
#define LANES 8
#define ROWS_2 4
#define ROWS_1 8
#define TALL 6
#else
#define LANES 4
#define ROWS_2 8
#define ROWS_1 12
#define TALL 12
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
    int64_t x_stride, n_in, n_out;  // the first n_out rows of a submanifold layer's input are its output's
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
    float *room;  // room_parts of room_size floats, one for each thread: what sr_blocks keeps between its steps
    int64_t room_size, room_parts;
    uint64_t room_taken;  // bit i: part i is in use
    int64_t large;        // outputs that the cache will not hold until the next layer reads them
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

INLINE void store(float *to, vec value, int64_t count, int64_t large) {
    if (count >= LANES) {
#if defined(__AVX512F__)
        if (large && (uintptr_t)to % 64 == 0) {  // a whole cache line, which then need not be read first
            _mm512_stream_ps(to, (__m512)value);
            return;
        }
#endif
        *(vec *)to = value;
    }
    else
        for (int i = 0; i < count; i++) to[i] = value[i];
}

// Before another thread may read what was streamed.
INLINE void fence(void) {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
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

// Adds to the sums of output rows at[] what else the layer adds, and writes them; only rows whose bit is set in keep.
INLINE void finish(
    const int rows, const int vectors, const struct layer *l, vec sums[MAX_ROWS][2], const int64_t *at, unsigned keep,
    int64_t panel
) {
    const int width = vectors * LANES;
    if (l->x2) {
        const float *a[MAX_ROWS];
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
                if (keep >> r & 1) store(out->data + at[r] * out->stride + channel, y, live, l->large);
            }
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
    finish(rows, vectors, l, sums, at, (1u << count) - 1, panel);
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
    fence();
}

// Winograd's F(2x2, 3x3): the table holds the 4x4 patch of every block, row by row; the block is its middle. Each of the
// 16 planes is a matrix product of its own; planes and products of PATCHES blocks stay in second-level cache. A patch
// with one input that is not finite makes all of its block not finite.

#define PATCHES 96  // a multiple of every tile's rows
static const int MIDDLE[4] = {5, 6, 9, 10};

int64_t sr_patches(void) { return PATCHES; }

// Floats from one plane to the next; the vector more keeps the planes off the same cache sets.
INLINE int64_t plane(int64_t channels) { return PATCHES * ((channels + LANES - 1) / LANES * LANES) + LANES; }

int64_t sr_room(int64_t cin) { return 16 * (plane(cin) + plane(2 * LANES)); }

// (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
INLINE void into(vec *d, const int step) {
    vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
    d[0] = d0 - d2;
    d[step] = d1 + d2;
    d[2 * step] = d2 - d1;
    d[3 * step] = d1 - d3;
}

// Patches first..first+count of the input, transformed: planes [16][count][cin].
static void transform(const struct layer *l, int64_t first, int64_t count, float *planes) {
    const int64_t step = plane(l->cin), row = (l->cin + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < count; i++) {
        const float *a[16];
        for (int p = 0; p < 16; p++) {
            const int64_t from = l->table[(first + i) * 16 + p];
            a[p] = from == l->n_in ? l->zeros : l->x + from * l->x_stride;
        }
        for (int64_t c = 0; c < l->cin; c += LANES) {
            vec d[16];
#pragma GCC unroll 16
            for (int p = 0; p < 16; p++) d[p] = load(a[p] + c, l->cin - c);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) into(d + p, 4);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) into(d + 4 * p, 1);
#pragma GCC unroll 16
            for (int p = 0; p < 16; p++) *(vec *)(planes + p * step + i * row + c) = d[p];
        }
    }
}

// One panel of blocks first..first+count: the products, then back and out.
INLINE void panel_of_blocks(
    const int rows, const int tall, const int vectors, const struct layer *l, int64_t first, int64_t count,
    int64_t panel, const float *planes, float *products
) {
    const int width = vectors * LANES;
    const int64_t step = plane(l->cin), row = (l->cin + LANES - 1) / LANES * LANES, out_step = plane(width);
    for (int p = 0; p < 16; p++)
        for (int64_t i = 0; i < count; i += tall) {  // rows behind count are computed of whatever is there, and unread
            const float *a[MAX_ROWS];
            vec sums[MAX_ROWS][2];
#pragma GCC unroll 12
            for (int r = 0; r < tall; r++) {
                a[r] = planes + p * step + (i + r) * row;
                sums[r][0] = sums[r][1] = (vec){0};
            }
            multiply(tall, vectors, sums, a, l->weight + (panel * 16 + p) * l->cin * width, l->cin);
#pragma GCC unroll 12
            for (int r = 0; r < tall; r++)
                for (int v = 0; v < vectors; v++)
                    *(vec *)(products + p * out_step + (i + r) * width + v * LANES) = sums[r][v];
        }
    for (int64_t i = 0; i < count; i += rows / 4) {
        vec sums[MAX_ROWS][2];
        int64_t at[MAX_ROWS];
        unsigned keep = 0;
#pragma GCC unroll 3
        for (int b = 0; b < rows / 4; b++) {
            const int64_t block = i + b < count ? i + b : i;
            const int32_t *patch = l->table + (first + block) * 16;
            int64_t any = 0;
            for (int q = 0; q < 4; q++)
                if (patch[MIDDLE[q]] < l->n_out) any = patch[MIDDLE[q]];
            for (int q = 0; q < 4; q++) {
                const int64_t to = patch[MIDDLE[q]];
                at[4 * b + q] = to < l->n_out ? to : any;
                keep |= (unsigned)(to < l->n_out && i + b < count) << (4 * b + q);
            }
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                vec upper[4], lower[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const float *m = products + j * out_step + block * width + v * LANES;
                    vec m0 = *(const vec *)m, m1 = *(const vec *)(m + 4 * out_step);
                    vec m2 = *(const vec *)(m + 8 * out_step), m3 = *(const vec *)(m + 12 * out_step);
                    upper[j] = m0 + m1 + m2;
                    lower[j] = m1 - m2 - m3;
                }
                sums[4 * b][v] = upper[0] + upper[1] + upper[2];
                sums[4 * b + 1][v] = upper[1] - upper[2] - upper[3];
                sums[4 * b + 2][v] = lower[0] + lower[1] + lower[2];
                sums[4 * b + 3][v] = lower[1] - lower[2] - lower[3];
            }
        }
        finish(rows, vectors, l, sums, at, keep, panel);
    }
}

// Blocks first..last of a submanifold layer; weights are [panels][16][cin][panel].
void sr_blocks(struct layer *l, int64_t first, int64_t last) {
    int part = 0;
    while (__atomic_fetch_or(&l->room_taken, 1ull << part, __ATOMIC_ACQUIRE) >> part & 1) part = (part + 1) % (int)l->room_parts;
    float *planes = l->room + part * l->room_size, *products = planes + 16 * plane(l->cin);
    const int64_t width = sr_panel(l->cout);
    for (int64_t count; first < last; first += count) {
        count = last - first < PATCHES ? last - first : PATCHES;
        transform(l, first, count, planes);
        for (int64_t panel = 0; panel * width < l->cout; panel++)
            if (width > LANES) panel_of_blocks(ROWS_2, TALL, 2, l, first, count, panel, planes, products);
            else panel_of_blocks(ROWS_1, ROWS_1, 1, l, first, count, panel, planes, products);
    }
    fence();
    __atomic_fetch_and(&l->room_taken, ~(1ull << part), __ATOMIC_RELEASE);
}
