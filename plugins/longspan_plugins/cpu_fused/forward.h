/* Forward: one online softmax a query row over all its segments. */
#pragma once
#include "dropout.h"
#include "tiles.h"
#include <stdlib.h>

#if defined(__AVX512BF16__)
#include "bfloat.h"
#endif

enum { PANELS = TILE / PANEL };

/* What a thread works in. */
typedef struct {
    float *query;     /* [panel][x][lane]; in bfloat16 pairs of x */
    float *sum;       /* [panel][x][lane], of the last chunks */
    float *whole, *rest; /* the same of those before, and what it rounded off */
    float *scores;    /* [key][lane] */
    float *key, *value, *rows;
    uint32_t *pairs, *weights;
    Pair top[PANELS], total[PANELS], whole_total[PANELS], rest_total[PANELS];
    Pair fade[PANELS]; /* of `whole` and `rest`, since they were written */
    int chunks[PANELS];
} Space;

INLINE float *rows_of(const void *tensor, const int64_t *at, int64_t entry, int64_t head, int64_t row, int kind) {
    int64_t where = entry * at[0] + head * at[1] + row * at[2];
    return kind ? (float *)((uint16_t *)tensor + where) : (float *)tensor + where;
}

INLINE const float *row_after(const float *row, int64_t elements, int kind) {
    return kind ? (const float *)((const uint16_t *)row + elements) : row + elements;
}

/* Rows as float32, where they are or in `to`. */
INLINE const float *widened(const float *rows, int64_t *at, int64_t count, int64_t dim, int64_t padded, int kind, float *to) {
    if (kind == 0 && padded == dim) return rows;
    for (int64_t i = 0; i < count; i++) {
        widen_row(to + i * padded, row_after(rows, i * *at, kind), dim, kind);
        for (int64_t x = dim; x < padded; x++) to[i * padded + x] = 0;
    }
    *at = padded;
    return to;
}

/* The tile's queries in the lanes: [panel][x][lane], times `factor`; lanes without a query are 0. */
INLINE void spread(float *to, const float *rows, int64_t at, int64_t count, int64_t dim, float factor) {
    for (int64_t row = 0; row < count; row += PANEL) {
        float *panel = to + row * dim;
        for (int half = 0; half < 2; half++) {
            int64_t left = count - row - half * VL;
            transpose(panel + half * VL, PANEL, rows + (row + half * VL) * at, at, left < 0 ? 0 : left, dim);
        }
        if (factor != 1.0f)
            for (int64_t i = 0; i < dim * PANEL; i += VL) store(panel + i, load(panel + i) * factor);
    }
}

/* Hide what may not be seen from a panel's scores; returns the largest that is left, or `top`. */
APART Pair hide(const Job *job, const Tile *tile, const Segment *s, int64_t row, int64_t k, int64_t keys, float *scores, Pair top) {
    vf empty = all(-INFINITY);
    for (int64_t i = 0; i < keys; i++) {
        Seen see = seen(job, tile, s, row, k + i);
        vf a = pick(see.a, load(scores + i * PANEL), empty), b = pick(see.b, load(scores + i * PANEL + VL), empty);
        store(scores + i * PANEL, a);
        store(scores + i * PANEL + VL, b);
        top.a = larger(top.a, a);
        top.b = larger(top.b, b);
    }
    return top;
}

/* Scaled scores beyond which weights are relative to the row's top itself; below, to the nearest integer, so that what
   was summed before fades by powers of 2, exactly. */
INLINE vi is_large(vf scaled) { return (scaled > all(LARGE)) | (scaled < all(-LARGE)); }

/* Scores become 2^(score * factor - base), in the lanes that are large 2^((score - top) * factor); returns their sums. */
INLINE Pair weights_of(int large, int64_t keys, float *scores, Seen where, Pair base, Pair top, float factor) {
    const vi la = where.a, lb = where.b;
    vf a = {0}, b = {0};
    for (int64_t k = 0; k < keys; k++) {
        vf x = load(scores + k * PANEL), y = load(scores + k * PANEL + VL), fx = x * factor - base.a, fy = y * factor - base.b;
        x = exp2_of(large ? pick(la, (x - top.a) * factor, fx) : fx);
        y = exp2_of(large ? pick(lb, (y - top.b) * factor, fy) : fy);
        a += x;
        b += y;
        store(scores + k * PANEL, x);
        store(scores + k * PANEL + VL, y);
    }
    return (Pair){a, b};
}

/* What weights are relative to where the scaled top is not large. Weights that are rounded to bfloat16 are relative to
   the top itself, whose own weight of 1 that rounding leaves as it is. */
INLINE vf base_of(vf scaled, int narrow) { return narrow ? scaled : nearest(scaled); }

/* By how much what is relative to `old` fades, where it or the top that comes after it is large. */
INLINE vf fade_of_large(vf old, vf top, float factor, int narrow) {
    const vf a = pick(old == all(-INFINITY), (vf){0}, old * factor), b = top * factor;
    const vi la = is_large(a), lb = is_large(b);
    const vf from = pick(la, (old - top) * factor, base_of(a, narrow) - b); /* the new one large: the old too, or not */
    return pick(lb, from, pick(la, a - base_of(b, narrow), base_of(a, narrow) - base_of(b, narrow)));
}

/* Scores become weights relative to `top`; returns by how much what was summed before fades, and adds up `total`. */
APART Pair soften(int64_t keys, float *scores, Pair *top, Pair fresh, Pair *total, float factor, int narrow) {
    const vf empty = all(-INFINITY), none = {0};
    const Pair from = {pick(top->a == empty, none, top->a * factor), pick(top->b == empty, none, top->b * factor)};
    const Pair most = {pick(fresh.a == empty, none, fresh.a), pick(fresh.b == empty, none, fresh.b)};
    /* `pick` keeps the products from being fused with the differences: an unchanged top fades nothing */
    const Pair scaled = {pick(fresh.a == empty, none, fresh.a * factor), pick(fresh.b == empty, none, fresh.b * factor)};
    const Pair base = {base_of(scaled.a, narrow), base_of(scaled.b, narrow)};
    const Seen large = {is_large(scaled.a), is_large(scaled.b)}, was = {is_large(from.a), is_large(from.b)};
    Pair fade = {base_of(from.a, narrow) - base.a, base_of(from.b, narrow) - base.b}, sums;
    if (any(large.a | large.b | was.a | was.b)) { /* lane by lane: what one row sees is not to change another's bits */
        fade.a = fade_of_large(top->a, most.a, factor, narrow);
        fade.b = fade_of_large(top->b, most.b, factor, narrow);
        sums = weights_of(1, keys, scores, large, base, most, factor);
    } else
        sums = weights_of(0, keys, scores, large, base, most, factor);
    fade.a = exp2_of(pick(top->a == empty, empty, fade.a)); /* nothing was summed: 0, whatever the base */
    fade.b = exp2_of(pick(top->b == empty, empty, fade.b));
    total->a = total->a * fade.a + sums.a;
    total->b = total->b * fade.b + sums.b;
    *top = fresh;
    return fade;
}

/* A panel's sums move up: after RUN chunks, so that few are added one after the other, and at the end. */
INLINE void lift_panel(Space *space, int p, int64_t dim, int is_first) {
    const int64_t at = p * PANEL * dim;
    Pair *whole = &space->whole_total[p], *rest = &space->rest_total[p], *fade = &space->fade[p], *total = &space->total[p];
    lift(dim, space->sum + at, space->whole + at, space->rest + at, *fade, is_first);
    if (is_first)
        *whole = *total, *rest = (Pair){{0}, {0}};
    else {
        whole->a *= fade->a, whole->b *= fade->b, rest->a *= fade->a, rest->b *= fade->b;
        add_exactly(total->a, &whole->a, &rest->a);
        add_exactly(total->b, &whole->b, &rest->b);
    }
    *total = (Pair){{0}, {0}};
    *fade = (Pair){all(1.0f), all(1.0f)};
}

/* The levels of a panel's sums become one. */
INLINE void join_panel(Space *space, int p, int64_t dim) {
    if (space->chunks[p] <= RUN) return; /* nothing has moved up */
    const int64_t at = p * PANEL * dim;
    lift_panel(space, p, dim, 0);
    join(dim, space->sum + at, space->whole + at, space->rest + at);
    space->total[p].a = space->whole_total[p].a + space->rest_total[p].a;
    space->total[p].b = space->whole_total[p].b + space->rest_total[p].b;
}

/* Divide by the totals, and write rows of `out` and `lse`. */
INLINE void finish(const Job *job, const Tile *tile, int64_t entry, int64_t head, Space *space, float factor, int narrow) {
    const int kind = (int)job->kind;
    const int64_t dim = job->dim;
    for (int64_t row = 0; row < tile->count; row += PANEL) {
        int p = (int)(row / PANEL);
        float *sum = space->sum + row * dim;
        join_panel(space, p, dim);
        Pair total = space->total[p], top = space->top[p];
        vf ia = pick(total.a == 0, (vf){0}, 1.0f / total.a), ib = pick(total.b == 0, (vf){0}, 1.0f / total.b);
        for (int64_t x = 0; x < dim; x++) {
            store(sum + x * PANEL, load(sum + x * PANEL) * ia);
            store(sum + x * PANEL + VL, load(sum + x * PANEL + VL) * ib);
        }
        int64_t padded = (dim + VL - 1) / VL * VL;
        for (int64_t x = 0; x < dim; x += VL)
            for (int half = 0; half < 2; half++) {
                float *to = space->rows + half * VL * padded + x;
                if (x + VL <= dim)
                    transpose_square(to, padded, sum + x * PANEL + half * VL, PANEL);
                else
                    for (int64_t y = x; y < dim; y++)
                        for (int i = 0; i < VL; i++) to[i * padded + y - x] = sum[y * PANEL + half * VL + i];
            }
        for (int64_t i = 0; i < PANEL && row + i < tile->count; i++) {
            int64_t at = tile->index + (row + i) * tile->step;
            narrow_row(rows_of(job->out, job->out_at, entry, head, at, kind), space->rows + i * padded, dim, kind);
            float whole = i < VL ? total.a[i] : total.b[i - VL], most = i < VL ? top.a[i] : top.b[i - VL];
            /* Of the product with the scale as it is rounded, with which the backward compares it: where one key has all
               of the weight, that weight is 1 there too. */
            const float scaled = most * (float)fabs(job->scale);
            const float rounded = most * factor;
            const double base = fabsf(rounded) > LARGE ? 0 : (narrow ? rounded : rintf(rounded)) - (double)most * factor;
            int power;
            const float part = logf(frexpf(whole, &power));
            const float lse = (float)(scaled + ((base + power) * 0.69314718055994531 + part));
            job->lse[entry * job->lse_at[0] + head * job->lse_at[1] + at * job->lse_at[2]] = whole == 0 ? -INFINITY : lse;
        }
    }
}

static void forward_tile(const Job *job, const Tile *tile, int64_t entry, int64_t head, Space *space) {
    const int kind = (int)job->kind;
    const int64_t dim = job->dim, own = head / job->group;
    /* The sign goes to the queries: hidden scores, -inf, are to stay so. A scale of 0 in float32 makes all queries 0. */
    const double size = fabs(job->scale) * 1.4426950408889634;
    const float sign = size < FLT_MIN ? 0.0f : job->scale < 0 ? -1.0f : 1.0f;
    const float factor = sign == 0 ? 1.0f : size > FLT_MAX ? FLT_MAX : (float)size;
    int64_t at = job->query_at[2] * tile->step;
    const float *query = rows_of(job->query, job->query_at, entry, head, tile->index, kind);
    const int64_t panels = (tile->count + PANEL - 1) / PANEL;
    Dropping drop = dropping(job, entry, head, own);
#if !defined(__AVX512BF16__)
    const int pairs = 0;
#else
    const int pairs = kind == 1 && dim % 2 == 0 && sign > 0;
    if (pairs)
        spread_pairs((uint32_t *)space->query, (const uint16_t *)query, at, tile->count, dim);
    else
#endif
    {
        query = widened(query, &at, tile->count, dim, dim, kind, space->rows);
        spread(space->query, query, at, tile->count, dim, sign);
    }
    for (int p = 0; p < panels; p++) {
        space->top[p] = (Pair){all(-INFINITY), all(-INFINITY)};
        space->total[p] = (Pair){{0}, {0}};
        space->fade[p] = (Pair){all(1.0f), all(1.0f)};
        space->chunks[p] = 0;
    }
    memset(space->sum, 0, sizeof(float) * panels * PANEL * dim);
    for (const Segment *s = job->segments + tile->first; s < job->segments + tile->last; s++)
        for (int64_t k = 0; k < s->count; k += KEYS) {
            const int64_t keys = s->count - k < KEYS ? s->count - k : KEYS, start = s->index + k * s->step;
            if (visible(tile, s, 0, tile->count, k, keys) == NONE) continue;
            int64_t key_at = job->key_at[2] * s->step, value_at = job->value_at[2] * s->step;
            const float *key = rows_of(job->key, job->key_at, entry, own, start, kind);
            const float *value = rows_of(job->value, job->value_at, entry, own, start, kind);
            int clean = -1; /* not known yet */
#if defined(__AVX512BF16__)
            if (pairs)
                pair_rows(space->pairs, (const uint16_t *)value, value_at, keys, dim);
            else
#endif
            {
                key = widened(key, &key_at, keys, dim, dim, kind, space->key);
                value = widened(value, &value_at, keys, dim, dim, kind, space->value);
            }
            for (int p = 0; p < panels; p++) {
                const int64_t row = p * PANEL, rows = tile->count - row < PANEL ? tile->count - row : PANEL;
                const int part = visible(tile, s, row, rows, k, keys);
                if (part == NONE) continue;
                float *sum = space->sum + row * dim;
                const Pair before = space->top[p];
                Pair top;
#if defined(__AVX512BF16__)
                if (pairs)
                    top = score_pairs(keys, dim, (const uint16_t *)key, key_at, (uint32_t *)space->query + row * dim / 2, space->scores, before);
                else
#endif
                    top = score(keys, dim, key, key_at, space->query + row * dim, space->scores, before);
                if (part == SOME) top = hide(job, tile, s, row, k, keys, space->scores, before);
                const int chunks = space->chunks[p]++;
                if (chunks && chunks % RUN == 0) lift_panel(space, p, dim, chunks == RUN);
                Pair fade = soften(keys, space->scores, &space->top[p], top, &space->total[p], factor, pairs);
                space->fade[p].a *= fade.a, space->fade[p].b *= fade.b;
                if (job->lines) drop_weights(&drop, tile, s, row, k, keys, space->scores);
                if (clean < 0 && (part == SOME || job->lines)) { /* some weights are 0, and 0 times NaN is NaN */
#if defined(__AVX512BF16__)
                    if (pairs)
                        clean = clean_pairs(space->pairs, (keys + 1) / 2 * dim);
                    else
#endif
                        clean = all_finite(value, value_at, keys, dim);
                }
#if defined(__AVX512BF16__)
                if (pairs) {
                    narrow_pairs(keys, space->scores, space->weights);
                    weigh_pairs(keys, dim, space->pairs, space->weights, sum, fade);
                    if (clean == 0) taint(keys, dim, (const uint16_t *)value, value_at, space->scores, sum);
                    continue;
                }
#endif
                (clean ? weigh : weigh_seen)(keys, dim, value, value_at, space->scores, sum, fade);
            }
        }
    finish(job, tile, entry, head, space, factor, pairs);
}
