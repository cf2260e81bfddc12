// Vectors of float32 as wide as the machine's, and what the kernels compute with them; GCC's and Clang's extension.

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec splat(float x) { return x - (vec){0}; }
static inline ivec isplat(int32_t x) { return x - (ivec){0}; }
static inline vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7 (relative error < 2e-7).
static inline vec exp_negative(vec x) {
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    x = larger(x, splat(-87.0f));
    vec shifted = x * 1.44269504f + magic;
    vec n = shifted - magic;
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

// ln x for normal x > 0: exponent * ln 2 + 2 atanh(t), t = (m - 1) / (m + 1), m in [0.7, 1.4] (absolute error < 3e-7
// up to 2^8).
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
