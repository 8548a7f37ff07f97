// The matrix products of attention, all of one shape: C[m][n] (+)= sum over k of A(m, k) * B[k][n], where A is read one
// 32-bit word at a time and broadcast, B and C are read in vectors along n. A block of up to kBlockRows x kPanel
// accumulators stays in registers over all k. A word is an fp32 number, or with kPairs two bfloat16 numbers that
// belong to neighbouring k: then one step of k stands for both.
#pragma once

#include "cpu/simd.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

/// How A lies in memory. rows: A(m, k) = a[m * stride + k]. columns: A(m, k) = a[k * stride + m]. packed: as
/// pack_column_blocks leaves it, a[first(m) * stride + k * size(m) + m - first(m)] with the EvenBlocks of m.
enum class Layout { rows, columns, packed };

/// What becomes of the sum over k: C = sum, C + sum, or C times one factor per column n + sum. The registers start from
/// 0 in each case: the rounding error of many short sums is less than that of one long one.
enum class Result { set, add, scale };

/// Scores are sums over the head dim, taken in pieces of this many steps for the same reason.
inline constexpr int64_t kScoreSteps = 64;

struct Product {
    int64_t rows = 0;        // m
    int64_t steps = 0;       // k
    const float* a = nullptr;
    int64_t a_stride = 0;
    int64_t a_first = 0;     // packed: the first k
    const float* b = nullptr;
    int64_t b_stride = 0;    // between the vectors of step k and k + 1
    float* c = nullptr;
    int64_t c_stride = 0;    // between rows m and m + 1
    const float* factor = nullptr;
};

/// Cuts rows into register blocks as evenly as possible, so that none has too few accumulators to hide the latency of
/// the multiply-add.
struct EvenBlocks {
    int64_t count;
    int64_t small;
    int64_t num_large;  // of small + 1 rows; they come first

    explicit STROBE_CPU_INLINE EvenBlocks(int64_t rows)
        : count((rows + kBlockRows - 1) / kBlockRows), small(count ? rows / count : 0), num_large(count ? rows % count : 0) {}

    STROBE_CPU_INLINE int64_t size(int64_t block) const { return small + (block < num_large ? 1 : 0); }
};

template <int M, int N, Layout A, Result R, bool kPairs>
__attribute__((noinline)) void register_block(int64_t steps, const float* a, int64_t a_stride, const float* b,
                                              int64_t b_stride, float* c, int64_t c_stride, const float* factor) {
    Vec acc[M][N] = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; ++k) {
        Vec row[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) row[n] = load(b + n * kWidth);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Vec x = splat(A == Layout::rows ? a[m * a_stride] : a[m]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) acc[m][n] = accumulate<kPairs>(x, row[n], acc[m][n]);
        }
        b += b_stride;
        a += A == Layout::rows ? 1 : A == Layout::columns ? a_stride : M;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            float* const at = c + m * c_stride + n * kWidth;
            Vec sum = acc[m][n];
            if (R == Result::add) sum = load(at) + sum;
            if (R == Result::scale) sum = fma(load(at), load(factor + n * kWidth), sum);
            store(at, sum);
        }
    }
}

using RegisterBlock = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, const float*);

template <int N, Layout A, Result R, bool kPairs>
STROBE_CPU_INLINE RegisterBlock register_block_of(int64_t rows) {
    static constexpr RegisterBlock kBlocks[] = {
        register_block<1, N, A, R, kPairs>,  register_block<2, N, A, R, kPairs>,  register_block<3, N, A, R, kPairs>,
        register_block<4, N, A, R, kPairs>,  register_block<5, N, A, R, kPairs>,  register_block<6, N, A, R, kPairs>,
#if defined(__AVX512F__)
        register_block<7, N, A, R, kPairs>,  register_block<8, N, A, R, kPairs>,  register_block<9, N, A, R, kPairs>,
        register_block<10, N, A, R, kPairs>, register_block<11, N, A, R, kPairs>, register_block<12, N, A, R, kPairs>,
#endif
    };
    static_assert(sizeof(kBlocks) / sizeof(kBlocks[0]) == kBlockRows);
    return kBlocks[rows - 1];
}

/// One strip of N vectors of columns.
template <int N, Layout A, Result R, bool kPairs>
STROBE_CPU_INLINE void multiply_strip(const Product& p) {
    const EvenBlocks blocks(p.rows);
    const float* a = p.a;
    float* c = p.c;
    for (int64_t i = 0; i < blocks.count; ++i) {
        const int64_t rows = blocks.size(i);
        const float* const first = A == Layout::packed ? a + p.a_first * rows : a;
        register_block_of<N, A, R, kPairs>(rows)(p.steps, first, p.a_stride, p.b, p.b_stride, c, p.c_stride, p.factor);
        a += rows * (A == Layout::columns ? 1 : p.a_stride);
        c += rows * p.c_stride;
    }
}

/// The scores of one panel of kPanel columns. All pieces of a block of rows are summed before the next block is read, which
/// thus passes through the first-level cache once.
template <bool kPairs>
STROBE_CPU_INLINE void multiply_scores(const Product& p) {
    const EvenBlocks blocks(p.rows);
    const float* a = p.a;
    float* c = p.c;
    for (int64_t i = 0; i < blocks.count; ++i) {
        const int64_t rows = blocks.size(i);
        const auto set = register_block_of<2, Layout::rows, Result::set, kPairs>(rows);
        const auto add = register_block_of<2, Layout::rows, Result::add, kPairs>(rows);
        for (int64_t done = 0; done < p.steps; done += kScoreSteps) {
            const int64_t steps = p.steps - done < kScoreSteps ? p.steps - done : kScoreSteps;
            (done ? add : set)(steps, a + done, p.a_stride, p.b + done * p.b_stride, p.b_stride, c, p.c_stride, nullptr);
        }
        a += rows * p.a_stride;
        c += rows * p.c_stride;
    }
}

/// `columns` columns, a multiple of kWidth.
template <Layout A, Result R, bool kPairs>
STROBE_CPU_INLINE void multiply_columns(Product p, int64_t columns) {
    for (; columns >= kPanel; columns -= kPanel) {
        multiply_strip<2, A, R, kPairs>(p);
        p.b += kPanel;
        p.c += kPanel;
    }
    if (columns > 0) multiply_strip<1, A, R, kPairs>(p);
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
