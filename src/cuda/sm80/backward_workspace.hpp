// The backward's workspace: per query tile, in the order the kernels touch it, the statistics of its rows and the fp32
// accumulator of dQ; in the deterministic mode also whose turn it is. Shared by the kernels and by the planner.
#pragma once

#include "cuda/sm80/config.hpp"

namespace strobe::sm80 {

struct BackwardWorkspace {
    int64_t head_tiles = 0;     // tiles of one head (varlen: of one head of all sequences)
    float* lse = nullptr;       // (tiles, block_m): in base 2, with a bias in the unit of scores; +inf where the row sees nothing or does not exist
    float* delta = nullptr;     // (tiles, block_m): rowsum(dout * out) - dlse
    float* dq = nullptr;        // (tiles, block_m * head_dim) in fragment order; null when dQ has its own pass
    int32_t* turns = nullptr;   // when key tiles take turns: (tiles), how many have added to the tile
    int32_t* claims = nullptr;  // the same: how many key tiles have been begun

    static constexpr int64_t kAlign = 256;

    STROBE_HD static constexpr int64_t tiles_of_head(const ProblemSize& size, bool varlen, int block_m) {
        return varlen ? size.total_q / block_m + size.batch : (size.seqlen_q + block_m - 1) / block_m;
    }
    STROBE_HD static constexpr int64_t total_tiles(const ProblemSize& size, bool varlen, int block_m) {
        return tiles_of_head(size, varlen, block_m) * size.num_heads * (varlen ? 1 : size.batch);
    }
    STROBE_HD static constexpr int64_t stat_bytes(int64_t tiles, int block_m) {
        return (tiles * block_m * 4 + kAlign - 1) / kAlign * kAlign;
    }

    STROBE_HD static constexpr int64_t dq_bytes(int64_t tiles, const Variant& v) { return tiles * v.block_m * v.head_dim * 4; }
    STROBE_HD static constexpr int64_t turn_bytes(int64_t tiles) { return (tiles + 1) * 4; }

    /// The first tile of one (sequence, head). Varlen: a sequence starts at tile row / block_m + its number, which leaves
    /// every sequence room for its last, partial tile.
    template <int kBlockM>
    STROBE_HD int64_t first_tile(const AttentionParams& p, const Sequence& seq, int batch, int head) const {
        if (p.seqlens.cu_seqlens_q) return head * head_tiles + seq.q_row / kBlockM + batch;
        return (static_cast<int64_t>(batch) * p.size.num_heads + head) * head_tiles;
    }

    static BackwardWorkspace make(const BackwardParams& p, const Variant& v) {
        BackwardWorkspace w;
        const bool varlen = p.seqlens.cu_seqlens_q != nullptr;
        w.head_tiles = tiles_of_head(p.size, varlen, v.block_m);
        const int64_t tiles = total_tiles(p.size, varlen, v.block_m);
        char* at = static_cast<char*>(p.workspace);
        w.lse = reinterpret_cast<float*>(at);
        w.delta = reinterpret_cast<float*>(at + stat_bytes(tiles, v.block_m));
        at += 2 * stat_bytes(tiles, v.block_m);
        if (p.deterministic && !takes_turns(v)) return w;
        w.dq = reinterpret_cast<float*>(at);
        if (p.deterministic) {
            w.turns = reinterpret_cast<int32_t*>(at + dq_bytes(tiles, v));
            w.claims = w.turns + tiles;
        }
        return w;
    }
};

inline int64_t backward_workspace_bytes(const ProblemSize& size, bool varlen, bool deterministic, const Variant& v) {
    if (v.dtype == DType::f32) return size.num_heads * 4 * (varlen ? size.total_q : size.batch * size.seqlen_q);  // delta
    const int64_t tiles = BackwardWorkspace::total_tiles(size, varlen, v.block_m);
    const int64_t bytes = 2 * BackwardWorkspace::stat_bytes(tiles, v.block_m);
    if (deterministic && !takes_turns(v)) return bytes;
    return bytes + BackwardWorkspace::dq_bytes(tiles, v) + (deterministic ? BackwardWorkspace::turn_bytes(tiles) : 0);
}

}  // namespace strobe::sm80
