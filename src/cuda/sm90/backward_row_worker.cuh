// The two memory-bound parts of the backward pass inside the main kernel, by warps that otherwise have nothing to do:
// row statistics (with the clearing of dq's accumulator) of the heads that come next, conversion of dq of the heads
// that are done. The kernels in front of and behind the main kernel are left with the first and the last heads.
//
// Both take 64-row units off a list by tickets, in the order in which heads are worked
// on, whichever CTA has time. Statistics wait for nothing, load warps for statistics,
// conversion for finished heads: no circle, and no CTA waits for one that is not running.
//
// A warp's 32 registers cannot hide the memory's latency; copies into shared memory do. Each of the two needs some 16
// us for a unit, so that this pays when a unit has many key tiles (backward_launch.cuh).
#pragma once

#include "cuda/common/counter.cuh"
#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

template <Variant V>
struct RowWorkerBase {
    using C = BackwardConfig<V>;
    static constexpr int kUnits = 4;  // of a ticket

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int lane;
    RowJob& job;
    uint32_t phase = 0;

    /// The next ticket, of heads from `first_head` to before `end_head`; false: no more.
    __device__ __forceinline__ bool take(int32_t* counter, int first_head, int end_head) {
        const int group = params.size.num_heads / params.size.num_heads_k;
        const int chunks = static_cast<int>(ceil_div(params.size.seqlen_q, 64 * kUnits));
        int index = 0;
        if (lane == 0) index = atomicAdd(counter, 1);
        index = __shfl_sync(0xFFFFFFFFu, index, 0);
        const int within = index / (group * chunks);
        if (within >= end_head - first_head) return false;
        const int rest = index - within * group * chunks;
        const int key_head = first_head + within;
        const int batch = launch.schedule.batch_of(key_head, params);
        const int head = key_head % params.size.num_heads_k * group + rest / chunks;
        if (lane == 0) describe(key_head, batch, head, rest % chunks * kUnits);
        __syncwarp();
        return true;
    }

    /// Until a counter of other CTAs has come that far.
    __device__ __forceinline__ void wait_for(const int32_t* counter, int value) const {
        while (cuda::load_acquire(counter) < value) __nanosleep(500);
        __syncwarp();
    }

    __device__ __forceinline__ int units_of_key_head() const {
        return params.size.num_heads / params.size.num_heads_k *
               static_cast<int>(ceil_div(fresh(job.seqlen_q), C::kBlockM)) * C::kQueryUnits;
    }

    /// Reads from shared memory now: what the compiler would keep of a job would not fit into this warp's registers.
    template <typename T>
    __device__ __forceinline__ static T fresh(const T& x) {
        return *static_cast<const volatile T*>(&x);
    }

private:
    __device__ __forceinline__ void describe(int key_head, int batch, int head, int first) {
        Sequence seq = sequence_of(params, batch);
        // Of a sequence longer than it was said to be nothing more
        // is done, and nobody waits for more (LoadWorker neither).
        seq.seqlen_q = min(seq.seqlen_q, params.size.seqlen_q);
        const bool ragged = params.seqlens.cu_seqlens_q != nullptr;
        const int64_t batch_q = ragged ? 0 : batch;
        job.key_head = key_head;
        job.first = first;
        job.rows_q = static_cast<int>(seq.rows_q);
        job.seqlen_q = static_cast<int>(seq.seqlen_q);
        job.work_tiles = min(static_cast<int>(ceil_div(seq.rows_k, V.block_n)), launch.schedule.key_tiles);
        job.at = {static_cast<int>(params.size.seqlen_q - seq.seqlen_q), head,
                  static_cast<int>(seq.q_row + seq.seqlen_q), ragged ? 0 : batch};
        job.padded = (head * launch.tiles + first_padded_tile(params, seq, batch, C::kBlockM)) * C::kQueryUnits;
        job.lse = batch_q * params.lse.batch_stride + head * params.lse.head_stride + seq.q_row;
        job.dlse = batch_q * params.dlse.batch_stride + head * params.dlse.head_stride + seq.q_row;
        job.dq = batch_q * params.dq.batch_stride + head * params.dq.head_stride + seq.q_row * params.dq.row_stride;
    }
};

template <Variant V>
struct StatisticsWorker : RowWorkerBase<V> {
    using Base = RowWorkerBase<V>;
    using typename Base::C;
    using Base::smem, Base::params, Base::launch, Base::lane, Base::job;

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();
        while (Base::take(launch.counter + kStatisticsTickets, launch.first_inner_head, launch.schedule.heads)) {
            int units = 0;
            // To the end of a query tile, also behind the sequence.
            while (units < Base::kUnits &&
                   (Base::fresh(job.first) + units) / C::kQueryUnits * C::kBlockM < Base::fresh(job.seqlen_q)) {
                unit(units++);
            }
            if (units > 0) {
                fence_async_proxy_global();  // the statistics will be fetched by bulk copies
                __syncwarp();
                if (lane == 0) cuda::add_release(launch.ready + Base::fresh(job.key_head), units);
            }
            __syncwarp();
        }
    }

private:
    static constexpr int kRows = C::kRowBufferRows;
    static_assert(2 * kRows * C::kChunks * C::kRowBytes == C::kRowBufferBytes);

    __device__ __forceinline__ void unit(int i) {
        load((Base::fresh(job.first) + i) * 64);
        const int64_t padded = Base::fresh(job.padded) + Base::fresh(job.first) + i;
        float4* const dq = reinterpret_cast<float4*>(launch.dq + padded * (64 * C::kDim)) + lane;
#pragma unroll 8
        for (int n = 0; n < 64 * C::kDim / 128; ++n) dq[n * 32] = make_float4(0.f, 0.f, 0.f, 0.f);

#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const int row0 = (Base::fresh(job.first) + i) * 64 + half * 32;
            if (kRows == 32 && half == 1) load(row0);
            float minus_lse = -INFINITY, minus_delta = 0.0f;
            if (row0 < Base::fresh(job.seqlen_q)) {
                if (kRows == 32 || half == 0) wait_for_load();
                minus_delta = -row_product(kRows == 64 ? half * 32 : 0);
            }
            const int row = row0 + lane;
            if (row < Base::fresh(job.seqlen_q)) {
                const float lse = params.lse.data[Base::fresh(job.lse) + row];
                if (lse == -INFINITY) {
                    minus_delta = 0.0f;
                } else {
                    minus_lse = -lse * kLog2E;
                    if (params.dlse) minus_delta += params.dlse.data[Base::fresh(job.dlse) + row];
                }
            }
            const int64_t at = Base::fresh(job.padded) + row0 / 64;
            float* const stats =
                launch.stats + at / C::kQueryUnits * (2 * C::kBlockM) + at % C::kQueryUnits * 64 + half * 32 + lane;
            stats[0] = minus_lse;
            stats[C::kBlockM] = minus_delta;
        }
    }

    /// The rows of dout and out from `row` on; none if that is behind the sequence (ragged_tensor_map.hpp).
    __device__ __forceinline__ void load(int row) {
        __syncwarp();
        if (row < Base::fresh(job.seqlen_q) && lane == 0) {
            const RaggedCoordinates at{Base::fresh(job.at.row_shift), Base::fresh(job.at.head), Base::fresh(job.at.end),
                                       Base::fresh(job.at.batch)};
            const int chunks = C::chunks_of(params.size.head_dim_v);
            Barrier& full = smem.rows_full[0];
            full.arrive_expect(static_cast<uint32_t>(2 * chunks * kRows * C::kRowBytes));
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                if (c >= chunks) continue;
                ragged_load(address(0, c, 0), launch.out, full, c * 64, row, at);
                ragged_load(address(1, c, 0), launch.dout_rows, full, c * 64, row, at);
            }
        }
        __syncwarp();
    }
    __device__ __forceinline__ void wait_for_load() {
        smem.rows_full[0].wait(Base::phase);
        Base::phase ^= 1;
    }
    __device__ __forceinline__ uint32_t address(int tensor, int chunk, int row) const {
        return smem_address(smem.rows[0]) + ((tensor * C::kChunks + chunk) * kRows + row) * C::kRowBytes;
    }

    /// Lane i's: the product of rows row0 + i. Both tensors are swizzled the same way.
    __device__ __forceinline__ float row_product(int row0) const {
        const int chunks = C::chunks_of(params.size.head_dim_v);
        float mine = 0.0f;
#pragma unroll 2
        for (int i = 0; i < 8; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                if (c >= chunks) continue;
                const uint32_t at = address(0, c, row0 + 4 * i) + lane * 16;
                const uint4 a = load_shared_vector(at);
                const uint4 b = load_shared_vector(at + C::kRowBufferBytes / 2);
                add_products(sum, a.x, b.x), add_products(sum, a.y, b.y);
                add_products(sum, a.z, b.z), add_products(sum, a.w, b.w);
            }
#pragma unroll
            for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
            const float of_my_row = __shfl_sync(0xFFFFFFFFu, sum, lane % 4 * 8);
            if (lane / 4 == i) mine = of_my_row;
        }
        return mine;
    }
    __device__ __forceinline__ static void add_products(float& sum, uint32_t a, uint32_t b) {
        const float2 x = unpack_pair<V.dtype>(a), y = unpack_pair<V.dtype>(b);
        sum += x.x * y.x;
        sum += x.y * y.y;
    }
};

template <Variant V>
struct ConversionWorker : RowWorkerBase<V> {
    using Base = RowWorkerBase<V>;
    using typename Base::C;
    using Base::smem, Base::params, Base::launch, Base::lane, Base::job;

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();
        while (Base::take(launch.counter + kConversionTickets, 0, launch.inner_conversions)) {
            // Each of the four warps of the dq warpgroup counts its work tiles.
            Base::wait_for(launch.done + Base::fresh(job.key_head), 4 * Base::fresh(job.work_tiles));
            // Work tiles without queries do not wait for the clearing of the accumulator.
            if (Base::fresh(job.key_head) >= launch.first_inner_head) {
                Base::wait_for(launch.ready + Base::fresh(job.key_head), Base::units_of_key_head());
            }
            fence_async_proxy_global();
            for (int i = 0; i < Base::kUnits && (Base::fresh(job.first) + i) * 64 < Base::fresh(job.rows_q); ++i) {
                unit(i);
            }
            __syncwarp();
        }
    }

private:
    static constexpr int kPieceColumns = C::kRowBufferBytes / 256;  // of dq, in 64 rows
    static constexpr int kPieceVectors = C::kWarpMajor ? 8 : kPieceColumns / 8;
    static constexpr int kPasses = C::kWarpMajor ? 4 : kPieceVectors;

    __device__ __forceinline__ void unit(int i) {
        if constexpr (C::kTransposedDq) {
#pragma unroll 1
            for (int piece = 0; piece < 2; ++piece) {
                const int row0 = (Base::fresh(job.first) + i) * 64;
                const bool any = row0 < Base::fresh(job.seqlen_q);
                if (any) {
                    const int64_t padded = Base::fresh(job.padded) + Base::fresh(job.first) + i;
                    load(launch.dq + padded * (64 * C::kDim) + piece * 2048, 8192);
                }
                store_transposed(row0, piece * 32, any);
            }
        } else if constexpr (C::kWarpMajor) {
#pragma unroll 1
            for (int piece = 0; piece < 2; ++piece) {
                const int row0 = (Base::fresh(job.first) + i) * 64 + piece * 32;
                const bool any = row0 < Base::fresh(job.seqlen_q);
                if (any) {
                    const int64_t padded = Base::fresh(job.padded) + Base::fresh(job.first) + i;
                    load(launch.dq + padded * (64 * C::kDim) + piece * (32 * C::kDim), C::kRowBufferBytes);
                }
#pragma unroll 1
                for (int column = 0; column < C::kDim; column += 64) store(row0, column, any);
            }
        } else {
#pragma unroll 1
            for (int column = 0; column < C::kDim; column += kPieceColumns) {
                const int row0 = (Base::fresh(job.first) + i) * 64;
                const bool any = row0 < Base::fresh(job.seqlen_q);
                if (any) {
                    const int64_t padded = Base::fresh(job.padded) + Base::fresh(job.first) + i;
                    load(launch.dq + padded * (64 * C::kDim) + column * 64, min(C::kDim - column, kPieceColumns) * 256);
                }
                store(row0, column, any);
            }
        }
    }

    __device__ __forceinline__ void load(const float* accumulator, uint32_t bytes) {
        __syncwarp();
        if (lane == 0) {
            smem.rows_full[1].arrive_expect(bytes);
            bulk_load(smem_address(smem.rows[1]), accumulator, bytes, smem.rows_full[1]);
        }
        __syncwarp();
        smem.rows_full[1].wait(Base::phase);
        Base::phase ^= 1;
    }

    /// See backward_convert_dq for the order of the accumulator. A lane has eight columns of two rows at a time; the
    /// order in which it reads their quads keeps lanes out of each other's banks.
    __device__ __forceinline__ void store(int row0, int column, bool any) const {
        const int j = lane / 2 % kPieceVectors;
        const int swap = j % 4;
        uint16_t* const data = static_cast<uint16_t*>(params.dq.data) + Base::fresh(job.dq) + column + j * 8;
        const bool inside = column + j * 8 < params.size.head_dim;
#pragma unroll 1
        for (int i = 0; i < kPasses; ++i) {
            const int within = kPieceVectors == 8 ? i / 2 * 16 + i % 2 * 4 + lane % 2 + lane / 16 * 2
                                                  : i * 16 + lane % 2 + lane / 8 * 2;
            uint32_t upper[4] = {}, lower[4] = {};
            if (any) {
                const int vector = C::kWarpMajor
                                       ? within / 16 * (4 * C::kDim) + (column / 8 + j) * 32 + within % 8 * 4
                                       : j * 128 + within / 16 * 32 + within % 8 * 4;
                const uint32_t at = smem_address(smem.rows[1]) + vector * 16;
#pragma unroll
                for (int quad = 0; quad < 4; ++quad) {
                    const uint4 a = load_shared_vector(at + (quad ^ swap) * 16);
                    const float scale = params.score.softmax_scale;
                    upper[quad] = pack_pair<V.dtype>(__uint_as_float(a.x) * scale, __uint_as_float(a.y) * scale);
                    lower[quad] = pack_pair<V.dtype>(__uint_as_float(a.z) * scale, __uint_as_float(a.w) * scale);
                }
                restore(upper, swap);
                restore(lower, swap);
            }
            const int row = row0 + within;
            if (inside && row < Base::fresh(job.rows_q)) {
                store_global_vector(data + row * params.dq.row_stride,
                                    make_uint4(upper[0], upper[1], upper[2], upper[3]));
            }
            if (inside && row + 8 < Base::fresh(job.rows_q)) {
                store_global_vector(data + (row + 8) * params.dq.row_stride,
                                    make_uint4(lower[0], lower[1], lower[2], lower[3]));
            }
        }
    }

    /// 32 columns of 64 rows of dq^T (convert_transposed in
    /// backward_rows.cuh). A lane has eight columns of two rows at a time.
    __device__ __forceinline__ void store_transposed(int row0, int column, bool any) const {
        const bool odd = lane / 4 % 2;  // reads in another order, so that lanes keep out of each other's banks
        const int row = row0 + lane / 4 * 8 + lane % 4 * 2;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            uint32_t words[2][4] = {};
            if (any) {
                const uint32_t at =
                    smem_address(smem.rows[1]) + i / 2 * 4096 + lane / 4 * 512 + lane % 4 * 16 + i % 2 * 8;
                const float scale = params.score.softmax_scale;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float2 x = load_shared_pair(at + (odd ? 2 * k + 1 : 2 * k) * 64);
                    const float2 y = load_shared_pair(at + (odd ? 2 * k : 2 * k + 1) * 64);
                    words[0][k] = pack_pair<V.dtype>((odd ? y.x : x.x) * scale, (odd ? x.x : y.x) * scale);
                    words[1][k] = pack_pair<V.dtype>((odd ? y.y : x.y) * scale, (odd ? x.y : y.y) * scale);
                }
            }
            const int first = column + i * 8;
            uint16_t* const data = static_cast<uint16_t*>(params.dq.data) + Base::fresh(job.dq) + first;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (first < params.size.head_dim && row + r < Base::fresh(job.rows_q)) {
                    store_global_vector(data + (row + r) * params.dq.row_stride,
                                        make_uint4(words[r][0], words[r][1], words[r][2], words[r][3]));
                }
            }
        }
    }

    /// Element i becomes what was element i ^ swap.
    __device__ __forceinline__ static void restore(uint32_t (&w)[4], int swap) {
        const auto exchange = [](uint32_t& a, uint32_t& b, bool really) {
            const uint32_t x = really ? b : a, y = really ? a : b;
            a = x, b = y;
        };
        exchange(w[0], w[1], swap & 1), exchange(w[2], w[3], swap & 1);
        exchange(w[0], w[2], swap & 2), exchange(w[1], w[3], swap & 2);
    }
};

}  // namespace strobe::sm90
