// The dq warpgroup: dq = dS K.
#pragma once

#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

/// Order in which key tiles add to one dq tile when the result must not depend on timing: key tile 0 first.
struct DqOrder {
    int32_t* semaphore;

    __device__ __forceinline__ void wait_for_turn(int turn, int thread) const {
        if (thread == 0) {
            int seen;
            do {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(semaphore) : "memory");
            } while (seen != turn);
        }
    }
    __device__ __forceinline__ void pass_on(int thread) const {
        if (thread == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(semaphore) : "memory");
    }
};

template <Variant V>
struct DqWorker {
    using C = BackwardConfig<V>;
    static constexpr int kBarrier = 1;  // named barrier of the 128 threads

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int thread;  // in the warpgroup

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();  // the accumulator has been cleared
        RingPosition ds_stage, slot;
        for (int t = 0;; ++t) {
            smem.k_full.wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                smem.ds_full[ds_stage.index].wait(ds_stage.phase);
                multiply_and_add(ds_stage.index, smem.slot[slot.index]);
                ds_stage.template advance<C::kDsStages>();
                slot.template advance<C::kSlots>();
            }
            if (thread % 32 == 0) smem.kv_free.arrive();
        }
    }

private:
    /// dq (block_m queries x dim) += dS K in pieces of 64 x 64, which need few registers.
    __device__ __forceinline__ void multiply_and_add(int ds_index, const QuerySlot& slot) {
        const int64_t padded = slot.padded;
        const DqOrder order{launch.semaphore + padded};
        if (params.deterministic) {
            order.wait_for_turn(slot.turn, thread);
            named_barrier_sync(kBarrier, 128);
        }
        const uint32_t ds = smem_address(smem.ds) + ds_index * C::kQueryUnits * C::kDsUnitBytes;
        float* const out = launch.dq + padded * (C::kBlockM * C::kDim) + thread * 4;
#pragma unroll
        for (int u = 0; u < C::kQueryUnits; ++u) {
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                constexpr int kTail = C::kDim % 64;
                if (kTail == 0 || c + 1 < C::kChunks) {
                    multiply_piece<64>(ds, ds_index, u, c, out);
                } else {
                    multiply_piece<kTail == 0 ? 64 : kTail>(ds, ds_index, u, c, out);
                }
            }
        }
        if (params.deterministic) {
            __threadfence();
            named_barrier_sync(kBarrier, 128);
            order.pass_on(thread);
        }
    }

    /// 64 queries (unit) by N columns from 64 * chunk. The last piece frees the dS buffer.
    template <int N>
    __device__ __forceinline__ void multiply_piece(uint32_t ds, int ds_index, int unit, int chunk, float* out) {
        float acc[N / 2];
        const uint64_t a = mn_major(ds + unit * C::kDsUnitBytes, C::kDsUnitBytes);
        const uint64_t b = mn_major(smem_address(smem.k) + chunk * C::kKeyChunkBytes, C::kKeyChunkBytes);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < C::kBlockN / 16; ++kk) {
            const int step = kk * (16 * C::kRowBytes >> 4);
            Wgmma<N>::template ss<V.dtype, 1, 1>(acc, a + step, b + step, kk != 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        fence_registers(acc);
        if (unit + 1 == C::kQueryUnits && chunk + 1 == C::kChunks && thread % 32 == 0) smem.ds_free[ds_index].arrive();
        float* const piece = out + (unit * (C::kDim / 8) + chunk * 8) * 512;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            reduce_add(piece + j * 512, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
    }
};

}  // namespace strobe::sm90
