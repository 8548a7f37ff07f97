// The shape of the backward kernel: tiles, shared memory, barriers, registers.
//
// Four warpgroups. Two *key* warpgroups compute S^T = K q^T and dP^T = V dout^T, turn them into P and dS, which are
// then in registers as the left operands of dV += P^T dout and dK += dS^T q. The third, the *dq* warpgroup, computes
// dq = dS K from the dS that the others left in shared memory and adds it to the fp32 accumulator in L2 straight from
// its registers. One warp of the fourth keeps the tensor copies going. They meet only at mbarriers, so the tensor cores
// are fed by one warpgroup while another works on exponentials.
//
// head_dim <= 128: a tile has 128 keys, each key warpgroup does everything for 64 of them (backward_key_worker.cuh).
// head_dim > 128: a CTA has 64 keys, for which dK and dV together exceed one
// warpgroup's registers: one warpgroup computes P and dV, the other dS and dK,
// and P is handed over in the buffer that dS goes to (backward_split_worker.cuh).
//
// There a tile of 128 keys belongs to a pair, a cluster of two CTAs. They exchange dS, and each adds half of dq's
// columns for the keys of both: that halves the reductions into L2, which otherwise are what such a kernel waits for. A
// dS buffer is free when the dq warpgroups of both CTAs have said so.
//
// Where keys are few a CTA (or pair) may take whole heads, one key tile after the other (takes_whole_heads): dq then
// leaves without an accumulator of its own size. Head dims 64 and 128 have rows of their own for that, with two buffers
// for keys; there, and at 96, two warps of the fourth warpgroup make the row statistics of a head with a single key
// tile (backward_statistics_worker.cuh).
#pragma once

#include <cuda.h>

#include "core/variant.hpp"
#include "cuda/sm90/backward_ptx.cuh"
#include "cuda/sm90/backward_schedule.hpp"
#include "cuda/sm90/wgmma.cuh"

namespace strobe::sm90 {

inline constexpr float kLog2E = 1.4426950408889634f;

template <Variant V>
struct BackwardConfig {
    static constexpr int kDim = V.head_dim;
    static constexpr int kChunks = (kDim + 63) / 64;  // a chunk: 64 columns, 128 bytes a row, swizzled as TMA writes it
    static constexpr int kBlockM = V.block_m;
    static constexpr int kStages = V.stages;          // of q, dout and the row statistics
    static constexpr int kSlots = 16;                 // of QuerySlot
    static constexpr bool kFewKeys = V.keys == Keys::few;
    static constexpr bool kWholeHeads = may_take_whole_heads(V);
    // Of k and v: a short head's next keys should be there when they are wanted.
    static constexpr int kKeyStages = kFewKeys && (kDim == 64 || kWholeHeads) ? 2 : 1;
    static constexpr bool kSplit = kDim > 128;        // by product instead of by key
    static constexpr bool kPair = kSplit;             // the two go together
    static constexpr int kCtas = kPair ? 2 : 1;       // that work on a tile
    static constexpr int kBlockN = V.block_n / kCtas;
    static constexpr int kDsStages = 2;
    // At head dim 256 there is room for one tile of dout. Its halves by columns come and go by themselves: dP reads the
    // first one while the second is on its way, and dV gives the first one back while it reads the second.
    static constexpr bool kDoutHalves = kDim == 256;
    static constexpr int kDoutStages = kDoutHalves ? 1 : kStages;
    static constexpr int kDoutBarriers = kDoutHalves ? 2 : kStages;
    // The fence that publishes dS waits for its stores. Where nothing
    // else keeps the tensor cores from idling, dK goes first.
    static constexpr bool kFenceBehindDk = kDim == 128 && V.mask == MaskClass::full;
    // dK follows dS by sixteen queries; what is left of it when dS
    // is complete keeps the tensor cores busy under that fence.
    static constexpr bool kDkFollowsDs = kDim == 128 && V.mask == MaskClass::band && !kWholeHeads;
    static constexpr int kKeyWarpgroups = 2;
    static constexpr bool kPipelined = kDim == 64 && kBlockM == 64;  // PipelinedKeyWorker
    // dq^T = K^T dS^T with K in registers (backward_dq_worker.cuh).
    static constexpr bool kTransposedDq = kPipelined && !kFewKeys;
    // dq may be added by the copy engine.
    static constexpr bool kBulkAdd = (kDim == 64 || kDim == 128) && (!kFewKeys || kPipelined);
    static constexpr bool kWarpMajor = kBulkAdd || kDim == 256;  // a warp's part of the dq accumulator is in one piece
    static constexpr int kStagingBytes = 64 * 64 * 4;
    static constexpr int kKeyUnits = kBlockN / 64;
    static constexpr int kThreads = V.warps * 32;
    // Row statistics and the conversion of dq in the main kernel,
    // but for the first and last heads (backward_row_worker.cuh).
    static constexpr bool kInnerRows = (kDim == 64 || kDim == 128) && !kFewKeys;
    // Row statistics of a head with a single key tile by the CTA that has it (backward_statistics_worker.cuh).
    static constexpr bool kOwnStatistics = kWholeHeads && kDim <= 96;
    static constexpr int kKeyRegisters = kDim == 192 ? 184 : kPipelined ? 192 : kDim == 96 || kDim == 256 ? 200 : 208;
    static constexpr int kDqRegisters = kDim == 192                  ? 104
                                        : kPipelined                 ? 96
                                        : kDim == 96                 ? 80
                                        : kDim == 128 && kWholeHeads ? 72
                                        : kDim <= 128                ? 64
                                                                     : 72;
    static constexpr int kLoadRegisters = kSplit ? 40 : kInnerRows || kOwnStatistics ? 32 : 24;
    static constexpr int kRowBufferRows = 32;  // of dout and out that a row worker has in shared memory
    // For each of the two row workers, and for each of the two
    // that make a CTA's own statistics: its half of a tile of out.
    static constexpr int kRowBufferBytes =
        kInnerRows ? kRowBufferRows * 2 * kChunks * 128 : kBlockM / 2 * kChunks * 128;
    static constexpr int kQueryUnits = kBlockM / 64;  // 64-row units of a query tile: the M of one wgmma

    static constexpr int kRowBytes = 128;
    static constexpr int kKeyChunkBytes = kBlockN * kRowBytes;
    static constexpr int kQueryChunkBytes = kBlockM * kRowBytes;
    static constexpr int kKeyTileBytes = kChunks * kKeyChunkBytes;
    static constexpr int kQueryTileBytes = kChunks * kQueryChunkBytes;
    static constexpr int kDsUnitBytes = V.block_n * kRowBytes;  // (keys of the tile, 64 queries)
    static constexpr int kPairChunks = 2;  // that hold the columns of K from which one CTA of a pair computes dq
    static constexpr int kStatsBytes = 2 * kBlockM * 4;

    __device__ __forceinline__ static int chunks_of(int dim) { return (dim + 63) / 64; }
    /// This CTA's place in the pair.
    __device__ __forceinline__ static int rank() { return kPair ? blockIdx.x % 2 : 0; }
    __device__ __forceinline__ static Peer peer() { return {(blockIdx.x ^ 1) % 2}; }
    __device__ __forceinline__ static int first_key(const BackwardTile& tile) {
        return tile.n_block * V.block_n + rank() * kBlockN;
    }
    /// The first chunk of K whose columns this CTA's dq has.
    __device__ __forceinline__ static int pair_chunk() { return rank() * (kChunks - kPairChunks); }

    static_assert(kStages + kDsStages < kSlots);
    static_assert(V.warps == 4 * (kKeyWarpgroups + 2));
    static_assert(V.block_n == 128 && kBlockM % 64 == 0 && (!kSplit || kBlockM == 64));
    static_assert(kDim <= 256 && kDim % 32 == 0 && (!kSplit || kDim % 64 == 0));
    static_assert(kKeyRegisters * 2 + kDqRegisters + kLoadRegisters <= 512);
    static_assert(!(kInnerRows || kTransposedDq) || kBlockM == 64);  // a row worker's unit is a tile
};

/// What the load warp tells the others about the tiles to come.
struct TileRing {
    static constexpr int kEntries = 4;
    BackwardTile entry[kEntries];
};

/// Where the t-th key tile of a CTA lies.
template <int kCount>
struct KeyStage {
    int index;
    uint32_t phase;

    __device__ __forceinline__ explicit KeyStage(int t) : index(kCount == 1 ? 0 : t % kCount), phase(t / kCount & 1) {}
};

/// Position in a ring of buffers and the parity of the current trip round it.
struct RingPosition {
    int index = 0;
    uint32_t phase = 0;

    template <int kCount>
    __device__ __forceinline__ void advance() {
        if (++index == kCount) {
            index = 0;
            phase ^= 1;
        }
    }
};

/// What a row worker does next: 64-row units of one query head.
struct RowJob {
    int key_head;           // in the order of work
    int first;              // unit
    int rows_q, seqlen_q;   // of the sequence
    int work_tiles;         // of the key head
    RaggedCoordinates at;   // of the head's rows
    int64_t padded;         // its first 64-row unit in the accumulator and the statistics
    int64_t lse, dlse, dq;  // its first row, in elements
};

/// What belongs to one query tile, written by the load warp along with its copies. The n-th tile of a CTA has slot
/// n % kSlots: the dq warpgroup may read it kDsStages tiles behind the key warps, who free its stage.
struct alignas(16) QuerySlot {
    int padded;       // index of the tile in the dq accumulator, all heads together; -1: no more work (deterministic)
    int turn;         // deterministic mode: how many key tiles add to that dq tile before this one
    int query0;       // first row
    int masked;       // bit w: of keys 64 w ... 64 w + 63 some are hidden from some of the queries
    int batch, head;
};

/// Where a query tile's dq goes when a CTA has whole heads.
struct alignas(8) DqTarget {
    int64_t dq;        // element of its first row
    int64_t partial;   // element of launch.dq: what the keys before added up to
    int rows;          // of the sequence, from the first one on
    bool first, last;  // of the key tiles that the queries see
};

template <Variant V>
struct BackwardSmem {
    using C = BackwardConfig<V>;
    static constexpr bool kMakesRows = C::kInnerRows || C::kOwnStatistics;
    alignas(1024) uint8_t k[C::kKeyStages][C::kKeyTileBytes];
    alignas(1024) uint8_t v[C::kKeyStages][C::kKeyTileBytes];
    alignas(1024) uint8_t q[C::kStages][C::kQueryTileBytes];
    alignas(1024) uint8_t dout[C::kDoutStages][C::kQueryTileBytes];
    alignas(1024) uint8_t ds[C::kDsStages][C::kQueryUnits * C::kDsUnitBytes];
    union {
        // Of the row workers, or of those that make a CTA's own statistics.
        alignas(kMakesRows ? 1024 : 16) uint8_t rows[2][kMakesRows ? C::kRowBufferBytes : 16];
        // The other's K from pair_chunk() on.
        alignas(C::kPair ? 1024 : 16) uint8_t k_peer[C::kPair ? C::kPairChunks * C::kKeyChunkBytes : 16];
    };
    alignas(C::kBulkAdd ? 128 : 16) uint8_t staging[C::kBulkAdd ? C::kStagingBytes : 16];
    alignas(128) float stats[C::kStages][2][C::kBlockM];
    QuerySlot slot[C::kSlots];
    DqTarget dq_target[4];
    TileRing tiles;
    Barrier k_full[C::kKeyStages];    // a key tile has landed; also publishes its TileRing entry
    Barrier v_full[C::kKeyStages];
    Barrier kv_free[C::kKeyStages];   // every warp is done with the key tile
    Barrier q_full[C::kStages];       // q and the row statistics
    Barrier dout_full[C::kDoutBarriers];
    Barrier dout_free[C::kDoutBarriers];  // halves only: every key warp is done with it
    Barrier stage_free[C::kStages];   // every key warp is done with q, statistics, and dout where it is in one piece
    Barrier p_full[C::kDsStages];     // split only: P is in the dS buffer
    Barrier ds_full[C::kDsStages];    // dS is complete, in a pair that of both
    Barrier ds_free[C::kDsStages];    // the dq warpgroup has read it, in a pair both
    Barrier slot_full[C::kSlots];     // deterministic mode: the slot is written,
    Barrier turn_come[C::kSlots];     // its turn has come and one kLag tiles back has been taken note of,
    Barrier added[C::kSlots];         // the dq warpgroup has issued its additions
    Barrier claim_full[2];            // pair only: the first CTA has told the second what they work on next,
    Barrier claim_free[2];            // and the second one knows
    int claim[2];
    RowJob row_job[2];
    Barrier rows_full[2];             // inner rows: the buffer of statistics, of conversion
};

/// Zeroes what is never loaded: the chunks past head_dim in q and k, past head_dim_v in dout and v.
template <Variant V>
__device__ void clear_missing_chunks(BackwardSmem<V>& smem, const ProblemSize& size) {
    using C = BackwardConfig<V>;
    const auto clear = [](uint8_t* tile, int chunk_bytes, int dim) {
        uint4* const words = reinterpret_cast<uint4*>(tile);
        for (int i = C::chunks_of(dim) * chunk_bytes / 16 + threadIdx.x; i < C::kChunks * chunk_bytes / 16;
             i += C::kThreads) {
            words[i] = make_uint4(0, 0, 0, 0);
        }
    };
    for (int s = 0; s < C::kKeyStages; ++s) {
        clear(smem.k[s], C::kKeyChunkBytes, size.head_dim);
        clear(smem.v[s], C::kKeyChunkBytes, size.head_dim_v);
    }
    for (int s = 0; s < C::kStages; ++s) {
        clear(smem.q[s], C::kQueryChunkBytes, size.head_dim);
    }
    for (int s = 0; s < C::kDoutStages; ++s) clear(smem.dout[s], C::kQueryChunkBytes, size.head_dim_v);
    if constexpr (C::kPair) {
        uint4* const words = reinterpret_cast<uint4*>(smem.k_peer);
        for (int i = threadIdx.x; i < C::kPairChunks * C::kKeyChunkBytes / 16; i += C::kThreads) {
            words[i] = make_uint4(0, 0, 0, 0);
        }
    }
    fence_async_proxy();
}

/// Counters of BackwardLaunch::counter, each in its own line: work tiles claimed, tickets of the row workers.
inline constexpr int kStatisticsTickets = 32;
inline constexpr int kConversionTickets = 64;

/// Kernel arguments beside BackwardParams, made by the host for one launch.
struct BackwardLaunch {
    CUtensorMap q, k, v, dout;
    BackwardSchedule schedule;
    float scale_log2 = 1.0f;      // softmax_scale * log2(e)
    float* stats = nullptr;       // see BackwardWorkspace
    float* dq = nullptr;
    int64_t private_tiles = 0;    // of each CTA or pair in dq, with whole heads
    int32_t* semaphore = nullptr;
    int32_t* counter = nullptr;
    int64_t tiles = 0;
    int32_t* finished = nullptr;  // shared key tiles: see BackwardWorkspace
    float4* parts = nullptr;
    bool bulk_add = false;        // dq is added by the copy engine

    int first_position = 0;       // of the sequences that a launch of the kernels around the main one works on
    bool own_statistics = false;  // no kernel in front
    // Row statistics and dq conversion in the main kernel (heads: key heads of all sequences in the order of work).
    bool inner_rows = false;
    int first_inner_head = 0;     // statistics before that: by the kernel in front
    int inner_conversions = 0;    // dq of heads from there on: by the kernel behind
    CUtensorMap out, dout_rows;   // boxes for StatisticsWorker
    int32_t* ready = nullptr;     // per key head: units whose statistics are there
    int32_t* done = nullptr;      // per key head: work tiles whose dq has been added, times four
};

// Wgmma descriptors of the shared memory tiles. A chunk read along its rows is K-major; read across them, MN-major,
// where the leading offset leads to the next chunk and the stride offset to the next 8 rows.
__device__ __forceinline__ uint64_t k_major(uint32_t address) { return smem_descriptor<128>(address, 16, 1024); }
__device__ __forceinline__ uint64_t mn_major(uint32_t address, int chunk_bytes) {
    return smem_descriptor<128>(address, chunk_bytes, 1024);
}

/// d = A B^T over kDim columns, both operands K-major in chunks.
template <DType kType, int N, int kDim>
__device__ __forceinline__ void multiply_over_dim(float (&d)[N / 2], uint64_t a, int a_chunk_bytes, uint64_t b,
                                                  int b_chunk_bytes) {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
        const int chunk = k / 4;
        const int within = k % 4 * 2;  // 16 columns = 32 bytes
        Wgmma<N>::template ss<kType, 0, 0>(d, a + (chunk * a_chunk_bytes >> 4) + within,
                                           b + (chunk * b_chunk_bytes >> 4) + within, k != 0);
    }
}

}  // namespace strobe::sm90
