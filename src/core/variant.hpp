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
    capped,   // plain and a softcap
    general,  // softcap, ALiBi, tensors of any alignment, by warp-uniform branches
    dropout,  // plain and dropout, whose integer work runs beside a matrix product
    tiled,    // plain and an additive bias whose tiles can be copied 16 bytes at a time; not its gradient
    biased,   // everything: a bias of any layout, its gradient, dropout and what general rows do, by branches
};

/// Rows that take tensors of any alignment and every score function.
constexpr bool is_general(Features f) { return f == Features::general || f == Features::biased; }
constexpr bool has_bias(Features f) { return f == Features::tiled || f == Features::biased; }
constexpr bool may_drop(Features f) { return f == Features::dropout || f == Features::biased; }

enum class Keys : int {
    any,
    few,  // for sequences of few keys: buffers for the next ones in place of others
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
    Keys keys = Keys::any;

    bool operator==(const Variant&) const = default;
};

}  // namespace strobe
