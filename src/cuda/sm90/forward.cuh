// Exact attention, forward, for Hopper: one producer warpgroup feeds two to four consumer warpgroups through TMA.
//
// A CTA is persistent. The work of a consumer is 64 query rows of each tile; score accumulators become the A operand of
// P V in registers. Algorithm: Dao, "FlashAttention-2" (2023).
#pragma once

#include <type_traits>

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm90/forward_pipelined.cuh"
#include "cuda/sm90/forward_producer.cuh"
#include "cuda/sm90/forward_sequential.cuh"

namespace strobe::sm90 {

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(cuda::decode_variant(kVariantCode).warps * 32,
                                  ForwardConfig<cuda::decode_variant(kVariantCode)>::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    using Config = ForwardConfig<V>;
    extern __shared__ __align__(1024) unsigned char dynamic_smem[];
    auto& smem = *reinterpret_cast<ForwardSmem<Config>*>(dynamic_smem);

    if (threadIdx.x == 0) {
        constexpr int kConsumerWarps = Config::kConsumers * 4;
        for (int g = 0; g < Config::kConsumers; ++g) {
            for (int i = 0; i < Config::kQStages; ++i) {
                smem.q_full[g][i].init(1);
                smem.q_empty[g][i].init(4);
            }
        }
        for (int i = 0; i < Config::kStages; ++i) {
            smem.k_full[i].init(1);
            smem.k_empty[i].init(kConsumerWarps);
            smem.v_full[i].init(1);
            smem.v_empty[i].init(kConsumerWarps);
        }
        smem.v_tail.init(1);
        for (int i = 0; i < kTileSlots; ++i) {
            smem.tile_full[i].init(1);
            smem.tile_empty[i].init(kConsumerWarps + 1);
        }
        fence_barrier_init();
        prefetch_tensor_map(&args.q_map);
        prefetch_tensor_map(&args.k_map);
        prefetch_tensor_map(&args.v_map);
        prefetch_tensor_map(&args.out_map);
    }
    __syncthreads();

    if (threadIdx.x < Config::kConsumers * 128) {
        register_limit_raise<Config::kConsumerRegisters>();
        std::conditional_t<Config::kSequential, SequentialConsumer<V>, PipelinedConsumer<V>>(args, smem).run();
    } else {
        register_limit_lower<Config::kProducerRegisters>();
        const int warp = threadIdx.x / 32 - Config::kConsumers * 4;
        if (warp == 0) {
            if (threadIdx.x % 32 == 0) produce_queries_and_keys<Config>(args, smem);
        } else if (warp == 1) {
            produce_values<Config>(args, smem);
        }
    }
}

}  // namespace strobe::sm90
