// What every consumer warpgroup of the forward kernel does: follows the streams of tiles, queries, keys and values,
// issues the two matrix multiplies, masks, and ends a tile.
#pragma once

#include "cuda/sm90/forward_config.cuh"
#include "cuda/sm90/forward_epilogue.cuh"
#include "cuda/sm90/softmax.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace strobe::sm90 {

/// Which key blocks of a tile need an element test for the 64 rows of one warpgroup, and the test.
template <typename Config, MaskClass kMask>
struct RowMask {
    int seqlen_k, right, left;
    int row;  // first of this thread's two rows
    int plain_begin, plain_end;  // blocks in between are seen whole ...
    int seen_end;                // ... and those from here on not at all

    __device__ __forceinline__ RowMask(const ForwardTile& tile, int first_row, int thread_row)
        : seqlen_k(tile.seqlen_k), right(tile.right), left(tile.left), row(thread_row), plain_begin(0) {
        int end = seqlen_k, last = seqlen_k;
        if constexpr (kMask == MaskClass::band) {
            end = max(min(end, first_row + right), 0);
            last = max(min(last, first_row + 63 + right), 0);
            plain_begin = (max(first_row + 63 + left, 0) + Config::kBlockN - 1) / Config::kBlockN;
        }
        plain_end = end / Config::kBlockN;
        seen_end = (last + Config::kBlockN - 1) / Config::kBlockN;
    }

    __device__ __forceinline__ bool hides(int n) const { return kMask == MaskClass::band && n >= seen_end; }

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
protected:
    using Config = ForwardConfig<V>;
    static constexpr int kBlockN = Config::kBlockN, kSpan = Config::kSpan;

    using Scores = float[kBlockN / 2];
    using Output = float[Config::kHeadDim / 2];
    using Weights = uint32_t[kBlockN / 16][4];
    using Mask = RowMask<Config, V.mask>;

    __device__ Consumer(const ForwardArgs& args, ForwardSmem<Config>& smem)
        : args_(args),
          smem_(smem),
          group_(__shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 128, 0)),
          softmax_(args.scale_log2) {}

    // The streams are counted from the kernel's start; an item's number gives its buffer. key_ and value_ are the
    // blocks due next, query_ and tile_ those at work.
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
    __device__ __forceinline__ uint32_t queries(uint32_t count) const {
        return smem_address(smem_.q) + ring_slot<Config::kQStages>(count) * static_cast<uint32_t>(sizeof(smem_.q[0])) +
               group_ * static_cast<uint32_t>(sizeof(smem_.q[0][0]));
    }
    __device__ __forceinline__ const ForwardTile& tile(uint32_t count) const {
        return smem_.tiles[ring_slot<kTileSlots>(count)];
    }
    __device__ __forceinline__ const ForwardTile& tile() const { return tile(tile_); }

    __device__ int group_row() const { return tile().row + 64 * group_; }
    /// This thread's first row within its group's 64; the second is 8 further.
    __device__ static int thread_row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

    /// Goes on to a tile that has keys; answers those that have none on the way. They
    /// may be many, and the producers pass through all their slots meanwhile: whoever
    /// comes here holds neither a slot nor a buffer that a producer waits for.
    __device__ __forceinline__ bool find_tile() {
        for (;; ++tile_) {
            wait_full(smem_.tile_full, tile_);
            if (tile().is_end()) return false;
            if (tile().has_keys()) return true;
            store_nothing_seen<Config>(args_.params, tile(), group_row());
            release_tile(tile_);
        }
    }
    /// Moves to the next tile, while the slot of this one stays ours. Returns whether it has keys.
    __device__ __forceinline__ bool next_tile() {
        ++tile_;
        wait_full(smem_.tile_full, tile_);
        return tile().has_keys();
    }
    __device__ __forceinline__ void release_tile(uint32_t count) {
        __syncwarp();
        release(smem_.tile_empty, count);
    }

    /// S = Q K^T of 64 query rows and the key block due.
    __device__ __forceinline__ void issue_scores(Scores& s) const {
        const uint64_t q = smem_descriptor<kSpan>(queries(query_), 16, 8 * kSpan);
        const uint64_t k = smem_descriptor<kSpan>(buffer(smem_.k, key_), 16, 8 * kSpan);
        fence_registers(s);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Config::kHeadDim / 16; ++i) {
            const int chunk = i * 32 / kSpan, offset = i * 32 % kSpan;
            Wgmma<kBlockN>::template ss<V.dtype, 0, 0>(s, advanced(q, chunk * Config::kGroupChunkBytes + offset),
                                                       advanced(k, chunk * kBlockN * kSpan + offset), i > 0);
        }
        wgmma_commit();
        fence_registers(s);
    }

    /// The accumulators of 16 key columns are, rounded, the A fragment of one k-step of P V: no data changes hands.
    __device__ __forceinline__ static void round_weights(const Scores& s, Weights& p) {
#pragma unroll
        for (int i = 0; i < kBlockN / 4; ++i) p[i / 4][i % 4] = pack<V.dtype>(s[2 * i], s[2 * i + 1]);
    }

    /// O = [accumulate] O + P V for the value block due.
    __device__ __forceinline__ void issue_output(Output& o, const Weights& p, bool accumulate) const {
        const uint64_t v = smem_descriptor<kSpan>(buffer(smem_.v, value_), kBlockN * kSpan, 8 * kSpan);
        fence_registers(o);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBlockN / 16; ++i) {
            Wgmma<Config::kHeadDim>::template rs<V.dtype, 1>(o, p[i], advanced(v, i * 16 * kSpan), i > 0 || accumulate);
        }
        wgmma_commit();
        fence_registers(o);
    }
    __device__ __forceinline__ static void rescale(Output& o, const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < Config::kHeadDim / 2; ++i) o[i] *= factor[i / 2 % 2];
    }

    /// Stores output and LSE of the group's rows of a tile, through `staging`:
    /// the size of its queries, and its own. Gives the tile's slot back.
    __device__ __forceinline__ void store_tile(const Output& o, uint32_t count, uint32_t staging) {
        const ForwardTile done = tile(count);
        const int first_row = done.row + 64 * group_;
        const OutputRows rows = finish_rows(done, first_row + thread_row(), softmax_);
        if (args_.params.out_dtype == DType::f32) {
            store_output_f32<Config>(args_.params, done, rows, o);
        } else {
            const int warp_row = threadIdx.x % 128 / 32 * 16;
            store_output_staged<Config, V.dtype>(args_, done, first_row + warp_row, rows, o,
                                                 staging + warp_row * kSpan);
        }
        // Last: the fence in the staged store waits for every store before it.
        store_lse(args_.params, done, rows, softmax_);
        release_tile(count);
    }
    /// Waits until the staged output has been read.
    __device__ __forceinline__ static void wait_stored() {
        if (threadIdx.x % 32 == 0) bulk_wait_read();
    }

    const ForwardArgs& args_;
    ForwardSmem<Config>& smem_;
    const int group_;
    OnlineSoftmax softmax_;
    uint32_t tile_ = 0;
    uint32_t query_ = 0;
    uint32_t key_ = 0;
    uint32_t value_ = 0;
};

}  // namespace strobe::sm90
