#!/usr/bin/env bash
# Compare ways of training a mixture of experts on the GPUs of this machine; installs nothing.
#
#   tools/gpu_experts.sh OUT qwen    one GPU: Qwen3-30B-A3B, in 24 GiB and beside experts in 16 bits (61 GB in WORK)
#   tools/gpu_experts.sh OUT glm     two GPUs: GLM-4.5-Air, or as many of its layers as WORK holds, on two and on one
#   tools/gpu_experts.sh OUT tiny    smoke test of both with tiny models on CPUs
#
# A call stops what is left after LIMIT seconds (default 570). The same call again goes on with what has not run yet.
# Checkpoints are made in WORK (default /dev/shm) and kept. PYTHON names the interpreter. OUT gets one line of JSON for
# each way (experts.jsonl), one log, the findings of tools/gpu_check.py on experts, and profiles.
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
device=cuda processes=12 steps=6 small=
short=1x1024c long=4x2048c unchecked=1x1024
if [[ $what == tiny ]]; then
  device=cpu processes=1 steps=3 small=--small
  short=1x32c long=2x32c unchecked=1x32
fi
mkdir -p "$out/profiles"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# make FOLDER OPTION...: a complete checkpoint is left alone.
make() {
  local folder=$1 started=$SECONDS
  shift
  timeout -k 10 -s INT 250 "$python" tools/make_checkpoint.py synthetic "$folder" --device "$device" \
    --processes "$processes" "$@" >>"$out/log" 2>&1
  local code=$?
  echo "$folder: exit $code, $((SECONDS - started)) s, $(du -sh "$folder" 2>/dev/null | cut -f1)"
  return $code
}

# check RANKS: every value against bitsandbytes, transformers and PEFT, on tiny models.
check() {
  [[ -e $work/.done-checks-$1 ]] && return
  timeout -k 10 180 "$python" -m torch.distributed.run --standalone --nproc-per-node "$1" tools/gpu_check.py \
    --device "$device" --work "$work/gpu_check" --json "$out/checks-$1.json" --parts experts $small 2>&1 |
    tee "$out/checks-$1.log" | grep -E ' (ok|FAILED) '
  echo "checks on $1: exit ${PIPESTATUS[0]} at $SECONDS s"
  touch "$work/.done-checks-$1"
}

# stage NAME SECONDS OPTION...: one way, unless it has run before or too little of its time is left.
stage() {
  local name=$1 seconds=$2 left=$((limit - SECONDS - 20)) started=$SECONDS
  shift 2
  [[ -e $work/.done-$name ]] && return
  if ((left * 10 < seconds * 6)); then
    echo "$name: left for the next call"
    return
  fi
  ((left < seconds)) && seconds=$left
  timeout -k 10 $((seconds + 15)) "$python" tools/bench_experts.py --device "$device" --steps "$steps" \
    --json "$out/experts.jsonl" --limit "$seconds" "$@" 2>&1 | tee -a "$out/log" | grep -E '^[|]|rror'
  echo "$name: exit ${PIPESTATUS[0]}, $((SECONDS - started)) s; at $SECONDS s"
  touch "$work/.done-$name"
}

# qwen NAME OPTION..., glm NAME OPTION...: of a checkpoint.
qwen() {
  local from="--checkpoint $work/$1"
  check 1 &
  make "$work/$1" --shape "$@" || return
  wait
  stage ours 120 $from --ways ours --batches "$short,$long"
  stage split 120 $from --ways split --batches "$short,$long"
  stage capped 100 $from --ways ours --memory-cap 24 --batches "$short"
  stage fold 150 $from --ways fold --batches "$short,$long"
  stage parametrized 200 $from --ways parametrized --batches "$short,$long"
  stage profiles 120 $from --ways ours,split --batches "$unchecked" --profile "$out/profiles"
}
glm() {
  local from="--checkpoint $work/$1"
  check 2 &
  make "$work/$1" --shape "$@" || return
  wait
  stage glm-on-2 150 $from --ways ours --ranks 2 --batches "$short,$long"
  stage glm-on-1 150 $from --ways ours --batches "$short"
}

case $what in
  qwen) qwen qwen3-30b-a3b --shards 120 ;;
  glm)
    # 199 GiB, of the 256 of the machine; by default only half of them can be used so.
    mount -o remount,size=212G "$work" 2>/dev/null
    free=$(df --output=avail -BG "$work" | tail -1 | tr -dc 0-9)
    layers=$(((free - 8) * 10 / 43))
    ((layers > 46)) && layers=46
    echo "$layers layers"
    glm glm-4.5-air --shards 400 --layers "$layers"
    ;;
  tiny)
    rm -f "$work"/.done-*
    qwen qwen3-moe-tiny
    glm glm4-moe-tiny
    ;;
esac
echo "ended at $SECONDS s"
