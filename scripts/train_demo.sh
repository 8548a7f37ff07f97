#!/usr/bin/env bash
# The main job: trains a small Llama-shaped GPT on the bytes of the King James Bible and writes a sample.
#   scripts/train_demo.sh STROBE      STROBE: the built command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
strobe=$1
out=out/demo

mkdir -p out
[ -s out/kjv.txt ] || scripts/kjv_text.sh out/kjv.txt
# 0.84 M parameters read 3 M bytes in small steps: with minutes of two cores, more steps gain more than a larger model.
"$strobe" train --data out/kjv.txt --out "$out" --overwrite \
    --arch llama --layers 4 --hidden 128 --heads 4 --context 256 --init-std 0.05 \
    --steps 1500 --batch 8 --lr 0.005 --final-lr 0.02 --warmup 60 --eval-every 250 --eval-rows 64 --save-every 500
echo
echo "A sample:"
"$strobe" generate --checkpoint "$out" --prompt "In the beginning" --tokens 400 --temperature 0.7
