// The forward kernel's plan: what follows from a variant row,
// how shared memory is laid out and which barrier guards what.
#pragma once

#include <cstdint>

#include "core/variant.hpp"
#include "cuda/sm90/forward_tile.cuh"
#include "cuda/sm90/ptx.cuh"

namespace strobe::sm90 {

constexpr int kSmemLimit = 227 * 1024;  // of one CTA

template <Variant V>
struct ForwardConfig {
    static constexpr int kBlockM = V.block_m;
    static constexpr int kBlockN = V.block_n;
    static constexpr int kHeadDim = V.head_dim;
    static constexpr int kStages = V.stages;

    // A consumer warpgroup owns 64 query rows; one more warpgroup feeds them and gives them its registers. Where the
    // accumulators are small, four consumers share an SM, in one CTA or two, and hide one another's waits
    // (forward_sequential.cuh); elsewhere each hides its own (forward_pipelined.cuh).
    static constexpr int kConsumers = kBlockM / 64;
    static constexpr int kThreads = V.warps * 32;
    static_assert(kThreads == (kConsumers + 1) * 128, "one producer warpgroup and one consumer warpgroup per 64 rows");
    static constexpr bool kSequential = kHeadDim + kBlockN <= 144;
    static constexpr int kCtasPerSm = kSequential && kConsumers == 2 ? 2 : 1;
    static constexpr int kProducerRegisters = kSequential || kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters =
        kCtasPerSm == 2 ? 104 : kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : 232;

    // The output leaves through the spent query buffer when there is a second one, else through two value buffers that
    // the producer lends at the tile's end. Barriers and tiles take less than 2 KB.
    static constexpr int kSmemBudget = (kSmemLimit + 1024) / kCtasPerSm - 1024;
    static constexpr int kQStages = 2 * kHeadDim * (2 * kBlockM + 2 * kStages * kBlockN) + 2048 <= kSmemBudget ? 2 : 1;
    static constexpr bool kOutputInValues = kQStages == 1;
    static_assert(!kOutputInValues || (kConsumers <= kStages && kBlockN >= 64 && !kSequential));

    // Tiles are stored in chunks of one swizzle span of columns.
    static constexpr int kSpan = kHeadDim % 64 == 0 ? 128 : 64;  // bytes
    static constexpr int kChunkCols = kSpan / 2;
    static constexpr int kChunks = kHeadDim / kChunkCols;
    static_assert(kHeadDim % 32 == 0 && kBlockN % 16 == 0);
    static constexpr int kGroupChunkBytes = 64 * kSpan;  // of a consumer's queries, and of its staged output
};

struct ForwardArgs {
    CUtensorMap q_map, k_map, v_map;
    CUtensorMap out_map;  // boxes of 16 rows; unused for fp32 output
    AttentionParams params;
    ForwardSchedule schedule;
    int heads_per_key_head;
    float scale_log2;  // softmax_scale * log2(e)
    bool overlaps_upstream;  // launched before the kernel in front of it on the stream has finished
    bool clean_tails;  // memory behind a sequence's last key holds other data: zero what a value block caught of it
};

constexpr int kTileSlots = 4;

/// Ownership: the producer fills a buffer after `empty`, its readers may read after `full`. Each consumer warp arrives
/// once on an `empty` barrier; queries belong to one consumer warpgroup.
template <typename Config>
struct ForwardSmem {
    alignas(1024) uint16_t q[Config::kQStages][Config::kConsumers][64 * Config::kHeadDim];
    alignas(1024) uint16_t k[Config::kStages][Config::kBlockN * Config::kHeadDim];
    alignas(1024) uint16_t v[Config::kStages][Config::kBlockN * Config::kHeadDim];
    Barrier q_full[Config::kConsumers][Config::kQStages], q_empty[Config::kConsumers][Config::kQStages];
    Barrier k_full[Config::kStages], k_empty[Config::kStages];
    Barrier v_full[Config::kStages], v_empty[Config::kStages];
    Barrier v_tail;  // a ragged value block has arrived and waits for its tail to be zeroed
    Barrier tile_full[kTileSlots], tile_empty[kTileSlots];
    ForwardTile tiles[kTileSlots];
};

/// Where item number `count` of a stream lives in a ring of kSize buffers, and the phase bit of its `full` barrier.
template <int kSize>
__device__ __forceinline__ int ring_slot(uint32_t count) {
    return static_cast<int>(count % kSize);
}
template <int kSize>
__device__ __forceinline__ uint32_t ring_phase(uint32_t count) {
    return count / kSize & 1;
}

}  // namespace strobe::sm90
