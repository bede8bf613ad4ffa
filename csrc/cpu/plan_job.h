/* plan_job.h: what plan.c and plan_groups.c share: lists, their levels, and spending bytes on steps between levels. */
#pragma once
#include "plan_tables.h"

#define KVC_PLAN_CHAIN 10 /* levels: a chain of classes rising in both halves has at most nine; 0 is dropped */

/* One list, or one group of lists, which is a list of one run whose bytes and distortions are sums over its members.
 * Level 0 is dropped (of a group: a class found otherwise), level l >= 1 the class (k[l], v[l]); both rise with the
 * level. */
typedef struct {
    int32_t levels, least;           /* levels in use, 0 included; where tokens that must be kept begin */
    int32_t candidates;              /* tokens */
    int32_t runs, required;          /* all, and those that must be kept: the first ones */
    int32_t guarded;                 /* runs, from the first, that may be at (16, 16) */
    int32_t last_tokens;             /* of the last run */
    int32_t sinks, window;           /* fixed tokens */
    int32_t whole;                   /* the level (16, 16), or 0 where it is not used */
    int32_t next[2][KVC_PLAN_CHAIN]; /* [may be at (16, 16)]: the level after this one, or 0 */
    double distortion[KVC_PLAN_CHAIN];
    int64_t bytes[KVC_PLAN_CHAIN];     /* of a full run */
    int64_t last_tail_bytes;           /* of the last run at (16, 16): what it adds to the list's pages of that class */
    double fixed_error, importance;    /* of fixed tokens; the sum over candidates */
    int64_t first_member, next_member; /* of a group: its first list; of a list: the group's next one; < 0: none */
    uint8_t k[KVC_PLAN_CHAIN], v[KVC_PLAN_CHAIN];
} kvc_plan_list;

#define KVC_PLAN_FEW 256         /* lists: up to so many, groups are planned exactly */
#define KVC_PLAN_UNITS (1 << 14) /* of bytes, in which they are */

typedef struct {
    const kvc_plan_args *args;
    int64_t n, s, most_runs, tail_bytes; /* runs a list has at most; of a page of class (16, 16), its entry included */
    kvc_plan_list *lists;
    kvc_plan_list *groups; /* [n], where there are groups */
    double *weight;        /* [n][most_runs]: sum of importance */
    uint8_t *level;        /* [n][most_runs] */
    int32_t *order;        /* [n][s]: candidates, the most important first */
    kvc_plan_step *heap;
    int64_t heap_size;
    uint64_t *sorting; /* [sorters][2][s] */
    double *rows;      /* [2][KVC_PLAN_UNITS + 1]: error by units of bytes */
    uint8_t *choices;  /* [n][KVC_PLAN_UNITS + 1], where n is at most KVC_PLAN_FEW: a group's class by units */
} kvc_plan_job;

bool kvc_plan_allows(const kvc_plan_job *j, int k, int v);
kvc_plan_option kvc_plan_option_of(const kvc_plan_job *j, int64_t i, int k, int v); /* of a full packed page */
/* The option, among those within `top` in both halves, that saves the most per byte over what `from` is; NULL: none. */
const kvc_plan_option *kvc_plan_steepest(const kvc_plan_option *options, int count, const kvc_plan_option *from,
                                         const kvc_plan_option *top);
void kvc_plan_add_level(kvc_plan_list *l, const kvc_plan_option *o);
int64_t kvc_plan_fixed_bytes(const kvc_plan_job *j, const kvc_plan_list *l); /* of fixed tokens and the list's state */
/* Fails, with summary.least_bytes set, where the budget is below `least` bytes. */
kvc_status kvc_plan_expect_budget(const kvc_plan_job *j, int64_t least);
void kvc_plan_spend(kvc_plan_job *j, int64_t left); /* takes steps from the levels given, best first */

kvc_status kvc_plan_by_groups(kvc_plan_job *j); /* plan_groups.c: all after the arguments have been read */
