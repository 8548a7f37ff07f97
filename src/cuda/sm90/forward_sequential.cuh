// A consumer that does one thing at a time: scores, softmax, output. Its scores and weights share registers, so that
// four such warpgroups fit an SM, in one CTA or two, and whatever one waits for the others hide: matrix multiplies,
// special functions, the change of tiles.
#pragma once

#include "cuda/sm90/forward_consumer.cuh"

namespace strobe::sm90 {

template <Variant V>
class SequentialConsumer : Consumer<V> {
    using Base = Consumer<V>;
    using typename Base::Config;
    using typename Base::Mask;
    using typename Base::Output;
    using typename Base::Scores;
    using typename Base::Weights;
    using Base::smem_, Base::group_, Base::softmax_, Base::tile_, Base::query_, Base::key_, Base::value_;
    using Base::wait_full, Base::release, Base::tile;

public:
    __device__ SequentialConsumer(const ForwardArgs& args, ForwardSmem<Config>& smem) : Base(args, smem) {}

    __device__ __forceinline__ void run() {
        while (Base::find_tile()) {
            Output o;
            const Mask mask(tile(), Base::group_row(), Base::group_row() + Base::thread_row());
            const int n_begin = tile().n_begin;
            int n = tile().n_end - 1;
            for (; n > n_begin && mask.hides(n); --n) skip_block();
            wait_full(smem_.q_full[group_], query_);
            do_block<true>(o, mask, n);
            if (query_ > 0) {
                Base::wait_stored();
                release(smem_.q_empty[group_], query_ - 1);
            }
            while (--n >= n_begin) do_block<false>(o, mask, n);

            // All warps of the group have read the queries that the output replaces.
            named_barrier_sync(1 + group_, 128);
            Base::store_tile(o, tile_, Base::queries(query_));
            ++tile_;
            ++query_;
        }
        Base::wait_stored();
    }

private:
    template <bool kFirst>
    __device__ __forceinline__ void do_block(Output& o, const Mask& mask, int n) {
        Scores s;
        Weights p;
        wait_full(smem_.k_full, key_);
        Base::issue_scores(s);
        wgmma_wait<0>();
        fence_registers(s);
        release(smem_.k_empty, key_);
        ++key_;
        mask.apply(s, n);
        if constexpr (kFirst) {
            softmax_.start(s);
        } else {
            float factor[2];
            if (softmax_.adapt(s, factor)) Base::rescale(o, factor);
        }
        softmax_.exponentiate(s);
        Base::round_weights(s, p);
        wait_full(smem_.v_full, value_);
        Base::issue_output(o, p, !kFirst);
        wgmma_wait<0>();
        fence_registers(o);
        release(smem_.v_empty, value_);
        ++value_;
    }

    /// A key block of which this group's rows see nothing.
    __device__ __forceinline__ void skip_block() {
        wait_full(smem_.k_full, key_);
        release(smem_.k_empty, key_);
        ++key_;
        wait_full(smem_.v_full, value_);
        release(smem_.v_empty, value_);
        ++value_;
    }
};

}  // namespace strobe::sm90
