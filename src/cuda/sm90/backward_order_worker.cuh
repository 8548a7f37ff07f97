// Deterministic mode: key tiles add to a dq tile one after the other, in an order that depends on the problem alone
// (query_turn in backward_schedule.hpp). A global counter per dq tile tells whose turn it is.
//
// The dq warpgroup never touches that counter: its round trip and the fence behind the additions
// would cost a third of a query tile's time. One warp waits for the turns of the tiles ahead; two
// others, in turns, wait for the additions of the tiles behind to be performed, and hand over. A
// release is cumulative: what the mbarrier ordered before it is ordered for the whole device.
#pragma once

#include "cuda/common/counter.cuh"
#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

/// Lets the dq warpgroup add to a tile once the turn has come. One thread.
template <Variant V>
struct TurnWorker {
    using C = BackwardConfig<V>;

    BackwardSmem<V>& smem;
    const BackwardLaunch& launch;

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();  // the counters have been cleared
        for (RingPosition at;; at.template advance<C::kSlots>()) {
            smem.slot_full[at.index].wait(at.phase);
            const QuerySlot& slot = smem.slot[at.index];
            if (slot.padded < 0) return;
            const int32_t* const turn = launch.semaphore + slot.padded;
            while (cuda::load_acquire(turn) < slot.turn * C::kCtas) {  // both CTAs of a pair add, each its columns
            }
            smem.turn_come[at.index].arrive();
        }
    }
};

/// Hands the turn on. One thread of each of two warps; the first takes the even tiles.
template <Variant V>
struct HandOverWorker {
    using C = BackwardConfig<V>;
    // Tiles that the dq warpgroup may be ahead of what has been taken note of. A stage is free
    // when a dS buffer was, which is before that tile has been added: the load warp is up to
    // kStages + kDsStages + 1 ahead of the last tile whose turn had come, and must not reuse
    // the slot of one that nobody has taken note of, or its barriers would go round unseen.
    static constexpr int kLag = C::kSlots - C::kStages - C::kDsStages - 1;
    static_assert(kLag >= 2);

    BackwardSmem<V>& smem;
    const BackwardLaunch& launch;
    const int first;

    __device__ __forceinline__ void run() {
        RingPosition at;
        if (first == 0) {
            for (int i = 0; i < kLag; ++i) smem.turn_come[i].arrive();
        } else {
            at.template advance<C::kSlots>();
        }
        for (;;) {
            smem.slot_full[at.index].wait(at.phase);
            const int padded = smem.slot[at.index].padded;
            if (padded < 0) return;
            smem.added[at.index].wait(at.phase);
            smem.turn_come[(at.index + kLag) % C::kSlots].arrive();
            cuda::add_release(launch.semaphore + padded, 1);
            at.template advance<C::kSlots>();
            at.template advance<C::kSlots>();
        }
    }
};

}  // namespace strobe::sm90
