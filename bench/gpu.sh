#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU, under 9 minutes, from the source tree and without a network:
#   bench/gpu.sh OUTDIR
# runs the GPU tests, then times every kernel and strategy; leaves JSON and logs in OUTDIR and prints a short table last.
set -uo pipefail
out=$(realpath "${1:?usage: bench/gpu.sh OUTDIR}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.__version__, torch.cuda.get_device_name())' || exit 2
# Most of the time goes into compiling, one kernel after the other in each process: several share it.
tests=0
pids=()
for dtype in float16 bfloat16 float32; do
  for strategy in assemble fused; do
    timeout 250 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider -o addopts= tests/gpu \
      -k "test_contract and $dtype and $strategy" >"$out/contract_${dtype}_$strategy.log" 2>&1 &
    pids+=($!)
  done
done
timeout 250 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider -o addopts= tests/gpu -k "not test_contract" >"$out/others.log" 2>&1 &
pids+=($!)
for pid in "${pids[@]}"; do wait "$pid" || tests=$?; done
tail -qn 6 "$out"/*.log
timeout 270 "$python" -m bench.gpu_ops --out "$out/gpu_ops.json" 2>"$out/gpu_ops.err"
ops=$?
[ $ops -eq 0 ] || tail -n 20 "$out/gpu_ops.err"
echo "tests: exit $tests, timings: exit $ops; logs and JSON in $out"
[ $tests -eq 0 ] && [ $ops -eq 0 ]
