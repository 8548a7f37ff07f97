// The backward kernel. See backward_config.cuh for how the work is divided.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm90/backward_config.cuh"
#include "cuda/sm90/backward_dq_worker.cuh"
#include "cuda/sm90/backward_key_worker.cuh"
#include "cuda/sm90/backward_load_worker.cuh"
#include "cuda/sm90/backward_order_worker.cuh"
#include "cuda/sm90/backward_pipelined_worker.cuh"
#include "cuda/sm90/backward_row_worker.cuh"
#include "cuda/sm90/backward_split_worker.cuh"
#include "cuda/sm90/backward_statistics_worker.cuh"

namespace strobe::sm90 {

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(cuda::decode_variant(kVariantCode).warps * 32, 1)
    backward_kernel(const __grid_constant__ BackwardParams params, const __grid_constant__ BackwardLaunch launch) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    using C = BackwardConfig<V>;
    extern __shared__ __align__(1024) uint8_t smem_bytes[];
    BackwardSmem<V>& smem = *reinterpret_cast<BackwardSmem<V>*>(smem_bytes);
    release_downstream_kernel();
    if (threadIdx.x == 0) {
        constexpr int kKeyWarps = 4 * C::kKeyWarpgroups;
        for (int s = 0; s < C::kKeyStages; ++s) {
            smem.k_full[s].init(1);
            smem.v_full[s].init(1);
            smem.kv_free[s].init(kKeyWarps + 4);
        }
        for (int s = 0; s < C::kStages; ++s) {
            // The load warp, two statistics warps.
            smem.q_full[s].init(C::kOwnStatistics && launch.own_statistics ? 1 + 2 * 32 : 1);
            smem.stage_free[s].init(kKeyWarps);
        }
        for (int s = 0; s < C::kDoutBarriers; ++s) {
            smem.dout_full[s].init(1);
            smem.dout_free[s].init(kKeyWarps);
        }
        for (int s = 0; s < C::kDsStages; ++s) {
            smem.p_full[s].init(4);
            smem.ds_full[s].init(C::kSplit ? 4 : kKeyWarps);
            smem.ds_free[s].init(C::kCtas * 4);
        }
        for (int s = 0; s < C::kSlots; ++s) {
            smem.slot_full[s].init(1);
            smem.turn_come[s].init(2);
            smem.added[s].init(4);
        }
        for (int s = 0; s < 2; ++s) smem.claim_full[s].init(1), smem.claim_free[s].init(1), smem.rows_full[s].init(1);
        fence_barrier_init();
    }
    if (C::chunks_of(min(params.size.head_dim, params.size.head_dim_v)) < C::kChunks) {
        clear_missing_chunks<V>(smem, params.size);
    }
    if constexpr (C::kPair) cluster_arrive(), cluster_wait();
    __syncthreads();

    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
    const int thread = threadIdx.x % 128;
    if (warpgroup == C::kKeyWarpgroups + 1) {
        register_limit_lower<C::kLoadRegisters>();
        const int warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0);
        if (warp == 0) {
            LoadWorker<V>{smem, params, launch, thread}.run();
        } else if (C::kOwnStatistics && launch.own_statistics) {
            if constexpr (C::kOwnStatistics) {
                if (warp == 3) {
                    clear_unseen_heads<V>(params, launch, thread % 32);
                } else {
                    OwnStatisticsWorker<V>{smem, params, launch, thread % 32, warp - 1}.run();
                }
            }
        } else if (C::kInnerRows && launch.inner_rows) {
            if constexpr (C::kInnerRows) {
                if (warp == 1) StatisticsWorker<V>{{smem, params, launch, thread % 32, smem.row_job[0]}}.run();
                if (warp == 2) ConversionWorker<V>{{smem, params, launch, thread % 32, smem.row_job[1]}}.run();
            }
        } else if (params.deterministic && thread % 32 == 0) {
            if (warp == 1) {
                TurnWorker<V>{smem, launch}.run();
            } else {
                HandOverWorker<V>{smem, launch, warp - 2}.run();
            }
        }
    } else if (warpgroup == C::kKeyWarpgroups) {
        register_limit_lower<C::kDqRegisters>();
        if (C::kWholeHeads && launch.schedule.whole_heads) {
            DqWorker<V, C::kWholeHeads>{smem, params, launch, thread}.run();
        } else {
            DqWorker<V, false>{smem, params, launch, thread}.run();
        }
    } else {
        register_limit_raise<C::kKeyRegisters>();
        if constexpr (C::kPipelined) {
            PipelinedKeyWorker<V>{{smem, params, launch, warpgroup, thread}}.run();
        } else if constexpr (!C::kSplit) {
            KeyWorker<V>{{smem, params, launch, warpgroup, thread}}.run();
        } else if (warpgroup == 0) {
            ValueWorker<V>{{smem, params, launch, thread}}.run();
        } else {
            KeyGradWorker<V>{{smem, params, launch, thread}}.run();
        }
    }
    if constexpr (C::kPair) cluster_arrive(), cluster_wait();  // the other may still arrive at barriers in here
}

}  // namespace strobe::sm90
