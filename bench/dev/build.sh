#!/bin/bash
# Builds forward_dev with the kernels listed in a file: NAME VARIANT-FIELDS per line, e.g.
#   hd128_full_176  bf16,128,full,128,176,2,12
# usage: build.sh LIST OUTPUT-DIRECTORY [nvcc options]
set -euo pipefail
list=$1 out=$2
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out/obj"
flags=(-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -I"$root/src" -I"$root/include" -I"$root/bench/dev" "$@")
objects=("$out/obj/main.o")
nvcc "${flags[@]}" -c "$root/bench/dev/forward_dev.cu" -o "$out/obj/main.o" &
while read -r name variant _; do
    [[ -z $name || $name == \#* ]] && continue
    IFS=, read -r dtype dim mask m n stages warps <<< "$variant"
    cat > "$out/obj/$name.cu" <<UNIT
#include "cuda/sm90/forward_launch.cuh"
#include "forward_dev.hpp"
using namespace strobe;
constexpr Variant kVariant{Arch::sm90, Direction::forward, DType::$dtype, $dim, MaskClass::$mask, Features::plain, $m, $n, $stages, $warps};
static const dev::Registration registration("$name", kVariant, sm90::launch<kVariant>);
UNIT
    (nvcc "${flags[@]}" -Xptxas -v -c "$out/obj/$name.cu" -o "$out/obj/$name.o" > "$out/obj/$name.log" 2>&1 ||
        { head -30 "$out/obj/$name.log"; exit 1; }
     echo "$name: $(grep -oE 'C75[0-9]+|[1-9][0-9]* bytes spill stores' "$out/obj/$name.log" | sort -u | tr '\n' ' ')") &
    objects+=("$out/obj/$name.o")
    while (( $(jobs -rp | wc -l) >= 2 )); do wait -n; done
done < "$list"
wait
nvcc -cudart static -o "$out/forward_dev" "${objects[@]}"
