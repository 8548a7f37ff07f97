// The dq warpgroup: dq = dS K, or at head dim 64 its transpose, for which K stays in registers: that halves what the
// product reads of shared memory, which is busier than the tensor cores. It is added to the fp32 accumulator in L2.
// Where a CTA has whole heads nobody else adds: dq of the keys so far waits in memory that only this thread touches,
// and goes out in its own type with the last of them.
#pragma once

#include "cuda/common/counter.cuh"
#include "cuda/sm90/backward_epilogue.cuh"

namespace strobe::sm90 {

template <Variant V, bool kWholeHeads>
struct DqWorker {
    using C = BackwardConfig<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int thread;  // in the warpgroup
    int unreported = -1;  // head of a work tile that has been done
    uint32_t k_operand[C::kTransposedDq ? V.block_n / 16 : 1][4] = {};

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();  // the accumulator has been cleared, the counter of claims too
        RingPosition ds_stage, slot;
        for (int t = 0;; ++t) {
            const KeyStage<C::kKeyStages> key_stage(t);
            smem.k_full[key_stage.index].wait(key_stage.phase);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) break;
            if constexpr (C::kTransposedDq) load_operand(key_stage.index);
            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
            const int head = tile.head;
#pragma unroll 1
            for (int i = 0; i < iterations; ++i) {
                if constexpr (kWholeHeads) describe_target(tile, i);
                multiply(key_stage.index, ds_stage, slot);
                ds_stage.template advance<C::kDsStages>();
                if (!kWholeHeads) slot.template advance<C::kSlots>();
                if (C::kBulkAdd && i == 0) report<1>();
            }
            if (thread % 32 == 0) smem.kv_free[key_stage.index].arrive();
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
    /// The i-th query tile of a work tile, in the order of the load warp.
    /// Kept in shared memory, for each warp, because registers are few.
    __device__ __forceinline__ void describe_target(const BackwardTile& tile, int i) {
        const int group = params.size.num_heads / params.size.num_heads_k;
        const int m = tile.m_begin + i / group;
        const int head = i % group;
        const Sequence seq = sequence_of(params, tile.batch);
        const QueryShare share = query_share<V>(tile, m, static_cast<int>(seq.seqlen_q));
        const TensorRef& dq = params.dq;
        const int64_t batch = params.seqlens.cu_seqlens_q ? 0 : tile.batch * dq.batch_stride;
        const int64_t row = static_cast<int64_t>(m) * C::kBlockM;
        __syncwarp();
        if (thread % 32 == 0) {
            DqTarget& to = target();
            to.dq = batch + (seq.q_row + row) * dq.row_stride +
                    (static_cast<int64_t>(tile.head_k) * group + head) * dq.head_stride;
            to.partial = (static_cast<int64_t>(blockIdx.x / C::kCtas) * launch.private_tiles + m * group + head) *
                         (C::kBlockM * C::kDim);
            to.rows = static_cast<int>(seq.rows_q - row);
            to.first = share.first;
            to.last = share.last;
        }
        __syncwarp();
    }
    __device__ __forceinline__ DqTarget& target() const { return smem.dq_target[thread / 32]; }
    /// Of what follows from it nothing is kept in registers.
    __device__ __forceinline__ int thread_anew() const {
        int x = thread;
        if constexpr (kWholeHeads) asm volatile("" : "+r"(x));
        return x;
    }
    template <typename T>
    __device__ __forceinline__ static T fresh(const T& x) {
        return *static_cast<const volatile T*>(&x);
    }

    /// Tells the row workers that the work tile before has been added to dq: the copy engine is done with all groups
    /// but the last kGroups, which belong to this tile.
    template <int kGroups>
    __device__ __forceinline__ void report() {
        if (thread % 32 != 0 || unreported < 0) return;
        if constexpr (C::kBulkAdd) {
            bulk_wait<kGroups>();
            fence_async_proxy_global();
        }
        cuda::add_release(launch.done + unreported, 1);
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
    __device__ __forceinline__ void multiply(int key_stage, const RingPosition& ds, const RingPosition& slot) {
        if constexpr (C::kPair) {
            multiply_half(ds, slot);
        } else if constexpr (C::kTransposedDq) {
            multiply_transposed(ds, slot);
        } else {
            multiply_all(key_stage, ds, slot);
        }
        if (!kWholeHeads && params.deterministic) {
            __syncwarp();
            if (thread % 32 == 0) smem.added[slot.index].arrive();
        }
    }

    /// The left operand of dq^T = K^T dS^T, for as long as the key tile.
    __device__ __forceinline__ void load_operand(int key_stage) {
        const int lane = thread % 32;
        const uint32_t row = smem_address(smem.k) + key_stage * C::kKeyTileBytes +
                             (lane / 16 * 8 + lane % 8) * C::kRowBytes +
                             ((thread / 32 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
        for (int kk = 0; kk < V.block_n / 16; ++kk) {
            load_matrices_transposed(row + kk * 16 * C::kRowBytes, k_operand[kk]);
        }
    }

    __device__ __forceinline__ void multiply_transposed(const RingPosition& ds, const RingPosition& slot) {
        float acc[32];
        smem.ds_full[ds.index].wait(ds.phase);
        const uint64_t b = mn_major(smem_address(smem.ds) + ds.index * C::kDsUnitBytes, C::kDsUnitBytes);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < V.block_n / 16; ++kk) {
            Wgmma<64>::template rs<V.dtype, 1>(acc, k_operand[kk], b + kk * kStep, kk != 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        fence_registers(acc);
        add<64>(acc, {0, 0, {}, true, true}, ds, slot);
    }

    __device__ __forceinline__ void multiply_all(int key_stage, const RingPosition& ds, const RingPosition& slot) {
        constexpr int kTail = C::kDim % 64;
        // Addresses are made anew: there are no registers to keep them.
        if constexpr (C::kKeyStages > 1) asm volatile("" : "+r"(key_stage));
#pragma unroll
        for (int u = 0; u < C::kQueryUnits; ++u) {
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                const uint32_t k = smem_address(smem.k) + key_stage * C::kKeyTileBytes + c * C::kKeyChunkBytes;
                const bool tail = c + 1 == C::kChunks;
                const Piece piece{
                    u, 64 * c, {k, k + 64 * C::kRowBytes}, u == 0 && c == 0, u + 1 == C::kQueryUnits && tail};
                if (kTail == 0 || !tail) {
                    multiply_piece<64>(piece, ds, slot);
                } else {
                    multiply_piece<kTail == 0 ? 64 : kTail>(piece, ds, slot);
                }
            }
        }
    }

    /// A whole chunk of this CTA's half, and the rest of it: another chunk, or at head_dim 192 half of the middle one.
    __device__ __forceinline__ void multiply_half(const RingPosition& ds, const RingPosition& slot) {
        constexpr int kRest = C::kDim / 2 - 64;
        constexpr bool kShared = kRest < 64;
        int rank = C::rank();
        // Addresses are made anew: there are no registers to keep them.
        if constexpr (kWholeHeads) asm volatile("" : "+r"(rank));
        multiply_piece<64>(pair_piece(rank, kShared ? rank : 0, 0, true), ds, slot);
        multiply_piece<kRest>(pair_piece(rank, kShared ? 1 - rank : 1, kShared ? rank * kRest : 0, false), ds, slot);
    }

    /// From column `within` of the chunk that is `chunk` behind pair_chunk().
    __device__ __forceinline__ Piece pair_piece(int rank, int chunk, int within, bool first) {
        const uint32_t mine = smem_address(smem.k) + (C::pair_chunk() + chunk) * C::kKeyChunkBytes + within * 2;
        const uint32_t theirs = smem_address(smem.k_peer) + chunk * C::kKeyChunkBytes + within * 2;
        const bool upper = rank == 0;
        return {
            0, (C::pair_chunk() + chunk) * 64 + within, {upper ? mine : theirs, upper ? theirs : mine}, first, !first};
    }

    /// The first piece waits for dS.
    template <int N>
    __device__ __forceinline__ void multiply_piece(const Piece& piece, const RingPosition& ds,
                                                   const RingPosition& slot) {
        float acc[N / 2];
        const bool adds = kWholeHeads && __any_sync(0xFFFFFFFFu, !fresh(target().first));
        if (adds) load_partial(acc, partial(piece));  // on its way while dS is waited for
        if (piece.first) smem.ds_full[ds.index].wait(ds.phase);
        if constexpr (kWholeHeads) __syncwarp();  // tells the assembler that the warp is one
        const uint64_t a = mn_major(smem_address(smem.ds) + (ds.index * C::kQueryUnits + piece.unit) * C::kDsUnitBytes,
                                    C::kDsUnitBytes);
        const uint64_t b[2] = {mn_major(piece.k[0], C::kKeyChunkBytes), mn_major(piece.k[1], C::kKeyChunkBytes)};
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < V.block_n / 16; ++kk) {
            Wgmma<N>::template ss<V.dtype, 1, 1>(acc, a + kk * kStep, b[kk / 4] + kk % 4 * kStep, kk != 0 || adds);
        }
        wgmma_commit();
        wgmma_wait<0>();
        fence_registers(acc);
        add<N>(acc, piece, ds, slot);
    }

    /// The first piece waits for the turn, the last one frees the dS buffer.
    template <int N>
    __device__ __forceinline__ void add(const float (&acc)[N / 2], const Piece& piece, const RingPosition& ds,
                                        const RingPosition& slot) {
        const int warp = thread / 32, lane = thread % 32;
        if (piece.last && lane == 0) {
            smem.ds_free[ds.index].arrive();
            if constexpr (C::kPair) C::peer().arrive(smem.ds_free[ds.index]);
        }
        if constexpr (kWholeHeads) {
            if (__any_sync(0xFFFFFFFFu, fresh(target().last))) {
                store_result(acc, piece);
            } else {
                store_partial(partial(piece), acc);
            }
            return;
        }
        if (piece.first && params.deterministic) smem.turn_come[slot.index].wait(slot.phase);
        float* const unit = launch.dq + static_cast<int64_t>(smem.slot[slot.index].padded) * (C::kBlockM * C::kDim) +
                            piece.unit * (64 * C::kDim);
        float* const out =
            unit + (C::kWarpMajor ? warp * (16 * C::kDim) + piece.column * 16 : piece.column * 64 + warp * 128);
        if constexpr (C::kBulkAdd) {
            if (launch.bulk_add) {
                add_in_bulk<N>(acc, out);
                return;
            }
        }
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            reduce_add(out + j * (C::kWarpMajor ? 128 : 512) + lane * 4, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2],
                       acc[4 * j + 3]);
        }
    }

    /// Reductions from registers keep the load and store unit, and with it
    /// the key warpgroups, waiting for L2; the copy engine waits by itself.
    template <int N>
    __device__ __forceinline__ void add_in_bulk(const float (&acc)[N / 2], float* out) {
        const int lane = thread % 32;
        const uint32_t staging = smem_address(smem.staging) + thread / 32 * (16 * N * 4);
        if (lane == 0) bulk_wait_read();
        __syncwarp();
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            store_shared_vector(staging + (j * 32 + lane) * 16, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2],
                                acc[4 * j + 3]);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
            bulk_reduce_add(out, staging, 16 * N * 4);
            bulk_commit();
        }
        __syncwarp();
    }

    /// This thread's first element of a piece in a tile of the accumulator: (unit, dim / 8, 128 threads, 4).
    __device__ __forceinline__ int place_in_tile(const Piece& piece) const {
        return (piece.unit * (C::kDim / 8) + piece.column / 8) * 512 + thread_anew() * 4;
    }

    __device__ __forceinline__ float* partial(const Piece& piece) const {
        return launch.dq + fresh(target().partial) + place_in_tile(piece);
    }

    template <int kCount>
    __device__ __forceinline__ static void load_partial(float (&acc)[kCount], const float* from) {
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) {
            asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(acc[4 * j]), "=f"(acc[4 * j + 1]), "=f"(acc[4 * j + 2]), "=f"(acc[4 * j + 3])
                         : "l"(from + j * 512)
                         : "memory");
        }
    }

    template <int kCount>
    __device__ __forceinline__ static void store_partial(float* to, const float (&acc)[kCount]) {
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) {
            *reinterpret_cast<float4*>(to + j * 512) =
                make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
    }

    template <int kCount>
    __device__ __forceinline__ void store_result(const float (&acc)[kCount], const Piece& piece) const {
        const int me = thread_anew();
        const int row = piece.unit * 64 + me / 32 * 16 + me % 32 / 4;
        const GradRows rows{
            fresh(target().dq), params.dq.row_stride, fresh(target().rows), params.size.head_dim, row, me % 4};
        store_gradient<V.dtype>(params, params.dq.data, rows, acc, params.score.softmax_scale, piece.column);
    }

    static constexpr int kStep = 16 * C::kRowBytes >> 4;  // 16 keys further, in a descriptor
};

}  // namespace strobe::sm90
