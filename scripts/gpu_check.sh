#!/usr/bin/env bash
# On a machine with a CUDA GPU: builds strobe with its kernels and holds the whole case list against the specification on the
# device; then runs the benchmark grid. Records go to results/<gpu>/check-<commit>.json and bench-<commit>.json.
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

cmake --preset cuda -DSTROBE_BUILD_GPT=OFF -DSTROBE_SM80_ARCHS="${STROBE_SM80_ARCHS:-90}" >/dev/null
cmake --build --preset cuda --target strobe_cli -- --quiet
strobe=build/cuda/bin/strobe
"$strobe" info
status=0
"$strobe" verify --device cuda "${filter[@]}" --json "$output/$gpu/check-$commit.json" || status=$?
if [ "$bench" = yes ]; then
    "$strobe" bench --device cuda --seconds 0.2 --json "$output/$gpu/bench-$commit.json" || status=$?
fi
exit "$status"
