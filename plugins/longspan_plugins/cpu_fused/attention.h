/* What the Python side and the kernels agree on: `binding.py` mirrors these structures field by field. */
#pragma once
#include <stdint.h>

enum { TILE = 128 }; /* most query rows of a tile */

/* Query rows `index, index + step, ...` (`count` of them) at positions `position, position + step, ...`, which attend to
   the keys of segments `first` to `last` (not included) in one softmax. */
typedef struct {
    int64_t index, step, count, position, first, last;
} Tile;

/* Keys `index, index + step, ...` at positions `position, position + step, ...`. A query at position p sees those from
   p - before to p + after. `mask` >= 0: row `mask_key + j` of mask `mask` says which queries see key j; the tile's row 0
   is the mask's query `mask_query`. */
typedef struct {
    int64_t index, step, count, position, before, after, mask, mask_query, mask_key;
} Segment;

typedef struct {
    int64_t batch, heads, group, dim; /* `group` query heads share a key head */
    int64_t kind;                     /* 0 float32, 1 bfloat16, 2 float16 */
    int64_t threads, parts;
    double scale;
    const Tile *tiles;
    const Segment *segments;
    const int64_t *programs;        /* first and last tile (not included) of each program */
    const int64_t *program_of_head; /* per query head */
    const uint32_t *masks;          /* [mask][key][word]: bit q % 32 of word q / 32 says that query q sees the key */
    int64_t mask_keys, mask_words;
    /* Tensors; strides in elements for batch, head, row. The last dimension has no gaps. */
    const void *query, *key, *value;
    void *out;
    float *lse;
    int64_t query_at[3], key_at[3], value_at[3], out_at[3], lse_at[3];
    /* Backward: `out` and `lse` are read, these too or written. */
    const void *dout;
    const float *dlse; /* or null */
    void *dquery;
    const int64_t *shares; /* [program][part]: first and last tile (not included) */
    const int64_t *sums;   /* [part]: where key 0's dkey and dvalue would be, [batch][key head][key][padded dim] floats that
                              are 0 on entry, and the strides of batch and key head */
    int64_t run;           /* tiles whose sums are added up apart before they join those; 0: each joins them itself */
    int64_t dout_at[3], dlse_at[3], dquery_at[3];
    /* Dropout: null `lines` for none. Numbers as in longspan.numerics.dropout. */
    const int64_t *lines, *query_positions, *key_positions;
    int64_t lines_at[2], query_positions_at[3], key_positions_at[3];
    int64_t seed;
    double keep;      /* 1 / (1 - p) */
    int64_t threshold;
    int64_t failed; /* out of memory */
} Job;
