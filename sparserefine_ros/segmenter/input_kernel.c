// What the sparse U-Net reads of its pixels: colours, normalised, and the initial prediction over them; in one pass over
// the result, of which library calls make four.

#include <stdint.h>
#include <string.h>

struct input {
    const int64_t *sites;        // [N, 3]: image, row, column
    const uint8_t *native;       // [B, height, width, 3]
    const float *normalised;     // [3, 256]: what each value of a channel becomes
    const float *probabilities;  // [B, low_height, low_width, classes], or NULL
    const int64_t *rows, *columns;  // [height], [width]: of probabilities, over each of native
    int64_t height, width, low_height, low_width, classes;
    float *out;  // [N, 3 + classes]
};

void sr_input(struct input *job, int64_t begin, int64_t end) {
    const int64_t classes = job->probabilities ? job->classes : 0;
    float *out = job->out + begin * (3 + classes);
    for (int64_t i = begin; i < end; i++, out += 3 + classes) {
        const int64_t *site = job->sites + 3 * i;
        const uint8_t *colour = job->native + 3 * ((site[0] * job->height + site[1]) * job->width + site[2]);
        for (int c = 0; c < 3; c++) out[c] = job->normalised[256 * c + colour[c]];
        if (!classes) continue;
        const int64_t row = site[0] * job->low_height + job->rows[site[1]];
        const int64_t at = row * job->low_width + job->columns[site[2]];
        memcpy(out + 3, job->probabilities + at * classes, classes * sizeof *out);
    }
}
