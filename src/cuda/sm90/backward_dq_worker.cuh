// The dq warpgroup: dq = dS K.
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
    uint32_t k_operand[C::kTransposedDq ? C::kOperandSteps : 1][4];

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();  // the accumulator has been cleared
        RingPosition ds_stage, slot;
        for (int t = 0;; ++t) {
            smem.k_full.wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) break;
            if constexpr (C::kTransposedDq) load_operand();
            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                smem.ds_full[ds_stage.index * C::kDsParts].wait(ds_stage.phase);
                if constexpr (STROBE_NODQ) {
                    if (thread % 32 == 0) smem.ds_free[ds_stage.index].arrive();
                } else {
                    multiply_and_add(ds_stage, slot);
                }
                ds_stage.template advance<C::kDsStages>();
                slot.template advance<C::kSlots>();
            }
            const int key_head = tile.head;
            if (thread % 32 == 0) smem.kv_free.arrive();
            if (C::kInnerRows && launch.inner_rows) {
                __syncwarp();
                if (thread % 32 == 0) {
                    if constexpr (C::kBulkAdd) {
                        bulk_wait();
                        fence_async_proxy_global();
                    }
                    add_release(launch.done + key_head, 1);
                }
            }
        }
        if constexpr (C::kBulkAdd) {
            if (thread % 32 == 0) bulk_wait();
        }
    }

private:
    /// 64 queries (a unit of the tile) by at most 64 columns, which need few registers.
    struct Piece {
        int unit;
        int column;
        uint32_t k[2];  // shared memory of keys 0...63 and 64...127, from that column
        bool first, last;
    };

    /// dq (block_m queries x dim, or a pair's half of dim) += dS K.
    __device__ __forceinline__ void multiply_and_add(const RingPosition& ds_stage, const RingPosition& slot) {
        if constexpr (C::kPair) {
            add_half(ds_stage.index, slot);
        } else if constexpr (C::kTransposedDq) {
            add_transposed(ds_stage, slot);
        } else if constexpr (STROBE_TWO && C::kDim == 64 && C::kQueryUnits == 2) {
            add_two(ds_stage.index, slot);
        } else if constexpr (C::kWide) {
            add_wide(ds_stage, slot);
        } else {
            add_all(ds_stage, slot);
        }
        if (params.deterministic) {
            __syncwarp();
            if (thread % 32 == 0) smem.added[slot.index].arrive();
        }
    }

    /// The left operand of dq^T = K^T dS^T, 64 columns of K: it stays in registers as long as the key tile.
    __device__ __forceinline__ void load_operand() {
        const int lane = thread % 32;
        const uint32_t row = smem_address(smem.k) + (lane / 16 * 8 + lane % 8) * C::kRowBytes +
                             ((thread / 32 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
        for (int kk = 0; kk < C::kOperandSteps; ++kk) load_matrices_transposed(row + kk * 16 * C::kRowBytes, k_operand[kk]);
    }

    /// dq^T, kTransposedQueries at a time. K from registers halves what the product reads of shared memory.
    __device__ __forceinline__ void add_transposed(const RingPosition& ds_stage, const RingPosition& slot) {
        const int ds_index = ds_stage.index;
        constexpr int kStep = 16 * C::kRowBytes >> 4;
        constexpr int kQueries = C::kTransposedQueries;
        const uint64_t k = mn_major(smem_address(smem.k), C::kKeyChunkBytes);
#pragma unroll
        for (int i = 0; i < C::kBlockM / kQueries; ++i) {
            const int unit = i * kQueries / 64, within = i * kQueries % 64;
            if (C::kDsParts == 2 && unit == 1 && within == 0) smem.ds_full[ds_index * 2 + 1].wait(ds_stage.phase);
            float acc[kQueries / 2];
            const uint64_t ds = mn_major(smem_address(smem.ds) + (ds_index * C::kQueryUnits + unit) * C::kDsUnitBytes + within * 2,
                                         C::kDsUnitBytes);
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < V.block_n / 16; ++kk) {
                if (kk < C::kOperandSteps) {
                    Wgmma<kQueries>::template rs<V.dtype, 1>(acc, k_operand[kk < C::kOperandSteps ? kk : 0], ds + kk * kStep, kk != 0);
                } else {
                    Wgmma<kQueries>::template ss<V.dtype, 1, 1>(acc, k + kk * kStep, ds + kk * kStep, 1);
                }
            }
            wgmma_commit();
            wgmma_wait<0>();
            fence_registers(acc);
            add<kQueries>(acc, unit, within, ds_index, slot, i == 0, (i + 1) * kQueries == C::kBlockM);
        }
    }

    /// Two units, the second one's product under the first one's additions.
    __device__ __forceinline__ void add_two(int ds_index, const RingPosition& slot) {
        constexpr int kStep = 16 * C::kRowBytes >> 4;
        float acc[2][32];
        const uint64_t a = mn_major(smem_address(smem.ds) + ds_index * 2 * C::kDsUnitBytes, C::kDsUnitBytes);
        const uint64_t b = mn_major(smem_address(smem.k), C::kKeyChunkBytes);
        wgmma_fence();
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
            for (int kk = 0; kk < V.block_n / 16; ++kk) {
                Wgmma<64>::template ss<V.dtype, 1, 1>(acc[u], a + (u * C::kDsUnitBytes >> 4) + kk * kStep, b + kk * kStep, kk != 0);
            }
            wgmma_commit();
        }
        wgmma_wait<1>();
        fence_registers(acc[0]);
        add<64>(acc[0], 0, 0, ds_index, slot, true, false);
        wgmma_wait<0>();
        fence_registers(acc[1]);
        add<64>(acc[1], 1, 0, ds_index, slot, false, true);
    }

    /// 256 keys, in the order in which the key warpgroups finish them.
    __device__ __forceinline__ void add_wide(const RingPosition& ds_stage, const RingPosition& slot) {
        constexpr int kStep = 16 * C::kRowBytes >> 4;
        float acc[32];
        const uint64_t a = mn_major(smem_address(smem.ds) + ds_stage.index * C::kDsUnitBytes, C::kDsUnitBytes);
        const uint64_t b = mn_major(smem_address(smem.k), C::kKeyChunkBytes);
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            if (part == 1) smem.ds_full[ds_stage.index * 2 + 1].wait(ds_stage.phase);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int kk = i / 4 * 8 + part * 4 + i % 4;
                Wgmma<64>::template ss<V.dtype, 1, 1>(acc, a + kk * kStep, b + kk * kStep, part + i != 0);
            }
            wgmma_commit();
        }
        wgmma_wait<0>();
        fence_registers(acc);
        add<64>(acc, 0, 0, ds_stage.index, slot, true, true);
    }

    __device__ __forceinline__ void add_all(const RingPosition& ds_stage, const RingPosition& slot) {
        const int ds_index = ds_stage.index;
        constexpr int kTail = C::kDim % 64;
#pragma unroll
        for (int u = 0; u < C::kQueryUnits; ++u) {
            if (C::kDsParts == 2 && u == 1) smem.ds_full[ds_index * 2 + 1].wait(ds_stage.phase);
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

    /// The first piece waits for the turn, the last one frees the dS buffer.
    template <int N>
    __device__ __forceinline__ void multiply_piece(const Piece& piece, int ds_index, const RingPosition& slot) {
        constexpr int kStep = 16 * C::kRowBytes >> 4;
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
        add<N>(acc, piece.unit, piece.column, ds_index, slot, piece.first, piece.last);
    }

    /// Adds the accumulators of a piece to dq in L2; the buffer of dS is free behind the last piece.
    template <int N>
    __device__ __forceinline__ void add(const float (&acc)[N / 2], int unit, int column, int ds_index, const RingPosition& slot,
                                        bool first, bool last) {
        if (last && thread % 32 == 0) {
            smem.ds_free[ds_index].arrive();
            if constexpr (C::kPair) C::peer().arrive(smem.ds_free[ds_index]);
        }
        if (first && params.deterministic) smem.turn_come[slot.index].wait(slot.phase);
        float* const tile = launch.dq + static_cast<int64_t>(smem.slot[slot.index].padded) * (C::kBlockM * C::kDim) + unit * (64 * C::kDim);
        if constexpr (STROBE_NORED) {
            if (acc[0] == 123.456f) reduce_add(tile, acc[0], acc[1], acc[2], acc[3]);
            return;
        }
        float* const out = C::kWarpMajor ? tile + thread / 32 * (16 * C::kDim) + column / 8 * 128
                                         : tile + column / 8 * 512 + thread / 32 * 128;
        constexpr int kNext = C::kWarpMajor ? 128 : 512;
        if constexpr (C::kBulkAdd) {
            if (!params.deterministic) {
                add_in_bulk<N>(acc, out);
                return;
            }
        }
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            reduce_add(out + j * kNext + thread % 32 * 4, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
    }

    /// By the copy engine: reductions of the load and store unit keep the key warpgroups' accesses to shared memory waiting.
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
            if constexpr (C::kWarpMajor) {
                bulk_reduce_add(out, staging, N / 8 * 512);
            } else {
#pragma unroll
                for (int j = 0; j < N / 8; ++j) bulk_reduce_add(out + j * 512, staging + j * 512, 512);
            }
            bulk_commit();
        }
        __syncwarp();
    }
};

}  // namespace strobe::sm90
