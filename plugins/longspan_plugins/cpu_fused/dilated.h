/* Tiles of dilated attention: rows that the same branches keep, at a regular step, between two segment boundaries. */
#pragma once
#include "attention.h"

enum { BRANCHES = 32, PERIOD = 1024 };

typedef struct {
    int64_t w, r, s; /* segment length, rate, offset */
} Branch;

typedef struct {
    int64_t query_start, key_start, first, queries, keys; /* one document, as in longspan.lowering.segments.Span */
} Document;

typedef struct {
    Tile *tiles; /* null: only count */
    Segment *segments;
    int64_t tile_count, segment_count, rows, keys;
} Listing;

/* Rows `row, row + step, ...` below `high` (positions), with a segment of keys for each branch in `active`. */
static void list_class(Listing *to, const Document *doc, const Branch *branches, int many, uint32_t active, int64_t row, int64_t step,
                       int64_t high, int causal) {
    for (; row < high; row += TILE * step) {
        int64_t count = (high - row + step - 1) / step;
        if (count > TILE) count = TILE;
        const int64_t first = to->segment_count;
        for (int b = 0; b < many; b++) {
            if (!(active >> b & 1)) continue;
            const Branch *own = branches + b;
            const int64_t base = row / own->w * own->w, key = base + own->s;
            int64_t stop = base + own->w < doc->keys ? base + own->w : doc->keys;
            if (causal && row + (count - 1) * step + 1 < stop) stop = row + (count - 1) * step + 1;
            if (stop <= key) continue;
            const int64_t keys = (stop - key + own->r - 1) / own->r;
            to->keys += keys;
            if (to->tiles)
                to->segments[to->segment_count] = (Segment){
                    key + doc->key_start, own->r, keys, key, INT64_C(1) << 60, causal ? 0 : INT64_C(1) << 60, -1, 0, 0};
            to->segment_count++;
        }
        if (to->tiles)
            to->tiles[to->tile_count] = (Tile){row - doc->first + doc->query_start, step, count, row, first, to->segment_count};
        to->tile_count++;
        to->rows += count;
    }
}

/* One document for heads with these branches; `period` is the least common multiple of their rates. */
static void list_document(Listing *to, const Document *doc, const Branch *branches, int many, int64_t period, int causal) {
    const int64_t end = doc->first + doc->queries;
    uint32_t active[PERIOD];
    for (int64_t low = doc->first, high; low < end; low = high) {
        high = end;
        for (int b = 0; b < many; b++) {
            int64_t next = (low / branches[b].w + 1) * branches[b].w;
            if (next < high) high = next;
        }
        for (int64_t i = 0; i < period; i++) {
            active[i] = 0;
            for (int b = 0; b < many; b++) {
                int64_t within = (low + i) % branches[b].w; /* past the cell's end this is wrong, and not used */
                if (low + i < high && within % branches[b].r == branches[b].s) active[i] |= 1u << b;
            }
            if (low + i >= high) active[i] = 0;
        }
        for (int64_t i = 0; i < period; i++) { /* the longest progression from here with the same branches */
            const uint32_t same = active[i];
            if (!same) continue;
            int64_t members = 0, step = period;
            for (int64_t j = i; j < period; j++) members += active[j] == same;
            if (period % members == 0 && i < period / members) {
                int regular = 1;
                for (int64_t j = i; j < period; j++) regular &= (active[j] == same) == ((j - i) % (period / members) == 0);
                if (regular) step = period / members;
            }
            list_class(to, doc, branches, many, same, low + i, step, high, causal);
            if (step < period)
                for (int64_t j = i; j < period; j += step) active[j] = 0;
            active[i] = 0;
        }
    }
}

/* Counts, and with `tiles` writes, the tiles of one kind of head: `told` receives tiles, segments, rows and keys. `segments` and
   the tiles' numbers start at `base`. */
int64_t longspan_dilated(int64_t many, const Branch *branches, int64_t period, int64_t documents, const Document *document, int64_t causal,
                         Tile *tiles, Segment *segments, int64_t base, int64_t *told) {
    if (many > BRANCHES || period > PERIOD) return 1;
    Listing to = {tiles, segments, 0, base, 0, 0};
    for (int64_t i = 0; i < documents; i++) list_document(&to, document + i, branches, (int)many, period, (int)causal);
    told[0] = to.tile_count, told[1] = to.segment_count - base, told[2] = to.rows, told[3] = to.keys;
    return 0;
}
