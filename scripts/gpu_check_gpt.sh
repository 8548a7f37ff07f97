#!/usr/bin/env bash
# On a machine with a CUDA GPU: holds the trainer's GPU side against its CPU side. Operators, passes and steps by
# gpt_cuda_tests; then whole runs of `strobe train`: the same on both, resumed across devices, killed and resumed, and text from both.
#   scripts/gpu_check_gpt.sh BIN [TEXT]     BIN: folder of the built programs; TEXT: a text file or folder (default: docs/)
set -euo pipefail
bin=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
text=${2:-docs}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export STROBE_CACHE=$work/cache

shards=()
for i in 0 1 2 3; do
    GTEST_TOTAL_SHARDS=4 GTEST_SHARD_INDEX=$i "$bin/gpt_cuda_tests" --gtest_brief=1 &
    shards+=($!)
done
for shard in "${shards[@]}"; do wait "$shard"; done

train() {  # FOLDER DEVICE [OPTION...]
    local out=$1 device=$2
    shift 2
    "$bin/strobe" train --quiet --data "$text" --out "$work/$out" --device "$device" --layers 3 --hidden 256 --heads 4 --context 256 \
        --batch 4 --steps 40 --warmup 10 --lr 3e-4 --save-every 20 --eval-every 0 "$@" >"$work/$out.txt"
}
resume() {  # FROM FOLDER DEVICE [OPTION...]: goes on from step 20 of FROM
    local from=$1 out=$2 device=$3
    shift 3
    mkdir -p "$work/$out"
    cp -r "$work/$from/step-00000020" "$work/$out/"
    "$bin/strobe" train --quiet --resume --data "$text" --out "$work/$out" --device "$device" "$@" >"$work/$out.txt"
}
killed() {  # FOLDER DEVICE [OPTION...]: killed -9 when a checkpoint of step 3, 12, 21, 33 is there, then left to finish
    local out=$1 kills=0 newest
    for step in 3 12 21 33; do
        train "$@" --resume --save-every 3 &
        local run=$!
        while kill -0 $run 2>/dev/null; do
            newest=$(ls "$work/$out" 2>/dev/null | grep '^step-' | tail -n 1 || true)
            [[ ! $newest < step-$(printf %08d $step) ]] && break
            sleep 0.01
        done
        pkill -KILL -P $run && kills=$((kills + 1))  # the program that this shell's job is
        wait $run 2>/dev/null || true
    done
    train "$@" --resume --save-every 3
    echo "killed -9 and resumed: $kills times"
    [ $kills -gt 0 ]
}
train cpu cpu
train cuda cuda
train cuda-again cuda
killed cuda-killed cuda
train cuda-fp32 cuda --precision fp32
train cuda-moments cuda --moments bf16
train cuda-narrow cuda --moments bf16 --gradients bf16 --recompute norms
narrowest=(--moments bf16 --gradients bf16 --masters bf16 --recompute norms)
train cuda-narrowest cuda "${narrowest[@]}"
train cuda-rows cuda --across-documents
train cpu-rows cpu --across-documents
resume cpu cpu-to-cuda cuda
resume cuda cuda-to-cpu cpu
resume cuda cuda-to-cuda cuda
resume cuda-narrowest cuda-narrowest-resumed cuda "${narrowest[@]}"
for device in cpu cuda; do
    "$bin/strobe" generate --checkpoint "$work/cpu" --device "$device" --precision fp32 --temperature 0 --tokens 60 --prompt "The " --json >"$work/text-$device.json"
done

python3 - "$work" <<'PYTHON'
import json, pathlib, sys

work = pathlib.Path(sys.argv[1])


def losses(name):
    lines = [json.loads(line) for line in (work / name / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


failed = False
# From one start, over ten steps: later ones depend on how a fresh model's steps have amplified the roundings of the first.
for name, other, tolerance in [("cuda-fp32", "cpu", 1e-3), ("cuda", "cpu", 1e-2), ("cuda-moments", "cpu", 1e-2),
                               ("cuda-narrow", "cpu", 1e-2), ("cuda-narrowest", "cpu", 1e-2), ("cuda-rows", "cpu-rows", 1e-2),
                               ("cpu-to-cuda", "cpu", 1e-2), ("cuda-to-cpu", "cuda", 1e-2)]:
    reference = losses(other)
    apart = [abs(loss / reference[step] - 1) for step, loss in sorted(losses(name).items())]
    good = max(apart[:10]) <= tolerance
    failed |= not good
    print(f"{name:<14} losses within {max(apart[:10]):.2e} of those of {other} in ten steps ({'good' if good else 'BEYOND'} {tolerance}), {max(apart):.2e} in {len(apart)}")
same = losses("cuda") == losses("cuda-again")
resumed = losses("cuda-killed") == losses("cuda") and all(
    losses(name)[step] == loss for name, again in [("cuda", "cuda-to-cuda"), ("cuda-narrowest", "cuda-narrowest-resumed")] for step, loss in losses(again).items())
texts = [json.loads((work / f"text-{device}.json").read_text())["tokens"] for device in ("cpu", "cuda")]
print(f"two runs on the GPU alike bit for bit: {same}; a resumed and a killed one too: {resumed}; same text from both devices: {texts[0] == texts[1]}")
sys.exit(failed or not same or not resumed or texts[0] != texts[1])
PYTHON
