"""What nvcc makes of kernels with wgmma: the command that builds with KVCOMP_WERROR compile by (cuda/compile.sh), and
registers."""

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
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compiled(source: Path, folder: Path) -> tuple[int, str]:
    """The command's status for sm_90a's code, and what the compiler says."""
    command = ["sh", str(ROOT / "cuda" / "compile.sh"), "nvcc", "-gencode=arch=compute_90a,code=sm_90a"]
    command += ['-DKVC_CUDA_ARCHS="90a"', "-std=c++17", "-O3", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{ROOT / 'cuda'}", "-cubin", str(source), "-o", str(folder / "kernels.cubin")]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's, for Python
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    return done.returncode, done.stdout + done.stderr


def test_block_sparse_kernels(tmp_path: Path) -> None:
    """Registers must not spill, either."""
    source = tmp_path / "kernels.cu"
    source.write_text(BSR)
    status, text = compiled(source, tmp_path)
    assert status == 0 and "setmaxnreg" not in text
    assert text.count("0 bytes spill stores, 0 bytes spill loads") == 3


def test_serialized_products_are_an_error(tmp_path: Path) -> None:
    """Sums that are read while their products may still run."""
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
    status, text = compiled(source, tmp_path)
    assert status == 1 and "wgmma.mma_async instructions are serialized" in text


def test_errors_stay_errors(tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text("not C\n")
    status, text = compiled(source, tmp_path)
    assert status != 0 and "error" in text
