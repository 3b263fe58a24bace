#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU, under 9 minutes, from the source tree and without a network:
#   bench/gpu.sh OUTDIR
# builds the CUDA extension where nvcc is, runs the GPU tests and the sanitizer, tunes tiles where there are none for this GPU, times kernels against their
# floors and everyone against everyone; leaves a few files in OUTDIR and prints a short table last.
# Exits with 1 if anything failed. Exit 124 of a part: its time was up; what it had is kept.
set -uo pipefail
mkdir -p "${1:?usage: bench/gpu.sh OUTDIR}" && out=$(realpath "$1") || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 GLORA_TESTS=exhaustive
python=${PYTHON:-python3}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.__version__, torch.cuda.get_device_name())' || exit 2
logs=$(mktemp -d)
failed=0
gpu_tests=("$python" -m pytest -q --maxfail=20 -p no:cacheprovider -o addopts= tests/gpu)
finished() { [ "$2" -eq 0 ] || [ "$2" -eq 124 ] || failed=1; echo "$1: exit $2"; }

# 0. The extension, if it can be built here; its tests are skipped otherwise.
if command -v nvcc >/dev/null && "$python" -c 'import setuptools' 2>/dev/null; then
  GLORA_BUILD_CUDA=auto TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print(".".join(map(str, torch.cuda.get_device_capability())))') \
    timeout 150 "$python" setup.py -q build_ext --inplace >"$logs/extension.log" 2>&1
  finished extension $?
else
  echo "extension: skipped, nvcc or setuptools is not here"
fi

# 1. Correctness. Most of the time goes into compiling, one kernel after the other in each process: several share it.
declare -A pids
for dtype in float16 bfloat16 float32; do
  for strategy in assemble fused; do
    timeout 150 "${gpu_tests[@]}" -k "test_contract and torch.$dtype and $strategy" >"$logs/contract_${dtype}_$strategy.log" 2>&1 &
    pids["tests $dtype $strategy"]=$!
  done
done
timeout 150 "${gpu_tests[@]}" -k "not test_contract" >"$logs/others.log" 2>&1 &
pids["other tests"]=$!
for part in "${!pids[@]}"; do wait "${pids[$part]}"; finished "$part" $?; done

# 2. Memory errors and races; the kernels were compiled above.
if command -v compute-sanitizer >/dev/null; then
  pids=()
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool $tool --error-exitcode 9 \
      "${gpu_tests[@]}" -k "test_merging" >"$logs/sanitizer_$tool.log" 2>&1 &
    pids["sanitizer $tool"]=$!
  done
  for part in "${!pids[@]}"; do wait "${pids[$part]}"; finished "$part" $?; done
else
  echo "sanitizer: skipped, compute-sanitizer is not here"
fi

# 3. Tiles, if this GPU has none of its own: to be committed as glora_kernels/planning/settings.json. What follows here
# still runs with those of its nearest relative.
timeout 80 "$python" -m glora_kernels.tune --missing --seconds 60 --out "$out/settings.json" >"$logs/tune.log" 2>&1
finished tune $?

# 4. Times, with nothing beside them. An interrupt lets pytest write what it has.
timeout 90 "$python" -m bench.gpu_ops --out "$out/gpu_ops.json" >"$logs/gpu_ops.txt" 2>"$logs/gpu_ops.log"
finished kernels $?
timeout --signal=INT --kill-after=20 140 "$python" -m pytest -q -p no:cacheprovider bench \
  --device cuda --dtype bfloat16 --shapes vit_b,llama7b,swin_b --rounds 7 --results "$logs/bench" \
  -k "not compiled and not search" >"$logs/bench.log" 2>&1
finished benches $?
cp "$logs"/bench/{results.json,table.md} "$out" || failed=1
tar -czf "$out/logs.tar.gz" -C "$logs" --exclude=bench .
tail -qn 3 "$logs"/contract_*.log "$logs/others.log" "$logs"/sanitizer_*.log 2>/dev/null
sed -n '/ratios of times/,$p' "$logs/bench.log" | head -n 120
head -n 60 "$logs/gpu_ops.txt"
echo "failed: $failed; files in $out"
exit $failed
