#!/usr/bin/env bash
# Tests and measures on a machine with an NVIDIA GPU, from the source tree and without a network, in two calls:
#   bench/gpu.sh 1 OUTDIR     is it right?  then kernels and layers against their floors and peers
#   bench/gpu.sh 2 OUTDIR     whole steps, inference, tiles
#   bench/gpu.sh --rehearse 1 OUTDIR     the same on a machine without a GPU: see docs/gpu-day.md
# Each takes at most 4 minutes, leaves at most 8 files in OUTDIR, says last what it found, and exits with 1 if anything failed.
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
