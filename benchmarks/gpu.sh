#!/usr/bin/env bash
# Everything that needs a CUDA card, in one call of a few minutes: correctness first, then figures, each step with a time limit
# and its result written at once under $OUT. Arguments name the steps to run; without any, all do.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:=benchmarks/results}"
export PYTHONPATH=. PYTHONUNBUFFERED=1

step() {
  local name=$1 seconds=$2
  shift 2
  if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then return; fi
  local begun=$SECONDS
  timeout --kill-after=5 "$seconds" "$@" > "$OUT/$name.txt" 2>&1
  echo "== $name: exit $? after $((SECONDS - begun)) s"
  tail -n "${TAIL:-25}" "$OUT/$name.txt"
}

chosen=("$@")
step machine 20 bash -c 'nvidia-smi; lscpu | grep -E "Model name|^CPU\(s\)"; free -g; python3 -m pip list 2>/dev/null | grep -iE "^(torch|transformers|accelerate|peft|numpy) "'
step tests 240 python3 -m pytest tests/gpu -m gpu -q -n 8 --dist worksteal --tb=short -p no:benchmark
step figures 150 python3 -m benchmarks.gpu --size 4GB --rounds 1 --out "$OUT/gpu.json"
step kv 40 python3 -m benchmarks.kv_gpu --tokens 16384 --rounds 1 --output "$OUT/kv-gpu.json"
