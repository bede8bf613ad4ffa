/* divide.h: the work of attend, divided over a GPU's multiprocessors by bytes, for all layers of a step in one launch.
 *
 * Every layer's lists lie one behind the other: list 0's pages, list 1's, ... A block of attend takes a run of them,
 * from (first list, first page) up to (end list, end page); runs follow each other without a gap, and a list's last run
 * ends where the list ends when attend runs: appends in between make a division less even, never wrong. What a block
 * costs is the bytes of its pages, and a charge for every further list that it begins.
 *
 * A division is `w` int32 words a layer, w = kvc_divide_words:
 *   word 0: blocks; 1: lists; 2, 3: 0
 *   kvc_share [lists]: which blocks a list's pages lie in
 *   kvc_run [blocks]: the blocks' runs, of as many as there may be (KVC_DIVIDE_MOST_BLOCKS, or the multiprocessors)
 *   kvc_page [as many][KVC_DIVIDE_ENTRIES]: the entries of each run's first pages, 0 for those that are not of its
 * first list or not fixed: attend asks for such pages without looking into the table, which has to say the same then
 * Errors: ESHAPE, EDTYPE, EDEVICE, EINVAL. CUDA only: the CPU's attend divides by itself. */
#pragma once
#include "format.h"
#include "kvcomp.h"

#define KVC_DIVIDE_MOST_BLOCKS 1024
#define KVC_DIVIDE_ENTRIES 12

typedef struct {
    int32_t first_list, first_page, end_list, end_page; /* end_page 0: up to the end of list end_list - 1 */
} kvc_run;

typedef struct {
    int32_t first_block, blocks; /* at least one block, also for an empty list */
    int32_t fixed_pages;         /* pages that appends leave as they are: those before the tail */
    int32_t mixed;               /* 1: the list has pages of more classes (but 16 bits) than blocks, and fewer than 128
                                  * fixed pages a block; else 0. Attend chooses code by it, not results */
} kvc_share;

typedef struct {
    kvc_tensor divisions; /* out (l,w) int32, 16-byte aligned rows: w a multiple of 4 */
    kvc_tensor tables;    /* in  (l,n,c) uint64: kvc_page */
    kvc_tensor lists;     /* in  (l,n,4) int32: kvc_list */
    kvc_layout layout;
} kvc_divide_args;

typedef kvc_status kvc_divide_fn(const kvc_divide_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_divide_fn kvc_divide_cuda;
/* Words of a layer's division of n lists in at most `blocks` blocks, and those before the pages' entries. */
static inline int64_t kvc_divide_words_of(int64_t n, int blocks) {
    return 4 + 4 * n + (4 + 2 * KVC_DIVIDE_ENTRIES) * (int64_t)blocks;
}
static inline int64_t kvc_divide_entries_at(int64_t n, int blocks) { return 4 + 4 * (n + blocks); }
/* Words of a layer's division of n lists on this CUDA device; 0 for a device that is none. */
int64_t kvc_divide_words(int64_t n, int device);
#ifdef __cplusplus
}
#endif
