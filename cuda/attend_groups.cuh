/* attend_groups.cuh: attention over packed pages for every layout, those with several scales a token too, in fp32.
 *
 * For layouts with group = head_dim attend.cu is the fast way, and this is what it is checked against; this is the only
 * way to a mass. Bound: attend.h's of the CPU. Deterministic for one device; the order of sums depends on its number of
 * multiprocessors. Pages that the table describes wrongly (no class, more tokens than a page holds, bytes outside the
 * arena) are left out. Two launches, with mass three and a memset; no allocation, no synchronization. */
#pragma once
#include "common.cuh"
#include "kvcomp/attend.h"

/* Bytes for n lists and q queries of `group` heads; mass_tokens: columns of mass, 0 without. INT64_MAX where that
 * overflows. */
int64_t kvc_attend_groups_workspace(int64_t n, int64_t group, int64_t q, int32_t head_dim, int64_t mass_tokens,
                                    int sms);

/* `args` have passed kvc_attend_check and lie on the current device, which has `sms` multiprocessors; their workspace
 * is left alone in favour of `workspace`, 16-byte aligned, of any content before and after. */
cudaError_t kvc_attend_groups(const kvc_attend_args *args, void *workspace, int sms, cudaStream_t stream);
