// A Variant as one integer. nvcc cannot emit the launch stub of a __global__ template whose arguments are of class type;
// kernels take this code instead and everything below them the Variant itself.
#pragma once

#include <cstdint>

#include "core/variant.hpp"

namespace strobe::cuda {

STROBE_HD constexpr uint64_t encode_variant(const Variant& v) {
    uint64_t code = 0;
    const auto put = [&](int value, int bits) { code = code << bits | static_cast<uint64_t>(value); };
    put(static_cast<int>(v.arch), 8);
    put(static_cast<int>(v.direction), 1);
    put(static_cast<int>(v.dtype), 2);
    put(v.head_dim, 11);
    put(static_cast<int>(v.mask), 1);
    put(static_cast<int>(v.features), 3);
    put(v.block_m, 10);
    put(v.block_n, 10);
    put(v.stages, 4);
    put(v.warps, 6);
    put(static_cast<int>(v.keys), 1);
    return code;
}

STROBE_HD constexpr Variant decode_variant(uint64_t code) {
    const auto take = [&](int bits) {
        const int value = static_cast<int>(code & ((uint64_t{1} << bits) - 1));
        code >>= bits;
        return value;
    };
    Variant v{};
    v.keys = static_cast<Keys>(take(1));
    v.warps = take(6);
    v.stages = take(4);
    v.block_n = take(10);
    v.block_m = take(10);
    v.features = static_cast<Features>(take(3));
    v.mask = static_cast<MaskClass>(take(1));
    v.head_dim = take(11);
    v.dtype = static_cast<DType>(take(2));
    v.direction = static_cast<Direction>(take(1));
    v.arch = static_cast<Arch>(take(8));
    return v;
}

}  // namespace strobe::cuda
