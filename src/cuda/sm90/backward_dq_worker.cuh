// The dq warpgroup: dq = dS K, or at head dim 64 its transpose, for which K stays in registers: that halves what the product reads
// of shared memory, which is busier than the tensor cores.
#pragma once

#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

template <Variant V>
struct DqWorker {
    using C = BackwardConfig<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int thread;  // in the warpgroup
    int unreported = -1;  // head of a work tile that has been done
    uint32_t k_operand[C::kTransposedDq ? V.block_n / 16 : 1][4] = {};

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();  // the accumulator has been cleared
        RingPosition ds_stage, slot;
        for (int t = 0;; ++t) {
            smem.k_full.wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) break;
            if constexpr (C::kTransposedDq) load_operand();
            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
            const int head = tile.head;
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                smem.ds_full[ds_stage.index].wait(ds_stage.phase);
                multiply_and_add(ds_stage.index, slot);
                ds_stage.template advance<C::kDsStages>();
                slot.template advance<C::kSlots>();
                if (C::kBulkAdd && i == iterations) report<1>();
            }
            if (thread % 32 == 0) smem.kv_free.arrive();
            if (C::kInnerRows && launch.inner_rows) {
                report<0>();
                __syncwarp();
                unreported = head;
                if constexpr (!C::kBulkAdd) report<0>();
            }
        }
        report<0>();
        if (C::kBulkAdd && thread % 32 == 0) bulk_wait<0>();  // before this CTA's shared memory is somebody else's
    }

private:
    /// Tells the row workers that the work tile before has been added to dq: the copy engine is done with all groups but the last
    /// kGroups, which belong to this tile.
    template <int kGroups>
    __device__ __forceinline__ void report() {
        if (thread % 32 != 0 || unreported < 0) return;
        if constexpr (C::kBulkAdd) {
            bulk_wait<kGroups>();
            fence_async_proxy_global();
        }
        add_release(launch.done + unreported, 1);
        unreported = -1;
    }

    /// 64 queries (a unit of the tile) by at most 64 columns, which need few registers.
    struct Piece {
        int unit;
        int column;
        uint32_t k[2];  // shared memory of keys 0...63 and 64...127, from that column
        bool first, last;
    };

    /// dq (block_m queries x dim, or a pair's half of dim) += dS K.
    __device__ __forceinline__ void multiply_and_add(int ds_index, const RingPosition& slot) {
        if constexpr (C::kPair) {
            add_half(ds_index, slot);
        } else if constexpr (C::kTransposedDq) {
            add_transposed(ds_index, slot);
        } else {
            add_all(ds_index, slot);
        }
        if (params.deterministic) {
            __syncwarp();
            if (thread % 32 == 0) smem.added[slot.index].arrive();
        }
    }

    /// The left operand of dq^T = K^T dS^T, for as long as the key tile.
    __device__ __forceinline__ void load_operand() {
        const int lane = thread % 32;
        const uint32_t row = smem_address(smem.k) + (lane / 16 * 8 + lane % 8) * C::kRowBytes +
                             ((thread / 32 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
        for (int kk = 0; kk < V.block_n / 16; ++kk) load_matrices_transposed(row + kk * 16 * C::kRowBytes, k_operand[kk]);
    }

    __device__ __forceinline__ void add_transposed(int ds_index, const RingPosition& slot) {
        float acc[32];
        const uint64_t ds = mn_major(smem_address(smem.ds) + ds_index * C::kDsUnitBytes, C::kDsUnitBytes);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < V.block_n / 16; ++kk) {
            Wgmma<64>::template rs<V.dtype, 1>(acc, k_operand[kk], ds + kk * kStep, kk != 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        fence_registers(acc);
        add<64>(acc, {0, 0, {}, true, true}, ds_index, slot);
    }

    __device__ __forceinline__ void add_all(int ds_index, const RingPosition& slot) {
        constexpr int kTail = C::kDim % 64;
#pragma unroll
        for (int u = 0; u < C::kQueryUnits; ++u) {
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                const uint32_t k = smem_address(smem.k) + c * C::kKeyChunkBytes;
                const bool tail = c + 1 == C::kChunks;
                const Piece piece{u, 64 * c, {k, k + 64 * C::kRowBytes}, u == 0 && c == 0, u + 1 == C::kQueryUnits && tail};
                if (kTail == 0 || !tail) {
                    multiply_piece<64>(piece, ds_index, slot);
                } else {
                    multiply_piece<kTail == 0 ? 64 : kTail>(piece, ds_index, slot);
                }
            }
        }
    }

    /// A whole chunk of this CTA's half, and the rest of it: another chunk, or at head_dim 192 half of the middle one.
    __device__ __forceinline__ void add_half(int ds_index, const RingPosition& slot) {
        constexpr int kRest = C::kDim / 2 - 64;
        constexpr bool kShared = kRest < 64;
        const int rank = C::rank();
        multiply_piece<64>(pair_piece(kShared ? rank : 0, 0, true), ds_index, slot);
        multiply_piece<kRest>(pair_piece(kShared ? 1 - rank : 1, kShared ? rank * kRest : 0, false), ds_index, slot);
    }

    /// From column `within` of the chunk that is `chunk` behind pair_chunk().
    __device__ __forceinline__ Piece pair_piece(int chunk, int within, bool first) {
        const uint32_t mine = smem_address(smem.k) + (C::pair_chunk() + chunk) * C::kKeyChunkBytes + within * 2;
        const uint32_t theirs = smem_address(smem.k_peer) + chunk * C::kKeyChunkBytes + within * 2;
        const bool upper = C::rank() == 0;
        return {0, (C::pair_chunk() + chunk) * 64 + within, {upper ? mine : theirs, upper ? theirs : mine}, first, !first};
    }

    template <int N>
    __device__ __forceinline__ void multiply_piece(const Piece& piece, int ds_index, const RingPosition& slot) {
        float acc[N / 2];
        const uint64_t a = mn_major(smem_address(smem.ds) + (ds_index * C::kQueryUnits + piece.unit) * C::kDsUnitBytes, C::kDsUnitBytes);
        const uint64_t b[2] = {mn_major(piece.k[0], C::kKeyChunkBytes), mn_major(piece.k[1], C::kKeyChunkBytes)};
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < V.block_n / 16; ++kk) {
            Wgmma<N>::template ss<V.dtype, 1, 1>(acc, a + kk * kStep, b[kk / 4] + kk % 4 * kStep, kk != 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        fence_registers(acc);
        add<N>(acc, piece, ds_index, slot);
    }

    /// The first piece waits for the turn, the last one frees the dS buffer.
    template <int N>
    __device__ __forceinline__ void add(const float (&acc)[N / 2], const Piece& piece, int ds_index, const RingPosition& slot) {
        const int warp = thread / 32, lane = thread % 32;
        if (piece.last && lane == 0) {
            smem.ds_free[ds_index].arrive();
            if constexpr (C::kPair) C::peer().arrive(smem.ds_free[ds_index]);
        }
        if (piece.first && params.deterministic) smem.turn_come[slot.index].wait(slot.phase);
        float* const unit = launch.dq + static_cast<int64_t>(smem.slot[slot.index].padded) * (C::kBlockM * C::kDim) +
                            piece.unit * (64 * C::kDim);
        float* const out = unit + (C::kWarpMajor ? warp * (16 * C::kDim) + piece.column * 16 : piece.column * 64 + warp * 128);
        if constexpr (C::kBulkAdd) {
            if (launch.bulk_add) {
                add_in_bulk<N>(acc, out);
                return;
            }
        }
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            reduce_add(out + j * (C::kWarpMajor ? 128 : 512) + lane * 4, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
    }

    /// Reductions from registers keep the load and store unit, and with it the key warpgroups, waiting for L2; the copy engine
    /// waits by itself.
    template <int N>
    __device__ __forceinline__ void add_in_bulk(const float (&acc)[N / 2], float* out) {
        const int lane = thread % 32;
        const uint32_t staging = smem_address(smem.staging) + thread / 32 * (16 * N * 4);
        if (lane == 0) bulk_wait_read();
        __syncwarp();
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            store_shared_vector(staging + (j * 32 + lane) * 16, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
            bulk_reduce_add(out, staging, 16 * N * 4);
            bulk_commit();
        }
        __syncwarp();
    }

    static constexpr int kStep = 16 * C::kRowBytes >> 4;  // 16 keys further, in a descriptor
};

}  // namespace strobe::sm90
