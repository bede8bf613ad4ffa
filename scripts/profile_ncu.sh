#!/usr/bin/env bash
# Profiles kernels with Nsight Compute and writes one CSV line for each launch: time, SM, DRAM and L2 throughput (percent
# of peak), L2 hit rate, achieved occupancy, registers and shared memory.
#
#   scripts/profile_ncu.sh [-o FILE.csv] [-k KERNEL_REGEX] [-c LAUNCHES] [-s SKIPPED] [COMMAND ...]
#
# COMMAND: what to profile (default: scripts/quickstart_bsr.py --device cuda --method sparse --calls 8). Exit codes: 0;
# 1 the command or ncu failed; 2 bad arguments, no ncu, or no permission to read the GPU's counters.
set -euo pipefail

output=profile_ncu.csv kernels='regex:(bsr_wgmma|mma|sddmm)_kernel' launches=5 skipped=3
refuse() {
    echo "profile_ncu: $1" >&2
    exit 2
}
while getopts ":o:k:c:s:" flag; do
    case $flag in
        o) output=$OPTARG ;;
        k) kernels=regex:$OPTARG ;;
        c) launches=$OPTARG ;;
        s) skipped=$OPTARG ;;
        *) refuse "-$OPTARG: expected -o FILE, -k REGEX, -c LAUNCHES or -s SKIPPED, got another flag or no value" ;;
    esac
done
shift $((OPTIND - 1))
[[ $launches =~ ^[1-9][0-9]*$ ]] || refuse "-c: expected a number of 1 or more, got $launches"
[[ $skipped =~ ^[0-9]+$ ]] || refuse "-s: expected a number of 0 or more, got $skipped"
folder=$(dirname -- "$output")
if [[ -d $output ]] || ! mkdir -p -- "$folder" 2>/dev/null || [[ ! -w $folder ]]; then
    refuse "-o: expected the name of a file that can be written, got $output"
fi

ncu=$(command -v ncu || true)
for folder in "${CUDA_HOME:-/usr/local/cuda}/bin" /opt/nvidia/nsight-compute/*; do
    [[ -z $ncu && -x $folder/ncu ]] && ncu=$folder/ncu
done
[[ -n $ncu ]] || refuse "ncu: expected NVIDIA Nsight Compute on PATH or in the CUDA toolkit, got none"

if (($# == 0)); then
    set -- python3 "$(dirname "$0")/quickstart_bsr.py" --device cuda --method sparse --calls 8
fi
metrics=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed,lts__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,lts__t_sector_hit_rate.pct,sm__warps_active.avg.pct_of_peak_sustained_active
metrics+=,launch__registers_per_thread,launch__shared_mem_per_block

raw=$(mktemp)
trap 'rm -f "$raw"' EXIT
status=0
# Clocks as they are in use, not locked to the base clock.
"$ncu" --clock-control none --csv --page raw --print-units base --target-processes all --kernel-name "$kernels" --launch-skip "$skipped" \
    --launch-count "$launches" --metrics "$metrics" "$@" >"$raw" || status=$?
if grep -q ERR_NVGPUCTRPERM "$raw"; then
    refuse "ncu: expected permission to read the GPU's counters (root, or NVreg_RestrictProfilingToAdminUsers=0), got none"
fi
if ((status != 0)); then
    grep '^==' "$raw" >&2 || true
    echo "profile_ncu: ncu: expected $* to be profiled, got exit code $status" >&2
    exit 1
fi

PROFILE_RAW=$raw PROFILE_OUTPUT=$output PROFILE_KERNELS=${kernels#regex:} python3 - <<'PYTHON'
import csv
import os
import sys

COLUMNS = {
    "time_us": ("gpu__time_duration.sum", 1e-3),
    "sm_pct": ("sm__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "dram_pct": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_pct": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_hit_pct": ("lts__t_sector_hit_rate.pct", 1),
    "occupancy_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "registers": ("launch__registers_per_thread", 1),
    "shared_bytes": ("launch__shared_mem_per_block", 1),
}
# What the program itself printed, and ncu's own lines, stand before the table.
lines = open(os.environ["PROFILE_RAW"], encoding="utf-8").read().splitlines()
start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
table = list(csv.DictReader(lines[start:])) if start is not None else []
launches = [row for row in table if row.get("ID")]  # the line behind the header names the units
if not launches:
    sys.exit(f"profile_ncu: -k: expected a launch of a kernel like {os.environ['PROFILE_KERNELS']}, got none")


def number(row, name, factor):
    text = (row.get(name) or "").replace(",", "")
    try:
        return f"{float(text) * factor:.6g}"
    except ValueError:
        return ""


with open(os.environ["PROFILE_OUTPUT"], "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["kernel", *COLUMNS])
    for row in launches:
        writer.writerow([row["Kernel Name"], *(number(row, *metric) for metric in COLUMNS.values())])
print(open(os.environ["PROFILE_OUTPUT"], encoding="utf-8").read(), end="")
PYTHON
