#!/bin/bash
# What needs a GPU: the tests marked gpu, then the sanitizers over one small case of each operation.
# Usage: tests/gpu.sh [folder for the logs]
# racecheck finds hazards in attend and w4 unless the library was built with KVC_RACECHECK (CUDAFLAGS=-DKVC_RACECHECK): it
# does not take __syncwarp for an order between lanes (common.cuh). Some stay, in attend and bsr: it comes last; what they
# are is in experiments/results/h200/gpu_tests.txt.
set -euo pipefail
logs=$(realpath "${1:-.}")
cd "$(dirname "$0")/.."
python3 -m pytest -q -m gpu tests 2>&1 | tee "$logs/gpu_tests.txt"
# Without torch's caching, memory ends where a tensor ends.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck initcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m pytest -q -m gpu tests -k test_small 2>&1 |
        tee "$logs/gpu_$tool.txt"
    grep -qE "ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards" "$logs/gpu_$tool.txt"
done
