/* plan_tables.h: what plan and shrink share: classes with what they cost and distort, and a heap of steps. */
#pragma once
#include "core/core.h"
#include "kvcomp/plan.h"

#define KVC_PLAN_TOP (KVC_PLAN_LEVELS - 1)                   /* the column of 16 bits */
#define KVC_PLAN_CLASSES (KVC_PLAN_LEVELS * KVC_PLAN_LEVELS) /* class = k * KVC_PLAN_LEVELS + v, in columns */
#define KVC_PLAN_MOST_TABLE_BYTES (1 << 20)                  /* of an entry of a page table, of a list's state */
static const uint8_t kvc_plan_bits[KVC_PLAN_LEVELS] = {2, 3, 4, 8, 16};

/* One class a run, a group or a page may have. */
typedef struct {
    int k, v; /* columns of the distortion tables */
    int64_t bytes;
    double distortion;
} kvc_plan_option;

static inline bool kvc_plan_within(const kvc_plan_option *a, const kvc_plan_option *b) {
    return a->k <= b->k && a->v <= b->v;
}

/* The distortion of K at column k and V at column v in list i. */
static inline double kvc_plan_distortion(const kvc_tensor *k_table, const kvc_tensor *v_table, int64_t i, int k,
                                         int v) {
    return (double)((const float *)k_table->data)[i * KVC_PLAN_LEVELS + k] +
           (double)((const float *)v_table->data)[i * KVC_PLAN_LEVELS + v];
}

/* Checks the tables of n lists, which are finite and >= 0, and `allowed`, of which it counts the classes: at least 1.
 */
kvc_status kvc_plan_check_tables(const char *op, int64_t n, const kvc_tensor *distortion_k,
                                 const kvc_tensor *distortion_v, const kvc_tensor *drop, const kvc_tensor *allowed,
                                 int *classes);
kvc_status kvc_plan_check_bytes(const char *op, const char *name, int64_t bytes); /* 0 .. KVC_PLAN_MOST_TABLE_BYTES */

/* ---- a heap: the largest gain first, equal ones by their index */

typedef struct {
    double gain; /* error saved per byte, or, negative, added */
    int64_t at;  /* of the run, group or page */
} kvc_plan_step;

static inline bool kvc_plan_before(const kvc_plan_step *a, const kvc_plan_step *b) {
    return a->gain > b->gain || (a->gain == b->gain && a->at < b->at);
}

static inline void kvc_plan_push(kvc_plan_step *heap, int64_t *size, kvc_plan_step added) {
    int64_t at = (*size)++;
    for (; at > 0 && kvc_plan_before(&added, &heap[(at - 1) / 2]); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = added;
}

/* Puts `moved` in the place of the first. */
static inline void kvc_plan_replace(kvc_plan_step *heap, int64_t size, kvc_plan_step moved) {
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && kvc_plan_before(&heap[child + 1], &heap[child])) child++;
        if (!kvc_plan_before(&heap[child], &moved)) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

static inline int64_t kvc_plan_pop(kvc_plan_step *heap, int64_t *size) {
    const int64_t first = heap[0].at;
    --*size;
    kvc_plan_replace(heap, *size, heap[*size]);
    return first;
}
