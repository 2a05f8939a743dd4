#!/usr/bin/env bash
# Everything that needs a CUDA card, in one call: correctness first, then figures, as JSON under $OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:=benchmarks/results}"
export PYTHONPATH=.
nvidia-smi > "$OUT/machine.txt"
python -m pytest tests/gpu -m gpu -q 2>&1 | tee "$OUT/tests.txt"
python -m benchmarks.gpu --size 8GB --rounds 5 --out "$OUT/gpu.json"
python -m benchmarks.kv_gpu --output "$OUT/kv-gpu.json"
