// Key tiles that several CTAs share.
//
// Without a mask all work tiles take equally long, and those that are left when all others have made full rounds would keep the
// whole machine waiting for a few CTAs. These are cut by queries into parts; whoever finishes a tile's last part sums dK and dV
// of all of them, always in the same order.
#pragma once

#include <cstdint>

#include "core/params.hpp"
#include "core/variant.hpp"

namespace strobe::sm90 {

STROBE_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Work tiles at a time: above head_dim 128 a pair of CTAs has one. On a machine of another size L2 hits and balance suffer.
STROBE_HD constexpr int machine_tiles(const Variant& v) { return v.head_dim > 128 ? 66 : 132; }

/// Not measured at head dim 192.
STROBE_HD constexpr bool may_share_tiles(const Variant& v) { return v.mask == MaskClass::full && v.head_dim != 192; }

struct SharedTiles {
    static constexpr int kMostParts = 8;

    int tiles = 0;  // the last ones
    int parts = 1;  // of each

    /// A part of a tile, fp32: dK and dV.
    STROBE_HD static int64_t part_bytes(const Variant& v) { return int64_t{4} * 2 * v.block_n * v.head_dim; }
    /// Counters of finished parts: one for each warp of a part, above head_dim 128 one for each gradient and warp.
    STROBE_HD int64_t counters(const Variant& v) const { return int64_t{tiles} * v.block_n / (v.head_dim > 128 ? 8 : 16); }
};

STROBE_HD SharedTiles shared_tiles(const Variant& v, const BackwardParams& p) {
    const SeqlenParams& s = p.seqlens;
    if (!may_share_tiles(v) || p.deterministic) return {};
    if (p.size.num_heads != p.size.num_heads_k) return {};  // measured: parts of a group stream more through L2 than they gain
    if (s.cu_seqlens_q || s.cu_seqlens_k || s.seqused_q || s.seqused_k) return {};
    // In query tiles' time: a work tile's beginning and end; summing, for each shared tile and part.
    constexpr double kEnds = 3.0, kSum = 2.0, kSumPart = 1.0;
    const int machine = machine_tiles(v);
    const int left = static_cast<int>(int64_t{p.size.batch} * p.size.num_heads_k * ceil_div(p.size.seqlen_k, v.block_n) % machine);
    const int64_t query_tiles = ceil_div(p.size.seqlen_q, v.block_m);
    SharedTiles best;
    double least = static_cast<double>(query_tiles) + kEnds;
    for (int parts = 2; parts <= SharedTiles::kMostParts && parts <= query_tiles && left > 0; ++parts) {
        const double rounds = static_cast<double>(ceil_div(int64_t{left} * parts, machine));
        const double time = rounds * (static_cast<double>(query_tiles) / parts + kEnds) + kSum + kSumPart * parts;
        if (time < least) best = {left, parts}, least = time;
    }
    return best;
}

}  // namespace strobe::sm90
