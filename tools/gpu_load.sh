#!/usr/bin/env bash
# Compare ways of loading on the GPUs of this machine; installs nothing. Each call ends within 10 minutes.
#
#   tools/gpu_load.sh OUT 8b [RANKS]    this project, accelerate and fsdp_qlora's way, with training and profiles
#   tools/gpu_load.sh OUT loads [RANKS] several turns of every way, in the same processes, without training
#   tools/gpu_load.sh OUT 70b           on two GPUs as if they had 24 GiB each, with activation checkpointing
#   tools/gpu_load.sh OUT tiny [RANKS]  smoke test of all of this with a tiny model on CPUs
#
# Checkpoints are made in WORK (default /dev/shm; 15 GB and 138 GB) and kept for the next call. PYTHON names the
# interpreter. OUT gets JSON, Markdown and SVG of each comparison, and a folder of profiles.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -lt 2 || ! $2 =~ ^(8b|loads|70b|tiny)$ ]]; then
  echo "usage: $0 OUT 8b|loads|70b|tiny [RANKS]" >&2
  exit 2
fi
out=$(realpath -m "$1")
size=$2
ranks=${3:-2}
work=${WORK:-/dev/shm}
python=${PYTHON:-python3}
device=cuda
processes=4
length=1024
model=llama-$size
if [[ $size == tiny ]]; then
  device=cpu processes=1 length=64
elif [[ $size == loads ]]; then
  model=llama-8b
fi
checkpoint=$work/$model

mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

started=$SECONDS
"$python" tools/make_checkpoint.py synthetic "$checkpoint" --shape "$model" --device "$device" \
  --processes "$processes"
echo "checkpoint: $((SECONDS - started)) s"

# compare NAME OPTION...: a failing way is in the results, and the next comparison runs anyway.
compare() {
  local name=$1
  shift
  "$python" tools/bench_load.py compare --checkpoint "$checkpoint" --device "$device" --ranks "$ranks" \
    --length "$length" --json "$out/$name.json" --markdown "$out/$name.md" --svg "$out/$name.svg" "$@" ||
    echo "$name: some ways gave no figures" >&2
}

ways=read,sharded,rank0-cpu,replicated,replicated-fsdp2,seed,accelerate-fsdp1,accelerate-fsdp2
ours=sharded
if [[ $ranks == 1 ]]; then
  ours=unsharded
fi

# The most important comparison first: if the machine is taken away, only the rest stays unmeasured.
training() {
  compare "$size-x$ranks" --ways "$ours,accelerate-fsdp2,seed" --steps 12 --limit 90
  compare "$size-x$ranks-profiles" --ways "$ours,accelerate-fsdp2" --steps 4 --profile "$out/profiles-$size-x$ranks" \
    --limit 120
}
loads() {
  compare "$size-x$ranks-loads" --ways "$ours,accelerate-fsdp2" --together --repeats 5 --steps 0 --limit 200
  compare "$size-x$ranks-all-loads" --ways "$ways" --together --repeats 3 --steps 0 --limit 400
}
capped() {
  compare "$size-x$ranks-capped" --ways sharded --memory-cap 24 --activation-checkpointing --steps 3 --limit 120
  compare "$size-x$ranks-capped-fsdp1" --ways rank0-cpu,seed --memory-cap 24 --steps 0 --limit 150
  compare "$size-x$ranks-capped-accelerate" --ways accelerate-fsdp2 --memory-cap 24 --steps 0 --limit 150
}

case $size in
  8b) training ;;
  loads) loads ;;
  70b) capped ;;
  tiny) training && loads && capped ;;
esac
