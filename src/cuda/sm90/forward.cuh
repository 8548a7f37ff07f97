// Exact attention, forward, for Hopper: one producer warpgroup feeds two or three consumer warpgroups through TMA.
//
// A CTA is persistent. The work of a consumer is one unbroken stream of key blocks: while the tensor cores compute the
// scores of block j + 1 and the output of block j, the warpgroup's softmax follows behind, and the first scores of the next
// tile start before the last output of this one is stored. Score accumulators become the A operand of P V in registers.
// Algorithm: Dao, "FlashAttention-2" (2023); overlap of softmax and wgmma: Shah et al., "FlashAttention-3" (2024).
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm90/forward_config.cuh"
#include "cuda/sm90/forward_epilogue.cuh"
#include "cuda/sm90/forward_producer.cuh"
#include "cuda/sm90/softmax.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace strobe::sm90 {

// ---------------------------------------------------------------------------------------------------------- consumer

/// S = Q K^T of 64 query rows.
template <typename Config, DType kType>
__device__ __forceinline__ void issue_scores(float (&s)[Config::kBlockN / 2], uint32_t q, uint32_t k) {
    constexpr int kSpan = Config::kSpan;
    const uint64_t q_descriptor = smem_descriptor<kSpan>(q, 16, 8 * kSpan);
    const uint64_t k_descriptor = smem_descriptor<kSpan>(k, 16, 8 * kSpan);
    fence_registers(s);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
        const int chunk = i * 32 / kSpan, offset = i * 32 % kSpan;
        Wgmma<Config::kBlockN>::template ss<kType, 0, 0>(
            s, advanced(q_descriptor, chunk * Config::kBlockM * kSpan + offset),
            advanced(k_descriptor, chunk * Config::kBlockN * kSpan + offset), i > 0);
    }
    wgmma_commit();
    fence_registers(s);
}

/// Which key blocks of a tile need an element test for the 64 rows of one warpgroup, and the test.
template <typename Config, MaskClass kMask>
struct RowMask {
    int seqlen_k, right, left;
    int row;  // first of this thread's two rows
    int plain_begin, plain_end;  // blocks in between are seen whole

    __device__ __forceinline__ RowMask(const ForwardTile& tile, int first_row, int thread_row)
        : seqlen_k(tile.seqlen_k), right(tile.right), left(tile.left), row(thread_row), plain_begin(0) {
        int end = seqlen_k;
        if constexpr (kMask == MaskClass::band) {
            end = max(min(end, first_row + right), 0);
            plain_begin = (max(first_row + 63 + left, 0) + Config::kBlockN - 1) / Config::kBlockN;
        }
        plain_end = end / Config::kBlockN;
    }

    template <int kCount>
    __device__ __forceinline__ void apply(float (&s)[kCount], int n) const {
        if (n < plain_end && (kMask == MaskClass::full || n >= plain_begin)) return;
        const int first_column = n * Config::kBlockN + threadIdx.x % 4 * 2;
        int hi[2], lo[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            hi[r] = seqlen_k - first_column;
            lo[r] = 0;
            if constexpr (kMask == MaskClass::band) {
                hi[r] = min(hi[r], row + 8 * r + right - first_column);
                lo[r] = row + 8 * r + left - first_column;
            }
        }
        mask_columns(s, lo, hi);
    }
};

template <Variant V>
class Consumer {
    using Config = ForwardConfig<V>;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kSpan = Config::kSpan;

    static constexpr bool kPrefetch = Config::kQStages > 1;

    using Scores = float[kBlockN / 2];
    using Output = float[Config::kHeadDim / 2];
    using Weights = uint32_t[kBlockN / 16][4];
    using Mask = RowMask<Config, V.mask>;

public:
    __device__ Consumer(const ForwardArgs& args, ForwardSmem<Config>& smem)
        : args_(args), smem_(smem), group_(__shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 128 - 1, 0)), softmax_(args.scale_log2) {}

    __device__ __forceinline__ void run() {
        Scores s;
        Output o;
        Weights p;
        if (group_ == 0) pass_turn(Config::kConsumers - 1);
        if (!next_tile()) return;
        wait_turn();
        start_scores(s);
        pass_turn(group_);
        Mask mask = begin_tile(s, p);
        for (;;) {
            const int n_begin = tile().n_begin;
            bool accumulate = false;
            for (int n = tile().n_end - 2; n >= n_begin; --n) {
                next_block(s, o, p, mask, n, accumulate);
                accumulate = true;
            }
            if constexpr (!kPrefetch) release(smem_.q_empty, query_);
            ++query_;

            const ForwardTile& done = tile();
            const bool more = next_tile();
            wait_full(smem_.v_full, block_ - 1, values_ready_);
            wait_turn();
            if (!more) {
                issue_output(o, p, accumulate);
                pass_turn(group_);
                finish_tile<0>(o, done);
                if constexpr (kPrefetch) bulk_wait_read();
                return;
            }
            issue_output(o, p, accumulate);
            if constexpr (kPrefetch) {
                start_scores(s);
                pass_turn(group_);
                finish_tile<1>(o, done);
                mask = begin_tile(s, p);
                if (threadIdx.x % 32 == 0) bulk_wait_read();
                release(smem_.q_empty, query_ - 1);
            } else {
                pass_turn(group_);
                finish_tile<0>(o, done);
                wait_turn();
                start_scores(s);
                pass_turn(group_);
                mask = begin_tile(s, p);
            }
        }
    }

private:
    // The streams of key and value blocks, of tiles and of tiles that have keys are counted from the kernel's start; an
    // item's number gives its buffer. block_ is the next key block; the values due are those of the block before.
    template <int kSize>
    __device__ __forceinline__ static void wait_full(Barrier (&full)[kSize], uint32_t count, bool ready = false) {
        if (!ready) full[ring_slot<kSize>(count)].wait(ring_phase<kSize>(count));
    }
    template <int kSize>
    __device__ __forceinline__ static bool peek_full(Barrier (&full)[kSize], uint32_t count) {
        return full[ring_slot<kSize>(count)].peek(ring_phase<kSize>(count));
    }
    template <int kSize>
    __device__ __forceinline__ static void release(Barrier (&empty)[kSize], uint32_t count) {
        if (threadIdx.x % 32 == 0) empty[ring_slot<kSize>(count)].arrive();
    }
    template <int kSize, int kElements>
    __device__ __forceinline__ static uint32_t buffer(const uint16_t (&ring)[kSize][kElements], uint32_t count) {
        return smem_address(ring) + ring_slot<kSize>(count) * static_cast<uint32_t>(sizeof(ring[0]));
    }
    __device__ __forceinline__ uint32_t q_address() const { return buffer(smem_.q, query_) + group_ * 64 * kSpan; }
    __device__ __forceinline__ const ForwardTile& tile() const { return smem_.tiles[ring_slot<kTileSlots>(tile_)]; }

    /// This thread's first row within the tile; the second is 8 further.
    __device__ int thread_row() const {
        const int thread = threadIdx.x % 128;
        return 64 * group_ + thread / 32 * 16 + thread % 32 / 4;
    }
    // A warpgroup that has the turn issues its two matrix multiplies, then passes the turn on to the next one.
    __device__ void wait_turn() const {
        named_barrier_sync(1 + group_, 256);
    }
    __device__ static void pass_turn(int from) {
        named_barrier_arrive(1 + (from + 1) % Config::kConsumers, 256);
    }

    /// Moves to the next tile that has keys; answers those that have none on the way. A tile's slot stays ours until it
    /// is finished.
    __device__ __forceinline__ bool next_tile() {
        for (;;) {
            ++tile_;
            wait_full(smem_.tile_full, tile_);
            if (tile().is_end()) return false;
            if (tile().has_keys()) return true;
            store_nothing_seen<Config>(args_.params, tile(), tile().row + 64 * group_);
            release_tile(tile());
        }
    }
    __device__ __forceinline__ void release_tile(const ForwardTile& done) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) smem_.tile_empty[&done - smem_.tiles].arrive();
    }

    __device__ __forceinline__ void start_scores(float (&s)[kBlockN / 2]) {
        wait_full(smem_.q_full, query_);
        wait_full(smem_.k_full, block_);
        issue_scores<Config, V.dtype>(s, q_address(), buffer(smem_.k, block_));
    }

    /// Waits for the first scores of a tile and takes their softmax.
    __device__ __forceinline__ Mask begin_tile(Scores& s, Weights& p) {
        const Mask mask(tile(), tile().row + 64 * group_, tile().row + thread_row());
        wgmma_wait<0>();
        fence_registers(s);
        release(smem_.k_empty, block_);
        ++block_;
        mask.apply(s, tile().n_end - 1);
        softmax_.start(s);
        peek_next_block();
        softmax_.exponentiate(s);
        round_weights(s, p);
        return mask;
    }

    /// Issues the scores of key block n and the output of the block before, whose weights are p; p becomes the weights of n.
    __device__ __forceinline__ void next_block(Scores& s, Output& o, Weights& p, const Mask& mask, int n, bool accumulate) {
        wait_full(smem_.k_full, block_, keys_ready_);
        wait_turn();
        issue_scores<Config, V.dtype>(s, q_address(), buffer(smem_.k, block_));
        wait_full(smem_.v_full, block_ - 1, values_ready_);
        issue_output(o, p, accumulate);
        pass_turn(group_);

        wgmma_wait<1>();
        fence_registers(s);
        release(smem_.k_empty, block_);
        ++block_;
        mask.apply(s, n);
        float factor[2];
        const bool rescale = softmax_.adapt(s, factor);
        peek_next_block();
        softmax_.exponentiate(s);

        // The weights exist before the wait: the compiler would rather delay them, and lose the overlap.
        fence_registers(s);
        wgmma_wait<0>();
        fence_registers(o);
        release(smem_.v_empty, block_ - 2);
        round_weights(s, p);
        if (rescale) {
#pragma unroll
            for (int i = 0; i < Config::kHeadDim / 2; ++i) o[i] *= factor[i / 2 % 2];
        }
    }

    /// Asks early whether the next key block and the values of this one have arrived: the answer takes 100 cycles.
    __device__ __forceinline__ void peek_next_block() {
        keys_ready_ = peek_full(smem_.k_full, block_);
        values_ready_ = peek_full(smem_.v_full, block_ - 1);
    }

    /// The accumulators of 16 key columns are, rounded, the A fragment of one k-step of P V: no data changes hands.
    __device__ __forceinline__ static void round_weights(const Scores& s, Weights& p) {
#pragma unroll
        for (int i = 0; i < kBlockN / 4; ++i) p[i / 4][i % 4] = pack<V.dtype>(s[2 * i], s[2 * i + 1]);
    }

    /// O = [accumulate] O + P V for the key block before block_.
    __device__ __forceinline__ void issue_output(Output& o, const Weights& p, bool accumulate) {
        const uint64_t v = smem_descriptor<kSpan>(buffer(smem_.v, block_ - 1), kBlockN * kSpan, 8 * kSpan);
        fence_registers(o);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBlockN / 16; ++i) {
            Wgmma<Config::kHeadDim>::template rs<V.dtype, 1>(o, p[i], advanced(v, i * 16 * kSpan), i > 0 || accumulate);
        }
        wgmma_commit();
        fence_registers(o);
    }

    /// Waits for the last P V, which kPending younger groups may outlive, and stores the tile's output.
    template <int kPending>
    __device__ __forceinline__ void finish_tile(Output& o, const ForwardTile& slot) {
        const ForwardTile done = slot;
        wgmma_wait<kPending>();
        fence_registers(o);
        release(smem_.v_empty, block_ - 1);
        const OutputRows rows = finish_rows(done, done.row + thread_row(), softmax_);
        if (args_.params.out_dtype == DType::f32) {
            store_output_f32<Config>(args_.params, done, rows, o);
        } else if constexpr (kPrefetch) {
            const int warp_row = 64 * group_ + threadIdx.x % 128 / 32 * 16;
            // All warps of the group have read the queries that the output replaces.
            named_barrier_sync(1 + Config::kConsumers + group_, 128);
            store_output_staged<Config, V.dtype>(args_, done, done.row + warp_row, rows, o,
                                                 smem_.q[ring_slot<Config::kQStages>(query_ - 1)] + warp_row * Config::kChunkCols);
        } else {
            store_output_direct<Config, V.dtype>(args_.params, done, rows, o);
        }
        // Last: the fence in the staged store waits for every store before it.
        store_lse(args_.params, done, rows, softmax_);
        release_tile(slot);
    }

    const ForwardArgs& args_;
    ForwardSmem<Config>& smem_;
    const int group_;
    OnlineSoftmax softmax_;
    bool keys_ready_ = false, values_ready_ = false;
    uint32_t tile_ = ~0u;
    uint32_t query_ = 0;
    uint32_t block_ = 0;
};

// ------------------------------------------------------------------------------------------------------------ kernel

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(cuda::decode_variant(kVariantCode).warps * 32, 1)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    using Config = ForwardConfig<V>;
    extern __shared__ __align__(1024) unsigned char dynamic_smem[];
    auto& smem = *reinterpret_cast<ForwardSmem<Config>*>(dynamic_smem);

    if (threadIdx.x == 0) {
        constexpr int kConsumerWarps = Config::kConsumers * 4;
        for (int i = 0; i < Config::kQStages; ++i) {
            smem.q_full[i].init(1);
            smem.q_empty[i].init(kConsumerWarps);
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

    if (threadIdx.x < 128) {
        register_limit_lower<Config::kProducerRegisters>();
        const int warp = threadIdx.x / 32;
        if (warp == 0) {
            if (threadIdx.x == 0) produce_queries_and_keys<Config>(args, smem);
        } else if (warp == 1) {
            produce_values<Config>(args, smem);
        }
    } else {
        register_limit_raise<Config::kConsumerRegisters>();
        Consumer<V>(args, smem).run();
    }
}

}  // namespace strobe::sm90
