#!/usr/bin/env python3
"""Block-sparse times dense in one minute: make a matrix, multiply, check against the dense product, compare times.

Useful TFLOPS are 2 · stored blocks · block² · N / time. ``--calls`` alone, without check and rival, is what
``scripts/profile_ncu.sh`` profiles.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from kvcomp import _C
from kvcomp.bsr import BLOCKS, PATTERNS, break_even, random_bsr, validate_sparse_matrix, way_of


def main() -> int:
    parser = argparse.ArgumentParser(description="Block-sparse times dense, checked and timed.")
    gpu = bool(_C.cuda_info()["available"]) and torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--size", type=int, help="rows and columns (default: 8192; cpu: 2048)")
    parser.add_argument("--block-size", type=int, choices=BLOCKS, default=128)
    parser.add_argument("--sparsity", type=float, default=0.78, help="share of empty blocks (default: 0.78)")
    parser.add_argument("--pattern", choices=PATTERNS, default="uniform")
    parser.add_argument("--method", choices=["auto", "sparse", "dense"], default="auto")
    parser.add_argument("--calls", type=int, help="multiply so often, and nothing else")
    options = parser.parse_args()
    if options.device == "cuda" and not gpu:
        print(f"quickstart_bsr: --device: expected a CUDA device, got none: {_C.cuda_info()['why']}", file=sys.stderr)
        return 2
    size = (8192 if options.device == "cuda" else 2048) if options.size is None else options.size
    if size < 1 or (options.calls is not None and options.calls < 1):
        print("quickstart_bsr: --size, --calls: expected 1 or more, got less", file=sys.stderr)
        return 2
    dtype = torch.float16 if options.device == "cuda" else torch.float32

    try:
        a = random_bsr(size, size, options.block_size, options.sparsity, pattern=options.pattern, dtype=dtype,
                       device=options.device)  # fmt: skip
    except ValueError as reason:
        print(f"quickstart_bsr: {reason}", file=sys.stderr)
        return 2
    b = torch.randn(size, size, device=options.device).mul_(0.1).to(dtype)
    if options.calls is not None:
        for _ in range(options.calls):
            a.matmul(b, method=options.method)
        wait(options.device)
        return 0

    print(a)
    ok, info = validate_sparse_matrix(a)
    print(f"{'worth it' if ok else 'not worth it'} ({info['performance_rating']}): {info['message']}")
    even = break_even(options.block_size, options.device, dtype)
    print(f"sparse is expected to be faster up to {even:.0%} of stored blocks; taken here: {way_of(a, size)}")

    dense = a.to_dense()
    got = a.matmul(b, out_dtype=torch.float32, method=options.method)
    gap = float((got - dense.float() @ b.float()).abs().max())
    print(f"largest difference from the dense product in float32: {gap:.1e}")
    sparse_s = seconds(lambda: a.matmul(b, method=options.method), options.device)
    dense_s = seconds(lambda: dense @ b, options.device)
    useful = 2 * a.blocks * a.block_size**2 * size / sparse_s / 1e12
    print(f"kvcomp {sparse_s * 1e3:.3f} ms, {useful:.3g} useful TFLOPS; dense {dense_s * 1e3:.3f} ms: "
          f"{dense_s / sparse_s:.2f} times faster")  # fmt: skip
    return 0 if gap < 0.01 else 1


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str, calls: int = 10) -> float:
    """A call's mean over ten that follow each other; ``kvcomp bench bsr`` measures more carefully."""
    for _ in range(3):
        call()
    wait(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - begin) / calls


if __name__ == "__main__":
    sys.exit(main())
