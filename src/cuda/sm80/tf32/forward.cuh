// The fp32 forward on tensor cores: one CTA per (query tile, head, batch) over the key tiles that its queries see;
// warps split the queries.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/sm80/schedule.hpp"
#include "cuda/sm80/score.cuh"
#include "cuda/sm80/tf32/product.cuh"

namespace strobe::sm80::tf32 {

/// One row in plain fp32 arithmetic, by one warp. For rows whose result is not finite: an infinity, or what rounds to
/// one in TF32, has no two halves, so that its products are NaN where fp32 may have an infinity, or a number.
template <int kD>
__device__ __noinline__ void forward_row(const ForwardParams& p, int batch, int head, int64_t row) {
    const Sequence seq = sequence_of(p, batch);
    const BandMask mask = seq.mask(p.mask);
    const int kv_head = head / (p.size.num_heads / p.size.num_heads_k), lane = threadIdx.x % kWarpSize;
    const float* const q = Rows(p.q, batch, seq.q_row + row, head).data;
    const Rows k(p.k, batch, seq.k_row, kv_head), v(p.v, batch, seq.k_row, kv_head);
    const auto reduce = [](float x, auto f) {
#pragma unroll
        for (int n = 1; n < kWarpSize; n *= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, n));
        return x;
    };

    float reference = -INFINITY, sum = 0.0f, out[kD / kWarpSize] = {};
    const IndexRange keys = mask.key_range(row, row + 1);
    for (int64_t begin = keys.begin; begin < keys.end; begin += kWarpSize) {
        const int count = static_cast<int>(keys.end - begin < kWarpSize ? keys.end - begin : kWarpSize);
        float score = -INFINITY;
        if (lane < count) {
            float dot = 0.0f;
            for (int d = 0; d < p.size.head_dim; ++d) dot = fmaf(q[d], k.row(begin + lane)[d], dot);
            score = p.score.softmax_scale * dot;
        }
        const float next = fmaxf(reference, reduce(score, [](float x, float y) { return fmaxf(x, y); }));
        const float factor = next == reference ? 1.0f : expf(reference - next);
        const float probability = score == -INFINITY ? 0.0f : expf(score - next);
        reference = next;
        sum = sum * factor + reduce(probability, [](float x, float y) { return x + y; });
        for (float& x : out) x = factor == 0.0f ? 0.0f : x * factor;
        for (int n = 0; n < count; ++n) {
            const float weight = __shfl_sync(0xffffffffu, probability, n);
#pragma unroll
            for (int c = 0; c < kD / kWarpSize; ++c) {
                const int col = lane + kWarpSize * c;
                if (col < p.size.head_dim_v) out[c] = fmaf(weight, v.row(begin + n)[col], out[c]);
            }
        }
        if (isnan(sum)) break;  // and so is every column
    }
    float* const to = Rows(p.out, batch, seq.q_row + row, head).data;
#pragma unroll
    for (int c = 0; c < kD / kWarpSize; ++c) {
        const int col = lane + kWarpSize * c;
        if (col < p.size.head_dim_v) to[col] = sum == 0.0f ? 0.0f : __fdividef(out[c], sum);
    }
    if (p.lse && lane == 0) {
        p.lse.data[batch * p.lse.batch_stride + head * p.lse.head_stride + seq.q_row + row] =
            sum == 0.0f ? -INFINITY : reference + logf(sum);
    }
}

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(Tf32Config(cuda::decode_variant(kVariantCode)).threads,
                                  Tf32Config(cuda::decode_variant(kVariantCode)).ctas_per_sm)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ TileOrder order) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr Tf32Config kConfig(V);
    constexpr int kRows = kConfig.rows, kCols = kConfig.cols, kD = V.head_dim, kThreads = kConfig.threads;
    constexpr int kM = kConfig.m_atoms, kN = kConfig.n_atoms, kStages = V.stages;
    extern __shared__ __align__(128) unsigned char smem[];

    const TileIndex index = order.at(blockIdx.x);
    const int batch = index.head / p.size.num_heads, head = index.head % p.size.num_heads;
    const Sequence seq = sequence_of(p, batch);
    const int64_t q_begin = static_cast<int64_t>(index.tile) * kRows;
    if (q_begin >= seq.rows_q) return;
    const int kv_head = head / (p.size.num_heads / p.size.num_heads_k);
    const Band band(seq.mask(p.mask));
    const int2 keys = band.key_range(static_cast<int>(q_begin), kRows, static_cast<int>(seq.seqlen_q));
    const int tile_begin = keys.x / kCols, tile_end = (keys.y + kCols - 1) / kCols;
    const int thread = threadIdx.x, lane = thread % kWarpSize, row0 = thread / kWarpSize * 16 * kM;
    const int q0 = static_cast<int>(q_begin) + row0;

    const uint32_t q_tile = smem_address(smem), k_tile = q_tile + kConfig.tile_bytes(kRows);
    constexpr uint32_t kTileBytes = kConfig.tile_bytes(kCols), kStageBytes = 2 * kTileBytes;
    const Rows k_in(p.k, batch, seq.k_row, kv_head), v_in(p.v, batch, seq.k_row, kv_head);
    const auto rows_from = [](Rows rows, int64_t first) {
        rows.data = rows.row(first);
        return rows;
    };
    const auto load_keys = [&](int tile, uint32_t stage) {
        const int64_t first = static_cast<int64_t>(tile) * kCols;
        const int valid = band.seqlen_k - tile * kCols;
        const uint32_t keys_to = k_tile + stage;
        load_rows<kCols, kD, kThreads>(keys_to, rows_from(k_in, first), valid, p.size.head_dim, thread);
        load_rows<kCols, kD, kThreads>(keys_to + kTileBytes, rows_from(v_in, first), valid, p.size.head_dim_v, thread);
    };

    Columns<kM, kD> out;
    float reference[kM][2], sum[kM][2];
    for_rows<kM>([&](int i, int h) { reference[i][h] = -INFINITY, sum[i][h] = 0.0f; });
    if (tile_begin < tile_end) {
        const Rows q_in(p.q, batch, seq.q_row + q_begin, head);
        load_rows<kRows, kD, kThreads>(q_tile, q_in, seq.seqlen_q - q_begin, p.size.head_dim, thread);
        if (kStages > 1) load_keys(tile_begin, 0);
        cp_async_commit();
    }
    uint32_t stage = 0;
    for (int tile = tile_begin; tile < tile_end; ++tile) {
        if constexpr (kStages == 1) {
            __syncthreads();  // everyone is done with the tile before
            load_keys(tile, 0);
            cp_async_commit();
        }
        cp_async_wait<0>();
        __syncthreads();  // the tile has landed; everyone is done with the one before, whose buffers are free
        if (kStages > 1 && tile + 1 < tile_end) {
            load_keys(tile + 1, stage ^ kStageBytes);
            cp_async_commit();
        }
        const int k0 = tile * kCols;
        if (band.any_visible(q0, 16 * kM, k0, kCols)) {
            float s[kM][kN][4];
            dot_rows<kD, false>(s, left_rows<kD>(q_tile, row0, lane), right_rows<kD>(k_tile + stage, lane));
            for_each(s, [&](float& x, int, int, int) { x *= p.score.softmax_scale; });
            if (!band.all_visible(q0, 16 * kM, k0, kCols)) {
                apply_mask(s, band, FragmentOrigin<false>{q0 + lane / 4, k0 + 2 * (lane % 4)}, -INFINITY);
            }
            for_rows<kM>([&](int i, int h) {
                float largest = reference[i][h];
#pragma unroll
                for (int j = 0; j < kN; ++j) largest = fmaxf(largest, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
                largest = quad_max(largest);
                if (largest != reference[i][h]) {
                    const float factor = exp2_fast((reference[i][h] - largest) * kLog2e);
                    reference[i][h] = largest;
                    sum[i][h] *= factor;
                    out.scale(i, h, factor);
                }
                // The maximum is subtracted first, as the backward does with the log-sum-exp: a probability of one is
                // one in both.
                const float offset = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
                for (int j = 0; j < kN; ++j)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) {
                        s[i][j][e] = exp2_fast((s[i][j][e] - offset) * kLog2e);
                        sum[i][h] += s[i][j][e];
                    }
            });
            out.add(s, Columns<kM, kD>::rows(k_tile + stage + kTileBytes, lane));
        }
        if (kStages > 1) stage ^= kStageBytes;
    }

    // Read again rather than kept in registers over the loop.
    const int own_head = made_anew(index.head);
    const int out_batch = own_head / p.size.num_heads, out_head = own_head % p.size.num_heads;
    const Sequence rows = sequence_of(p, out_batch);
    const Rows result(p.out, out_batch, rows.q_row, out_head);
    uint32_t again[kM][2];
    for_rows<kM>([&](int i, int h) {
        const int row = q0 + 16 * i + 8 * h + lane / 4;
        const float total = quad_sum(sum[i][h]);
        bool is_finite = fabsf(total) < INFINITY;
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) {
            is_finite &= fabsf(out.value[i][j][2 * h]) < INFINITY && fabsf(out.value[i][j][2 * h + 1]) < INFINITY;
        }
        const bool live = row < rows.seqlen_q && total != 0.0f;
        if (row < rows.rows_q) {
            out.store(i, h, result.row(row), live ? reciprocal_fast(total) : 0.0f, p.size.head_dim_v, false, lane);
            if (p.lse && lane % 4 == 0) {
                p.lse.data[out_batch * p.lse.batch_stride + out_head * p.lse.head_stride + rows.q_row + row] =
                    live ? reference[i][h] + logf(total) : -INFINITY;
            }
        }
        again[i][h] = __ballot_sync(0xffffffffu, !is_finite && row < rows.seqlen_q);  // four lanes a row
    });
    __syncwarp();  // what was stored of such rows
    // One place for all rows: the code above is long enough.
    uint32_t any = 0;
    for_rows<kM>([&](int i, int h) { any |= again[i][h]; });
    if (any == 0) return;
#pragma unroll 1
    for (int n = 0; n < 16 * kM; ++n) {
        uint32_t quads = 0;
        for_rows<kM>([&](int i, int h) { quads = n / 8 == 2 * i + h ? again[i][h] : quads; });
        if (quads >> 4 * (n % 8) & 0xf) forward_row<kD>(p, out_batch, out_head, q0 + n);
    }
}

template <Variant V>
cudaError_t launch_forward(const ForwardParams& p, const cuda::LaunchContext& context) {
    constexpr Tf32Config kConfig(V);
    const auto kernel = forward_kernel<cuda::encode_variant(V)>;
    const TileOrder order = TileOrder::make(static_cast<int64_t>(p.size.batch) * p.size.num_heads,
                                            (p.size.seqlen_q + kConfig.rows - 1) / kConfig.rows,
                                            2 * p.size.seqlen_k * V.head_dim * 4, p.mask.is_band(), true);
    if (order.size() == 0) return cudaSuccess;
    if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kConfig.smem_bytes); e != cudaSuccess) return e;
    kernel<<<static_cast<unsigned>(order.size()), kConfig.threads, kConfig.smem_bytes, context.stream>>>(p, order);
    return cudaGetLastError();
}

}  // namespace strobe::sm80::tf32
