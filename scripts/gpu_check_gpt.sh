#!/usr/bin/env bash
# On a machine with a CUDA GPU: holds the trainer's GPU side against its CPU side. Operators, passes and steps by
# gpt_cuda_tests; then whole runs of `strobe train`: the same on both, resumed across devices, and text from both.
#   scripts/gpu_check_gpt.sh BIN [TEXT]     BIN: folder of the built programs; TEXT: a text file or folder (default: docs/)
set -euo pipefail
bin=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
text=${2:-docs}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export STROBE_CACHE=$work/cache

"$bin/gpt_cuda_tests" --gtest_brief=1

train() {  # FOLDER DEVICE [OPTION...]
    local out=$1 device=$2
    shift 2
    "$bin/strobe" train --quiet --data "$text" --out "$work/$out" --device "$device" --layers 3 --hidden 256 --heads 4 --context 256 \
        --batch 4 --steps 40 --warmup 5 --save-every 20 --eval-every 0 "$@" >"$work/$out.txt"
}
resume() {  # FROM FOLDER DEVICE: goes on from step 20 of FROM
    mkdir -p "$work/$2"
    cp -r "$work/$1/step-00000020" "$work/$2/"
    "$bin/strobe" train --quiet --resume --data "$text" --out "$work/$2" --device "$3" >"$work/$2.txt"
}
train cpu cpu
train cuda cuda
train cuda-again cuda
train cuda-fp32 cuda --precision fp32
resume cpu cpu-to-cuda cuda
resume cuda cuda-to-cpu cpu
resume cuda cuda-to-cuda cuda
for device in cpu cuda; do
    "$bin/strobe" generate --checkpoint "$work/cpu" --device "$device" --precision fp32 --temperature 0 --tokens 60 --prompt "The " --json >"$work/text-$device.json"
done

python3 - "$work" <<'PYTHON'
import json, pathlib, sys

work = pathlib.Path(sys.argv[1])


def losses(name):
    lines = [json.loads(line) for line in (work / name / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


reference, failed = losses("cpu"), False
for name, tolerance in [("cuda-fp32", 1e-3), ("cuda", 1e-2), ("cpu-to-cuda", 1e-2), ("cuda-to-cpu", 1e-2)]:
    worst = max(abs(loss / reference[step] - 1) for step, loss in losses(name).items())
    good = worst <= tolerance
    failed |= not good
    print(f"{name:<12} {len(losses(name))} steps, losses within {worst:.2e} of the CPU's ({'good' if good else 'BEYOND'} {tolerance})")
same = losses("cuda") == losses("cuda-again")
resumed = all(losses("cuda")[step] == loss for step, loss in losses("cuda-to-cuda").items())
texts = [json.loads((work / f"text-{device}.json").read_text())["tokens"] for device in ("cpu", "cuda")]
print(f"two runs on the GPU alike bit for bit: {same}; a resumed one too: {resumed}; same text from both devices: {texts[0] == texts[1]}")
sys.exit(failed or not same or not resumed or texts[0] != texts[1])
PYTHON
