#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU, under 9 minutes, from the source tree and without a network:
#   bench/gpu.sh OUTDIR
# runs the GPU tests and the sanitizer, tunes tiles where there are none for this GPU, times kernels against their
# floors and everyone against everyone; leaves six files in OUTDIR and prints a short table last.
set -uo pipefail
out=$(realpath "${1:?usage: bench/gpu.sh OUTDIR}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.__version__, torch.cuda.get_device_name())' || exit 2
logs=$(mktemp -d)
gpu_tests=("$python" -m pytest -q --maxfail=20 -p no:cacheprovider -o addopts= tests/gpu)

# 1. Correctness. Most of the time goes into compiling, one kernel after the other in each process: several share it.
tests=0
pids=()
for dtype in float16 bfloat16 float32; do
  for strategy in assemble fused; do
    timeout 150 "${gpu_tests[@]}" -k "test_contract and $dtype and $strategy" >"$logs/contract_${dtype}_$strategy.log" 2>&1 &
    pids+=($!)
  done
done
timeout 150 "${gpu_tests[@]}" -k "not test_contract" >"$logs/others.log" 2>&1 &
pids+=($!)
for pid in "${pids[@]}"; do wait "$pid" || tests=$?; done
tail -qn 3 "$logs"/*.log

# 2. Memory errors and races; the kernels were compiled above.
sanitizer=skipped
if command -v compute-sanitizer >/dev/null; then
  pids=()
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool $tool --error-exitcode 9 \
      "${gpu_tests[@]}" -k "test_merging or (test_same_call_same_bits and lora_3-lora_3)" >"$logs/sanitizer_$tool.log" 2>&1 &
    pids+=($!)
  done
  sanitizer=0
  for pid in "${pids[@]}"; do wait "$pid" || sanitizer=$?; done
  tail -qn 2 "$logs"/sanitizer_*.log
fi

# 3. Tiles, if this GPU has none of its own. The file is to be committed as glora_kernels/_triton/settings.json.
"$python" -m glora_kernels.tune --missing --seconds 60 --out "$out/settings.json" 2>"$logs/tune.log" || tail -n 5 "$logs/tune.log"

# 4. Times, with nothing beside them. An interrupt lets pytest write what it has.
timeout 90 "$python" -m bench.gpu_ops --out "$out/gpu_ops.json" >"$out/gpu_ops.txt" 2>"$logs/gpu_ops.log"
ops=$?
[ $ops -eq 0 ] || tail -n 20 "$logs/gpu_ops.log"
timeout --signal=INT --kill-after=20 150 "$python" -m pytest -q -p no:cacheprovider bench \
  --device cuda --dtype bfloat16 --shapes vit_b,llama7b,swin_b --rounds 7 --results "$logs/bench" \
  -k "not compiled and not search" >"$logs/bench.log" 2>&1
bench=$?
cp "$logs"/bench/{results.json,table.md} "$out" 2>/dev/null
tar -czf "$out/logs.tar.gz" -C "$logs" --exclude=bench .
sed -n '/ratios of times/,$p' "$logs/bench.log" | head -n 120
head -n 60 "$out/gpu_ops.txt"
echo "tests: exit $tests, sanitizer: $sanitizer, kernels: exit $ops, benches: exit $bench (2: cut by time); files in $out"
[ $tests -eq 0 ] && [ $ops -eq 0 ] && [ "$sanitizer" != 9 ] && { [ $bench -eq 0 ] || [ $bench -eq 2 ]; }
