#!/usr/bin/env bash
# Everything that needs a CUDA card, in one call of at most eight minutes: correctness first, then figures, each step with a time
# limit and its result written at once under $OUT. Arguments name the steps to run; without any, all do.
#     benchmarks/gpu.sh [--dry] [machine] [tests] [order] [figures] [kv]
# --dry runs the same on the pretended card, on tiny sizes: it shows that nothing in here is broken, and no figure.
# What failed is run again by benchmarks/gpu_again.sh; docs/verification.md is filled by `python -m benchmarks.verified $OUT`.
set -uo pipefail
cd "$(dirname "$0")/.."
source benchmarks/gpu_steps.sh

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The checkpoint is made beside the tests.
if wanted figures; then
  "${python[@]}" -m offload.cli.main synth "$scratch/model" --size "$size" > "$OUT/synth.txt" 2>&1 &
fi

step machine 20 bash -c 'nvidia-smi; lscpu | grep -E "Model name|^CPU\(s\)"; free -g; python3 -m pip list 2>/dev/null | grep -iE "^(torch|transformers|accelerate|peft|numpy) "'
step tests 150 "${python[@]}" -m pytest tests/gpu "${tested[@]}"
# torch's own check of the order, on the kinds of copies that there are. The pretended card makes its own.
[ -z "$dry" ] && TORCH_CUDA_SANITIZER=1 step order 50 "${python[@]}" -m pytest tests/gpu/test_cuda.py tests/gpu/test_kv.py "${tested[@]}" -k "test_identical and llama and fp32"
wait
step figures 200 "${python[@]}" "${module[@]}" benchmarks.gpu --model "$scratch/model" "${figures[@]}" --rounds 1 --out "$OUT/gpu.json"
step kv 50 "${python[@]}" "${module[@]}" benchmarks.kv_gpu "${kv[@]}" --rounds 1 --output "$OUT/kv-gpu.json"
exit "$failed_steps"
