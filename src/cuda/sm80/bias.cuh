// The additive bias on the accumulator fragments of one warp. Where its layout allows, a
// tile of it comes through shared memory with the operands: 16-byte copies and ldmatrix
// take a quarter of the accesses that words read straight from global memory take.
#pragma once

#include "cuda/sm80/tile.cuh"

namespace strobe::sm80 {

/// Which (query, key) an accumulator element is. `query` and `key` belong to this thread's element 0 of atom (0, 0).
/// kTransposed: accumulator rows are keys (S^T), else queries.
template <bool kTransposed>
struct FragmentOrigin {
    int query;
    int key;

    __device__ static constexpr int row_step(int i, int e) { return 16 * i + 8 * (e >> 1); }
    __device__ static constexpr int col_step(int j, int e) { return 8 * j + (e & 1); }
    __device__ static constexpr int query_step(int i, int j, int e) {
        return kTransposed ? col_step(j, e) : row_step(i, e);
    }
    __device__ static constexpr int key_step(int i, int j, int e) {
        return kTransposed ? row_step(i, e) : col_step(j, e);
    }
};

/// For kernels without bias, and in place of a staged tile for passes that have none.
struct NoBias {
    __device__ NoBias() {}
    __device__ NoBias(const AttentionParams&, const Sequence&, int, int) {}
    template <typename... Arguments>
    __device__ __forceinline__ void add(Arguments&&...) const {}
};

/// The bias of one (batch, head).
struct Bias {
    const void* data;  // null: none
    DType dtype;
    int64_t row_stride;
    int64_t col_stride;
    int seqlen_q;
    int seqlen_k;

    __device__ Bias(const AttentionParams& p, const Sequence& seq, int batch, int head)
        : data(nullptr),
          dtype(p.bias_dtype),
          row_stride(p.score.bias.row_stride),
          col_stride(p.score.bias.col_stride),
          seqlen_q(static_cast<int>(seq.seqlen_q)),
          seqlen_k(static_cast<int>(seq.seqlen_k)) {
        const BiasRef& b = p.score.bias;
        if (!b) return;
        const int64_t offset = batch * b.batch_stride + head * b.head_stride;
        data = static_cast<const char*>(b.data) + offset * (dtype == DType::f32 ? 4 : 2);
    }

    /// Its tiles go through shared memory: 16-bit elements side by side, rows that start on 16 bytes.
    __device__ bool staged() const {
        return data && dtype != DType::f32 && col_stride == 1 && row_stride % 8 == 0 &&
               (reinterpret_cast<uintptr_t>(data) & 15) == 0;
    }

    template <int kRows, int kCols, int kThreads>
    __device__ __forceinline__ void load_tile(uint32_t tile, int64_t q_begin, int k_begin, int thread) const {
        const uint16_t* const src = static_cast<const uint16_t*>(data) + q_begin * row_stride + k_begin;
        sm80::load_tile<kRows, kCols, kThreads, true, true>(tile, src, row_stride, static_cast<int>(seqlen_q - q_begin),
                                                            min(seqlen_k - k_begin, kCols), true, thread);
    }

    /// s = unit * s + bias, from `staged_at`, the warp's part of the tile in shared memory (rows_first, or chunks_first
    /// for transposed fragments), if that is where it is. Without a bias s stays as it is.
    template <bool kTransposed, int kMAtoms, int kNAtoms, int kCols>
    __device__ __forceinline__ void add(float (&s)[kMAtoms][kNAtoms][4], const FragmentOrigin<kTransposed>& origin,
                                        float unit, const FragmentAddress<kCols>& staged_at) const {
        if (!staged()) {
            add(s, origin, unit, NoBias());
        } else if (dtype == DType::bf16) {
            add_tile<DType::bf16, kTransposed>(s, unit, staged_at);
        } else {
            add_tile<DType::f16, kTransposed>(s, unit, staged_at);
        }
    }
    template <bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add(float (&s)[kMAtoms][kNAtoms][4], const FragmentOrigin<kTransposed>& origin,
                                        float unit, const NoBias&) const {
        if (!data) return;
        if (dtype == DType::f32) {
            add_direct<FloatElements>(s, origin, unit);
        } else if (dtype == DType::bf16) {
            add_direct<HalfElements<DType::bf16>>(s, origin, unit);
        } else {
            add_direct<HalfElements<DType::f16>>(s, origin, unit);
        }
    }

    /// The same of a tile of kType in shared memory.
    template <DType kType, bool kTransposed, int kMAtoms, int kNAtoms, int kCols>
    __device__ __forceinline__ static void add_tile(float (&s)[kMAtoms][kNAtoms][4], float unit,
                                                      const FragmentAddress<kCols>& at) {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int j = 0; j < kNAtoms; j += 2) {
                uint32_t words[4];  // atom j, its lower half; atom j + 1
                if constexpr (kTransposed) {
                    ldmatrix_transposed(words, at.at(8 * j, 16 * i));
                } else {
                    ldmatrix(words, at.at(16 * i, 8 * j));
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const float2 x = unpack2<kType>(words[n]);
                    float (&atom)[4] = s[i][j + n / 2];
                    atom[n % 2 * 2] = fmaf(atom[n % 2 * 2], unit, x.x);
                    atom[n % 2 * 2 + 1] = fmaf(atom[n % 2 * 2 + 1], unit, x.y);
                }
            }
    }

private:
    /// How elements of one type are read, one at a time and two at a time.
    struct FloatElements {
        using One = float;
        using Two = float2;
        __device__ static float one(float x) { return x; }
        __device__ static float2 two(float2 x) { return x; }
    };
    template <DType kType>
    struct HalfElements {
        using One = uint16_t;
        using Two = uint32_t;
        __device__ static float one(uint16_t x) { return unpack<kType>(x); }
        __device__ static float2 two(uint32_t x) { return unpack2<kType>(x); }
    };

    /// A tile inside the sequence whose bias has unit column stride is read with one pointer per query row and constant
    /// offsets, two keys at a time where they lie side by side in the thread and in memory; else every element is
    /// addressed and checked by itself.
    template <typename Elements, bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add_direct(float (&s)[kMAtoms][kNAtoms][4],
                                               const FragmentOrigin<kTransposed>& origin, float unit) const {
        using Origin = FragmentOrigin<kTransposed>;
        using T = typename Elements::One;
        using T2 = typename Elements::Two;
        const T* const from = static_cast<const T*>(data) + origin.query * row_stride + origin.key * col_stride;
        const bool whole = origin.query + Origin::query_step(kMAtoms - 1, kNAtoms - 1, 3) < seqlen_q &&
                           origin.key + Origin::key_step(kMAtoms - 1, kNAtoms - 1, 3) < seqlen_k && col_stride == 1;
        const bool paired = row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(from) % (2 * sizeof(T)) == 0;
        if (!kTransposed && __all_sync(0xffffffffu, whole && paired)) {
#pragma unroll
            for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const T* const row = from + (16 * i + 8 * h) * row_stride;
                    T2 words[kNAtoms];
#pragma unroll
                    for (int j = 0; j < kNAtoms; ++j) words[j] = __ldg(reinterpret_cast<const T2*>(row + 8 * j));
#pragma unroll
                    for (int j = 0; j < kNAtoms; ++j) {
                        const float2 x = Elements::two(words[j]);
                        s[i][j][2 * h] = fmaf(s[i][j][2 * h], unit, x.x);
                        s[i][j][2 * h + 1] = fmaf(s[i][j][2 * h + 1], unit, x.y);
                    }
                }
        } else if (__all_sync(0xffffffffu, whole)) {
            for_each(s, [&](float& x, int i, int j, int e) {
                const auto* const at = from + Origin::query_step(i, j, e) * row_stride + Origin::key_step(i, j, e);
                x = fmaf(x, unit, Elements::one(__ldg(at)));
            });
        } else {
            for_each(s, [&](float& x, int i, int j, int e) {
                const int query = Origin::query_step(i, j, e), key = Origin::key_step(i, j, e);
                if (origin.query + query < seqlen_q && origin.key + key < seqlen_k) {
                    x = fmaf(x, unit, Elements::one(__ldg(from + query * row_stride + key * col_stride)));
                }
            });
        }
    }
};

template <bool kBias>
struct BiasChoice {
    using Type = NoBias;
};
template <>
struct BiasChoice<true> {
    using Type = Bias;
};
template <bool kBias>
using BiasOf = typename BiasChoice<kBias>::Type;

}  // namespace strobe::sm80
