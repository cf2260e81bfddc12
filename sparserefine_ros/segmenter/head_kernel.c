// The per-pixel ends of the pipeline on a CPU: what the dense segmenter says of a pixel, and how it is blended with
// what the refiner says. Both are a few hundred to a few thousand operations on a handful of numbers; in library calls
// each of those numbers would travel through memory a dozen times. Here LANES pixels are worked on at once, one a
// vector lane, and everything between their logits and their class stays in registers and first-level cache.
//
// Shape shorthand: K classes, C feature channels, HIDDEN width of the ensembler's perceptrons.

#include "../native/vectors.h"

#include <stdint.h>
#include <string.h>

#define MAX_CLASSES 255
#define MAX_CHANNELS 256
#define HIDDEN 64
#define BLOCK 8  // hidden units computed side by side

// Probabilities and entropy of LANES pixels, the largest logit and its class; returns the largest probability. What is
// not finite goes through to the entropy.
static inline vec softmax(const vec *logits, int classes, vec *p, vec *entropy, vec *best, ivec *which) {
    vec top = logits[0];
    ivec index = isplat(0);
    for (int k = 1; k < classes; k++) {
        ivec higher = logits[k] > top;  // strictly: of equal classes the first wins
        top = choose(higher, logits[k], top);
        index = (higher & isplat(k)) | (~higher & index);
    }
    vec sum = splat(0), weighted = splat(0);
    for (int k = 0; k < classes; k++) {
        vec below = logits[k] - top, e = exp_negative(below);
        e = choose(below <= 0, e, below);  // NaN compares false
        p[k] = e;
        sum += e;
        weighted += e * larger(below, splat(-87.0f));
    }
    vec inverse = 1.0f / sum;
    for (int k = 0; k < classes; k++) p[k] *= inverse;
    *entropy = larger(logarithm(sum) - weighted * inverse, splat(0)) + (sum - sum);
    *best = top;
    *which = index;
    return inverse;
}

// hidden[HIDDEN] = start + inputs @ weight, weight [inputs, HIDDEN].
static inline void perceptron(const vec *inputs, int count, const float *weight, const vec *start, vec *hidden) {
    for (int j = 0; j < HIDDEN; j += BLOCK) {
        vec sums[BLOCK];
        for (int i = 0; i < BLOCK; i++) sums[i] = start[j + i];
        for (int k = 0; k < count; k++) {
            const float *row = weight + (size_t)k * HIDDEN + j;
            vec x = inputs[k];
            for (int i = 0; i < BLOCK; i++) sums[i] += x * row[i];
        }
        for (int i = 0; i < BLOCK; i++) hidden[j + i] = sums[i];
    }
}

static inline void rectify(vec *hidden) {
    for (int j = 0; j < HIDDEN; j++) hidden[j] = choose(hidden[j] < 0, splat(0), hidden[j]);  // a NaN stays
}

// outputs[count] = bias + inputs @ weight, weight [inputs, count].
static inline void linear(
    const vec *inputs, int inputs_count, const float *weight, const float *bias, vec *outputs, int count
) {
    for (int k = 0; k < count; k += BLOCK) {
        int width = count - k < BLOCK ? count - k : BLOCK;
        vec sums[BLOCK];
        for (int i = 0; i < width; i++) sums[i] = splat(bias[k + i]);
        if (width == BLOCK) {
            for (int j = 0; j < inputs_count; j++)
                for (int i = 0; i < BLOCK; i++) sums[i] += inputs[j] * weight[(size_t)j * count + k + i];
        } else {
            for (int j = 0; j < inputs_count; j++)
                for (int i = 0; i < width; i++) sums[i] += inputs[j] * weight[(size_t)j * count + k + i];
        }
        for (int i = 0; i < width; i++) outputs[k + i] = sums[i];
    }
}

static inline uint8_t byte_of(float probability) { return (uint8_t)(probability * 255.0f + 0.5f); }

struct initial {
    const float *logits;  // element pixel * pixel_stride + k * class_stride
    int64_t pixel_stride, class_stride, classes;
    float *entropy;  // nats
    uint8_t *mask, *confidence;
    float *probabilities;  // [pixels, K], or NULL
    int64_t broken;        // becomes 1 where an entropy is not finite
};

void sr_initial(struct initial *job, int64_t begin, int64_t end) {
    const int classes = (int)job->classes;
    vec y[MAX_CLASSES], p[MAX_CLASSES], e, best;
    ivec which;
    for (int64_t at = begin; at < end; at += LANES) {
        int count = end - at < LANES ? (int)(end - at) : LANES;
        for (int i = 0; i < LANES; i++) {
            const float *from = job->logits + (at + (i < count ? i : 0)) * job->pixel_stride;
            for (int k = 0; k < classes; k++) y[k][i] = from[k * job->class_stride];
        }
        vec top = softmax(y, classes, p, &e, &best, &which);
        for (int i = 0; i < count; i++) {
            job->entropy[at + i] = e[i];
            job->mask[at + i] = (uint8_t)which[i];
            job->confidence[at + i] = byte_of(top[i]);
            if (!(e[i] - e[i] == 0)) job->broken = 1;
        }
        if (job->probabilities)
            for (int i = 0; i < count; i++)
                for (int k = 0; k < classes; k++) job->probabilities[(at + i) * classes + k] = p[k][i];
    }
}

// Selected pixels by the pixel of the logits they lie under: low [n] becomes block_low [blocks] and pixels
// [blocks, members], -1 behind the last of a block. head [cells] is room. Returns the blocks; -1 where there are more
// than capacity, or one has more than so many members.
int64_t sr_group(
    const int64_t *low, int64_t n, int64_t cells, int64_t members, int64_t capacity, int32_t *head, int64_t *block_low,
    int32_t *pixels
) {
    int64_t blocks = 0;
    memset(head, -1, cells * sizeof *head);
    for (int64_t i = 0; i < n; i++) {
        int32_t *block = head + low[i];
        if (*block < 0) {
            if (blocks == capacity) return -1;
            for (int m = 0; m < members; m++) pixels[blocks * members + m] = -1;
            block_low[blocks] = low[i];
            *block = (int32_t)blocks++;
        }
        int32_t *at = pixels + *block * members, *end = at + members;
        while (at < end && *at >= 0) at++;
        if (at == end) return -1;
        *at = (int32_t)i;
    }
    return blocks;
}

struct merge {
    const float *features;  // element pixel * feature_stride + channel
    int64_t feature_stride, channels;
    const float *logits;
    int64_t pixel_stride, class_stride, classes;
    const int64_t *low;     // [blocks] place in logits
    const int32_t *pixels;  // [blocks, members] as sr_group gives them, or NULL: every pixel is a block
    int64_t members;
    const int64_t *flat;  // each selected pixel's place in mask and confidence
    uint8_t *mask, *confidence;
    int64_t broken;
    // Weights, all [inputs, outputs], row by row.
    const float *classifier, *classifier_bias;  // [C, K], [K]
    const float *gate1, *gate1_bias;            // [2 (K + 1), HIDDEN], [HIDDEN]
    const float *gate2, *gate2_bias;            // [HIDDEN, 1], [1]: the first output less the second
    const float *fuse1, *fuse1_bias;            // [K, HIDDEN], [HIDDEN]
    const float *fuse2, *fuse2_bias;            // [HIDDEN, K], [K]
};

// The classifier on the features of the selected pixels of blocks begin..end, the gated ensembler (Eq. 1), class and
// probability. LANES blocks are worked on at once: what depends on the initial prediction alone, its softmax, entropy
// and half of the gate's first layer (a fifth of all multiplications), is done once for them, then one pixel of each
// block after another.
void sr_merge(struct merge *job, int64_t begin, int64_t end) {
    const int classes = (int)job->classes, channels = (int)job->channels;
    vec evidence[MAX_CLASSES + 1], x[MAX_CHANNELS], y1[MAX_CLASSES], y2[MAX_CLASSES], y[MAX_CLASSES];
    vec gate_start[HIDDEN], fuse_start[HIDDEN], initial_half[HIDDEN], hidden[HIDDEN], best, entropy;
    ivec which;
    for (int j = 0; j < HIDDEN; j++) {
        gate_start[j] = splat(job->gate1_bias[j]);
        fuse_start[j] = splat(job->fuse1_bias[j]);
    }
    for (int64_t at = begin; at < end; at += LANES) {
        const int blocks = end - at < LANES ? (int)(end - at) : LANES;
        for (int i = 0; i < LANES; i++) {
            const float *initial = job->logits + job->low[at + (i < blocks ? i : 0)] * job->pixel_stride;
            for (int k = 0; k < classes; k++) y1[k][i] = initial[k * job->class_stride];
        }
        softmax(y1, classes, evidence, evidence + classes, &best, &which);
        perceptron(evidence, classes + 1, job->gate1, gate_start, initial_half);
        for (int64_t member = 0; member < job->members; member++) {
            int64_t rows[LANES];
            for (int i = 0; i < LANES; i++) {
                const int64_t block = at + (i < blocks ? i : 0);
                rows[i] = i >= blocks ? -1 : job->pixels ? job->pixels[block * job->members + member] : block;
                const float *from = job->features + (rows[i] < 0 ? 0 : rows[i]) * job->feature_stride;
                for (int c = 0; c < channels; c++) x[c][i] = from[c];
                // Rows of a block lie far apart, where no hardware looks ahead.
                const int64_t next = block + LANES < end ? block + LANES : block;
                const int64_t later = job->pixels ? job->pixels[next * job->members + member] : next;
                for (int c = 0; c < channels; c += 16)
                    __builtin_prefetch(job->features + (later < 0 ? 0 : later) * job->feature_stride + c);
            }
            linear(x, channels, job->classifier, job->classifier_bias, y2, classes);
            softmax(y2, classes, evidence, evidence + classes, &best, &which);
            perceptron(evidence, classes + 1, job->gate1 + (classes + 1) * HIDDEN, initial_half, hidden);
            rectify(hidden);
            vec difference = splat(job->gate2_bias[0]);  // softmax over two outputs: a sigmoid of their difference
            for (int j = 0; j < HIDDEN; j++) difference += hidden[j] * job->gate2[j];
            vec small = exp_negative(-choose(difference > 0, difference, -difference));  // e^-|d|
            vec w1 = choose(difference > 0, splat(1), small) / (1.0f + small);
            for (int k = 0; k < classes; k++) y[k] = w1 * y1[k] + (1.0f - w1) * y2[k];
            perceptron(y, classes, job->fuse1, fuse_start, hidden);
            rectify(hidden);
            linear(hidden, HIDDEN, job->fuse2, job->fuse2_bias, y, classes);
            vec top = softmax(y, classes, y2, &entropy, &best, &which);
            for (int i = 0; i < LANES; i++) {
                if (rows[i] < 0) continue;
                job->mask[job->flat[rows[i]]] = (uint8_t)which[i];
                job->confidence[job->flat[rows[i]]] = byte_of(top[i]);
                if (!(entropy[i] - entropy[i] == 0)) job->broken = 1;
            }
        }
    }
}

struct direct {
    const float *features;  // element pixel * feature_stride + channel
    int64_t feature_stride, channels, classes;
    const int64_t *flat;  // each selected pixel's place in mask and confidence
    uint8_t *mask, *confidence;
    int64_t broken;
    const float *classifier, *classifier_bias;  // [C, K], [K]; NULL where the features are logits
};

// Class and probability of what the refiner says, in the place of the initial prediction.
void sr_direct(struct direct *job, int64_t begin, int64_t end) {
    const int classes = (int)job->classes, channels = (int)job->channels;
    vec x[MAX_CHANNELS], logits[MAX_CLASSES], p[MAX_CLASSES], entropy, best;
    ivec which;
    for (int64_t at = begin; at < end; at += LANES) {
        const int count = end - at < LANES ? (int)(end - at) : LANES;
        for (int i = 0; i < LANES; i++) {
            const float *from = job->features + (at + (i < count ? i : 0)) * job->feature_stride;
            for (int c = 0; c < channels; c++) x[c][i] = from[c];
        }
        if (job->classifier) linear(x, channels, job->classifier, job->classifier_bias, logits, classes);
        vec top = softmax(job->classifier ? logits : x, classes, p, &entropy, &best, &which);
        for (int i = 0; i < count; i++) {
            job->mask[job->flat[at + i]] = (uint8_t)which[i];
            job->confidence[job->flat[at + i]] = byte_of(top[i]);
            if (!(entropy[i] - entropy[i] == 0)) job->broken = 1;
        }
    }
}
