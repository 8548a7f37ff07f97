// Dynamic shared memory that a CTA of each sm90 row asks for, as a Markdown table; `row_bench --list` has the others.
//   nvcc -std=c++20 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -Isrc -Iinclude THIS_FILE -o OUT
#include <cstdio>

#include "cuda/sm90/backward_config.cuh"
#include "cuda/sm90/forward_config.cuh"
#include "cuda/sm90/forward_tile.cuh"

using namespace strobe;

template <Variant V>
constexpr size_t smem_bytes() {
    if constexpr (V.arch != Arch::sm90) {
        return 0;
    } else if constexpr (V.direction == Direction::forward) {
        return sizeof(sm90::ForwardSmem<sm90::ForwardConfig<V>>);
    } else {
        return sizeof(sm90::BackwardSmem<V>);
    }
}

template <Variant V>
void print(const char* row) {
    if (smem_bytes<V>() > 0) std::printf("| %s | %zu |\n", row, smem_bytes<V>());
}

int main() {
    constexpr Keys few = Keys::few;
    std::printf("| row | bytes |\n|---|---|\n");
#define STROBE_NAME(arch, direction, dtype, dim, mask, features, m, n, stages, warps, ...)                          \
    #arch "_" #direction "_" #dtype "_" #dim "_" #mask "_" #features "_" #m "_" #n "_" #stages "_" #warps __VA_OPT__( \
        "_") #__VA_ARGS__
#define STROBE_VARIANT(arch, direction, dtype, dim, mask, features, m, n, stages, ...)                               \
    print<Variant{Arch::arch, Direction::direction, DType::dtype, dim, MaskClass::mask, Features::features, m, n,    \
                  stages, __VA_ARGS__}>(                                                                            \
        STROBE_NAME(arch, direction, dtype, dim, mask, features, m, n, stages, __VA_ARGS__));
#include "variants.def"
}
