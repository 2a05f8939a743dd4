#!/usr/bin/env bash
# What failed on a card, once more and in full, in at most four minutes: the tests and the cases that FOLDER, which gpu.sh filled,
# calls failed. Results go to $OUT.
#     benchmarks/gpu_again.sh [--dry] FOLDER
set -uo pipefail
cd "$(dirname "$0")/.."
source benchmarks/gpu_steps.sh
before=${chosen[0]:?give the folder that gpu.sh filled}
chosen=()

mapfile -t failed < <(sed -n 's/^FAILED \([^ ]*\).*/\1/p' "$before/tests.txt" 2> /dev/null | sort -u)
mapfile -t cases < <("${python[@]}" -c 'import json, sys; print(*json.load(open(sys.argv[1]))["failed"], sep="\n")' "$before/gpu.json" 2> /dev/null | grep .)
echo "${#failed[@]} tests and ${#cases[@]} cases failed"

[ ${#failed[@]} -gt 0 ] && step again 120 "${python[@]}" -m pytest "${failed[@]}" "${tested[@]}" --tb=long -x --maxfail=6
[ ${#cases[@]} -gt 0 ] && step cases 110 "${python[@]}" "${module[@]}" benchmarks.gpu "${figures[@]}" --rounds 1 --cases "${cases[@]}" --out "$OUT/gpu-again.json"
exit "$failed_steps"
