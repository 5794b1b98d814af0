#!/usr/bin/env bash
# Compare ways to take a training step on the GPUs of this machine; installs nothing.
#
#   tools/gpu_step.sh OUT one     one GPU: this project with its options, stock, Liger, axolotl's kernels, unsloth
#   tools/gpu_step.sh OUT long    one GPU as if it had 24 GiB: 16,384 tokens, and the longest sequence that trains
#   tools/gpu_step.sh OUT two     two GPUs: FSDP2 of this project, of accelerate with Liger, and of unsloth; and its DDP
#   tools/gpu_step.sh OUT more    two GPUs: what `two` has no time for
#   tools/gpu_step.sh OUT tiny    smoke test of all of this with a tiny model on CPUs
#   tools/gpu_step.sh OUT NAME OPTION...    other options for `bench_step.py compare`; one and the like take them too
#
# The 8B checkpoint is made in WORK (default /dev/shm) and kept. PYTHON names the interpreter; PYTHONPATH is where
# unsloth and the like are found: a way whose package is absent fails, and the others go on. LIMIT is how many seconds a
# call may take (default 560). OUT gets NAME.jsonl, .md, .svg and .log of each comparison.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -lt 2 ]]; then
  sed -n '2,/^set/{/^#/p}' "$0" >&2
  exit 2
fi
out=$(realpath -m "$1")
what=$2
work=${WORK:-/dev/shm}
python=${PYTHON:-python3}
limit=${LIMIT:-560}
shape=llama-8b device=cuda processes=8
if [[ $what == tiny ]]; then
  shape=llama-tiny device=cpu processes=1
fi
checkpoint=$work/$shape
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

timeout -k 10 200 "$python" tools/make_checkpoint.py synthetic "$checkpoint" --shape "$shape" --device "$device" \
  --processes "$processes" >"$out/checkpoint.log" 2>&1 || tail -5 "$out/checkpoint.log"
rm -f "$out/checkpoint.log"
echo "checkpoint: at $SECONDS s, $(du -sh "$checkpoint" 2>/dev/null | cut -f1)"

# compare NAME OPTION...: in what is left of the time.
compare() {
  local name=$1 left=$((limit - SECONDS - 15))
  local logs=$work/logs-$name
  shift
  rm -rf "$logs"
  timeout -k 20 $((left + 10)) "$python" tools/bench_step.py compare --checkpoint "$checkpoint" --device "$device" \
    --limit $((left - 20)) --logs "$logs" --json "$out/$name.jsonl" --markdown "$out/$name.md" \
    --svg "$out/$name.svg" "$@"
  echo "$name: exit $? at $SECONDS s"
  tail -n 60 "$logs"/*.log >"$out/$name.log" 2>/dev/null
}

all=fused,liger
one="unsloth ours:$all,offload ours:$all ours:$all,graphs ours:$all,compile stock:liger stock ours stock:axolotl,liger"
long="ours:$all,offload unsloth ours:$all stock:liger"
two="accelerate:liger ours:$all ours:$all,kept ours:$all@1 accelerate ours unsloth:ddp unsloth:sharded"
more="accelerate:liger accelerate:axolotl,liger ours:$all,compile ours:$all,ddp unsloth:fsdp2 unsloth:balanced"

case $what in
  one) compare one --ways "$one" --steps 6 "${@:3}" ;;
  long)
    compare long --ways "$long" --batches 1x16384c --steps 5 --repeats 1 \
      --memory-cap 24 --longest 131072 --turn-limit 240 "${@:3}"
    ;;
  two) compare two --ways "$two" --ranks 2 --steps 6 "${@:3}" ;;
  more) compare more --ways "$more" --ranks 2 --steps 6 "${@:3}" ;;
  tiny)
    compare tiny-one --ways "ours ours:liger stock" --batches 1x32,2x32c --steps 2 --longest 4096
    compare tiny-two --ways "accelerate ours ours:ddp ours@1" --ranks 2 --batches 1x32,2x32c --steps 2
    ;;
  *) compare "${@:2}" ;;
esac
