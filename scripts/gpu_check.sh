#!/usr/bin/env bash
# On a machine with a CUDA GPU: builds strobe with its kernels and runs every check of theirs (the case list against the specification,
# races, determinism, graphs, streams and threads, 64k tokens, compute-sanitizer), holds them to PyTorch through the Python package and the
# trainer's GPU side to its CPU side, and runs the benchmark grid. Records go to results/<gpu>/check-<commit>.json, check-sm80-<commit>.json,
# python-tests-<commit>.json and bench-<commit>.json.
#   scripts/gpu_check.sh [--filter TERMS] [--no-bench] [--output DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

filter=()
bench=yes
output=results
while [ "$#" -gt 0 ]; do
    case "$1" in
        --filter) filter=(--filter "$2"); shift 2 ;;
        --no-bench) bench=no; shift ;;
        --output) output=$2; shift 2 ;;
        *) echo "gpu_check.sh: unknown argument '$1'; possible: --filter TERMS, --no-bench, --output DIR" >&2; exit 2 ;;
    esac
done

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 | head -1 | tr ' /' '--' | tr '[:upper:]' '[:lower:]')
commit=$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo "${STROBE_COMMIT:-unknown}")
mkdir -p "$output/$gpu"

# The trainer needs libraries of its own; without them the rest is checked all the same.
gpt=OFF
targets=(strobe_cli gpu_check)
if pkg-config --exists openblas libpcre2-8 2>/dev/null; then
    gpt=ON
    targets+=(gpt_cuda_tests)
else
    echo "gpu_check: no OpenBLAS and PCRE2 here: the trainer is left out"
fi
# So does the comparison with PyTorch.
python=OFF
if python3 -c 'import sys, torch, pytest, hypothesis; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    python=ON
    targets+=(strobe_torch)
else
    echo "gpu_check: no PyTorch with CUDA, pytest and hypothesis here: the comparison with it is left out"
fi
cmake --preset cuda -DSTROBE_BUILD_PYTHON=$python -DSTROBE_BUILD_GPT=$gpt -DSTROBE_BUILD_TESTS=ON -DSTROBE_SM80_ARCHS="${STROBE_SM80_ARCHS:-90}" >/dev/null
cmake --build --preset cuda --target "${targets[@]}" -- --quiet
bin=build/cuda/bin
"$bin/strobe" info
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
status=0
"$bin/gpu_check" "${filter[@]}" --sanitizer "$sanitizer" --commit "$commit" --json "$output/$gpu/check-$commit.json" || status=$?
# Where another family comes first, the one that serves every other GPU is held to the same.
"$bin/gpu_check" "${filter[@]}" --implementation sm80 --parts cases,races,determinism --commit "$commit" \
    --json "$output/$gpu/check-sm80-$commit.json" || status=$?
if [ "$python" = ON ]; then
    STROBE_BUILD_DIR=$PWD/build/cuda python3 -m pytest -q python/tests -k cuda --record "$output/$gpu/python-tests-$commit.json" || status=$?
fi
if [ "$gpt" = ON ]; then
    scripts/gpu_check_gpt.sh "$bin" || status=$?
fi
if [ "$bench" = yes ]; then
    "$bin/strobe" bench --device cuda --seconds 0.2 --json "$output/$gpu/bench-$commit.json" || status=$?
fi
exit "$status"
