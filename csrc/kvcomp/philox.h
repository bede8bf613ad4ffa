/* philox.h: the random numbers of stochastic rounding, the same on the CPU and on CUDA.
 *
 * Philox4x32-10 is a function of a 128-bit counter and a 64-bit key, so a number depends on what it is for and on
 * nothing else: not on the order of the work, the threads, or the page that a row lands in. One block gives four:
 *
 *   key[0]      the seed's low 32 bits
 *   key[1]      the seed's high 32 bits
 *   counter[0]  channel / 4; the number of `channel` is output channel % 4
 *   counter[1]  row = 2*token + is_value, token being the index into K and V's s axis
 *   counter[2]  list = sequence * heads + head
 *   counter[3]  layer
 *
 * Uniform numbers are (output >> 8) * 2^-24: multiples of 2^-24 in [0, 1), exact in fp32.
 * Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). */
#pragma once
#include "format.h"

/* The ten rounds, in place: counter in, four outputs out. */
KVC_HD void kvc_philox4x32(uint32_t block[4], uint32_t key_low, uint32_t key_high) {
    for (int round = 0; round < 10; round++) {
        const uint64_t even = (uint64_t)0xD2511F53u * block[0], odd = (uint64_t)0xCD9E8D57u * block[2];
        const uint32_t first = (uint32_t)(odd >> 32) ^ block[1] ^ key_low;
        const uint32_t third = (uint32_t)(even >> 32) ^ block[3] ^ key_high;
        block[0] = first;
        block[1] = (uint32_t)odd;
        block[2] = third;
        block[3] = (uint32_t)even;
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
}

KVC_HD float kvc_philox_float(uint32_t bits) { return (float)(bits >> 8) * 5.9604644775390625e-8f; }

/* The four numbers of channels 4*quad .. 4*quad + 3. */
KVC_HD void kvc_philox_uniform4(float out[4], uint64_t seed, int32_t layer, int32_t list, uint32_t row, uint32_t quad) {
    uint32_t block[4] = {quad, row, (uint32_t)list, (uint32_t)layer};
    kvc_philox4x32(block, (uint32_t)seed, (uint32_t)(seed >> 32));
    for (int i = 0; i < 4; i++) out[i] = kvc_philox_float(block[i]);
}

/* The number of one channel. */
KVC_HD float kvc_philox_uniform(uint64_t seed, int32_t layer, int32_t list, uint32_t row, uint32_t channel) {
    uint32_t block[4] = {channel / 4, row, (uint32_t)list, (uint32_t)layer};
    kvc_philox4x32(block, (uint32_t)seed, (uint32_t)(seed >> 32));
    return kvc_philox_float(block[channel % 4]);
}
