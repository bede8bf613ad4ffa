/* score_check.h: how score's workspace is counted; score_check.c links into both libraries. */
#pragma once
#include "kvcomp/score.h"

/* On the CPU: rows that one loop serves, and the parts of a query head's workspace; `padded` rows of a head, up to a
 * whole number of KVC_SCORE_ROWS. */
#define KVC_SCORE_ROWS 4
#define KVC_SCORE_CHUNK 256                        /* tokens whose keys are turned at once */
int64_t kvc_score_step(int64_t padded, int64_t s); /* tokens of a part of the first pass */
int64_t kvc_score_head_floats(int64_t padded, int64_t s);

/* On CUDA: blocks that run at once on the device that the division of work is made for, rows of the larger kind of
 * block, and of the smallest tile; how many times as many blocks as that a divided pass may have. */
#define KVC_SCORE_BLOCKS 264
#define KVC_SCORE_BLOCK_ROWS 256
#define KVC_SCORE_TILE_ROWS 32
#define KVC_SCORE_WAVES 4
