// Matrix products of fp32 operands on tensor cores. Each operand is a sum of two TF32 numbers, high + low, of which
// three of the four products count: what is left out is 2^-22 of a product, and a fp32 multiplication rounds to 2^-24.
// Tensor cores cut off what does not fit the accumulator, and do so at each step of eight terms. So the large products
// have accumulators of their own, which hold no more than one tile's sums; the small ones, in others, lose nothing that
// counts; and tiles are added up by rounded additions.
//
// Tiles lie in shared memory as they come, kPadding floats behind each row, by which neither ldmatrix nor the reads of
// columns meet a bank twice. Operands are split in registers.
#pragma once

#include "cuda/sm80/config.hpp"
#include "cuda/sm80/ptx.cuh"
#include "cuda/sm80/simt/tile.cuh"

namespace strobe::sm80::tf32 {

using simt::Rows;

template <int kD>
constexpr int kRowBytes = 4 * (kD + Tf32Config::kPadding);

/// kRows x kD of `from` on their way to shared memory; rows and columns past the valid ones become zero. The valid ones
/// are a multiple of four columns; kAligned: rows start on 16 bytes.
template <int kRows, int kD, int kThreads, bool kAligned = true>
__device__ __forceinline__ void load_rows(uint32_t tile, const Rows& from, int64_t rows_valid, int cols_valid,
                                          int thread) {
    constexpr int kChunks = kD / 4, kStep = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
    const int row0 = thread / kChunks, chunk = thread % kChunks;
    const int valid = 4 * chunk < cols_valid ? static_cast<int>(rows_valid < kRows ? rows_valid : kRows) : 0;
    const float* row = from.row(row0) + 4 * chunk;
    const int64_t step = kStep * from.row_stride;
    const uint32_t to = tile + row0 * kRowBytes<kD> + 16 * chunk;
    if (!kAligned && ((reinterpret_cast<uintptr_t>(from.data) & 15) != 0 || from.row_stride % 4 != 0)) {
#pragma unroll 1
        for (int r = 0; r < kRows; r += kStep) {
            const bool is_valid = row0 + r < valid;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                cp_async_4(to + r * kRowBytes<kD> + 4 * n, is_valid ? row + n : from.data, is_valid ? 4 : 0);
            }
            row += step;
        }
        return;
    }
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
        const bool is_valid = row0 + r < valid;
        cp_async_16(to + r * kRowBytes<kD>, is_valid ? row : from.data, is_valid ? 16 : 0);
        row += step;
    }
}

/// x = high + low: the nearest TF32 number and, once the tensor core has cut off its last bits, what is left to 2^-22
/// of x. (cvt.rna does the same in more instructions, for infinities and NaN, of which low is NaN in any case.)
struct Split {
    uint32_t high, low;

    __device__ Split() {}
    __device__ explicit Split(float x) {
        constexpr uint32_t kHalf = 1u << 12, kKept = ~0u << 13;
        high = (__float_as_uint(x) + kHalf) & kKept;
        low = __float_as_uint(x - __uint_as_float(high));
    }
};

/// d += a * b: a is 16 x 8 row-major, b 8 x 8 column-major.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// A 16 x 8 operand.
struct Fragment {
    uint32_t high[4], low[4];

    __device__ void set(int n, float x) {
        const Split s(x);
        high[n] = s.high, low[n] = s.low;
    }
};

/// sum += a * b, and rest += the small products. kSwapped: a and b have changed places; the order of the small ones
/// has, too, so that the transposed product is the same to the bit.
template <bool kSwapped>
__device__ __forceinline__ void multiply(float (&sum)[4], float (&rest)[4], const Fragment& a, const Split& b0,
                                         const Split& b1) {
    if constexpr (kSwapped) {
        mma(rest, a.high, b0.low, b1.low);
        mma(rest, a.low, b0.high, b1.high);
    } else {
        mma(rest, a.low, b0.high, b1.high);
        mma(rest, a.high, b0.low, b1.low);
    }
    mma(sum, a.high, b0.high, b1.high);
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&x)[kM][kN][4]) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[i][j][e] = 0.0f;
}

template <int kM, int kN>
__device__ __forceinline__ void add(float (&x)[kM][kN][4], const float (&y)[kM][kN][4]) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[i][j][e] += y[i][j][e];
}

/// Where a lane points ldmatrix at: for the rows of the left operand from `row0` on, and for those of the right one.
template <int kD>
__device__ __forceinline__ uint32_t left_rows(uint32_t tile, int row0, int lane) {
    return tile + (row0 + lane % 16) * kRowBytes<kD> + lane / 16 * 16;
}
template <int kD>
__device__ __forceinline__ uint32_t right_rows(uint32_t tile, int lane) {
    return tile + (lane % 8 + lane / 16 * 8) * kRowBytes<kD> + lane / 8 % 2 * 16;
}

/// Terms that an accumulator of scores takes before it is added to the others: fewer steps cut off less. As it is,
/// scores are twice as exact as those of a chain of fp32 additions.
constexpr int kChain = 32;

/// s = dots of 16 kM rows of the left tile with 8 kN rows of the right one.
template <int kD, bool kSwapped, int kM, int kN>
__device__ __forceinline__ void dot_rows(float (&s)[kM][kN][4], uint32_t left, uint32_t right) {
    static_assert(kN % 2 == 0 && kD % kChain == 0);
    float rest[kM][kN][4];
    clear(s);
    clear(rest);
#pragma unroll(kD <= 64 ? 2 : 1)
    for (int chain = 0; chain < kD / kChain; ++chain) {
        float sum[kM][kN][4];
        clear(sum);
#pragma unroll
        for (int k = 0; k < kChain / 8; ++k) {
            const int step = 4 * kChain * chain + 32 * k;
            Fragment a[kM];
#pragma unroll
            for (int i = 0; i < kM; ++i) {
                uint32_t x[4];
                ldmatrix(x, left + i * 16 * kRowBytes<kD> + step);
#pragma unroll
                for (int n = 0; n < 4; ++n) a[i].set(n, __uint_as_float(x[n]));
            }
#pragma unroll
            for (int j = 0; j < kN; j += 2) {
                uint32_t y[4];
                ldmatrix(y, right + j * 8 * kRowBytes<kD> + step);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const Split b0(__uint_as_float(y[2 * m])), b1(__uint_as_float(y[2 * m + 1]));
#pragma unroll
                    for (int i = 0; i < kM; ++i) multiply<kSwapped>(sum[i][j + m], rest[i][j + m], a[i], b0, b1);
                }
            }
        }
        add(s, sum);
    }
    add(s, rest);
}

/// Accumulators of weights * x, for a tile x of kD columns. An atom's columns are kChunk apart, so that a lane reads
/// those of kChunk atoms at once and holds 2 kChunk neighbours of each of its rows.
template <int kM, int kD>
struct Columns {
    static constexpr int kChunk = 2;
    static constexpr int kChunks = kD / (8 * kChunk);
    float value[kM][kD / 8][4];

    __device__ Columns() { clear(value); }

    /// What a lane adds up of a tile begins here.
    __device__ static uint32_t rows(uint32_t tile, int lane) {
        return tile + 2 * (lane % 4) * kRowBytes<kD> + 4 * kChunk * (lane / 4);
    }

    /// += w * x, where w is an accumulator of scores, its columns the rows of x: element 2 t of an atom's row is term t
    /// of a step and 2 t + 1 is term t + 4.
    template <int kN>
    __device__ __forceinline__ void add(const float (&w)[kM][kN][4], uint32_t x) {
        Fragment a[kM][kN];
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int k = 0; k < kN; ++k) {
                a[i][k].set(0, w[i][k][0]);
                a[i][k].set(1, w[i][k][2]);
                a[i][k].set(2, w[i][k][1]);
                a[i][k].set(3, w[i][k][3]);
            }
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            float sum[kM][kChunk][4], rest[kM][kChunk][4];
            clear(sum);
            clear(rest);
#pragma unroll
            for (int k = 0; k < kN; ++k) {
                float x0[kChunk], x1[kChunk];
                load(x0, x + 8 * k * kRowBytes<kD> + 32 * kChunk * c);
                load(x1, x + (8 * k + 1) * kRowBytes<kD> + 32 * kChunk * c);
#pragma unroll
                for (int e = 0; e < kChunk; ++e) {
                    const Split b0(x0[e]), b1(x1[e]);
#pragma unroll
                    for (int i = 0; i < kM; ++i) multiply<false>(sum[i][e], rest[i][e], a[i][k], b0, b1);
                }
            }
#pragma unroll
            for (int i = 0; i < kM; ++i)
#pragma unroll
                for (int e = 0; e < kChunk; ++e)
#pragma unroll
                    for (int n = 0; n < 4; ++n) value[i][kChunk * c + e][n] += sum[i][e][n] + rest[i][e][n];
            // Never so, since no addition gives a signalling NaN, but never seen not to be: additions that the
            // assembler put off would keep the sums of all chunks in registers.
            if (__float_as_uint(value[kM - 1][kChunk * c + kChunk - 1][3]) == 0x7f800001u) asm volatile("trap;");
        }
    }

    __device__ void scale(int i, int h, float factor) {
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) value[i][j][2 * h] *= factor, value[i][j][2 * h + 1] *= factor;
    }

    /// Row (i, h) times `factor`, or zeros where that is 0, to its place in memory; a multiple of four columns.
    __device__ __forceinline__ void store(int i, int h, float* to, float factor, int cols_valid, bool accumulate,
                                          int lane) const {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int n = 0; n < 2 * kChunk; n += 4) {
                const int col = 8 * kChunk * c + 2 * kChunk * (lane % 4) + n;
                if (col >= cols_valid) continue;
                float4 x;
                float* const element = &x.x;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float held = value[i][kChunk * c + (n + e) % kChunk][2 * h + (n + e) / kChunk];
                    element[e] = factor == 0.0f ? 0.0f : held * factor;
                }
                if ((reinterpret_cast<uintptr_t>(to + col) & 15) == 0) {
                    float4* const place = reinterpret_cast<float4*>(to + col);
                    if (accumulate) {
                        const float4 old = *place;
                        x = {old.x + x.x, old.y + x.y, old.z + x.z, old.w + x.w};
                    }
                    *place = x;
                } else {
#pragma unroll
                    for (int e = 0; e < 4; ++e) to[col + e] = accumulate ? to[col + e] + element[e] : element[e];
                }
            }
    }

private:
    __device__ static void load(float (&x)[kChunk], uint32_t from) {
        if constexpr (kChunk == 4) {
            const uint4 bits = load_shared_16(from);
            x[0] = __uint_as_float(bits.x), x[1] = __uint_as_float(bits.y);
            x[2] = __uint_as_float(bits.z), x[3] = __uint_as_float(bits.w);
        } else {
            const float2 pair = load_shared_pair(from);
            x[0] = pair.x, x[1] = pair.y;
        }
    }
};

/// f(i, h) for the rows that a lane holds a part of: row 16 i + 8 h + lane / 4 of the warp's.
template <int kM, typename F>
__device__ __forceinline__ void for_rows(F f) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) f(i, h);
}

}  // namespace strobe::sm80::tf32
