/* Backward with the joint out and log-sum-exp: P = exp(scores - lse), dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O) + dlse).
   A unit of work is a key head of a batch entry, or a part of its tiles: it owns the sums over keys, and every tile owns
   its queries' gradients, so that nothing is written by two threads. */
#pragma once
#include "forward.h"

typedef struct {
    float *query_rows, *dout_rows; /* [row][padded] */
    float *query, *dout, *dquery;  /* [panel][x][lane] */
    float *weights, *slope;        /* [panel][key][lane] */
    float *key, *value, *rows;
    float *whole, *rest; /* of dquery, for the chunks before the last ones */
    int chunks[PANELS];
    float lse[TILE], held[TILE]; /* the latter times the scale */
    /* A float32 weight is e^(score * scale) * 2^-shift * share: no place of the score is lost as in its difference from the
       lse. Of half inputs, which have no such places, it is 2^(score * scale - shift), which costs less. */
    float scale[TILE], shift[TILE], share[TILE];
    int large; /* whether any lse is */
} Trace;

/* sum[key][x] += sum over rows of weights[panel][key][row] * rows[row][x], VL or 2 * VL of x. */
INLINE void gather_rows(int keys, int wide, int seen_only, int64_t count, const float *weights, const float *rows, int64_t at, float *sum, int64_t sum_at) {
    vf a[ROWS], b[ROWS];
    UNROLL for (int k = 0; k < keys; k++) a[k] = b[k] = (vf){0};
    for (int64_t row = 0; row < count; row += PANEL, weights += KEYS * PANEL) {
        int64_t stop = count - row < PANEL ? count - row : PANEL;
        for (int64_t i = 0; i < stop; i++) {
            const float *from = rows + (row + i) * at;
            vf ra = load(from), rb = wide ? load(from + VL) : ra;
            UNROLL for (int k = 0; k < keys; k++) {
                float one = weights[k * PANEL + i];
                if (seen_only && one == 0) continue;
                vf w = all(one);
                a[k] += w * ra;
                if (wide) b[k] += w * rb;
            }
        }
    }
    UNROLL for (int k = 0; k < keys; k++) {
        store(sum + k * sum_at, load(sum + k * sum_at) + a[k]);
        if (wide) store(sum + k * sum_at + VL, load(sum + k * sum_at + VL) + b[k]);
    }
}

INLINE void gather_all(int seen_only, int64_t keys, int64_t count, int64_t dim, const float *weights, const float *rows, int64_t at, float *sum, int64_t sum_at) {
    int64_t x = 0;
    for (; x + 2 * VL <= dim; x += 2 * VL) {
        int64_t k = 0;
        for (; k + ROWS <= keys; k += ROWS)
            gather_rows(ROWS, 1, seen_only, count, weights + k * PANEL, rows + x, at, sum + k * sum_at + x, sum_at);
        for (; k < keys; k++) gather_rows(1, 1, seen_only, count, weights + k * PANEL, rows + x, at, sum + k * sum_at + x, sum_at);
    }
    for (; x < dim; x += VL)
        for (int64_t k = 0; k < keys; k++)
            gather_rows(1, 0, seen_only, count, weights + k * PANEL, rows + x, at, sum + k * sum_at + x, sum_at);
}

APART void gather(int64_t keys, int64_t count, int64_t dim, const float *weights, const float *rows, int64_t at, float *sum, int64_t sum_at) {
    gather_all(0, keys, count, dim, weights, rows, at, sum, sum_at);
}

APART void gather_seen(int64_t keys, int64_t count, int64_t dim, const float *weights, const float *rows, int64_t at, float *sum, int64_t sum_at) {
    gather_all(1, keys, count, dim, weights, rows, at, sum, sum_at);
}

/* Scores become the joint weights, and the slopes of the values' products the slopes of the scores. */
INLINE void slopes_of(int half, const Job *job, const Tile *tile, const Segment *s, int64_t row, int64_t k, int64_t keys, int part,
                      const Dropping *drop, const Trace *trace, float *weights, float *slope) {
    const vf fa = load(trace->scale + row), fb = load(trace->scale + row + VL);
    const vf sa = load(trace->shift + row), sb = load(trace->shift + row + VL);
    const vf ca = load(trace->share + row), cb = load(trace->share + row + VL);
    const vf ha = load(trace->held + row), hb = load(trace->held + row + VL);
    const vf scale = all((float)job->scale);
    Lots lots;
    if (job->lines) lots = row_lots(drop, tile, row);
    for (int64_t i = 0; i < keys; i++) {
        float *at = weights + i * PANEL, *to = slope + i * PANEL;
        vf a = half ? exp2_of(load(at) * fa - sa) : exp_shifted(load(at) * fa, sa) * ca;
        vf b = half ? exp2_of(load(at + VL) * fb - sb) : exp_shifted(load(at + VL) * fb, sb) * cb;
        vf da = load(to), db = load(to + VL);
        vf wa = a, wb = b;
        if (job->lines) {
            Pair f = factors(drop, lots, s, k + i);
            wa = a * f.a, wb = b * f.b;
            da = pick(f.a != 0, da * f.a, (vf){0}), db = pick(f.b != 0, db * f.b, (vf){0});
        }
        da = (da * scale - ha) * a, db = (db * scale - hb) * b;
        if (part == SOME) {
            Seen see = seen(job, tile, s, row, k + i);
            wa = pick(see.a, wa, (vf){0}), wb = pick(see.b, wb, (vf){0});
            da = pick(see.a, da, (vf){0}), db = pick(see.b, db, (vf){0});
        }
        if (row + PANEL > tile->count) { /* lanes without a query */
            vi count = (vi){0} + (int32_t)(tile->count - row);
            vi ia = lanes() < count, ib = lanes() + VL < count;
            wa = pick(ia, wa, (vf){0}), wb = pick(ib, wb, (vf){0});
            da = pick(ia, da, (vf){0}), db = pick(ib, db, (vf){0});
        }
        store(at, wa), store(at + VL, wb);
        store(to, da), store(to + VL, db);
    }
}

APART void slopes(const Job *job, const Tile *tile, const Segment *s, int64_t row, int64_t k, int64_t keys, int part, const Dropping *drop,
                  const Trace *trace, float *weights, float *slope) {
    slopes_of(0, job, tile, s, row, k, keys, part, drop, trace, weights, slope);
}

APART void slopes_half(const Job *job, const Tile *tile, const Segment *s, int64_t row, int64_t k, int64_t keys, int part, const Dropping *drop,
                       const Trace *trace, float *weights, float *slope) {
    slopes_of(1, job, tile, s, row, k, keys, part, drop, trace, weights, slope);
}

/* Where the lse is large, scores become their distance from it: of the rounded product with the scale, as the forward's
   lse has it, and at most 0, what a rounding elsewhere may have exceeded. */
APART void settle(int64_t keys, float *scores, const float *lse, float scale) {
    const vf none = {0};
    for (int64_t i = 0; i < 2 * keys; i++) {
        const vf score = load(scores + i * VL), base = load(lse + i % 2 * VL);
        volatile vf scaled = score * scale; /* not fused with the difference */
        vf x = scaled - base;
        x = pick(x > none, none, x);
        store(scores + i * VL, pick(is_large(base * LOG2E), x, score));
    }
}

/* Whether scores come from products of bfloat16 pairs. */
INLINE int paired(const Job *job) {
#if defined(__AVX512BF16__)
    return job->kind == 1 && job->dim % 2 == 0 && job->scale > 0; /* as the forward, whose rounding the lse has */
#else
    return 0;
#endif
}

/* The tile's rows of query, dout, out, lse as float32. */
static void open_tile(const Job *job, const Tile *tile, int64_t entry, int64_t head, int64_t padded, Trace *t, const float **query,
                      int64_t *query_at, const float **dout, int64_t *dout_at) {
    const int kind = (int)job->kind;
    const int64_t dim = job->dim;
    *query_at = job->query_at[2] * tile->step, *dout_at = job->dout_at[2] * tile->step;
    int64_t out_at = job->out_at[2] * tile->step;
    *query = widened(rows_of(job->query, job->query_at, entry, head, tile->index, kind), query_at, tile->count, dim, padded, kind, t->query_rows);
    *dout = widened(rows_of(job->dout, job->dout_at, entry, head, tile->index, kind), dout_at, tile->count, dim, padded, kind, t->dout_rows);
    const float *out = widened(rows_of(job->out, job->out_at, entry, head, tile->index, kind), &out_at, tile->count, dim, dim, kind, t->rows);
    t->large = 0;
    const float scale = (float)job->scale, unit = kind ? LOG2E : 1.0f;
    for (int64_t i = 0; i < TILE; i++) {
        t->lse[i] = t->shift[i] = INFINITY; /* weights 0, for rows without keys too */
        t->scale[i] = fabsf(scale) * unit, t->share[i] = 0, t->held[i] = 0;
        if (i >= tile->count) continue;
        const int64_t at = tile->index + i * tile->step;
        const float lse = job->lse[entry * job->lse_at[0] + head * job->lse_at[1] + at * job->lse_at[2]];
        if (lse != -INFINITY) {
            const double base = lse * 1.4426950408889634;
            t->lse[i] = lse, t->scale[i] = scale * unit, t->shift[i] = (float)(kind ? base : rint(base)), t->share[i] = (float)(rint(base) - base);
            if (fabsf(lse * LOG2E) > LARGE) t->large = 1, t->scale[i] = unit, t->shift[i] = 0, t->share[i] = 0;
        }
        float held = 0;
        const float *o = out + i * out_at, *d = *dout + i * *dout_at;
        vf sum = {0};
        int64_t x = 0;
        for (; x + VL <= dim; x += VL) sum += load(o + x) * load(d + x);
        for (; x < dim; x++) held += o[x] * d[x];
        for (int lane = 0; lane < VL; lane++) held += sum[lane];
        if (job->dlse) held -= job->dlse[entry * job->dlse_at[0] + head * job->dlse_at[1] + at * job->dlse_at[2]];
        t->held[i] = held * scale;
    }
    for (int64_t i = 0; i < TILE; i += VL) store(t->share + i, exp2_of(load(t->share + i)));
#if defined(__AVX512BF16__)
    if (paired(job)) {
        spread_pairs((uint32_t *)t->query, (const uint16_t *)rows_of(job->query, job->query_at, entry, head, tile->index, kind),
                     job->query_at[2] * tile->step, tile->count, dim);
        spread_pairs((uint32_t *)t->dout, (const uint16_t *)rows_of(job->dout, job->dout_at, entry, head, tile->index, kind),
                     job->dout_at[2] * tile->step, tile->count, dim);
    } else
#endif
    {
        spread(t->query, *query, *query_at, tile->count, dim, 1.0f);
        spread(t->dout, *dout, *dout_at, tile->count, dim, 1.0f);
    }
    memset(t->dquery, 0, sizeof(float) * TILE * dim);
    memset(t->chunks, 0, sizeof(t->chunks));
}

static void backward_tile(const Job *job, const Tile *tile, int64_t entry, int64_t head, float *dkeys, float *dvalues, Trace *t) {
    const int kind = (int)job->kind;
    const int64_t dim = job->dim, own = head / job->group, padded = (dim + VL - 1) / VL * VL;
    const int64_t panels = (tile->count + PANEL - 1) / PANEL;
    const Pair keep = {all(1.0f), all(1.0f)};
    const float *query, *dout;
    int64_t query_at, dout_at;
    Dropping drop = dropping(job, entry, head, own);
    open_tile(job, tile, entry, head, padded, t, &query, &query_at, &dout, &dout_at);
    int rows_clean = -1;
    for (const Segment *s = job->segments + tile->first; s < job->segments + tile->last; s++)
        for (int64_t k = 0; k < s->count; k += KEYS) {
            const int64_t keys = s->count - k < KEYS ? s->count - k : KEYS, start = s->index + k * s->step;
            const int whole = visible(tile, s, 0, tile->count, k, keys);
            if (whole == NONE) continue;
            int64_t key_at = job->key_at[2] * s->step, value_at = job->value_at[2] * s->step;
            const float *raw_key = rows_of(job->key, job->key_at, entry, own, start, kind);
            const float *raw_value = rows_of(job->value, job->value_at, entry, own, start, kind);
            const int64_t raw_key_at = key_at;
            const float *key = widened(raw_key, &key_at, keys, dim, dim, kind, t->key), *value = raw_value;
            if (!paired(job)) value = widened(raw_value, &value_at, keys, dim, dim, kind, t->value);
            int clean = 1;
            if (whole == SOME || job->lines) { /* some weights are 0, and 0 times NaN is NaN */
                if (rows_clean < 0) rows_clean = all_finite(query, query_at, tile->count, dim) && all_finite(dout, dout_at, tile->count, dim);
                clean = rows_clean && all_finite(key, key_at, keys, dim);
            }
            for (int p = 0; p < panels; p++) {
                const int64_t row = p * PANEL, rows = tile->count - row < PANEL ? tile->count - row : PANEL;
                const int part = visible(tile, s, row, rows, k, keys);
                float *weights = t->weights + row * KEYS, *slope = t->slope + row * KEYS;
                if (part == NONE) {
                    memset(weights, 0, sizeof(float) * keys * PANEL);
                    memset(slope, 0, sizeof(float) * keys * PANEL);
                    continue;
                }
#if defined(__AVX512BF16__)
                if (paired(job)) { /* exact products of bfloat16, summed in float32 */
                    score_pairs(keys, dim, (const uint16_t *)raw_key, raw_key_at, (uint32_t *)t->query + row * dim / 2, weights, keep);
                    score_pairs(keys, dim, (const uint16_t *)raw_value, value_at, (uint32_t *)t->dout + row * dim / 2, slope, keep);
                } else
#endif
                {
                    score(keys, dim, key, key_at, t->query + row * dim, weights, keep);
                    score(keys, dim, value, value_at, t->dout + row * dim, slope, keep);
                }
                if (t->large) settle(keys, weights, t->lse + row, (float)job->scale);
                (kind ? slopes_half : slopes)(job, tile, s, row, k, keys, part, &drop, t, weights, slope);
                const int chunks = t->chunks[p]++;
                if (chunks && chunks % RUN == 0) lift(dim, t->dquery + row * dim, t->whole + row * dim, t->rest + row * dim, keep, chunks == RUN);
                (clean ? weigh : weigh_seen)(keys, dim, key, key_at, slope, t->dquery + row * dim, keep);
            }
            const int64_t at = padded * s->step, from = start * padded;
            (clean ? gather : gather_seen)(keys, tile->count, padded, t->weights, dout, dout_at, dvalues + from, at);
            (clean ? gather : gather_seen)(keys, tile->count, padded, t->slope, query, query_at, dkeys + from, at);
        }
    for (int64_t row = 0; row < tile->count; row += PANEL) {
        if (t->chunks[row / PANEL] > RUN) {
            lift(dim, t->dquery + row * dim, t->whole + row * dim, t->rest + row * dim, keep, 0);
            join(dim, t->dquery + row * dim, t->whole + row * dim, t->rest + row * dim);
        }
        for (int half = 0; half < 2; half++) {
            const float *from = t->dquery + row * dim + half * VL;
            int64_t x = 0;
            for (; x + VL <= dim; x += VL) transpose_square(t->rows + x, padded, from + x * PANEL, PANEL);
            for (; x < dim; x++)
                for (int i = 0; i < VL; i++) t->rows[i * padded + x] = from[x * PANEL + i];
            for (int64_t i = 0; i < VL && row + half * VL + i < tile->count; i++) {
                const int64_t at = tile->index + (row + half * VL + i) * tile->step;
                narrow_row(rows_of(job->dquery, job->dquery_at, entry, head, at, kind), t->rows + i * padded, dim, kind);
            }
        }
    }
}
