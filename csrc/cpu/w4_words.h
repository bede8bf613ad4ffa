/* w4_words.h: words of packed weights (w4.h) in vectors of 16, for w4_tile.c and w4_pairs.c. Vectors are the
 * compiler's: they become what the function that uses them is compiled for.
 *
 * The 16 words of lanes 4*r .. 4*r+3 hold rows r and r + 8 of a tile and 64 inputs: vector element 4*c + s is input
 * 16*s + 2*c + odd + 8*high of nibble (odd, high). */
#pragma once
#include <stdint.h>
#include <string.h>

typedef uint32_t kvc_words __attribute__((vector_size(64)));

#define KVC_WORDS static inline __attribute__((always_inline))

/* Sixteen words of rows r and r + 8 of tile `tile`, in 64 inputs `chunk`; nibble (odd, high) of row r from bit
 * 16 * odd + 8 * high on, of row r + 8 four bits above. */
KVC_WORDS kvc_words kvc_load_words(const uint32_t *words, int chunk, int tile, int r) {
    kvc_words v;
    memcpy(&v, words + ((chunk * 4 + tile) * 32 + 4 * r) * 4, sizeof v);
    return v >> 2 | v << 30;
}

/* of[4*c + s]: that word of each r = 0..7, twice. */
KVC_WORDS void kvc_words_by_input(kvc_words of[16], const uint32_t *words, int chunk, int tile) {
    const kvc_words low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
    const kvc_words even = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
    kvc_words a[8], b[8];
    for (int r = 0; r < 8; r++) a[r] = kvc_load_words(words, chunk, tile, r);
    for (int turn = 0; turn < 3; turn++) { /* each moves the row's highest bit behind the word's lowest */
        for (int i = 0; i < 4; i++) {
            b[2 * i] = __builtin_shuffle(a[i], a[i + 4], low);
            b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 4], high);
        }
        memcpy(a, b, sizeof a);
    }
    for (int j = 0; j < 16; j++) of[j] = __builtin_shuffle(a[j / 2], even + 8 * (j & 1));
}

/* Where the nibbles (0, high), rows r and r + 8 side by side, begin in those words. */
KVC_WORDS kvc_words kvc_words_shift(int high) {
    return (kvc_words){0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4} + 8 * (uint32_t)high;
}
