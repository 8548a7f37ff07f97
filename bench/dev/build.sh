#!/bin/bash
# Builds forward_dev with sm90 forward rows: those of src/variants.def, or of a file of candidate rows in the same format.
# usage: build.sh OUTPUT-DIRECTORY [ROWS-FILE] [nvcc options]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$1 rows=${2:-$root/src/variants.def}
shift $(( $# < 2 ? $# : 2 ))
mkdir -p "$out/obj"
flags=(-std=c++20 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -I"$root/src" -I"$root/include" -I"$root/bench/dev" "$@")
nvcc "${flags[@]}" -c "$root/bench/dev/forward_dev.cu" -o "$out/obj/main.o" &
objects=("$out/obj/main.o")
while IFS=, read -r dtype dim mask _ m n stages warps; do
    name=${dim}_${mask}_${dtype}_${m}x${n}_s${stages}
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
done < <(sed -nE 's/^STROBE_VARIANT\(sm90, *forward, *(.*)\).*/\1/p' "$rows" | tr -d ' ')
wait
nvcc -cudart static -o "$out/forward_dev" "${objects[@]}"
