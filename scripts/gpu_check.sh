#!/usr/bin/env bash
# On a machine with a CUDA GPU: builds strobe with its kernels and holds the whole case list against the specification on the
# device, and the trainer's GPU side against its CPU side; then runs the benchmark grid. Records go to results/<gpu>/check-<commit>.json and bench-<commit>.json.
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
targets=(strobe_cli)
if pkg-config --exists openblas libpcre2-8 2>/dev/null; then
    gpt=ON
    targets+=(gpt_cuda_tests)
else
    echo "gpu_check: no OpenBLAS and PCRE2 here: the trainer is left out"
fi
cmake --preset cuda -DSTROBE_BUILD_GPT=$gpt -DSTROBE_BUILD_TESTS=$gpt -DSTROBE_SM80_ARCHS="${STROBE_SM80_ARCHS:-90}" >/dev/null
cmake --build --preset cuda --target "${targets[@]}" -- --quiet
strobe=build/cuda/bin/strobe
"$strobe" info
status=0
"$strobe" verify --device cuda "${filter[@]}" --json "$output/$gpu/check-$commit.json" || status=$?
if [ "$gpt" = ON ]; then
    scripts/gpu_check_gpt.sh build/cuda/bin || status=$?
fi
if [ "$bench" = yes ]; then
    "$strobe" bench --device cuda --seconds 0.2 --json "$output/$gpu/bench-$commit.json" || status=$?
fi
exit "$status"
