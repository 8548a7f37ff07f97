// One compiled GPU kernel, as a structural type: the template argument of the kernel and the key of the registry at
// once, so that host and device cannot disagree on a tile. The rows are in src/variants.def.
#pragma once

#include "core/params.hpp"

namespace strobe {

enum class Arch : int { sm80 = 80, sm90 = 90 };
enum class Direction : int { forward, backward };
enum class MaskClass : int { full, band };       // full: only sequence ends are masked
enum class Features : int {
    plain,
    general,  // softcap, ALiBi, tensors of any alignment, by warp-uniform branches
    dropout,  // the same, and always dropout, whose integer work runs under a matrix product
    biased,   // the same, an additive bias, and dropout by a branch
};

struct Variant {
    Arch arch;
    Direction direction;
    DType dtype;
    int head_dim;  // the bucket: serves every true head_dim up to it
    MaskClass mask;
    Features features;
    int block_m;   // query rows of a tile
    int block_n;   // key rows of a tile
    int stages;    // buffers of the streamed operand
    int warps;     // all warps of the CTA, producers included

    bool operator==(const Variant&) const = default;
};

}  // namespace strobe
