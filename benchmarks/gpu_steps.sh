# What gpu.sh and gpu_again.sh share: --dry, $OUT, the sizes, and a step with a time limit.
export PYTHONPATH=. PYTHONUNBUFFERED=1

dry=
python=(python3)
module=(-m)
size=12GB
figures=(--size $size)
kv=(--tokens 16384)
tested=(-m gpu -q -n 8 --dist worksteal -p no:benchmark -rf)
if [ "${1:-}" = --dry ]; then
  shift
  dry=1
  : "${OUT:=$(mktemp -d)}"
  python=(.venv/bin/python)
  module=(-m tests.pretended.run)
  if ! why=$("${python[@]}" -c 'from tests.pretended import build; build.built()' 2>&1); then
    echo "skipped: ${why##*$'\n'}"
    exit 0
  fi
  size=60MB
  "${python[@]}" -c 'import json; from tests.scheduler.machines import LAPTOP; print(json.dumps(LAPTOP.to_dict()))' > "$OUT/hardware.json"
  figures=(--size $size --gpu-memory 24MiB --cpu-memory 2GiB --tokens 3 --prompt-tokens 32 --hardware "$OUT/hardware.json")
  kv=(--tokens 1024 --ours-only)
  tested=(-p tests.pretended.plugin -m gpu -q -n 2 --dist worksteal -rf)
fi
: "${OUT:=benchmarks/results}"
chosen=("$@")
failed_steps=0

wanted() {
  [ ${#chosen[@]} -eq 0 ] || [[ " ${chosen[*]} " == *" $1 "* ]]
}

step() {
  local name=$1 seconds=$2
  shift 2
  wanted "$name" || return 0
  # A processor emulates the card, and some need minutes for products in bf16: there the limit only ends what hangs.
  [ -n "$dry" ] && seconds=$((6 * seconds))
  local begun=$SECONDS
  timeout --kill-after=5 "$seconds" "$@" > "$OUT/$name.txt" 2>&1
  local status=$?
  [ $status -eq 0 ] || failed_steps=$((failed_steps + 1))
  echo "== $name: exit $status after $((SECONDS - begun)) s"
  tail -n "${TAIL:-25}" "$OUT/$name.txt"
}
