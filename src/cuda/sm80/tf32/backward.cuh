// The fp32 backward on tensor cores, in the two passes of simt/backward.cuh: over the key tiles for dK and dV, over the
// query tiles for dQ. Each result is summed by one warp in a fixed order, so that every call is repeatable to the bit.
//
// Scores are those of the forward to the bit: a softmax that is all but one-hot shows each difference from them,
// however small beside the scores themselves.
#pragma once

#include <type_traits>

#include "cuda/common/kernel_variant.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/sm80/schedule.hpp"
#include "cuda/sm80/score.cuh"
#include "cuda/sm80/simt/backward.cuh"
#include "cuda/sm80/tf32/product.cuh"

namespace strobe::sm80::tf32 {

using simt::DeltaRows;

/// Log-sum-exps and deltas of a head's queries; of those that do not count or see nothing such that all their gradients
/// are zero.
struct QueryStatistics {
    const float* lses;
    const float* deltas;
    int seqlen_q;

    __device__ QueryStatistics(const BackwardParams& p, const DeltaRows& delta, const Sequence& seq, int batch,
                               int head)
        : lses(p.lse.data + batch * p.lse.batch_stride + head * p.lse.head_stride + seq.q_row),
          deltas(delta.rows(batch, head, seq.q_row)),
          seqlen_q(static_cast<int>(seq.seqlen_q)) {}

    __device__ float lse(int query) const {
        const float x = query < seqlen_q ? lses[query] : INFINITY;
        return x == -INFINITY ? INFINITY : x;
    }
    __device__ float delta(int query) const { return query < seqlen_q ? deltas[query] : 0.0f; }
};

__device__ __forceinline__ float probability(float score, float lse) { return exp2_fast((score - lse) * kLog2e); }

/// d loss / d score. Hidden elements have probability 0, and anything as dp.
__device__ __forceinline__ float score_gradient(float probability, float dp, float delta) {
    return probability == 0.0f ? 0.0f : probability * (dp - delta);
}

struct Nothing {};

/// kKeys: dK and dV of a tile of keys, over the queries of all heads that read them. Otherwise dQ of a tile of queries.
template <uint64_t kVariantCode, bool kKeys>
__global__ void __launch_bounds__(Tf32Config(cuda::decode_variant(kVariantCode)).threads,
                                  Tf32Config(cuda::decode_variant(kVariantCode)).ctas_per_sm)
    gradient(const __grid_constant__ BackwardParams p, const __grid_constant__ TileOrder order,
             const __grid_constant__ DeltaRows delta) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr Tf32Config kConfig(V);
    constexpr int kRows = kConfig.rows, kCols = kConfig.cols, kD = V.head_dim, kThreads = kConfig.threads;
    constexpr int kM = kConfig.m_atoms, kN = kConfig.n_atoms, kStages = V.stages;
    extern __shared__ __align__(128) unsigned char smem[];

    const TileIndex index = order.at(blockIdx.x);
    const int heads = kKeys ? p.size.num_heads_k : p.size.num_heads, group = p.size.num_heads / p.size.num_heads_k;
    const int batch = index.head / heads, own_head = index.head % heads;
    const int kv_head = kKeys ? own_head : own_head / group;
    const Sequence seq = sequence_of(p, batch);
    const int64_t begin = static_cast<int64_t>(index.tile) * kRows;  // of the rows that stay
    if (begin >= (kKeys ? seq.rows_k : seq.rows_q)) return;
    const BandMask mask = seq.mask(p.mask);
    const Band band(mask);
    const IndexRange seen = kKeys ? mask.query_range(begin, begin + kRows) : mask.key_range(begin, begin + kRows);
    const int tile_begin = seen.empty() ? 0 : static_cast<int>(seen.begin / kCols);
    const int tile_end = seen.empty() ? 0 : static_cast<int>((seen.end + kCols - 1) / kCols);
    const int first_head = kKeys ? kv_head * group : own_head;
    const int thread = threadIdx.x, lane = thread % kWarpSize, row0 = thread / kWarpSize * 16 * kM;
    const int r0 = static_cast<int>(begin) + row0;

    // Scores are products of the first tiles, dP those of the second ones: queries with keys, dO with V.
    const uint32_t own = smem_address(smem), streamed = own + 2 * kConfig.tile_bytes(kRows);
    constexpr uint32_t kOwnBytes = kConfig.tile_bytes(kRows);
    constexpr uint32_t kTileBytes = kConfig.tile_bytes(kCols), kStageBytes = 2 * kTileBytes;
    const int seqlen_q = static_cast<int>(seq.seqlen_q);
    const auto load_queries = [&]<int kCount>(uint32_t tile, uint32_t bytes, int head, int first) {
        const int valid = seqlen_q - first, b = made_anew(batch);
        const Rows q(p.q, b, seq.q_row + first, head), dout(p.dout, b, seq.q_row + first, head);
        load_rows<kCount, kD, kThreads>(tile, q, valid, p.size.head_dim, thread_index());
        load_rows<kCount, kD, kThreads, false>(tile + bytes, dout, valid, p.size.head_dim_v, thread_index());
    };
    const auto load_keys = [&]<int kCount>(uint32_t tile, uint32_t bytes, int first) {
        const int valid = band.seqlen_k - first, b = made_anew(batch);
        const Rows k(p.k, b, seq.k_row + first, kv_head), v(p.v, b, seq.k_row + first, kv_head);
        load_rows<kCount, kD, kThreads>(tile, k, valid, p.size.head_dim, thread_index());
        load_rows<kCount, kD, kThreads>(tile + bytes, v, valid, p.size.head_dim_v, thread_index());
    };
    // The steps: a tile of the streamed rows of a query head.
    struct Step {
        int head, tile;
    };
    const auto load_step = [&](const Step& step, uint32_t stage) {
        const int first = step.tile * kCols;
        if constexpr (kKeys) load_queries.template operator()<kCols>(streamed + stage, kTileBytes, step.head, first);
        else load_keys.template operator()<kCols>(streamed + stage, kTileBytes, first);
        cp_async_commit();
    };
    const auto after = [&](const Step& step) {
        return step.tile + 1 < tile_end ? Step{step.head, step.tile + 1} : Step{step.head + 1, tile_begin};
    };
    const int head_end = tile_begin < tile_end ? first_head + (kKeys ? group : 1) : first_head;
    Step step{first_head, tile_begin};

    if (step.head < head_end) {
        if constexpr (kKeys) load_keys.template operator()<kRows>(own, kOwnBytes, static_cast<int>(begin));
        else load_queries.template operator()<kRows>(own, kOwnBytes, own_head, static_cast<int>(begin));
        if (kStages > 1) load_step(step, 0);
        else cp_async_commit();
    }
    // Of the queries that a lane has elements of: they are rows, or columns that change with each step.
    float lse[kKeys ? kN : kM][2], deltas[kKeys ? kN : kM][2];
    const auto query_of = [&](int n, int m, int c0) {
        return kKeys ? c0 + 8 * n + 2 * (lane % 4) + m : r0 + 16 * n + 8 * m + lane / 4;
    };
    const auto for_queries = [&](auto f) { for_rows<kKeys ? kN : kM>(f); };
    if constexpr (!kKeys) {
        const QueryStatistics queries(p, delta, seq, batch, own_head);
        for_queries([&](int n, int m) {
            lse[n][m] = queries.lse(query_of(n, m, 0));
            deltas[n][m] = queries.delta(query_of(n, m, 0));
        });
    }

    Columns<kM, kD> first_sum;  // dK or dQ
    std::conditional_t<kKeys, Columns<kM, kD>, Nothing> dv;
    uint32_t stage = 0;
    for (; step.head < head_end; step = after(step)) {
        if constexpr (kStages == 1) {
            __syncthreads();  // everyone is done with the tiles before
            load_step(step, 0);
        }
        cp_async_wait<0>();
        __syncthreads();  // the tiles have landed; everyone is done with the ones before, whose buffers are free
        if constexpr (kStages > 1) {
            if (const Step next = after(step); next.head < head_end) load_step(next, stage ^ kStageBytes);
        }
        const int c0 = step.tile * kCols;
        const int lane = thread_index() % kWarpSize;  // read again in each step: registers are short
        const bool works = kKeys ? band.any_visible(c0, kCols, r0, 16 * kM) : band.any_visible(r0, 16 * kM, c0, kCols);
        if (works) {
            const QueryStatistics queries(p, delta, seq, made_anew(batch), step.head);
            if constexpr (kKeys) for_queries([&](int n, int m) { lse[n][m] = queries.lse(query_of(n, m, c0)); });
            float s[kM][kN][4], dp[kM][kN][4];
            dot_rows<kD, kKeys>(s, left_rows<kD>(own, row0, lane), right_rows<kD>(streamed + stage, lane));
            for_each(s, [&](float& x, int, int, int) { x *= p.score.softmax_scale; });
            if (!(kKeys ? band.all_visible(c0, kCols, r0, 16 * kM) : band.all_visible(r0, 16 * kM, c0, kCols))) {
                const int row = r0 + lane / 4, column = c0 + 2 * (lane % 4);
                apply_mask(s, band, FragmentOrigin<kKeys>{kKeys ? column : row, kKeys ? row : column}, -INFINITY);
            }
            for_each(s, [&](float& x, int i, int j, int e) {
                x = probability(x, kKeys ? lse[j][e & 1] : lse[i][e >> 1]);
            });
            const uint32_t second = streamed + stage + kTileBytes;  // dO, or V
            if constexpr (kKeys) dv.add(s, Columns<kM, kD>::rows(second, lane));
            dot_rows<kD, kKeys>(dp, left_rows<kD>(own + kOwnBytes, row0, lane), right_rows<kD>(second, lane));
            if constexpr (kKeys) for_queries([&](int n, int m) { deltas[n][m] = queries.delta(query_of(n, m, c0)); });
            for_each(s, [&](float& x, int i, int j, int e) {
                x = score_gradient(x, dp[i][j][e], kKeys ? deltas[j][e & 1] : deltas[i][e >> 1]);
            });
            first_sum.add(s, Columns<kM, kD>::rows(streamed + stage, lane));
        }
        if (kStages > 1) stage ^= kStageBytes;
    }

    // Read again rather than kept in registers over the loop.
    const int out_index = made_anew(index.head), out_batch = out_index / heads, out_head = out_index % heads;
    const Sequence rows = sequence_of(p, out_batch);
    const Rows result(kKeys ? p.dk : p.dq, out_batch, kKeys ? rows.k_row : rows.q_row, out_head);
    for_rows<kM>([&](int i, int h) {
        const int row = r0 + 16 * i + 8 * h + lane / 4;
        if (row >= (kKeys ? rows.rows_k : rows.rows_q)) return;
        const bool live = row < (kKeys ? rows.seqlen_k : rows.seqlen_q);
        const float scale = live ? p.score.softmax_scale : 0.0f;
        first_sum.store(i, h, result.row(row), scale, p.size.head_dim, p.accumulate, lane);
        if constexpr (kKeys) {
            const Rows to(p.dv, out_batch, rows.k_row, out_head);
            dv.store(i, h, to.row(row), live ? 1.0f : 0.0f, p.size.head_dim_v, p.accumulate, lane);
        }
    });
}

template <Variant V>
cudaError_t launch_backward(const BackwardParams& p, const cuda::LaunchContext& context) {
    constexpr uint64_t kCode = cuda::encode_variant(V);
    constexpr Tf32Config kConfig(V);
    const DeltaRows delta = DeltaRows::make(p);
    const int64_t heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads;
    if (const cudaError_t e = simt::launch_delta<kCode>(p, delta, context.stream); e != cudaSuccess) return e;
    const auto launch = [&](auto kernel, const TileOrder& order) -> cudaError_t {
        if (order.size() == 0) return cudaSuccess;
        if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kConfig.smem_bytes); e != cudaSuccess) return e;
        const auto ctas = static_cast<unsigned>(order.size());
        kernel<<<ctas, kConfig.threads, kConfig.smem_bytes, context.stream>>>(p, order, delta);
        return cudaGetLastError();
    };
    const auto tiles = [](int64_t rows) { return (rows + Tf32Config(V).rows - 1) / Tf32Config(V).rows; };
    const auto head_bytes = [](int64_t rows) { return 2 * rows * V.head_dim * 4; };
    const int64_t kv_heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads_k;
    const bool band = p.mask.is_band();
    const TileOrder keys = TileOrder::make(kv_heads, tiles(p.size.seqlen_k), head_bytes(p.size.seqlen_q), band, false);
    if (const cudaError_t e = launch(gradient<kCode, true>, keys); e != cudaSuccess) return e;
    const TileOrder queries = TileOrder::make(heads, tiles(p.size.seqlen_q), head_bytes(p.size.seqlen_k), band, true);
    return launch(gradient<kCode, false>, queries);
}

}  // namespace strobe::sm80::tf32
