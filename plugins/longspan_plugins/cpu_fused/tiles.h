/* The register blocks. Queries lie side by side in the lanes of vectors, so that the softmax of 2 * VL rows needs no
   shuffle, keys and values are read where they are, one scalar a time, and only the queries are transposed, once a tile.
   Every product is `C[row][lane] += A[row][k] * B[k][lane]` with A scalars. */
#pragma once
#include "attention.h"
#include "vectors.h"

enum {
    KEYS = 64, /* keys of a chunk: a panel's scores, KEYS x PANEL floats, stay in the first cache */
    SPAN = 128, /* most products of a score that are added up one after the other */
    RUN = 32    /* most chunks, or tiles, whose sums are */
};

/* A float32 sum of n terms one after the other is off by their number's root times the last place, or n times where all
   are alike. So a chunk's terms are summed from 0, at most RUN chunks' sums in turn, and those sums exactly. */

/* Scaled scores, to base 2, from which on a fused multiply-add no longer serves: it keeps what the rounded maximum has
   lost, up to half a unit in the last place, and 2 to that power weighs the key. */
#define LARGE 65536.0f

typedef struct {
    vf a, b;
} Pair;

/* scores[key][lane] = sum over x of key[key][x] * query[x][lane]; returns the larger of each lane and `top`. */
INLINE Pair score_rows(int rows, int spans, int64_t dim, const float *key, int64_t key_at, const float *query, float *scores, Pair top) {
    vf a[ROWS], b[ROWS];
    UNROLL for (int r = 0; r < rows; r++) a[r] = b[r] = (vf){0};
    for (int64_t x = 0;;) {
        for (const int64_t stop = !spans || dim - x < SPAN ? dim : x + SPAN; x < stop; x++) {
            vf qa = load(query + x * PANEL), qb = load(query + x * PANEL + VL);
            UNROLL for (int r = 0; r < rows; r++) {
                vf k = all(key[r * key_at + x]);
                a[r] += k * qa;
                b[r] += k * qb;
            }
        }
        if (spans && x > SPAN) /* what the spans before have come to */
            UNROLL for (int r = 0; r < rows; r++) {
                a[r] += load(scores + r * PANEL);
                b[r] += load(scores + r * PANEL + VL);
            }
        if (!spans || x == dim) break;
        UNROLL for (int r = 0; r < rows; r++) {
            store(scores + r * PANEL, a[r]);
            store(scores + r * PANEL + VL, b[r]);
            a[r] = b[r] = (vf){0};
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

INLINE Pair score_all(int spans, int64_t keys, int64_t dim, const float *key, int64_t key_at, const float *query, float *scores, Pair top) {
    int64_t k = 0;
    for (; k + ROWS <= keys; k += ROWS)
        top = score_rows(ROWS, spans, dim, key + k * key_at, key_at, query, scores + k * PANEL, top);
    for (; k < keys; k++) top = score_rows(1, spans, dim, key + k * key_at, key_at, query, scores + k * PANEL, top);
    return top;
}

APART Pair score(int64_t keys, int64_t dim, const float *key, int64_t key_at, const float *query, float *scores, Pair top) {
    return dim > SPAN ? score_all(1, keys, dim, key, key_at, query, scores, top) : score_all(0, keys, dim, key, key_at, query, scores, top);
}

/* sum[x][lane] = sum[x][lane] * fade[lane] + sum over keys of value[key][x] * weights[key][lane]. */
INLINE void weigh_rows(int rows, int64_t keys, const float *value, int64_t value_at, const float *weights, float *sum, Pair fade) {
    vf a[ROWS], b[ROWS];
    UNROLL for (int r = 0; r < rows; r++) a[r] = b[r] = (vf){0};
    for (int64_t k = 0; k < keys; k++) {
        vf wa = load(weights + k * PANEL), wb = load(weights + k * PANEL + VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vf v = all(value[k * value_at + r]);
            a[r] += v * wa;
            b[r] += v * wb;
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        store(sum + r * PANEL, load(sum + r * PANEL) * fade.a + a[r]);
        store(sum + r * PANEL + VL, load(sum + r * PANEL + VL) * fade.b + b[r]);
    }
}

APART void weigh(int64_t keys, int64_t dim, const float *value, int64_t value_at, const float *weights, float *sum, Pair fade) {
    int64_t x = 0;
    for (; x + ROWS <= dim; x += ROWS) weigh_rows(ROWS, keys, value + x, value_at, weights, sum + x * PANEL, fade);
    for (; x < dim; x++) weigh_rows(1, keys, value + x, value_at, weights, sum + x * PANEL, fade);
}

/* The same where a weight of 0 is a key that the lane may not see: 0 times NaN is NaN, so such terms are left out. */
APART void weigh_seen(int64_t keys, int64_t dim, const float *value, int64_t value_at, const float *weights, float *sum, Pair fade) {
    for (int64_t x = 0; x < dim; x++) {
        vf a = {0}, b = {0};
        for (int64_t k = 0; k < keys; k++) {
            vf wa = load(weights + k * PANEL), wb = load(weights + k * PANEL + VL), v = all(value[k * value_at + x]);
            a = pick(wa != 0, a + v * wa, a);
            b = pick(wb != 0, b + v * wb, b);
        }
        store(sum + x * PANEL, load(sum + x * PANEL) * fade.a + a);
        store(sum + x * PANEL + VL, load(sum + x * PANEL + VL) * fade.b + b);
    }
}

/* whole + rest += part, without a loss: `rest` holds what the additions to `whole` rounded off. */
INLINE void add_exactly(vf part, vf *whole, vf *rest) {
    const vf sum = *whole + part, back = sum - *whole, lost = (*whole - (sum - back)) + (part - back);
    *rest += pick(lost == lost, lost, (vf){0}); /* NaN where the sum is infinite */
    *whole = sum;
}

/* The same for a panel: sum[x][lane] moves to the level above, which has faded since by `fade`. */
APART void lift(int64_t dim, float *sum, float *whole, float *rest, Pair fade, int is_first) {
    if (is_first) {
        memcpy(whole, sum, sizeof(float) * dim * PANEL);
        memset(rest, 0, sizeof(float) * dim * PANEL);
    } else
        for (int64_t i = 0; i < dim * PANEL; i += VL) {
            const vf by = i / VL % 2 ? fade.b : fade.a;
            vf high = load(whole + i) * by, low = load(rest + i) * by;
            add_exactly(load(sum + i), &high, &low);
            store(whole + i, high);
            store(rest + i, low);
        }
    memset(sum, 0, sizeof(float) * dim * PANEL);
}

/* What a panel's levels come to, in `sum`. */
INLINE void join(int64_t dim, float *sum, const float *whole, const float *rest) {
    for (int64_t i = 0; i < dim * PANEL; i += VL) store(sum + i, load(whole + i) + load(rest + i));
}

INLINE int all_finite(const float *rows, int64_t at, int64_t count, int64_t dim) {
    vf sum = {0};
    float rest = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t x = 0;
        for (; x + VL <= dim; x += VL) sum += load(rows + i * at + x) * 0.0f;
        for (; x < dim; x++) rest += rows[i * at + x] * 0.0f;
    }
    for (int lane = 0; lane < VL; lane++) rest += sum[lane];
    return rest == 0.0f;
}

/* ------------------------------------------------------------------------------------------------- what is visible */

enum { NONE, SOME, EVERY };

/* Lane numbers. */
INLINE vi lanes(void) {
    vi n;
    UNROLL for (int i = 0; i < VL; i++) n[i] = i;
    return n;
}

/* Which pairs of queries `row` to `row + rows - 1` of the tile and keys `k` to `k + keys - 1` of the segment count. */
INLINE int visible(const Tile *tile, const Segment *s, int64_t row, int64_t rows, int64_t k, int64_t keys) {
    if (s->mask >= 0) return SOME;
    int64_t qa = tile->position + row * tile->step, qb = qa + (rows - 1) * tile->step;
    int64_t ka = s->position + k * s->step, kb = ka + (keys - 1) * s->step;
    if (ka > qb + s->after || kb < qa - s->before) return NONE;
    return kb <= qa + s->after && ka >= qb - s->before ? EVERY : SOME;
}

INLINE int32_t clip(int64_t x) { return x > 1 << 30 ? 1 << 30 : x < -(1 << 30) ? -(1 << 30) : (int32_t)x; }

typedef struct {
    vi a, b;
} Seen;

/* Which lanes of the panel see key `k` of the segment: all ones or zeros. */
INLINE Seen seen(const Job *job, const Tile *tile, const Segment *s, int64_t row, int64_t k) {
    vi lane = lanes();
    if (s->mask >= 0) {
        const uint32_t *words = job->masks + (s->mask * job->mask_keys + s->mask_key + k) * job->mask_words;
        int64_t bit = s->mask_query + row, word = bit / 32;
        uint64_t bits = word < job->mask_words ? words[word] : 0;
        if (word + 1 < job->mask_words) bits |= (uint64_t)words[word + 1] << 32;
        uint32_t mine = (uint32_t)(bits >> bit % 32);
        vi one = (vi){0} + 1;
        vi a = (vi){0} + (int32_t)mine, b = (vi){0} + (int32_t)((uint64_t)mine >> VL);
        return (Seen){(a & one << lane) != 0, (b & one << lane) != 0};
    }
    int64_t from = s->position + k * s->step - tile->position - row * tile->step; /* the key's, from lane 0's */
    vi low = (vi){0} + clip(from - s->after), high = (vi){0} + clip(from + s->before);
    int32_t step = (int32_t)tile->step;
    vi a = lane * step, b = (lane + VL) * step;
    return (Seen){(a >= low) & (a <= high), (b >= low) & (b <= high)};
}
