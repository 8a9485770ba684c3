/* Exact attention for CPUs: forward and joint backward over any list of strided key segments a query tile. */
#include "backward.h"
#include "dilated.h"
#include <pthread.h>
#include <stdatomic.h>

typedef struct {
    Job *job;
    int backward;
    atomic_long next;
    long units;
} Queue;

/* Gradients of keys and values that a thread adds up apart, and how many numbers there is room for in each. */
typedef struct {
    float *dkeys, *dvalues;
    int64_t room;
} Sums;

static void *block(size_t floats) { return aligned_alloc(64, (4 * floats + 63) / 64 * 64 + 64); }

static int open_space(Space *s, int64_t dim) {
    const int64_t padded = (dim + VL - 1) / VL * VL;
    float **parts[] = {&s->query, &s->sum, &s->whole, &s->rest, &s->scores, &s->key, &s->value, &s->rows, (float **)&s->pairs, (float **)&s->weights};
    const int64_t sizes[] = {TILE * dim, TILE * dim, TILE * dim, TILE * dim, KEYS * PANEL, KEYS * dim, KEYS * dim, TILE * padded, KEYS * dim, KEYS * PANEL};
    int good = 1;
    for (int i = 0; i < 10; i++) good &= (*parts[i] = block(sizes[i])) != 0;
    return good;
}

static void close_space(Space *s) {
    free(s->query), free(s->sum), free(s->whole), free(s->rest), free(s->scores), free(s->key), free(s->value), free(s->rows), free(s->pairs), free(s->weights);
}

static int open_trace(Trace *t, int64_t dim) {
    const int64_t padded = (dim + VL - 1) / VL * VL;
    float **parts[] = {&t->query_rows, &t->dout_rows, &t->query, &t->dout, &t->dquery, &t->weights, &t->slope, &t->key, &t->value, &t->rows, &t->whole, &t->rest};
    const int64_t sizes[] = {TILE * padded, TILE * padded, TILE * dim, TILE * dim, TILE * dim, TILE * KEYS, TILE * KEYS, KEYS * dim, KEYS * dim, TILE * padded, TILE * dim, TILE * dim};
    int good = 1;
    for (int i = 0; i < 12; i++) good &= (*parts[i] = block(sizes[i])) != 0;
    return good;
}

static void close_trace(Trace *t) {
    free(t->query_rows), free(t->dout_rows), free(t->query), free(t->dout), free(t->dquery), free(t->weights), free(t->slope);
    free(t->key), free(t->value), free(t->rows), free(t->whole), free(t->rest);
}

static const int64_t *program(const Job *job, int64_t head) { return job->programs + 2 * job->program_of_head[head]; }

static void run_forward(Queue *queue) {
    Job *job = queue->job;
    Space space = {0};
    if (!open_space(&space, job->dim))
        job->failed = 1;
    else
        for (;;) { /* the next tile of the next head of the next entry; later tiles first: under causality they are longer */
            long unit = atomic_fetch_add(&queue->next, 1);
            if (unit >= queue->units) break;
            int64_t per_entry = queue->units / job->batch, left = unit % per_entry, head = 0;
            for (int64_t count; left >= (count = program(job, head)[1] - program(job, head)[0]); head++) left -= count;
            forward_tile(job, job->tiles + program(job, head)[1] - 1 - left, unit / per_entry, head, &space);
        }
    close_space(&space);
}

/* Where a thread is among the tiles of a unit of work: those of the heads up to `end` that are of its part. */
typedef struct {
    int64_t head, end, part, tile;
} Turn;

/* The next tile and its head; null after the last. */
static const Tile *next_tile(const Job *job, Turn *turn, int64_t *head) {
    for (; turn->head < turn->end; turn->head++, turn->tile = 0) {
        const int64_t *mine = job->shares + 2 * (job->program_of_head[turn->head] * job->parts + turn->part);
        if (turn->tile < mine[1] - mine[0]) {
            *head = turn->head;
            return job->tiles + mine[0] + turn->tile++;
        }
    }
    return 0;
}

/* The first key that the next `count` tiles read and the one after the last. */
static void reach(const Job *job, Turn turn, int64_t count, int64_t *low, int64_t *high) {
    *low = INT64_MAX, *high = 0;
    int64_t head;
    for (const Tile *tile; count && (tile = next_tile(job, &turn, &head)); count--)
        for (const Segment *s = job->segments + tile->first; s < job->segments + tile->last; s++) {
            if (!s->count) continue;
            const int64_t end = s->index + (s->count - 1) * s->step + 1;
            if (s->index < *low) *low = s->index;
            if (end > *high) *high = end;
        }
    if (*low > *high) *low = *high;
}

/* The sums of the next tiles of a column that has many: added up from 0, and then to the column's. */
static void run_apart(const Job *job, Turn *turn, int64_t entry, float *dkeys, float *dvalues, Trace *trace, Sums *apart) {
    const int64_t padded = (job->dim + VL - 1) / VL * VL;
    int64_t low, high, head;
    reach(job, *turn, job->run, &low, &high);
    const int64_t many = (high - low) * padded, from = low * padded;
    if (many > apart->room) {
        free(apart->dkeys), free(apart->dvalues);
        apart->dkeys = block(many), apart->dvalues = block(many), apart->room = many;
        if (!apart->dkeys || !apart->dvalues) {
            apart->room = 0;
            turn->head = turn->end;
            ((Job *)job)->failed = 1;
            return;
        }
    }
    memset(apart->dkeys, 0, sizeof(float) * many);
    memset(apart->dvalues, 0, sizeof(float) * many);
    const Tile *tile;
    for (int64_t left = job->run; left && (tile = next_tile(job, turn, &head)); left--)
        backward_tile(job, tile, entry, head, apart->dkeys - from, apart->dvalues - from, trace);
    for (int64_t i = 0; i < many; i += VL) {
        store(dkeys + from + i, load(dkeys + from + i) + load(apart->dkeys + i));
        store(dvalues + from + i, load(dvalues + from + i) + load(apart->dvalues + i));
    }
}

static void run_backward(Queue *queue) {
    Job *job = queue->job;
    Trace trace = {0};
    Sums apart = {0};
    const int64_t kv_heads = job->heads / job->group;
    if (!open_trace(&trace, job->dim))
        job->failed = 1;
    else
        for (;;) {
            long unit = atomic_fetch_add(&queue->next, 1);
            if (unit >= queue->units) break;
            const int64_t part = unit % job->parts, own = unit / job->parts % kv_heads, entry = unit / job->parts / kv_heads;
            const int64_t *sums = job->sums + 4 * part, where = entry * sums[2] + own * sums[3];
            float *dkey = (float *)sums[0] + where, *dvalue = (float *)sums[1] + where;
            Turn turn = {own * job->group, (own + 1) * job->group, part, 0};
            if (job->run)
                while (turn.head < turn.end) run_apart(job, &turn, entry, dkey, dvalue, &trace, &apart);
            else {
                int64_t head;
                for (const Tile *tile; (tile = next_tile(job, &turn, &head));) backward_tile(job, tile, entry, head, dkey, dvalue, &trace);
            }
        }
    free(apart.dkeys), free(apart.dvalues);
    close_trace(&trace);
}

static void *run(void *given) {
    Queue *queue = given;
    (queue->backward ? run_backward : run_forward)(queue);
    return 0;
}

static int64_t run_all(Job *job, int backward, long units) {
    enum { MOST = 256 };
    Queue queue = {job, backward, 0, units};
    pthread_t threads[MOST];
    long helpers = job->threads - 1, started = 0;
    if (helpers > units - 1) helpers = units - 1;
    if (helpers > MOST) helpers = MOST;
    while (started < helpers && pthread_create(&threads[started], 0, run, &queue) == 0) started++;
    run(&queue);
    for (long i = 0; i < started; i++) pthread_join(threads[i], 0);
    return job->failed;
}

int64_t longspan_forward(Job *job) {
    long units = 0;
    for (int64_t head = 0; head < job->heads; head++) units += program(job, head)[1] - program(job, head)[0];
    return run_all(job, 0, units * job->batch);
}

int64_t longspan_backward(Job *job) { return run_all(job, 1, job->batch * (job->heads / job->group) * job->parts); }

/* So that the Python side can refuse a library built from another source: the size of a Job, and the lanes of a vector. */
int64_t longspan_job_size(void) { return sizeof(Job); }
int64_t longspan_lanes(void) { return VL; }
