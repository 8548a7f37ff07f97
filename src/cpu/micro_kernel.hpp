// The matrix products of attention, all of one shape: C[m][n] (+)= sum over k of A(m, k) * B[k][n], where A is read one
// element at a time and broadcast, B and C are read in vectors along n. A block of up to kBlockRows x kPanel
// accumulators stays in registers over all k.
#pragma once

#include "cpu/simd.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

/// How A lies in memory: `rows` A(m, k) = a[m * stride + k], `columns` A(m, k) = a[k * stride + m].
enum class Layout { rows, columns };

/// What the accumulators start from: 0, C, or C times one factor per column n.
enum class Start { zero, add, scale };

struct Product {
    int64_t rows = 0;        // m
    int64_t steps = 0;       // k
    const float* a = nullptr;
    int64_t a_stride = 0;
    const float* b = nullptr;
    int64_t b_stride = 0;    // between the vectors of step k and k + 1
    float* c = nullptr;
    int64_t c_stride = 0;    // between rows m and m + 1
    const float* factor = nullptr;
};

template <int M, int N, Layout A, Start S>
__attribute__((noinline)) void register_block(int64_t steps, const float* a, int64_t a_stride, const float* b,
                                              int64_t b_stride, float* c, int64_t c_stride, const float* factor) {
    Vec acc[M][N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
        const Vec f = S == Start::scale ? load(factor + n * kWidth) : zero();
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            acc[m][n] = S == Start::zero ? zero() : load(c + m * c_stride + n * kWidth);
            if (S == Start::scale) acc[m][n] *= f;
        }
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; ++k) {
        Vec row[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) row[n] = load(b + n * kWidth);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Vec x = splat(A == Layout::rows ? a[m * a_stride] : a[m]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) acc[m][n] = fma(x, row[n], acc[m][n]);
        }
        b += b_stride;
        a += A == Layout::rows ? 1 : a_stride;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store(c + m * c_stride + n * kWidth, acc[m][n]);
    }
}

using RegisterBlock = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, const float*);

template <int N, Layout A, Start S>
STROBE_CPU_INLINE RegisterBlock register_block_of(int64_t rows) {
    static constexpr RegisterBlock kBlocks[] = {
        register_block<1, N, A, S>, register_block<2, N, A, S>,  register_block<3, N, A, S>,
        register_block<4, N, A, S>, register_block<5, N, A, S>,  register_block<6, N, A, S>,
#if defined(__AVX512F__)
        register_block<7, N, A, S>, register_block<8, N, A, S>,  register_block<9, N, A, S>,
        register_block<10, N, A, S>, register_block<11, N, A, S>, register_block<12, N, A, S>,
#endif
    };
    static_assert(sizeof(kBlocks) / sizeof(kBlocks[0]) == kBlockRows);
    return kBlocks[rows - 1];
}

/// One strip of N vectors of columns. The rows are cut evenly, so that no block has too few accumulators to hide the
/// latency of the multiply-add.
template <int N, Layout A, Start S>
STROBE_CPU_INLINE void multiply_strip(const Product& p) {
    const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
    if (blocks == 0) return;
    const int64_t small = p.rows / blocks, large_blocks = p.rows % blocks;
    const float* a = p.a;
    float* c = p.c;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t rows = small + (i < large_blocks ? 1 : 0);
        register_block_of<N, A, S>(rows)(p.steps, a, p.a_stride, p.b, p.b_stride, c, p.c_stride, p.factor);
        a += rows * (A == Layout::rows ? p.a_stride : 1);
        c += rows * p.c_stride;
    }
}

/// One panel of kPanel columns.
template <Layout A, Start S>
STROBE_CPU_INLINE void multiply_panel(const Product& p) {
    multiply_strip<2, A, S>(p);
}

/// `columns` columns, a multiple of kWidth.
template <Layout A, Start S>
STROBE_CPU_INLINE void multiply_columns(Product p, int64_t columns) {
    for (; columns >= kPanel; columns -= kPanel) {
        multiply_strip<2, A, S>(p);
        p.b += kPanel;
        p.c += kPanel;
    }
    if (columns > 0) multiply_strip<1, A, S>(p);
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
