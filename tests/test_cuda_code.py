"""What nvcc makes of the kernels with wgmma: ptxas only remarks on it when it does not let products run on, and a
kernel is several times slower then."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BSR = """
#include "bsr_wgmma.cuh"
void *kernels[] = {(void *)bsr_wgmma_kernel<128, 4, true, false>, (void *)bsr_wgmma_kernel<64, 2, true, true>,
                   (void *)bsr_wgmma_kernel<32, 1, false, true>};
"""
NAMES = ["w4_large_half", "w4_large_bfloat", "score", "attend_rows_80", "attend_rows_128", "attend_rows_256"]
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def said(source: Path, folder: Path) -> str:
    """What the compiler says of sm_90a's code."""
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", '-DKVC_CUDA_ARCHS="90a"', "-std=c++17", "-O3"]
    command += ["-Xptxas", "-v", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'cuda'}", "-cubin", str(source)]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's, for Python
    command += ["-o", str(folder / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_wgmma_is_not_serialized(name: str, tmp_path: Path) -> None:
    text = said(ROOT / "cuda" / f"{name}.cu", tmp_path)
    assert "Compiling entry function" in text
    assert "serialized" not in text


def test_block_sparse_kernels(tmp_path: Path) -> None:
    """Registers must not spill, either."""
    source = tmp_path / "kernels.cu"
    source.write_text(BSR)
    text = said(source, tmp_path)
    assert "serialized" not in text and "setmaxnreg" not in text
    assert text.count("0 bytes spill stores, 0 bytes spill loads") == 3


def test_a_serialized_product_is_remarked_on(tmp_path: Path) -> None:
    """So that the tests above could fail: sums that are read while their products may still run."""
    source = tmp_path / "kernels.cu"
    source.write_text(
        """
#include "wgmma_registers.cuh"
__global__ void kernel(float *out, uint32_t at, uint32_t word, int n) {
#ifdef KVC_HOPPER
    float d[32] = {};
    const uint32_t a[4] = {word, word, word, word};
    for (int k = 0; k < n; k++) {
        wgmma_begin();
        wgmma_halves<false>(d, a, at);
        for (int i = 0; i < 32; i++) d[i] *= 2.0f;
        wgmma_commit();
        wgmma_wait<1>();
    }
    for (int i = 0; i < 32; i++) out[i * 128 + threadIdx.x] = d[i];
#endif
}
"""
    )
    assert "serialized" in said(source, tmp_path)
