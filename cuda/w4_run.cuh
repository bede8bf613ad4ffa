/* w4_run.cuh: which pieces of W a block of threads takes, and in which order. */
#pragma once
#include "w4_job.cuh"

namespace {

/* A run of a.run pieces (the first a.longer runs have one more) of a.blocks a strip: `tail` pieces, its last part, come
 * first. */
struct w4_run {
    int first, count, tail, last_strip;
    int rest_from;              /* the run's i-th piece is W's i + rest_from, or, i < tail, i + rest_from + count */
    int tail_block, rest_block; /* where in its strip the first of the tail, and of the others, lies */

    __device__ __forceinline__ w4_run(const w4_job &a, int me) {
        first = me * a.run + min(me, a.longer);
        const int end = first + a.run + (me < a.longer);
        last_strip = a.by_blocks(end);
        count = end - first;
        tail = min(end - last_strip * a.blocks, count);
        rest_from = first - tail;
        rest_block = first - a.by_blocks(first) * a.blocks;
        tail_block = end - tail - last_strip * a.blocks;
    }
    /* The run in which a strip that this one ends begins. */
    __device__ __forceinline__ int begins_in(const w4_job &a, int strip) const {
        const int from = strip * a.blocks, far = a.longer * (a.run + 1);
        if (first <= from) return blockIdx.x;
        return from < far ? a.by_longer(from) : a.longer + a.by_run(from - far);
    }
};

/* The run's i-th piece, and where in its strip it lies. */
struct w4_place {
    int i, block;

    __device__ __forceinline__ void set(const w4_run &run, int blocks, int at) {
        i = at;
        block = at < run.tail ? run.tail_block + at : run.rest_block + at - run.tail;
        wrap(blocks);
    }
    __device__ __forceinline__ void advance(const w4_run &run, int blocks, int by) {
        block += by;
        i += by;
        if (i >= run.tail && i - by < run.tail) block = run.rest_block + i - run.tail;
        wrap(blocks);
    }
    __device__ __forceinline__ void wrap(int blocks) {
#pragma unroll 1
        while (block >= blocks) block -= blocks;
    }
    __device__ __forceinline__ int piece(const w4_run &run) const {
        return i + run.rest_from + (i < run.tail ? run.count : 0);
    }
};

} // namespace
