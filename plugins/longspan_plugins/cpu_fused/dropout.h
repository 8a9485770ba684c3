/* Dropout keyed by position: the same numbers as longspan.numerics.dropout, drawn where they are needed. */
#pragma once
#include "tiles.h"

typedef struct {
    uint64_t line, start;
    const int64_t *queries, *keys; /* of this line */
    int64_t query_at, key_at;
    int32_t threshold;
    float keep;
} Dropping;

INLINE uint64_t mix64(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

INLINE Dropping dropping(const Job *job, int64_t entry, int64_t head, int64_t own) {
    Dropping d = {0};
    if (!job->lines) return d;
    d.start = mix64((uint64_t)job->seed + 0x9E3779B97F4A7C15u);
    d.line = mix64(d.start + mix64((uint64_t)job->lines[entry * job->lines_at[0] + head * job->lines_at[1]] + 0xD1B54A32D192ED03u));
    d.queries = job->query_positions + entry * job->query_positions_at[0] + head * job->query_positions_at[1];
    d.keys = job->key_positions + entry * job->key_positions_at[0] + own * job->key_positions_at[1];
    d.query_at = job->query_positions_at[2], d.key_at = job->key_positions_at[2];
    d.threshold = (int32_t)job->threshold, d.keep = (float)job->keep;
    return d;
}

typedef struct {
    vi a, b;
} Lots;

INLINE vi mix32(vi x) {
    typedef uint32_t vu __attribute__((vector_size(4 * VL)));
    vu y = (vu)x;
    y ^= y >> 16;
    y *= 0x7FEB352Du;
    y ^= y >> 15;
    y *= 0x846CA68Bu;
    y ^= y >> 16;
    return (vi)y;
}

/* What the panel's rows bring to each pair's number. */
INLINE Lots row_lots(const Dropping *d, const Tile *tile, int64_t row) {
    Lots found;
    for (int i = 0; i < PANEL; i++) {
        int32_t lot = 0;
        if (row + i < tile->count)
            lot = (int32_t)mix64(d->line + mix64((uint64_t)d->queries[(tile->index + (row + i) * tile->step) * d->query_at] + 0xABC98388FB8FAC03u));
        if (i < VL)
            found.a[i] = lot;
        else
            found.b[i - VL] = lot;
    }
    return found;
}

/* What to multiply the weights of one key with. */
INLINE Pair factors(const Dropping *d, Lots rows, const Segment *s, int64_t k) {
    vi column = (vi){0} + (int32_t)mix64(d->start + mix64((uint64_t)d->keys[(s->index + k * s->step) * d->key_at] + 0x8CB92BA72F3D8DD7u));
    vf keep = all(d->keep), none = {0};
    return (Pair){pick(mix32(rows.a ^ column) >= d->threshold, keep, none), pick(mix32(rows.b ^ column) >= d->threshold, keep, none)};
}

APART void drop_weights(const Dropping *d, const Tile *tile, const Segment *s, int64_t row, int64_t k, int64_t keys, float *weights) {
    Lots rows = row_lots(d, tile, row);
    for (int64_t i = 0; i < keys; i++) {
        Pair f = factors(d, rows, s, k + i);
        store(weights + i * PANEL, load(weights + i * PANEL) * f.a);
        store(weights + i * PANEL + VL, load(weights + i * PANEL + VL) * f.b);
    }
}
