/* Vectors of float: GCC and clang's vector extensions, with the instruction sets' own where those say it better. */
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16 /* lanes of a vector */
#define ROWS 8 /* rows of a register block: ROWS x 2 accumulators, two vectors and a scalar fit in 32 registers */
#elif defined(__AVX__)
#define VL 8
#define ROWS 4
#else
#define VL 4
#define ROWS 8
#endif
#define PANEL (2 * VL) /* query rows that a register block holds side by side */

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * VL), aligned(2), may_alias));

#define LOG2E 1.44269504f
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vf load(const float *at) { return *(const vf_any *)at; }
INLINE void store(float *at, vf v) { *(vf_any *)at = v; }
INLINE vf all(float x) { return (vf){0} + x; }
INLINE vf pick(vi which, vf yes, vf no) { return (vf)(((vi)yes & which) | ((vi)no & ~which)); }

/* Whether any lane is not 0. */
INLINE int any(vi x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
    int32_t found = 0;
    UNROLL for (int lane = 0; lane < VL; lane++) found |= x[lane];
    return found != 0;
#endif
}

/* The larger; `b` where either is NaN. */
INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return pick(a > b, a, b);
#endif
}

/* The nearest integer, of numbers below 2^22. */
INLINE vf nearest(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
    return (x + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23 */
#endif
}

/* p * 2^n for an integer n; NaN where it is. Without AVX-512, 0 below -150. */
INLINE vf scaled_by(vf p, vf n) {
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    n = larger(all(-150.0f), n);
    vi e = __builtin_convertvector(n, vi);
    vi half = e >> 1; /* in two steps, for results below the smallest normal number */
    vf scaled = p * (vf)((half + 127) << 23) * (vf)((e - half + 127) << 23);
    return pick(n == n, scaled, n);
#endif
}

/* 2^x; 0 below -150 and for -inf, NaN for NaN. Both polynomials are those whose largest relative error, 3e-9, is least. */
INLINE vf exp2_of(vf x) {
    x = larger(all(-150.0f), x);
    const vf n = nearest(x), f = x - n;
    vf p = all(1.53533620e-4f);
    p = p * f + 1.33988739e-3f;
    p = p * f + 9.61843692e-3f;
    p = p * f + 5.55033237e-2f;
    p = p * f + 2.40226477e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return scaled_by(p, n);
}

/* e^x * 2^-shift for an integer `shift`, as exact as where the shift is 0; NaN for NaN. */
INLINE vf exp_shifted(vf x, vf shift) {
    x = larger(all(-1e5f), x);
    const vf n = nearest(x * LOG2E);
    const vf f = x - n * 0.693359375f - n * -2.12194440e-4f; /* n * log 2 in two parts, the first product exact */
    vf p = all(1.38143206e-3f);
    p = p * f + 8.36885069e-3f;
    p = p * f + 4.16684002e-2f;
    p = p * f + 1.66665196e-1f;
    p = p * f + 0.49999994f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return scaled_by(p, n - shift);
}

/* bfloat16 and float16 to float: `kind` 0 is float itself, 1 bfloat16, 2 float16. */
INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
    float f;
    if (exponent == 31)
        bits = 0x7f800000u | fraction << 13;
    else if (exponent)
        bits = (exponent + 112) << 23 | fraction << 13;
    else { /* subnormal: fraction * 2^-24 */
        f = (float)fraction * 5.9604644775390625e-8f;
        memcpy(&bits, &f, 4);
    }
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_half(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    uint32_t sign = x >> 16 & 0x8000, size = x & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x47800000 - 0x1000) return (uint16_t)(sign | 0x7c00); /* rounds to 2^16 or more */
    if (size < 0x38800000) { /* subnormal: adding 0.5 rounds to a multiple of 2^-24 */
        float y;
        memcpy(&y, &size, 4);
        y += 0.5f;
        memcpy(&size, &y, 4);
        return (uint16_t)(sign | (size - 0x3f000000));
    }
    size += 0xfff + (size >> 13 & 1);
    return (uint16_t)(sign | (size - 0x38000000) >> 13);
}

INLINE float bfloat_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_bfloat(float f) {
    uint32_t x;
    memcpy(&x, &f, 4);
    if ((x & 0x7fffffff) > 0x7f800000) return (uint16_t)(x >> 16 | 64);
    return (uint16_t)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

INLINE void widen_row(float *to, const void *from, int64_t count, int kind) {
    int64_t i = 0;
    if (kind == 0) {
        memcpy(to, from, 4 * count);
        return;
    }
    const uint16_t *h = from;
    if (kind == 1) {
        for (; i + VL <= count; i += VL) {
            typedef uint32_t vu __attribute__((vector_size(4 * VL)));
            store(to + i, (vf)(__builtin_convertvector(*(const vh_any *)(h + i), vu) << 16));
        }
        for (; i < count; i++) to[i] = bfloat_to_float(h[i]);
        return;
    }
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) store(to + i, (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)(h + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8) store(to + i, (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)(h + i))));
#endif
    for (; i < count; i++) to[i] = half_to_float(h[i]);
}

INLINE void narrow_row(void *to, const float *from, int64_t count, int kind) {
    int64_t i = 0;
    if (kind == 0) {
        memcpy(to, from, 4 * count);
        return;
    }
    uint16_t *h = to;
    if (kind == 1) {
        for (; i + VL <= count; i += VL) {
            typedef uint32_t vu __attribute__((vector_size(4 * VL)));
            vf f = load(from + i);
            vu x = (vu)f, rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16, quiet = x >> 16 | 64;
            *(vh_any *)(h + i) = __builtin_convertvector((vu)pick(f == f, (vf)rounded, (vf)quiet), vh);
        }
        for (; i < count; i++) h[i] = float_to_bfloat(from[i]);
        return;
    }
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((void *)(h + i), _mm512_cvtps_ph((__m512)load(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((void *)(h + i), _mm256_cvtps_ph((__m256)load(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; i++) h[i] = float_to_half(from[i]);
}

/* Transpose VL x VL floats: row i of `from` becomes column i of `to`. */
INLINE void transpose_square(float *to, int64_t to_step, const float *from, int64_t from_step) {
    vf a[VL];
    UNROLL for (int i = 0; i < VL; i++) a[i] = load(from + i * from_step);
    UNROLL for (int width = 1; width < VL; width *= 2) {
        UNROLL for (int i = 0; i < VL; i++) {
            if (i & width) continue;
            vf x = a[i], y = a[i + width];
            vi low, high;
            UNROLL for (int lane = 0; lane < VL; lane++) {
                low[lane] = lane & width ? VL + lane - width : lane;
                high[lane] = lane & width ? VL + lane : lane + width;
            }
#if defined(__clang__)
            for (int lane = 0; lane < VL; lane++) {
                a[i][lane] = low[lane] < VL ? x[low[lane]] : y[low[lane] - VL];
                a[i + width][lane] = high[lane] < VL ? x[high[lane]] : y[high[lane] - VL];
            }
#else
            a[i] = __builtin_shuffle(x, y, low);
            a[i + width] = __builtin_shuffle(x, y, high);
#endif
        }
    }
    UNROLL for (int i = 0; i < VL; i++) store(to + i * to_step, a[i]);
}

/* `to[column][row] = from[row][column]` for rows (at most VL) x columns; rows that are missing become 0. */
INLINE void transpose(float *to, int64_t to_step, const float *from, int64_t from_step, int64_t rows, int64_t columns) {
    int64_t column = 0;
    if (rows >= VL)
        for (; column + VL <= columns; column += VL)
            transpose_square(to + column * to_step, to_step, from + column, from_step);
    for (; column < columns; column++)
        for (int64_t row = 0; row < VL; row++)
            to[column * to_step + row] = row < rows ? from[row * from_step + column] : 0.0f;
}
