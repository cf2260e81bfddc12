// The tables and interpolations of repetition_tables.py on a CPU, without what torch would write in between.

#include <stdint.h>

struct look_up {
    const int32_t *number;   // of the row at each pixel
    const int64_t *base;     // [n] pixels
    const int64_t *offsets;  // [taps]
    int64_t taps;
    int32_t *table;  // [n, taps]
};

void sr_look_up(const struct look_up *j, int64_t first, int64_t last) {
    int32_t *entry = j->table + first * j->taps;
    for (int64_t i = first; i < last; i++) {
        const int32_t *number = j->number + j->base[i];
        for (int64_t t = 0; t < j->taps; t++) *entry++ = number[j->offsets[t]];
    }
}

// A convolution of each channel by itself, at n outputs.
struct by_channel {
    const float *rows, *weight, *bias;  // [count, channels], [taps, channels], [channels]
    const int32_t *table;               // [n, taps] rows, count where there is none
    int64_t taps, channels, count;
    float *out;  // [n, channels]
};

void sr_by_channel(const struct by_channel *j, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
        const int32_t *row = j->table + i * j->taps;
        float *restrict out = j->out + i * j->channels;
        for (int64_t c = 0; c < j->channels; c++) out[c] = j->bias[c];
        for (int64_t t = 0; t < j->taps; t++) {
            if (row[t] == j->count) continue;
            const float *x = j->rows + row[t] * j->channels, *w = j->weight + t * j->channels;
            for (int64_t c = 0; c < j->channels; c++) out[c] += w[c] * x[c];
        }
    }
}

// Bilinear interpolation at n sites of a grid, in a map [images, height, width].
struct corners {
    const int64_t *image, *row, *column;  // [n] on the grid
    const int32_t *top, *left;            // by the grid's row and column: the first of the map's two
    const float *down, *right;            // and the weight of the second
    int64_t height, width;
    const int32_t *number;  // of the row of features at each pixel of the map, or NULL: in order
    const float *rows;
    int64_t stride, channels;
    float *out;     // [n, channels]
    uint8_t *read;  // [images height width]
};

static inline void corners_of(const struct corners *j, int64_t i, int64_t at[4], float weight[4]) {
    const int64_t y = j->top[j->row[i]], x = j->left[j->column[i]];
    const float down = j->down[j->row[i]], right = j->right[j->column[i]];
    const int64_t corner = (j->image[i] * j->height + y) * j->width + x;
    const int64_t below = y + 1 < j->height ? j->width : 0, beside = x + 1 < j->width;
    at[0] = corner;
    at[1] = corner + beside;
    at[2] = corner + below;
    at[3] = corner + below + beside;
    weight[0] = (1 - down) * (1 - right);
    weight[1] = (1 - down) * right;
    weight[2] = down * (1 - right);
    weight[3] = down * right;
}

void sr_blend(const struct corners *j, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
        int64_t at[4];
        float w[4];
        corners_of(j, i, at, w);
        const float *a[4];
        for (int k = 0; k < 4; k++) a[k] = j->rows + (j->number ? j->number[at[k]] : at[k]) * j->stride;
        float *out = j->out + i * j->channels;
        for (int64_t c = 0; c < j->channels; c++)
            out[c] = w[0] * a[0][c] + w[1] * a[1][c] + w[2] * a[2][c] + w[3] * a[3][c];
    }
}

// Sets the pixels that are read. Threads that set the same one write the same.
void sr_mark(const struct corners *j, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
        int64_t at[4];
        float w[4];
        corners_of(j, i, at, w);
        for (int k = 0; k < 4; k++) __atomic_store_n(j->read + at[k], 1, __ATOMIC_RELAXED);
    }
}
