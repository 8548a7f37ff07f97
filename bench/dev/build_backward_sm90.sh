#!/bin/bash
# Builds the development driver of the Hopper backward kernels, rows in parallel. Run from the repository root:
#   bench/dev/build_backward_sm90.sh OUT [regular expression on rows] [nvcc flags]
# It prints, per row, ptxas's complaints about serialised wgmma (C75xx) and the spilled bytes.
set -e
out=$1
pattern=${2:-.}
shift
shift || true
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
flags="-gencode=arch=compute_90a,code=sm_90a -std=c++20 -Isrc -Iinclude -I$dir"
grep '^STROBE_VARIANT(sm90, backward' src/variants.def | grep -E "$pattern" > "$dir/backward_sm90_rows.inc"
objects=""
while IFS=',()' read -r _ arch direction dtype dim mask features m n stages warps keys _; do
    keys=${keys// /}
    name="${dtype}_${dim}_${mask}_${keys:-any}"
    name=${name// /}
    objects+=" $dir/$name.o"
    cat > "$dir/$name.cu" <<EOF
#include "cuda/sm90/backward_launch.cuh"
using namespace strobe;
template cudaError_t sm90::launch<Variant{Arch::sm90, Direction::backward, DType::${dtype# }, $dim, MaskClass::${mask# },
    Features::plain, $m, $n, $stages, $warps, Keys::${keys:-any}}>(const BackwardParams&, const cuda::LaunchContext&);
EOF
    (nvcc -O3 $flags -lineinfo -Xptxas -v "$@" -c "$dir/$name.cu" -o "$dir/$name.o" > "$dir/$name.log" 2>&1 || cat "$dir/$name.log"
     echo "$name:" $(grep -oE 'C75[0-9]+' "$dir/$name.log" | sort -u) \
          $(grep -A2 'entry function.*backward_kernel' "$dir/$name.log" | grep -oE '[0-9]+ bytes spill stores')) &
done < "$dir/backward_sm90_rows.inc"
nvcc -O1 $flags -c bench/dev/backward_sm90.cu -o "$dir/main.o" &
wait
nvcc -gencode=arch=compute_90a,code=sm_90a "$dir/main.o" $objects -o "$out"
