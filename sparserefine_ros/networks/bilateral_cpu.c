// Joint bilateral upsampling of a prediction at single pixels: the weights of a pixel's taps and the mean they make stay
// in first-level cache, where library calls would carry them through memory.

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define MAX_TAPS 1089

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec splat(float x) { return x - (vec){0}; }
static inline vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
static inline vec load(const float *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

struct bilateral {
    const int64_t *sites;              // [N, 3]: image, row, column
    const uint8_t *native, *low;       // [B, height, width, 3], [B, low_height, low_width, 3]
    const float *probabilities;        // [B, low_height, low_width, classes]
    const int64_t *rows, *columns;     // [height, side], [width, side]: of low, under the taps of each of native
    const float *down, *right;         // of the same: squared distances, over twice the Gaussian's variance
    const int64_t *own_row, *own_column;  // [height], [width]: of low, under the pixel itself
    int64_t height, width, low_height, low_width, side, classes;
    float colour, initial;  // one over twice the variance of colours from 0 to 255; the initial prediction's share
    float *out;             // [N, classes]: logarithms
};

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7 (relative error < 2e-7).
static inline vec exp_negative(vec x) {
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    x = choose(x > -87.0f, x, splat(-87.0f));
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = splat(1.0f / 5040);
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return (vec)((ivec)y + (((ivec)shifted - (ivec)magic) << 23));
}

// ln x for normal x > 0: exponent * ln 2 + 2 atanh(t), t = (m - 1) / (m + 1), m in [0.7, 1.4].
static inline vec logarithm(vec x) {
    ivec exponent = ((ivec)x - 0x3f3504f3) >> 23;
    vec m = (vec)((ivec)x - (exponent << 23));
    vec t = (m - 1.0f) / (m + 1.0f), s = t * t;
    vec y = splat(2.0f / 9);
    y = y * s + 2.0f / 7;
    y = y * s + 2.0f / 5;
    y = y * s + 2.0f / 3;
    y = y * s + 2.0f;
    return y * t + __builtin_convertvector(exponent, vec) * 0.693147181f;
}

static inline vec logarithm_of_probability(vec p) {
    vec y = logarithm(choose(p < 1e-10f, splat(1e-10f), p));
    return choose(p - p == 0, y, p);  // what is not finite stays
}

// classes: at least LANES. The last vector begins where it ends with the last class, over some that were there before.
static inline void blend(
    const float *probabilities, const int64_t *places, const float *weight, int64_t taps, const float *initial,
    float initial_share, float share, int64_t classes, float *out
) {
    for (int64_t k = 0; k < classes; k += LANES) {
        const int64_t first = k + LANES < classes ? k : classes - LANES;
        vec mean = splat(0);
        for (int64_t t = 0; t < taps; t++) mean += weight[t] * load(probabilities + places[t] * classes + first);
        vec y = logarithm_of_probability(initial_share * load(initial + first) + share * mean);
        memcpy(out + first, &y, sizeof y);
    }
}

// Fewer than LANES.
static inline void blend_few(
    const float *probabilities, const int64_t *places, const float *weight, int64_t taps, const float *initial,
    float initial_share, float share, int64_t classes, float *out
) {
    float mean[LANES] = {0}, p[LANES] = {0};
    for (int64_t t = 0; t < taps; t++)
        for (int64_t k = 0; k < classes; k++) mean[k] += weight[t] * probabilities[places[t] * classes + k];
    for (int64_t k = 0; k < classes; k++) p[k] = initial_share * initial[k] + share * mean[k];
    vec y = logarithm_of_probability(load(p));
    memcpy(out, &y, classes * sizeof *out);
}

void sr_bilateral(struct bilateral *job, int64_t begin, int64_t end) {
    const int64_t side = job->side, taps = side * side, classes = job->classes;
    int64_t places[MAX_TAPS];
    float weight[MAX_TAPS + LANES];
    for (int64_t n = begin; n < end; n++) {
        const int64_t image = job->sites[3 * n], y = job->sites[3 * n + 1], x = job->sites[3 * n + 2];
        const uint8_t *own = job->native + 3 * ((image * job->height + y) * job->width + x);
        float top = -1e30f, sum = 0;
        for (int64_t i = 0, t = 0; i < side; i++) {
            const int64_t row = (image * job->low_height + job->rows[y * side + i]) * job->low_width;
            for (int64_t j = 0; j < side; j++, t++) {
                places[t] = row + job->columns[x * side + j];
                const uint8_t *there = job->low + 3 * places[t];
                const int32_t red = there[0] - own[0], green = there[1] - own[1], blue = there[2] - own[2];
                const float squared = (float)(red * red + green * green + blue * blue);
                weight[t] = -job->down[y * side + i] - job->right[x * side + j] - job->colour * squared;
                top = weight[t] > top ? weight[t] : top;
            }
        }
        for (int64_t t = taps; t < taps + LANES; t++) weight[t] = top;  // room of the last vector
        for (int64_t t = 0; t < taps; t += LANES) {
            vec e = exp_negative(load(weight + t) - top);
            memcpy(weight + t, &e, sizeof e);
        }
        for (int64_t t = 0; t < taps; t++) sum += weight[t];
        const int64_t row = (image * job->low_height + job->own_row[y]) * job->low_width;
        const float *initial = job->probabilities + (row + job->own_column[x]) * classes;
        (classes < LANES ? blend_few : blend)(
            job->probabilities, places, weight, taps, initial, job->initial, (1.0f - job->initial) / sum, classes,
            job->out + n * classes
        );
    }
}
