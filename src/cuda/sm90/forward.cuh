// Exact attention, forward, for Hopper: one producer warpgroup feeds two or three consumer warpgroups through TMA.
//
// A CTA is persistent. The work of a consumer is one unbroken stream of key blocks: while the tensor cores compute the
// scores of block j + 1 and the output of block j, the warpgroup's softmax follows behind, and the first scores of the next
// tile start before the last output of this one is stored. Score accumulators become the A operand of P V in registers.
// Algorithm: Dao, "FlashAttention-2" (2023); overlap of softmax and wgmma: Shah et al., "FlashAttention-3" (2024).
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/common/tensor_map.hpp"
#include "cuda/sm90/forward_config.cuh"
#include "cuda/sm90/softmax.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace strobe::sm90 {

struct ForwardArgs {
    CUtensorMap q_map, k_map, v_map;
    AttentionParams params;
    ForwardSchedule schedule;
    float scale_log2;  // softmax_scale * log2(e)
    bool clean_tails;  // memory behind a sequence's last key holds other data: zero what a value block caught of it
};

// ---------------------------------------------------------------------------------------------------------- producer

/// One thread decides the tiles and loads queries and keys.
template <typename Config>
__device__ void produce_queries_and_keys(const ForwardArgs& args, ForwardSmem<Config>& smem) {
    constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kCols = Config::kChunkCols;
    const int group_size = args.params.size.num_heads / args.params.size.num_heads_k;
    const bool varlen_q = args.params.seqlens.cu_seqlens_q, varlen_k = args.params.seqlens.cu_seqlens_k;
    TileSource<kBlockM, kBlockN> source(args.params, args.schedule);
    uint32_t q_count = 0, k_count = 0;
    for (uint32_t tile_count = 0;; ++tile_count) {
        const ForwardTile tile = source.next();
        const int slot = ring_slot<kTileSlots>(tile_count);
        smem.tile_empty[slot].wait(ring_phase<kTileSlots>(tile_count) ^ 1);
        smem.tiles[slot] = tile;
        smem.tile_full[slot].arrive();
        if (tile.is_end()) return;
        if (!tile.has_keys()) continue;
        for (int n = tile.n_end - 1; n >= tile.n_begin; --n, ++k_count) {
            const int k = ring_slot<Config::kStages>(k_count);
            smem.k_empty[k].wait(ring_phase<Config::kStages>(k_count) ^ 1);
            smem.k_full[k].arrive_expect(sizeof(smem.k[0]));
#pragma unroll
            for (int c = 0; c < Config::kChunks; ++c) {
                tma_load(&smem.k[k][c * kBlockN * kCols], &args.k_map, smem.k_full[k], c * kCols,
                         tile.k_row + n * kBlockN, tile.head / group_size, varlen_k ? 0 : tile.batch,
                         CachePolicy::evict_last);
            }
            if (n == tile.n_end - 1) {
                const int q = ring_slot<Config::kQStages>(q_count);
                smem.q_empty[q].wait(ring_phase<Config::kQStages>(q_count) ^ 1);
                smem.q_full[q].arrive_expect(sizeof(smem.q[0]));
#pragma unroll
                for (int c = 0; c < Config::kChunks; ++c) {
                    tma_load(&smem.q[q][c * kBlockM * kCols], &args.q_map, smem.q_full[q], c * kCols,
                             tile.q_row + tile.row, tile.head, varlen_q ? 0 : tile.batch, CachePolicy::evict_first);
                }
                ++q_count;
            }
        }
    }
}

/// Zeroes the rows of a value block from `row` on: their weights are zero, but zero times NaN is not.
template <typename Config>
__device__ void zero_rows_from(uint16_t* block, int row) {
    constexpr int kVectorsPerRow = Config::kSpan / 16;
    const int lane = threadIdx.x % 32;
    for (int c = 0; c < Config::kChunks; ++c) {
        uint4* chunk = reinterpret_cast<uint4*>(block + c * Config::kBlockN * Config::kChunkCols);
        for (int i = row * kVectorsPerRow + lane; i < Config::kBlockN * kVectorsPerRow; i += 32) chunk[i] = uint4{0, 0, 0, 0};
    }
}

/// One warp loads the values.
template <typename Config>
__device__ void produce_values(const ForwardArgs& args, ForwardSmem<Config>& smem) {
    constexpr int kBlockN = Config::kBlockN, kCols = Config::kChunkCols;
    const int group_size = args.params.size.num_heads / args.params.size.num_heads_k;
    const bool varlen_k = args.params.seqlens.cu_seqlens_k;
    const bool leader = threadIdx.x % 32 == 0;
    uint32_t v_count = 0, tail_phase = 0;
    for (uint32_t tile_count = 0;; ++tile_count) {
        const int slot = ring_slot<kTileSlots>(tile_count);
        smem.tile_full[slot].wait(ring_phase<kTileSlots>(tile_count));
        const ForwardTile tile = smem.tiles[slot];
        __syncwarp();
        if (leader) smem.tile_empty[slot].arrive();
        if (tile.is_end()) return;
        for (int n = tile.n_end - 1; n >= tile.n_begin; --n, ++v_count) {
            const int v = ring_slot<Config::kStages>(v_count);
            const bool ragged = args.clean_tails && (n + 1) * kBlockN > tile.seqlen_k;
            smem.v_empty[v].wait(ring_phase<Config::kStages>(v_count) ^ 1);
            if (leader) {
                Barrier& arrival = ragged ? smem.v_tail : smem.v_full[v];
                arrival.arrive_expect(sizeof(smem.v[0]));
#pragma unroll
                for (int c = 0; c < Config::kChunks; ++c) {
                    tma_load(&smem.v[v][c * kBlockN * kCols], &args.v_map, arrival, c * kCols,
                             tile.k_row + n * kBlockN, tile.head / group_size, varlen_k ? 0 : tile.batch,
                             CachePolicy::evict_last);
                }
            }
            if (ragged) {
                smem.v_tail.wait(tail_phase);
                tail_phase ^= 1;
                zero_rows_from<Config>(smem.v[v], tile.seqlen_k - n * kBlockN);
                fence_async_proxy();
                __syncwarp();
                if (leader) smem.v_full[v].arrive();
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- consumer

/// S = Q K^T of 64 query rows.
template <typename Config, DType kType>
__device__ __forceinline__ void issue_scores(float (&s)[Config::kBlockN / 2], uint32_t q, uint32_t k) {
    constexpr int kSpan = Config::kSpan;
    fence_registers(s);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
        const int chunk = i * 32 / kSpan, offset = i * 32 % kSpan;
        Wgmma<Config::kBlockN>::template ss<kType, 0, 0>(
            s, smem_descriptor<kSpan>(q + chunk * Config::kBlockM * kSpan + offset, 16, 8 * kSpan),
            smem_descriptor<kSpan>(k + chunk * Config::kBlockN * kSpan + offset, 16, 8 * kSpan), i > 0);
    }
    wgmma_commit();
    fence_registers(s);
}

/// O = [accumulate] O + P V of 64 query rows.
template <typename Config, DType kType>
__device__ __forceinline__ void issue_output(float (&o)[Config::kHeadDim / 2], const uint32_t (&p)[Config::kBlockN / 16][4],
                                             uint32_t v, bool accumulate) {
    constexpr int kSpan = Config::kSpan;
    fence_registers(o);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kBlockN / 16; ++i) {
        Wgmma<Config::kHeadDim>::template rs<kType, 1>(
            o, p[i], smem_descriptor<kSpan>(v + i * 16 * kSpan, Config::kBlockN * kSpan, 8 * kSpan), i > 0 || accumulate);
    }
    wgmma_commit();
    fence_registers(o);
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

/// Lane t of a quad holds words t of four 16-byte vectors and receives all four words of vector t.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t& low = x[step == 1 ? 2 * i : i];
            uint32_t& high = x[step == 1 ? 2 * i + 1 : i + 2];
            const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, upper ? low : high, step);
            (upper ? low : high) = received;
        }
    }
}

/// Stores 64 rows of output and LSE straight from registers; a quad of lanes writes 64 contiguous bytes of a row.
template <typename Config, DType kType>
__device__ __forceinline__ void store_output(const ForwardArgs& args, const ForwardTile& tile, int thread_row,
                                             float (&o)[Config::kHeadDim / 2], OnlineSoftmax& softmax) {
    const AttentionParams& p = args.params;
    const int quad_lane = threadIdx.x % 4;
    softmax.finish();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = thread_row + 8 * r;
        const bool stored = row < tile.rows_q;
        const bool dead = softmax.sum(r) == 0.0f || row >= tile.seqlen_q;
        const float inverse = dead ? 0.0f : 1.0f / softmax.sum(r);
        if (p.lse && stored && quad_lane == 0) {
            p.lse.data[tile.batch * p.lse.batch_stride + tile.head * p.lse.head_stride + tile.q_row + row] =
                dead ? -INFINITY : softmax.lse(r);
        }
        const int64_t offset = tile.batch * p.out.batch_stride + (tile.q_row + row) * p.out.row_stride +
                               tile.head * p.out.head_stride;
        if (p.out_dtype == DType::f32) {
            float* out = static_cast<float*>(p.out.data) + offset + 2 * quad_lane;
#pragma unroll
            for (int j = 0; j < Config::kHeadDim / 8; ++j) {
                const float x = o[4 * j + 2 * r], y = o[4 * j + 2 * r + 1];
                if (stored && 8 * j < p.size.head_dim_v) {
                    *reinterpret_cast<float2*>(out + 8 * j) = dead ? float2{0, 0} : float2{x * inverse, y * inverse};
                }
            }
        } else {
            uint16_t* out = static_cast<uint16_t*>(p.out.data) + offset + 8 * quad_lane;
#pragma unroll
            for (int g = 0; g < Config::kHeadDim / 32; ++g) {
                uint32_t x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int j = 4 * (4 * g + i) + 2 * r;
                    x[i] = dead ? 0u : pack<kType>(o[j] * inverse, o[j + 1] * inverse);
                }
                transpose_quad(x);
                if (stored && 32 * g + 8 * quad_lane < p.size.head_dim_v) {
                    *reinterpret_cast<uint4*>(out + 32 * g) = uint4{x[0], x[1], x[2], x[3]};
                }
            }
        }
    }
}

/// A tile whose queries see no key: out = 0, lse = -inf.
template <typename Config>
__device__ __noinline__ void store_nothing_seen(const ForwardArgs& args, const ForwardTile& tile, int first_row) {
    const AttentionParams& p = args.params;
    const int thread = threadIdx.x % 128;
    const int element = p.out_dtype == DType::f32 ? 4 : 2;
    const int vectors = p.size.head_dim_v * element / 16;
    const int rows = min(64, tile.rows_q - first_row);
    for (int i = thread; i < rows * vectors; i += 128) {
        const int64_t offset = tile.batch * p.out.batch_stride +
                               (tile.q_row + first_row + i / vectors) * p.out.row_stride + tile.head * p.out.head_stride;
        reinterpret_cast<uint4*>(static_cast<char*>(p.out.data) + offset * element)[i % vectors] = uint4{0, 0, 0, 0};
    }
    if (p.lse && thread < rows) {
        p.lse.data[tile.batch * p.lse.batch_stride + tile.head * p.lse.head_stride + tile.q_row + first_row + thread] =
            -INFINITY;
    }
}

template <Variant V, ForwardTuning kTuning>
class Consumer {
    using Config = ForwardConfig<V, kTuning>;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kSpan = Config::kSpan;
    static constexpr bool kPrefetch = Config::kQStages > 1;

public:
    __device__ Consumer(const ForwardArgs& args, ForwardSmem<Config>& smem)
        : args_(args), smem_(smem), group_(static_cast<int>(threadIdx.x) / 128 - 1) {}

    __device__ __forceinline__ void run() {
        float s[kBlockN / 2];
        float o[Config::kHeadDim / 2];
        uint32_t p[kBlockN / 16][4];
        OnlineSoftmax softmax(args_.scale_log2);

        if (group_ == 0) pass_turn(Config::kConsumers - 1);
        if (!next_tile()) return;
        wait_turn();
        start_scores(s);
        pass_turn(group_);
        RowMask<Config, V.mask> mask = begin_tile(s, softmax);
        for (;;) {
            round_to_fragments<V.dtype>(s, p);
            const int n_begin = tile().n_begin;
            bool accumulate = false;
            for (int n = tile().n_end - 2; n >= n_begin; --n) {
                wait_full(smem_.k_full, block_);
                wait_turn();
                issue_scores<Config, V.dtype>(s, q_address(), buffer(smem_.k, block_));
                wait_full(smem_.v_full, block_ - 1);
                issue_output<Config, V.dtype>(o, p, buffer(smem_.v, block_ - 1), accumulate);
                pass_turn(group_);
                accumulate = true;

                wgmma_wait<1>();
                fence_registers(s);
                release(smem_.k_empty, block_);
                mask.apply(s, n);
                float factor[2];
                const bool rescale = softmax.adapt(s, factor);
                softmax.exponentiate(s);

                // The weights exist before the wait: the compiler would rather delay them, and lose the overlap.
                fence_registers(s);
                wgmma_wait<0>();
                fence_registers(o);
                release(smem_.v_empty, block_ - 1);
                ++block_;
                round_to_fragments<V.dtype>(s, p);
                if (rescale) {
#pragma unroll
                    for (int i = 0; i < Config::kHeadDim / 2; ++i) o[i] *= factor[i / 2 % 2];
                }
            }
            release(smem_.q_empty, query_);
            ++query_;

            const ForwardTile& done = tile();
            const bool more = next_tile();
            wait_full(smem_.v_full, block_ - 1);
            wait_turn();
            if (!more) {
                issue_output<Config, V.dtype>(o, p, buffer(smem_.v, block_ - 1), accumulate);
                pass_turn(group_);
                finish_tile<0>(o, softmax, done);
                return;
            }
            issue_output<Config, V.dtype>(o, p, buffer(smem_.v, block_ - 1), accumulate);
            if constexpr (kPrefetch) {
                start_scores(s);
                pass_turn(group_);
                finish_tile<1>(o, softmax, done);
            } else {
                pass_turn(group_);
                finish_tile<0>(o, softmax, done);
                wait_turn();
                start_scores(s);
                pass_turn(group_);
            }
            mask = begin_tile(s, softmax);
        }
    }

private:
    // The streams of key and value blocks, of tiles and of tiles that have keys are counted from the kernel's start; an
    // item's number gives its buffer. block_ is the next key block; the values due are those of the block before.
    template <int kSize>
    __device__ __forceinline__ static void wait_full(Barrier (&full)[kSize], uint32_t count) {
        full[ring_slot<kSize>(count)].wait(ring_phase<kSize>(count));
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
        if constexpr (kTuning.take_turns) named_barrier_sync(1 + group_, 256);
    }
    __device__ static void pass_turn(int from) {
        if constexpr (kTuning.take_turns) named_barrier_arrive(1 + (from + 1) % Config::kConsumers, 256);
    }

    /// Moves to the next tile that has keys; answers those that have none on the way. A tile's slot stays ours until it
    /// is finished.
    __device__ __forceinline__ bool next_tile() {
        for (;;) {
            ++tile_;
            wait_full(smem_.tile_full, tile_);
            if (tile().is_end()) return false;
            if (tile().has_keys()) return true;
            store_nothing_seen<Config>(args_, tile(), tile().row + 64 * group_);
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
    __device__ __forceinline__ RowMask<Config, V.mask> begin_tile(float (&s)[kBlockN / 2], OnlineSoftmax& softmax) {
        const RowMask<Config, V.mask> mask(tile(), tile().row + 64 * group_, tile().row + thread_row());
        wgmma_wait<0>();
        fence_registers(s);
        release(smem_.k_empty, block_);
        ++block_;
        mask.apply(s, tile().n_end - 1);
        softmax.start(s);
        softmax.exponentiate(s);
        return mask;
    }

    /// Waits for the last P V, which kPending younger groups may outlive, and stores the tile's output.
    template <int kPending>
    __device__ __forceinline__ void finish_tile(float (&o)[Config::kHeadDim / 2], OnlineSoftmax& softmax,
                                                const ForwardTile& done) {
        wgmma_wait<kPending>();
        fence_registers(o);
        release(smem_.v_empty, block_ - 1);
        store_output<Config, V.dtype>(args_, done, done.row + thread_row(), o, softmax);
        release_tile(done);
    }

    const ForwardArgs& args_;
    ForwardSmem<Config>& smem_;
    const int group_;
    uint32_t tile_ = ~0u;
    uint32_t query_ = 0;
    uint32_t block_ = 0;
};

// ------------------------------------------------------------------------------------------------------------ kernel

template <uint64_t kVariantCode, int kQStages, bool kTakeTurns>
__global__ void __launch_bounds__(cuda::decode_variant(kVariantCode).warps * 32, 1)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr ForwardTuning kTuning{kQStages, kTakeTurns};
    using Config = ForwardConfig<V, kTuning>;
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
        Consumer<V, kTuning>(args, smem).run();
    }
}

}  // namespace strobe::sm90
