// What follows from a variant row: how warps split the tiles, how much shared memory a CTA takes, how many CTAs should
// share an SM. Pure constexpr, shared by the kernels and by the planner (and its tests), without CUDA headers.
#pragma once

#include "core/variant.hpp"

namespace strobe::sm80 {

constexpr int kWarpSize = 32;
constexpr int kRegistersPerSm = 65536;

/// Softcaps in units of softmax_scale no power of whose reciprocal leaves the range of floats: those that a polynomial serves.
STROBE_HD constexpr bool is_moderate_softcap(float cap) { return cap > 1e-5f && cap < 1e5f; }

STROBE_HD constexpr int ctas_for_registers(int threads, int registers_per_thread) {
    const int ctas = kRegistersPerSm / (threads * registers_per_thread);
    return ctas < 1 ? 1 : ctas;
}

/// No registers are spared for CTAs that even the largest shared memory has no room for.
STROBE_HD constexpr int ctas_for_smem(int ctas, int smem_bytes) {
    constexpr int kLargest = 227 << 10;
    return ctas * smem_bytes <= kLargest ? ctas : kLargest / smem_bytes;
}

/// Forward: every warp owns `rows` query rows and sees all keys of a tile, or two warps share them: each then has the scores of half
/// the keys and half the columns of O, which takes less shared memory traffic where 32 whole rows of O do not fit a warp's registers.
/// K and V are streamed through `stages` buffers, and so are the tiles of a bias.
struct ForwardConfig {
    int threads, warps_of_rows, rows, m_atoms, n_atoms, d_atoms;
    int q_bytes, kv_bytes, bias_bytes, shared_rows_bytes, smem_bytes;
    int ctas_per_sm;

    STROBE_HD constexpr explicit ForwardConfig(const Variant& v)
        : threads(v.warps * kWarpSize),
          warps_of_rows(v.head_dim == 256 && v.features == Features::plain && v.block_n >= 64 ? 2 : 1),
          rows(v.block_m / v.warps * warps_of_rows),
          m_atoms(rows / 16),
          n_atoms(v.block_n / 8 / warps_of_rows),
          d_atoms(v.head_dim / 8 / warps_of_rows),
          q_bytes(v.block_m * v.head_dim * 2),
          kv_bytes(v.block_n * v.head_dim * 2),
          bias_bytes(has_bias(v.features) ? v.block_m * v.block_n * 2 : 0),
          shared_rows_bytes(warps_of_rows > 1 ? v.block_m * (v.block_n * 2 + 2 * 4) : 0),  // P, and two floats a row
          smem_bytes(q_bytes + v.stages * (2 * kv_bytes + bias_bytes) + shared_rows_bytes),
          // Accumulators of O and S, and about 40 registers for operands, row statistics and addresses; the others hold a softcap,
          // address a bias or make random bits besides.
          ctas_per_sm(ctas_for_smem(ctas_for_registers(threads, 4 * m_atoms * (n_atoms + d_atoms) +
                                                                    (v.features == Features::plain || v.features == Features::tiled ? 40 : 72)),
                                    smem_bytes)) {}
};

/// Backward, one CTA per key tile. Scores are computed transposed (keys x queries). When a warp's keys meet all queries
/// of the step (warps_m == 1), P and dS stay in registers for dV and dK; otherwise they pass through shared memory.
/// dS passes through shared memory for dQ in any case.
struct BackwardConfig {
    int threads;
    int score_warps_n, score_warps_m;  // S^T and dP^T, (block_n x step_m)
    int step_m;                        // queries whose scores are held at once
    int out_warps_n, out_warps_d;      // dK and dV, (block_n x head_dim)
    int dq_warps_m, dq_warps_d;        // dQ, (block_m x head_dim)
    bool p_in_registers;
    int kv_bytes, q_bytes, score_bytes, stat_bytes, bias_bytes, smem_bytes;
    int ctas_per_sm;

    STROBE_HD constexpr explicit BackwardConfig(const Variant& v)
        : threads(v.warps * kWarpSize),
          score_warps_n(0),
          score_warps_m(1),
          step_m(v.block_m),
          out_warps_n(0),
          out_warps_d(1),
          dq_warps_m(v.block_m / 32),
          dq_warps_d(1),
          p_in_registers(v.head_dim <= 64),
          kv_bytes(v.block_n * v.head_dim * 2),
          q_bytes(v.block_m * v.head_dim * 2),
          score_bytes(v.block_n * v.block_m * 2),
          stat_bytes(v.block_m * 4),
          bias_bytes(has_bias(v.features) ? score_bytes : 0),
          smem_bytes(0),
          ctas_per_sm(1) {
        if (p_in_registers) {
            score_warps_n = out_warps_n = v.warps;
            // 32 keys x 64 queries of S and dP would not fit beside dK and dV.
            if (v.block_n / v.warps == 32 && v.block_m > 32) step_m = 32;
        } else {
            out_warps_n = v.block_n / 32;
            out_warps_d = v.warps / out_warps_n;
            score_warps_n = v.block_n / 32;
            if (v.block_m / (v.warps / score_warps_n) < 16) score_warps_n = v.block_n / 16;
            score_warps_m = v.warps / score_warps_n;
        }
        dq_warps_d = v.warps / dq_warps_m;
        while ((v.head_dim / dq_warps_d) % 16 != 0 || dq_warps_m * dq_warps_d < v.warps) {
            dq_warps_m *= 2;
            dq_warps_d = v.warps / dq_warps_m;
        }
        smem_bytes = 2 * kv_bytes + v.stages * (2 * (q_bytes + stat_bytes) + bias_bytes) + (p_in_registers ? 1 : 2) * score_bytes;
        const int out_registers = 2 * (v.block_n / out_warps_n) * (v.head_dim / out_warps_d) / kWarpSize;
        const int score_registers = 2 * (v.block_n / score_warps_n) * (step_m / score_warps_m) / kWarpSize;
        const int dq_registers = v.block_m / dq_warps_m * (v.head_dim / dq_warps_d) / kWarpSize;
        const int live = out_registers + (score_registers > dq_registers ? score_registers : dq_registers);
        ctas_per_sm = ctas_for_registers(threads, live + 48);
    }
};

/// Deterministic mode: whether key tiles add to a query tile's dQ in turns, or dQ has a pass of its own (QueryGradientConfig).
STROBE_HD constexpr bool takes_turns(const Variant& v) { return v.features == Features::plain; }

/// The deterministic dQ pass, one CTA per query tile: structured like the forward, with dP beside S.
struct QueryGradientConfig {
    static constexpr int kWarps = 4;
    int block_m, block_n, rows, stages;
    int q_bytes, kv_bytes, smem_bytes;
    int ctas_per_sm;

    STROBE_HD constexpr explicit QueryGradientConfig(const Variant& v)
        : block_m(v.head_dim <= 128 ? 128 : 64),
          block_n(v.head_dim <= 64 && v.features == Features::plain ? 64 : 32),
          rows(block_m / kWarps),
          stages(v.head_dim <= 96 ? 2 : 1),
          q_bytes(block_m * v.head_dim * 2),
          kv_bytes(block_n * v.head_dim * 2),
          smem_bytes(2 * q_bytes + 2 * stages * kv_bytes),
          ctas_per_sm(ctas_for_registers(kWarps * kWarpSize, rows * (v.head_dim + 2 * block_n) / kWarpSize + 48)) {}
};

/// The bias gradient pass, one CTA per 64 x 32 tile of the gradient.
struct BiasGradientConfig {
    static constexpr int kWarps = 4;
    static constexpr int kBlockM = 64;
    static constexpr int kBlockN = 32;
    int q_bytes, kv_bytes, smem_bytes;

    STROBE_HD constexpr explicit BiasGradientConfig(const Variant& v)
        : q_bytes(kBlockM * v.head_dim * 2),
          kv_bytes(kBlockN * v.head_dim * 2),
          smem_bytes(2 * q_bytes + 2 * kv_bytes) {}
};

/// fp32 rows (simt/): 16 x 16 threads share a tile of scores of `rows` stationary times `cols` streamed rows. The forward and dQ
/// keep queries, the backward of the keys keeps keys.
struct SimtConfig {
    static constexpr int kSide = 16;
    static constexpr int kThreads = kSide * kSide;
    static constexpr int kPadding = 4;  // floats behind each row in shared memory: 16-byte reads of 8 rows meet all banks
    int rows, cols, head_dim;
    int smem_bytes;

    STROBE_HD constexpr explicit SimtConfig(const Variant& v)
        : rows(v.direction == Direction::forward ? v.block_m : v.block_n),
          cols(v.direction == Direction::forward ? v.block_n : v.block_m),
          head_dim(v.head_dim),
          smem_bytes(0) {
        const int stationary = v.direction == Direction::forward ? 1 : 2;
        smem_bytes = 4 * (stationary * operand_floats(rows) + operand_floats(cols) + rows * (cols + kPadding));
    }
    STROBE_HD constexpr int operand_floats(int n) const { return n * (head_dim + kPadding); }
};

/// Plain fp32 rows (tf32/): warps split the rows of stationary tiles, Q in the forward and for dQ, K for dK and dV, and others are streamed
/// through `stages` pairs of buffers.
struct Tf32Config {
    static constexpr int kPadding = 4;  // floats behind each row in shared memory
    int threads, rows, cols, m_atoms, n_atoms, head_dim;
    int smem_bytes;
    int ctas_per_sm;

    STROBE_HD constexpr explicit Tf32Config(const Variant& v)
        : threads(v.warps * kWarpSize),
          rows(v.direction == Direction::forward ? v.block_m : v.block_n),
          cols(v.direction == Direction::forward ? v.block_n : v.block_m),
          m_atoms(rows / (16 * v.warps)),
          n_atoms(cols / 8),
          head_dim(v.head_dim),
          smem_bytes(0),
          ctas_per_sm(1) {
        const bool forward = v.direction == Direction::forward;
        smem_bytes = (forward ? 1 : 2) * tile_bytes(rows) + 2 * v.stages * tile_bytes(cols);
        // Results, scores in two halves each, sums of a part of a product, and about 48 for operands and addresses.
        const int registers = m_atoms * (head_dim / (forward ? 2 : 1) + cols * (forward ? 2 : 3) / 2) + 32 + 48;
        ctas_per_sm = ctas_for_smem(ctas_for_registers(threads, registers), smem_bytes);
    }
    STROBE_HD constexpr int tile_bytes(int n) const { return 4 * n * (head_dim + kPadding); }
};

/// fp32 rows on tensor cores.
STROBE_HD constexpr bool uses_tf32(const Variant& v) { return v.dtype == DType::f32 && v.features == Features::plain; }

/// Dynamic shared memory of the row's largest kernel.
STROBE_HD constexpr int smem_bytes(const Variant& v) {
    if (uses_tf32(v)) return Tf32Config(v).smem_bytes;
    if (v.dtype == DType::f32) return SimtConfig(v).smem_bytes;
    if (v.direction == Direction::forward) return ForwardConfig(v).smem_bytes;
    int bytes = BackwardConfig(v).smem_bytes;
    if (const int dq = QueryGradientConfig(v).smem_bytes; !takes_turns(v) && dq > bytes) bytes = dq;
    if (const int db = BiasGradientConfig(v).smem_bytes; v.features == Features::biased && db > bytes) bytes = db;
    return bytes;
}

}  // namespace strobe::sm80
