// Joint bilateral upsampling of a prediction at single pixels: the weights of a pixel's taps and the mean they make stay
// in first-level cache, where library calls would carry them through memory.

#include "../native/vectors.h"

#include <stdint.h>
#include <string.h>

#define MAX_TAPS 1089

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
