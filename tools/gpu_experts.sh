#!/usr/bin/env bash
# Compare ways of training a mixture of experts on the GPUs of this machine; installs nothing.
#
#   tools/gpu_experts.sh OUT qwen    one GPU: Qwen3-30B-A3B, in 24 GiB and beside experts in 16 bits (61 GB in WORK)
#   tools/gpu_experts.sh OUT glm     two GPUs: GLM-4.5-Air, or as many of its layers as WORK holds, on two and on one
#   tools/gpu_experts.sh OUT tiny    smoke test of both with tiny models on CPUs
#
# A call stops what is left after LIMIT seconds (default 570). The same call again goes on with what has not run yet.
# Checkpoints are made in WORK (default /dev/shm) and kept. PYTHON names the interpreter. OUT gets one line of JSON for
# each way (experts.jsonl), tables, the findings of tools/gpu_check.py on experts, logs and profiles.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -ne 2 || ! $2 =~ ^(qwen|glm|tiny)$ ]]; then
  echo "usage: $0 OUT qwen|glm|tiny" >&2
  exit 2
fi
out=$(realpath -m "$1")
what=$2
work=${WORK:-/dev/shm}
python=${PYTHON:-python3}
limit=${LIMIT:-570}
device=cuda processes=12 steps=8
short=1x1024c medium=2x2048c long=4x2048c unchecked=1x1024
if [[ $what == tiny ]]; then
  device=cpu processes=1 steps=3
  short=1x32c medium=1x48c long=2x32c unchecked=1x32
fi
mkdir -p "$out/profiles"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

left() { echo $((limit - SECONDS)); }

# once NAME SECONDS COMMAND...: run a stage, unless it has run here before or less than half of its time is left.
once() {
  local name=$1 seconds=$2 started=$SECONDS
  shift 2
  [[ -e $work/.done-$what-$name ]] && return
  if (($(left) < seconds / 2)); then
    echo "$name: left for the next call"
    return
  fi
  timeout -k 10 "$(($(left) < seconds ? $(left) : seconds))" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - started)) s; at $SECONDS s"
  grep -h '^|' "$out/$name.log"
  touch "$work/.done-$what-$name"
}

# make FOLDER OPTION...: a complete checkpoint is left alone.
make() {
  local folder=$1 started=$SECONDS
  shift
  timeout -k 10 -s INT 250 "$python" tools/make_checkpoint.py synthetic "$folder" --device "$device" \
    --processes "$processes" "$@" >"$out/make.log" 2>&1
  local code=$?
  echo "$folder: exit $code, $((SECONDS - started)) s, $(du -sh "$folder" 2>/dev/null | cut -f1)"
  return $code
}

# check RANKS: every value against bitsandbytes, transformers and PEFT, on tiny models.
check() {
  timeout -k 10 200 "$python" -m torch.distributed.run --standalone --nproc-per-node "$1" tools/gpu_check.py \
    --device "$device" --work "$work/gpu_check" --json "$out/checks-$1.json" --parts experts >"$out/checks-$1.log" 2>&1
  echo "checks on $1: exit $?"
  grep -hE ' (ok|FAILED) ' "$out/checks-$1.log"
}

# bench SECONDS OPTION...
bench() {
  local seconds=$1
  shift
  "$python" tools/bench_experts.py --device "$device" --json "$out/experts.jsonl" --profile "$out/profiles" \
    --steps "$steps" --limit "$seconds" "$@"
}
export -f bench
export python device out steps

qwen() {
  local checkpoint=$work/$1
  check 1 &
  make "$checkpoint" --shape "$1" "${@:2}" || return
  wait
  stage capped 120 --ways ours --memory-cap 24 --batches "$short"
  stage ours 150 --ways ours --batches "$unchecked,$short,$medium,$long"
  stage split 150 --ways split --batches "$unchecked,$short,$medium,$long"
  stage fold 200 --ways fold --batches "$short,$medium,$long"
  stage parametrized 200 --ways parametrized --batches "$short,$medium,$long"
}

glm() {
  local checkpoint=$work/$1
  check 2 &
  make "$checkpoint" --shape "$1" "${@:2}" || return
  wait
  stage glm-2 150 --ways ours --ranks 2 --batches "$short,$long"
  stage glm-1 150 --ways ours --batches "$short"
}

# stage NAME SECONDS OPTION...: one process group of one way, which ends itself before its time is up.
stage() {
  local name=$1 seconds=$2
  shift 2
  once "$name" "$((seconds + 15))" bash -c 'bench "$@"' _ "$seconds" --checkpoint "$checkpoint" "$@"
}

case $what in
  qwen) qwen qwen3-30b-a3b --shards 120 ;;
  glm)
    # 199 GiB, of the 256 of the machine; by default only half of them can be used so.
    mount -o remount,size=212G "$work" 2>/dev/null
    layers=$(df --output=avail -BG "$work" | tail -1 | tr -dc 0-9 | awk '{n = int(($1 - 8) / 4.3); print n > 46 ? 46 : n}')
    echo "$layers layers"
    glm glm-4.5-air --shards 400 --layers "$layers"
    ;;
  tiny)
    qwen qwen3-moe-tiny
    glm glm4-moe-tiny
    ;;
esac
echo "ended at $SECONDS s"
