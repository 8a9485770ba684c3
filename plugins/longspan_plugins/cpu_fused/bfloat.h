/* bfloat16 products of pairs, summed in float32: twice the rate of float32 where the processor has them. */
#pragma once
#include "tiles.h"

typedef __m512bh vb;

INLINE vb pair_load(const uint32_t *at) { return (vb)_mm512_loadu_si512(at); }
INLINE vb pair_all(const uint16_t *at) {
    int32_t both;
    memcpy(&both, at, 4);
    return (vb)_mm512_set1_epi32(both);
}
INLINE vf pair_add(vf sum, vb a, vb b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }

INLINE Pair score_pair_rows(int rows, int64_t dim, const uint16_t *key, int64_t key_at, const uint32_t *query, float *scores, Pair top) {
    vf a[ROWS], b[ROWS];
    UNROLL for (int r = 0; r < rows; r++) a[r] = b[r] = (vf){0};
    for (int64_t x = 0; x < dim / 2; x++) {
        vb qa = pair_load(query + x * PANEL), qb = pair_load(query + x * PANEL + VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vb k = pair_all(key + r * key_at + 2 * x);
            a[r] = pair_add(a[r], k, qa);
            b[r] = pair_add(b[r], k, qb);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        store(scores + r * PANEL, a[r]);
        store(scores + r * PANEL + VL, b[r]);
        top.a = larger(top.a, a[r]);
        top.b = larger(top.b, b[r]);
    }
    return top;
}

APART Pair score_pairs(int64_t keys, int64_t dim, const uint16_t *key, int64_t key_at, const uint32_t *query, float *scores, Pair top) {
    int64_t k = 0;
    for (; k + ROWS <= keys; k += ROWS)
        top = score_pair_rows(ROWS, dim, key + k * key_at, key_at, query, scores + k * PANEL, top);
    for (; k < keys; k++) top = score_pair_rows(1, dim, key + k * key_at, key_at, query, scores + k * PANEL, top);
    return top;
}

/* Queries as pairs of x in the lanes: [panel][x / 2][lane]. Rows that start where no pair may are copied one by one. */
INLINE void spread_pairs(uint32_t *to, const uint16_t *rows, int64_t at, int64_t count, int64_t dim) {
    for (int64_t row = 0; row < count; row += PANEL) {
        float *panel = (float *)(to + row * dim / 2); /* a pair moves as one float would */
        for (int half = 0; half < 2; half++) {
            int64_t left = count - row - half * VL;
            const uint16_t *from = rows + (row + half * VL) * at;
            if (at % 2 == 0 && (uintptr_t)rows % 4 == 0)
                transpose(panel + half * VL, PANEL, (const float *)from, at / 2, left < 0 ? 0 : left, dim / 2);
            else
                for (int64_t x = 0; x < dim / 2; x++)
                    for (int i = 0; i < VL; i++) {
                        uint32_t both = 0;
                        if (i < left) memcpy(&both, from + i * at + 2 * x, 4);
                        memcpy(panel + x * PANEL + half * VL + i, &both, 4);
                    }
        }
    }
}

/* Rows 2k and 2k + 1 side by side: [k][x], the first in the low half; a row that is missing is 0. */
INLINE void pair_rows(uint32_t *to, const uint16_t *rows, int64_t at, int64_t count, int64_t dim) {
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t k = 0; k < count; k += 2) {
        const uint16_t *one = rows + k * at, *two = rows + (k + 1) * at;
        const int both = k + 1 < count;
        int64_t x = 0;
        for (; x + 16 <= dim; x += 16) {
            __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(one + x)));
            __m512i b = both ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(two + x))) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + k / 2 * dim + x, _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32(b, 16)));
        }
        for (; x < dim; x++) to[k / 2 * dim + x] = one[x] | (both ? (uint32_t)two[x] << 16 : 0);
    }
}

/* Weights of keys 2k and 2k + 1 rounded to pairs: [k][lane]. */
INLINE void narrow_pairs(int64_t keys, const float *scores, uint32_t *to) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t k = 0; k < keys; k += 2)
        for (int half = 0; half < 2; half++) {
            const float *at = scores + k * PANEL + half * VL;
            __m512 next = k + 1 < keys ? _mm512_loadu_ps(at + PANEL) : _mm512_setzero_ps();
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(next, _mm512_loadu_ps(at));
            _mm512_storeu_si512(to + k / 2 * PANEL + half * VL, _mm512_permutexvar_epi16(order, both));
        }
}

INLINE void weigh_pair_rows(int rows, int64_t keys, int64_t dim, const uint32_t *value, const uint32_t *weights, float *sum, Pair fade) {
    vf a[ROWS], b[ROWS];
    UNROLL for (int r = 0; r < rows; r++) a[r] = b[r] = (vf){0};
    for (int64_t k = 0; k < (keys + 1) / 2; k++) {
        vb wa = pair_load(weights + k * PANEL), wb = pair_load(weights + k * PANEL + VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vb v = (vb)_mm512_set1_epi32((int32_t)value[k * dim + r]);
            a[r] = pair_add(a[r], v, wa);
            b[r] = pair_add(b[r], v, wb);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        store(sum + r * PANEL, load(sum + r * PANEL) * fade.a + a[r]);
        store(sum + r * PANEL + VL, load(sum + r * PANEL + VL) * fade.b + b[r]);
    }
}

APART void weigh_pairs(int64_t keys, int64_t dim, const uint32_t *value, const uint32_t *weights, float *sum, Pair fade) {
    int64_t x = 0;
    for (; x + ROWS <= dim; x += ROWS) weigh_pair_rows(ROWS, keys, dim, value + x, weights, sum + x * PANEL, fade);
    for (; x < dim; x++) weigh_pair_rows(1, keys, dim, value + x, weights, sum + x * PANEL, fade);
}

/* Make what is NaN or infinite 0; returns whether nothing was. */
INLINE int clean_pairs(uint32_t *pairs, int64_t count) {
    int clean = 1;
    for (int64_t i = 0; i < count; i++) {
        if ((pairs[i] & 0x7f80) == 0x7f80) pairs[i] &= 0xffff0000u, clean = 0;
        if ((pairs[i] >> 16 & 0x7f80) == 0x7f80) pairs[i] &= 0xffff, clean = 0;
    }
    return clean;
}

/* What the values that `clean_pairs` took out bring to the lanes that see them. */
APART void taint(int64_t keys, int64_t dim, const uint16_t *value, int64_t value_at, const float *weights, float *sum) {
    for (int64_t k = 0; k < keys; k++)
        for (int64_t x = 0; x < dim; x++) {
            if ((value[k * value_at + x] & 0x7f80) != 0x7f80) continue;
            vf v = all(bfloat_to_float(value[k * value_at + x]));
            vf wa = load(weights + k * PANEL), wb = load(weights + k * PANEL + VL);
            vf a = load(sum + x * PANEL), b = load(sum + x * PANEL + VL);
            store(sum + x * PANEL, pick(wa != 0, a + v * wa, a));
            store(sum + x * PANEL + VL, pick(wb != 0, b + v * wb, b));
        }
}
