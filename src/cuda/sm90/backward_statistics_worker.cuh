// Row statistics inside the main kernel where a CTA has whole heads of a single key tile: two
// warps that otherwise have nothing to do make them for each query tile that the load warp has
// begun to fetch, from its dout and from out. Each needs some 3 us for half a tile; the copies
// in and out of such a short head take longer. A third warp sets dq = 0 where no key is seen.
#pragma once

#include "cuda/sm90/backward_config.cuh"
#include "cuda/sm90/backward_rows.cuh"

namespace strobe::sm90 {

template <Variant V>
struct OwnStatisticsWorker {
    using C = BackwardConfig<V>;
    static constexpr int kRows = C::kBlockM / 2;  // of a query tile, for each of the two

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int lane;
    const int half;

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();
        RingPosition at, stage;
        uint32_t phase = 0;
        for (;; at.template advance<C::kSlots>(), stage.template advance<C::kStages>()) {
            smem.slot_full[at.index].wait(at.phase);
            const QuerySlot& slot = smem.slot[at.index];
            if (__any_sync(0xFFFFFFFFu, slot.padded < 0)) return;
            const Sequence seq = sequence_of(params, slot.batch);
            const int row0 = slot.query0 + half * kRows;
            const int rows = static_cast<int>(seq.seqlen_q) - row0;
            const bool any = __any_sync(0xFFFFFFFFu, rows > 0);
            if (any) load(slot, seq, row0);
            float lse[kRows / 32];
            const int64_t first = seq.q_row + row0 + lane;
#pragma unroll
            for (int i = 0; i < kRows / 32; ++i) {
                lse[i] = i * 32 + lane < rows ? params.lse.data[place(params.lse, slot) + first + i * 32] : -INFINITY;
            }
            smem.dout_full[stage.index].wait(stage.phase);
            if (any) {
                smem.rows_full[half].wait(phase);
                phase ^= 1;
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kRows / 32; ++i) {
                float minus_delta = any ? -row_product(stage.index, i * 32) : 0.0f;
                if (lse[i] == -INFINITY) {
                    minus_delta = 0.0f;
                } else if (params.dlse) {
                    minus_delta += params.dlse.data[place(params.dlse, slot) + first + i * 32];
                }
                const int row = half * kRows + i * 32 + lane;
                smem.stats[stage.index][0][row] = lse[i] == -INFINITY ? -INFINITY : -lse[i] * kLog2E;
                smem.stats[stage.index][1][row] = minus_delta;
            }
            smem.q_full[stage.index].arrive();  // every lane for what it wrote itself
        }
    }

private:
    __device__ __forceinline__ int64_t place(const RowRef& t, const QuerySlot& slot) const {
        return (params.seqlens.cu_seqlens_q ? 0 : slot.batch * t.batch_stride) + slot.head * t.head_stride;
    }

    __device__ __forceinline__ void load(const QuerySlot& slot, const Sequence& seq, int row0) const {
        __syncwarp();
        if (lane == 0) {
            const RaggedCoordinates at{static_cast<int>(params.size.seqlen_q - seq.seqlen_q), slot.head,
                                       static_cast<int>(seq.q_row + seq.seqlen_q),
                                       params.seqlens.cu_seqlens_q ? 0 : slot.batch};
            const int chunks = C::chunks_of(params.size.head_dim_v);
            smem.rows_full[half].arrive_expect(static_cast<uint32_t>(chunks * kRows * C::kRowBytes));
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                if (c < chunks) {
                    ragged_load(smem_address(smem.rows[half]) + c * kRows * C::kRowBytes, launch.out,
                                smem.rows_full[half], c * 64, row0, at);
                }
            }
        }
        __syncwarp();
    }

    /// Lane i's: the product of dout and out of row first + i of this half. Both are swizzled the same way.
    __device__ __forceinline__ float row_product(int stage, int first) const {
        const int chunks = C::chunks_of(params.size.head_dim_v);
        const uint32_t out = smem_address(smem.rows[half]) + first * C::kRowBytes + lane * 16;
        const uint32_t dout = smem_address(smem.dout[stage]) + (half * kRows + first) * C::kRowBytes + lane * 16;
        float mine = 0.0f;
#pragma unroll 2
        for (int i = 0; i < 8; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                if (c >= chunks) continue;
                const uint4 a = load_shared_vector(out + c * kRows * C::kRowBytes + i * 4 * C::kRowBytes);
                const uint4 b = load_shared_vector(dout + c * C::kQueryChunkBytes + i * 4 * C::kRowBytes);
                add_products(sum, a.x, b.x), add_products(sum, a.y, b.y);
                add_products(sum, a.z, b.z), add_products(sum, a.w, b.w);
            }
#pragma unroll
            for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
            const float of_my_row = __shfl_sync(0xFFFFFFFFu, sum, lane % 4 * 8);
            if (lane / 4 == i) mine = of_my_row;
        }
        return mine;
    }
    __device__ __forceinline__ static void add_products(float& sum, uint32_t a, uint32_t b) {
        const float2 x = unpack_pair<V.dtype>(a), y = unpack_pair<V.dtype>(b);
        sum += x.x * y.x;
        sum += x.y * y.y;
    }
};

/// dq = 0 for the queries of this CTA's heads that the one key tile does not meet.
template <Variant V>
__device__ __forceinline__ void clear_unseen_heads(const BackwardParams& p, const BackwardLaunch& launch, int lane) {
    wait_for_upstream_kernels();
    if (p.accumulate) return;
    constexpr int kColumns = V.head_dim / 8;
    const int group = p.size.num_heads / p.size.num_heads_k;
    for (int index = blockIdx.x; index < launch.schedule.heads; index += gridDim.x) {
        BackwardTile tile;
        decode_tile<V>(p, launch.schedule, index, tile);
        const int batch = index / p.size.num_heads_k, head_k = index - batch * p.size.num_heads_k;
        const Sequence seq = sequence_of(p, batch);
        const int64_t seen_begin = static_cast<int64_t>(tile.m_begin) * V.block_m;
        const int64_t seen = static_cast<int64_t>(tile.m_end - tile.m_begin) * V.block_m;
        const int64_t batch_q = p.seqlens.cu_seqlens_q ? 0 : batch;
        const int64_t left = seq.rows_q - (seen_begin + seen < seq.rows_q ? seen : seq.rows_q - seen_begin);
        if (left <= 0) continue;
        for (int h = 0; h < group; ++h) {
            const int64_t dq0 =
                batch_q * p.dq.batch_stride + (head_k * group + h) * p.dq.head_stride + seq.q_row * p.dq.row_stride;
            for (int64_t i = lane; i < left * kColumns; i += 32) {
                const int64_t n = i / kColumns, row = n < seen_begin ? n : n + seen;
                const int column = static_cast<int>(i % kColumns) * 8;
                if (column < p.size.head_dim) store_eight<V.dtype>(p, dq0 + row * p.dq.row_stride + column, {});
            }
        }
    }
}

}  // namespace strobe::sm90
