#!/usr/bin/env bash
# Everything that needs a CUDA card, in one call of at most eight minutes: correctness first, then figures, each step with a time
# limit and its result written at once under $OUT. Arguments name the steps to run; without any, all do.
#     benchmarks/gpu.sh [--dry] [machine] [tests] [order] [figures] [kv]
# --dry runs the same on the pretended card, on tiny sizes: it shows that nothing in here is broken, and no figure.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1

python=(python3)
module=(-m)
figures=(--size 4GB)
kv=(--tokens 16384)
if [ "${1:-}" = --dry ]; then
  shift
  : "${OUT:=$(mktemp -d)}"
  python=(.venv/bin/python)
  module=(-m tests.pretended.run)
  "${python[@]}" -c 'import json; from tests.scheduler.machines import LAPTOP; print(json.dumps(LAPTOP.to_dict()))' > "$OUT/hardware.json"
  figures=(--size 60MB --gpu-memory 24MiB --tokens 3 --prompt-tokens 64 --hardware "$OUT/hardware.json")
  kv=(--tokens 1024)
fi
: "${OUT:=benchmarks/results}"
chosen=("$@")

step() {
  local name=$1 seconds=$2
  shift 2
  if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then return; fi
  local begun=$SECONDS
  timeout --kill-after=5 "$seconds" "$@" > "$OUT/$name.txt" 2>&1
  echo "== $name: exit $? after $((SECONDS - begun)) s"
  tail -n "${TAIL:-25}" "$OUT/$name.txt"
}

tested=(-m gpu -q -n 8 --dist worksteal --tb=short -p no:benchmark)
[ ${#module[@]} -gt 1 ] && tested=(-p tests.pretended.plugin -m gpu -q -n 2 --dist worksteal --tb=short)

step machine 20 bash -c 'nvidia-smi; lscpu | grep -E "Model name|^CPU\(s\)"; free -g; python3 -m pip list 2>/dev/null | grep -iE "^(torch|transformers|accelerate|peft|numpy) "'
step tests 180 "${python[@]}" -m pytest tests/gpu "${tested[@]}"
# torch's own check of the order, on the kinds of copies that there are. The pretended card makes its own.
[ ${#module[@]} -eq 1 ] && TORCH_CUDA_SANITIZER=1 step order 60 "${python[@]}" -m pytest tests/gpu/test_cuda.py tests/gpu/test_kv.py "${tested[@]}" -k "test_identical and llama and fp32"
step figures 150 "${python[@]}" "${module[@]}" benchmarks.gpu "${figures[@]}" --rounds 1 --out "$OUT/gpu.json"
step kv 60 "${python[@]}" "${module[@]}" benchmarks.kv_gpu "${kv[@]}" --rounds 1 --output "$OUT/kv-gpu.json"
