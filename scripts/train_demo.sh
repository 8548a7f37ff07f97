#!/usr/bin/env bash
# The main job: trains a small Llama-shaped GPT on the bytes of the King James Bible and writes a sample.
#   scripts/train_demo.sh STROBE      STROBE: the built command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
strobe=$1
out=out/demo

mkdir -p out
[ -s out/kjv.txt ] || scripts/kjv_text.sh out/kjv.txt
"$strobe" train --data out/kjv.txt --out "$out" --overwrite \
    --arch llama --layers 4 --hidden 192 --heads 6 --context 256 \
    --steps 300 --batch 16 --lr 0.003 --warmup 30 --eval-every 100 --save-every 100
echo
echo "A sample:"
"$strobe" generate --checkpoint "$out" --prompt "In the beginning" --tokens 400 --temperature 0.7
