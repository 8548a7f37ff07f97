#!/usr/bin/env bash
# On a machine with a CUDA GPU: builds strobe with its kernels and runs every check of theirs (the case list against the specification,
# races, determinism, graphs, streams and threads, 64k tokens, compute-sanitizer), holds the trainer's GPU side against its CPU side, and
# runs the benchmark grid. Records go to results/<gpu>/check-<commit>.json and bench-<commit>.json.
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
cmake --preset cuda -DSTROBE_BUILD_GPT=$gpt -DSTROBE_BUILD_TESTS=ON -DSTROBE_SM80_ARCHS="${STROBE_SM80_ARCHS:-90}" >/dev/null
cmake --build --preset cuda --target "${targets[@]}" -- --quiet
bin=build/cuda/bin
"$bin/strobe" info
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
status=0
"$bin/gpu_check" "${filter[@]}" --sanitizer "$sanitizer" --commit "$commit" --json "$output/$gpu/check-$commit.json" || status=$?
# Where another family comes first, the one that serves every other GPU is held to the same.
"$bin/gpu_check" "${filter[@]}" --implementation sm80 --parts cases,races,determinism --commit "$commit" \
    --json "$output/$gpu/check-sm80-$commit.json" || status=$?
if [ "$gpt" = ON ]; then
    scripts/gpu_check_gpt.sh "$bin" || status=$?
fi
if [ "$bench" = yes ]; then
    "$bin/strobe" bench --device cuda --seconds 0.2 --json "$output/$gpu/bench-$commit.json" || status=$?
fi
exit "$status"
