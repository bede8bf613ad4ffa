"""philox.h against the known answers published with the method, and its map from channels to numbers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc"

PROGRAM = r"""
#include <stdio.h>
#include "kvcomp/philox.h"
int main(void) {
    unsigned w[6];
    while (scanf("%x %x %x %x %x %x", w, w + 1, w + 2, w + 3, w + 4, w + 5) == 6) {
        uint32_t block[4] = {w[0], w[1], w[2], w[3]};
        kvc_philox4x32(block, w[4], w[5]);
        printf("%08x %08x %08x %08x", block[0], block[1], block[2], block[3]);
        /* the same block as a seed, a layer, a list, a row and four channels */
        const uint64_t seed = (uint64_t)w[5] << 32 | w[4];
        float four[4];
        kvc_philox_uniform4(four, seed, (int32_t)w[3], (int32_t)w[2], w[1], w[0]);
        for (uint32_t i = 0; i < 4; i++) {
            const float one = kvc_philox_uniform(seed, (int32_t)w[3], (int32_t)w[2], w[1], 4 * w[0] + i);
            printf(" %d", four[i] == (block[i] >> 8) / 16777216.0f && (w[0] >> 30 || four[i] == one));
        }
        printf("\n");
    }
}
"""

# counter and key -> output, from the known-answer file of the authors' library (Salmon et al., SC 2011)
ANSWERS = {
    "00000000 00000000 00000000 00000000 00000000 00000000": "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff": "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0": "d16cfe09 94fdcceb 5001e420 24126ea1",
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_known_answers(tmp_path: Path) -> None:
    (tmp_path / "philox.c").write_text(PROGRAM)
    command = ["cc", "-std=c11", "-I", SOURCES, tmp_path / "philox.c", "-o", tmp_path / "philox"]
    subprocess.run(command, check=True)
    result = subprocess.run([tmp_path / "philox"], input="\n".join(ANSWERS), text=True, capture_output=True, check=True)
    assert result.stdout.splitlines() == [f"{answer} 1 1 1 1" for answer in ANSWERS.values()]
