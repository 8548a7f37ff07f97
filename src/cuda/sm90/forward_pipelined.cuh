// A consumer that overlaps its own softmax with its own matrix multiplies, for tiles that fill the register file: its
// work is one unbroken stream of key blocks. While the tensor cores compute the scores of block j + 1 and the output of
// block j, the softmax follows behind, and the first scores of the next tile start before the last output of this one
// is stored. Overlap of softmax and wgmma, and turns: Shah et al., "FlashAttention-3" (2024).
#pragma once

#include "cuda/sm90/forward_consumer.cuh"

namespace strobe::sm90 {

template <Variant V>
class PipelinedConsumer : Consumer<V> {
    using Base = Consumer<V>;
    using typename Base::Config;
    using typename Base::Mask;
    using typename Base::Output;
    using typename Base::Scores;
    using typename Base::Weights;
    using Base::args_, Base::smem_, Base::group_, Base::softmax_, Base::tile_, Base::query_, Base::key_, Base::value_;
    using Base::wait_full, Base::release, Base::tile;

public:
    __device__ PipelinedConsumer(const ForwardArgs& args, ForwardSmem<Config>& smem) : Base(args, smem) {}

    __device__ __forceinline__ void run() {
        Scores s;
        Output o;
        Weights p;
        if (group_ == 0) pass_turn(Config::kConsumers - 1);
        while (Base::find_tile()) {
            wait_turn();
            start_scores(s);
            pass_turn(group_);
            Mask mask = begin_tile(s, p);
            for (;;) {
                const int n_begin = tile().n_begin;
                bool accumulate = false;
                for (int n = tile().n_end - 2; n >= n_begin; --n) {
                    next_block(s, o, p, mask, n, accumulate);
                    if (Config::kOutputInValues && n == n_begin) release_queries();
                    accumulate = true;
                }
                const bool more = Base::next_tile();
                wait_full(smem_.v_full, value_, values_ready_);
                wait_turn();
                ++query_;
                // In each branch: ptxas serialises wgmmas whose group it sees end in two places.
                if (!more) {
                    Base::issue_output(o, p, accumulate);
                    pass_turn(group_);
                    finish_tile<0>(o);
                    release_staging();
                    __syncwarp();
                    break;
                }
                Base::issue_output(o, p, accumulate);
                start_scores(s);
                pass_turn(group_);
                finish_tile<1>(o);
                mask = begin_tile(s, p);
                release_staging();
                // Together again in ptxas's eyes too: for warps that may have parted it does without uniform registers,
                // and every wgmma of the loop waits for its descriptors to be moved there.
                __syncwarp();
            }
        }
    }

private:
    // A warpgroup that has the turn issues its two matrix multiplies, then passes the turn on to the next one.
    __device__ void wait_turn() const { named_barrier_sync(1 + group_, 256); }
    __device__ static void pass_turn(int from) { named_barrier_arrive(1 + (from + 1) % Config::kConsumers, 256); }

    __device__ __forceinline__ void start_scores(Scores& s) {
        wait_full(smem_.q_full[group_], query_);
        wait_full(smem_.k_full, key_);
        Base::issue_scores(s);
    }

    __device__ __forceinline__ void release_queries() { release(smem_.q_empty[group_], query_); }

    /// Waits for the first scores of a tile and takes their softmax.
    __device__ __forceinline__ Mask begin_tile(Scores& s, Weights& p) {
        const Mask mask(tile(), Base::group_row(), Base::group_row() + Base::thread_row());
        wgmma_wait<0>();
        fence_registers(s);
        release(smem_.k_empty, key_);
        ++key_;
        if (Config::kOutputInValues && tile().num_blocks() == 1) release_queries();
        mask.apply(s, tile().n_end - 1);
        softmax_.start(s);
        peek_next_block();
        softmax_.exponentiate(s);
        Base::round_weights(s, p);
        return mask;
    }

    /// Issues the scores of key block n and the output of the block
    /// before, whose weights are p; p becomes the weights of n.
    __device__ __forceinline__ void next_block(Scores& s, Output& o, Weights& p, const Mask& mask, int n,
                                               bool accumulate) {
        wait_full(smem_.k_full, key_, keys_ready_);
        wait_turn();
        Base::issue_scores(s);
        wait_full(smem_.v_full, value_, values_ready_);
        Base::issue_output(o, p, accumulate);
        pass_turn(group_);

        wgmma_wait<1>();
        fence_registers(s);
        release(smem_.k_empty, key_);
        ++key_;
        mask.apply(s, n);
        float factor[2];
        const bool rescale = softmax_.adapt(s, factor);
        ++value_;
        peek_next_block();
        softmax_.exponentiate(s);

        // The weights exist before the wait: the compiler would rather delay them, and lose the overlap.
        fence_registers(s);
        wgmma_wait<0>();
        fence_registers(o);
        release(smem_.v_empty, value_ - 1);
        Base::round_weights(s, p);
        if (rescale) Base::rescale(o, factor);
    }

    /// Asks early whether the next key block and the values of this one have arrived: the answer takes 100 cycles.
    __device__ __forceinline__ void peek_next_block() {
        keys_ready_ = Base::peek_full(smem_.k_full, key_);
        values_ready_ = Base::peek_full(smem_.v_full, value_);
    }

    /// Waits for the last P V of the tile before, which kPending
    /// younger groups may outlive, and stores that tile's output.
    template <int kPending>
    __device__ __forceinline__ void finish_tile(Output& o) {
        wgmma_wait<kPending>();
        fence_registers(o);
        release(smem_.v_empty, value_);
        ++value_;
        if constexpr (Config::kOutputInValues) {
            // Two lent value buffers follow: one for each group, the first group's first.
            for (int g = 0; g < group_; ++g) return_value_buffer(g);
            wait_full(smem_.v_full, value_ + group_);
            Base::store_tile(o, tile_ - 1, Base::buffer(smem_.v, value_ + group_));
        } else {
            // All warps of the group have read the queries that the output replaces.
            named_barrier_sync(1 + Config::kConsumers + group_, 128);
            Base::store_tile(o, tile_ - 1, Base::queries(query_ - 1));
        }
    }

    /// Gives back what finish_tile() wrote to.
    __device__ __forceinline__ void release_staging() {
        Base::wait_stored();
        if constexpr (Config::kOutputInValues) {
            release(smem_.v_empty, value_ + group_);
            for (int g = group_ + 1; g < Config::kConsumers; ++g) return_value_buffer(g);
            value_ += Config::kConsumers;
            values_ready_ = false;  // was asked of a lent buffer
        } else {
            release(smem_.q_empty[group_], query_ - 1);
        }
    }
    /// A buffer lent to another group; arriving before it is lent would count for its last use.
    __device__ __forceinline__ void return_value_buffer(int g) {
        wait_full(smem_.v_full, value_ + g);
        release(smem_.v_empty, value_ + g);
    }

    bool keys_ready_ = false, values_ready_ = false;
};

}  // namespace strobe::sm90
