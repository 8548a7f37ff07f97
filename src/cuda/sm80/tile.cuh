// Tiles of 16-bit elements in shared memory: their swizzle, how they are filled from global memory, how warps read them
// as mma operands, and the one matrix product loop that every kernel of this path uses.
#pragma once

#include "cuda/sm80/ptx.cuh"

namespace strobe::sm80 {

/// Row-major rows x kCols; the 16-byte chunks of a row are XOR-permuted so that eight consecutive rows of one chunk
/// column cover all 32 banks (ldmatrix and the fragment stores are then conflict-free).
template <int kCols>
struct TileLayout {
    static_assert(kCols % 32 == 0);
    static constexpr int kRowBytes = kCols * 2;
    static constexpr bool kWideRows = kCols % 64 == 0;  // else two rows share a 128-byte line's parity
    static constexpr int kGroupChunks = kWideRows ? 8 : 4;
    static constexpr int kXorMask = kWideRows ? 6 : 2;

    __device__ static int phase(int row) { return kWideRows ? row & 7 : row >> 1 & 3; }
    __device__ static uint32_t offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ phase(row)) << 4); }
};

/// Where a lane points ldmatrix at inside a tile, from (row0, col0) on. `at(row, col)` with multiples of 16 costs one
/// XOR at most. row0 is a multiple of 16; col0 is one too and shares no bit with the columns later given to `at`.
template <int kCols>
struct FragmentAddress {
    using Layout = TileLayout<kCols>;
    uint32_t base;
    uint32_t beyond = 0;  // bytes added behind the XOR: tiles a constant apart share their XORed bases

    /// Matrices ordered (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1):
    /// a row-major A operand, or with .trans a B operand stored k x n.
    __device__ static FragmentAddress rows_first(uint32_t tile, int lane, int row0 = 0, int col0 = 0) {
        return {tile + Layout::offset(row0 + (lane & 15), (col0 >> 3) + (lane >> 4))};
    }
    /// Matrices ordered (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1):
    /// a B operand stored n x k, or with .trans an A operand stored k x m.
    __device__ static FragmentAddress chunks_first(uint32_t tile, int lane, int row0 = 0, int col0 = 0) {
        return {tile + Layout::offset(row0 + ((lane & 7) | (lane >> 4 << 3)), (col0 >> 3) + (lane >> 3 & 1))};
    }
    /// Where a lane points packed_to_tile for accumulators whose atom (0, 0)
    /// lies at (row0, col0): at its own first element, or as rows_first.
    __device__ static FragmentAddress accumulator(uint32_t tile, int lane, int row0, int col0) {
        if constexpr (kStoresMatrices) return rows_first(tile, lane, row0, col0);
        return {tile + Layout::offset(row0 + (lane >> 2), col0 >> 3) + 4 * (lane & 3)};
    }
    __device__ uint32_t at(int row, int col) const {
        const int chunk = col >> 3;
        return (base ^ ((chunk & Layout::kXorMask) << 4)) +
               (row * Layout::kRowBytes + ((chunk & ~Layout::kXorMask) << 4)) + beyond;
    }
    /// Two columns of an accumulator fragment: `at` for odd chunks too.
    __device__ uint32_t at_chunk(int row, int chunk) const {
        constexpr int kMask = Layout::kGroupChunks - 1;
        return (base ^ ((chunk & kMask) << 4)) + (row * Layout::kRowBytes + ((chunk & ~kMask) << 4)) + beyond;
    }
    __device__ FragmentAddress operator+(uint32_t bytes) const { return {base, beyond + bytes}; }
    /// For use inside a loop that has no registers for what `at` derives from it.
    __device__ FragmentAddress anew() const { return {made_anew(base), beyond}; }
    __device__ FragmentAddress moved(uint32_t bytes) const { return {base + bytes, beyond}; }
    __device__ FragmentAddress moved_chunks(int chunk) const { return {at_chunk(0, chunk) - beyond, beyond}; }
};

/// Eight elements one by one, for rows that are not 16-byte aligned or end inside a chunk.
__device__ __forceinline__ uint4 gather_chunk(const uint16_t* src, int valid) {
    uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < valid) w[i >> 1] |= static_cast<uint32_t>(src[i]) << (16 * (i & 1));
    }
    return {w[0], w[1], w[2], w[3]};
}

/// Fills kRows x kCols from `src` (row 0 of the tile); rows >= rows_valid and columns >= cols_valid become zero.
/// kAligned: rows start on 16 bytes and cols_valid is a multiple of 8. Otherwise `aligned` says so at run time.
/// kRagged: rows start on 16 bytes and end anywhere.
template <int kRows, int kCols, int kThreads, bool kAligned, bool kRagged = false>
__device__ __forceinline__ void load_tile(uint32_t tile, const uint16_t* src, int64_t row_stride, int rows_valid,
                                          int cols_valid, bool aligned, int thread) {
    using Layout = TileLayout<kCols>;
    constexpr int kLanes = Layout::kGroupChunks;
    constexpr int kRowStep = kThreads / kLanes;
    static_assert(kRowStep % 8 == 0);
    const int row0 = thread / kLanes;
    const int chunk0 = thread % kLanes;
    const uint32_t dst = tile + Layout::offset(row0, chunk0);
    const uint16_t* row_ptr = src + row0 * row_stride + chunk0 * 8;
    // A tile without edges needs no predicates.
    if ((kAligned || aligned) && rows_valid >= kRows && cols_valid == kCols) {
#pragma unroll
        for (int r = 0; r < (kRows + kRowStep - 1) / kRowStep; ++r) {
            if (kRows % kRowStep != 0 && row0 + r * kRowStep >= kRows) break;
#pragma unroll
            for (int c = 0; c < kCols / 8; c += kLanes) {
                cp_async_16(dst + r * kRowStep * Layout::kRowBytes + c * 16, row_ptr + c * 8);
            }
            row_ptr += kRowStep * row_stride;
        }
        return;
    }
#pragma unroll
    for (int r = 0; r < (kRows + kRowStep - 1) / kRowStep; ++r) {
        const int row = row0 + r * kRowStep;
        if (kRows % kRowStep != 0 && row >= kRows) break;
#pragma unroll
        for (int c = 0; c < kCols / 8; c += kLanes) {
            const int col = (chunk0 + c) * 8;
            const uint32_t to = dst + r * kRowStep * Layout::kRowBytes + c * 16;
            if constexpr (kRagged) {
                const int bytes = row < rows_valid ? min(max(2 * (cols_valid - col), 0), 16) : 0;
                cp_async_16(to, bytes > 0 ? row_ptr + c * 8 : src, bytes);
            } else if (kAligned || aligned) {
                const bool valid = row < rows_valid && col < cols_valid;
                cp_async_16(to, valid ? row_ptr + c * 8 : src, valid ? 16 : 0);
            } else {
                store_shared(to, gather_chunk(row_ptr + c * 8, row < rows_valid ? cols_valid - col : 0));
            }
        }
        row_ptr += kRowStep * row_stride;
    }
}

/// load_tile in parts, for an aligned tile inside its tensor: copy() is called for n = 0,
/// 1, ... kCopies - 1, one step of k of a product between. Straight-line code: the addresses
/// are made once, opaque to the compiler, which would make them anew for each copy.
template <int kRows, int kCols, int kThreads>
struct SpreadCopy {
    using Layout = TileLayout<kCols>;
    static constexpr int kLanes = Layout::kGroupChunks, kRowStep = kThreads / kLanes, kColCopies = kCols / 8 / kLanes;
    static constexpr int kCopies = kRows / kRowStep * kColCopies;
    static_assert(kRows % kRowStep == 0 && kRowStep % 8 == 0);
    uint32_t to = 0;
    const uint16_t* from = nullptr;
    int64_t step = 0;

    __device__ __forceinline__ void start(uint32_t tile, const uint16_t* src, int64_t row_stride) {
        const int thread = thread_index();
        to = tile + Layout::offset(thread / kLanes, thread % kLanes);
        from = src + thread / kLanes * row_stride + thread % kLanes * 8;
        step = kRowStep * row_stride;
        asm volatile("" : "+r"(to), "+l"(from));
    }
    __device__ __forceinline__ void copy(int n, bool wanted) {
        const int c = n % kColCopies * kLanes;
        cp_async_16_if(wanted, to + n / kColCopies * kRowStep * Layout::kRowBytes + c * 16, from + c * 8);
        if (n % kColCopies == kColCopies - 1) from += step;
    }
};

/// load_tile of aligned tiles without edges that follow one another: each thread keeps
/// where it reads next. kUpwards: tiles are rows of a matrix, each the one above the
/// last, else columns, each the one to the left. `to` of load: the tile in shared memory.
template <int kRows, int kCols, int kThreads, bool kUpwards>
struct StreamCopy {
    using Layout = TileLayout<kCols>;
    static constexpr int kLanes = Layout::kGroupChunks, kRowStep = kThreads / kLanes, kSteps = kRows / kRowStep;
    static_assert(kRows % kRowStep == 0 && kRowStep % 8 == 0 && kCols / 8 == kLanes);
    uint32_t place;
    uint32_t step;
    const char* from;

    /// src: the first row of the first tile.
    __device__ __forceinline__ StreamCopy(const uint16_t* src, int64_t row_stride, int thread)
        : place(Layout::offset(thread / kLanes, thread % kLanes)),
          step(static_cast<uint32_t>(row_stride) * (2 * kRowStep)) {
        const int64_t row = thread / kLanes + (kUpwards ? kRows - kRowStep : 0);
        from = reinterpret_cast<const char*>(src + row * row_stride + thread % kLanes * 8);
    }
    __device__ static bool serves(int64_t row_stride) { return row_stride >= 0 && row_stride < (1 << 24); }
    __device__ __forceinline__ void load(uint32_t to) {
        const char* row = from;
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
            const int r = kUpwards ? kSteps - 1 - n : n;
            cp_async_16(to + place + r * kRowStep * Layout::kRowBytes, row);
            row = kUpwards ? row - step : row + step;
        }
        from = kUpwards ? row : from - 2 * kCols;
    }
};

/// For kernels that load otherwise.
struct NoStream {
    __device__ static bool serves(int64_t) { return false; }
    __device__ void load(uint32_t) const {}
};

/// What `multiply` does besides after each step of k: nothing.
struct NoSideWork {
    __device__ void operator()(int) const {}
};

/// acc[i][j] = A[i] * B[j] (kFresh) or += A[i] * B[j] over kSteps steps of 16 in k.
/// load_a(k, a) fills kMAtoms fragments, one step of k ahead of their use; load_b(k, j, b)
/// the fragments of the n-atoms 2j and 2j + 1, as far ahead as it takes to hide ldmatrix
/// behind mma: one pair feeds 2 * kMAtoms of them. side_work(k) is spread between the steps.
template <DType kType, bool kFresh, int kMAtoms, int kNAtoms, int kSteps, typename LoadA, typename LoadB,
          typename SideWork = NoSideWork>
__device__ __forceinline__ void multiply(float (&acc)[kMAtoms][kNAtoms][4], LoadA load_a, LoadB load_b,
                                         SideWork side_work = {}) {
    static_assert(kNAtoms % 2 == 0);
    constexpr int kPairs = kNAtoms / 2, kTotal = kSteps * kPairs;
    constexpr int kAhead = kMAtoms == 1 ? 4 : kPairs == 1 ? 1 : 2;
    uint32_t a[2][kMAtoms][4];
    uint32_t b[kAhead + 1][4];
    load_a(0, a[0]);
#pragma unroll
    for (int n = 0; n < kAhead && n < kTotal; ++n) load_b(n / kPairs, n % kPairs, b[n]);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        if (k + 1 < kSteps) load_a(k + 1, a[(k + 1) & 1]);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            const int now = k * kPairs + j, next = now + kAhead;
            if (next < kTotal) load_b(next / kPairs, next % kPairs, b[next % (kAhead + 1)]);
            const uint32_t(&pair)[4] = b[now % (kAhead + 1)];
#pragma unroll
            for (int i = 0; i < kMAtoms; ++i) {
                if (kFresh && k == 0) {
                    mma<kType, true>(acc[i][2 * j], a[k & 1][i], pair[0], pair[1]);
                    mma<kType, true>(acc[i][2 * j + 1], a[k & 1][i], pair[2], pair[3]);
                } else {
                    mma<kType, false>(acc[i][2 * j], a[k & 1][i], pair[0], pair[1]);
                    mma<kType, false>(acc[i][2 * j + 1], a[k & 1][i], pair[2], pair[3]);
                }
            }
        }
        side_work(k);
    }
}

/// Operand fetchers for `multiply`; `from` points at the warp's part of the stored tile.
template <int kMAtoms, int kCols>
__device__ __forceinline__ auto a_rows(FragmentAddress<kCols> from) {  // A[m][k] stored m x k: rows_first
    return [from](int k, uint32_t (&a)[kMAtoms][4]) {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i) ldmatrix(a[i], from.at(16 * i, 16 * k));
    };
}

template <int kMAtoms, int kCols>
__device__ __forceinline__ auto a_columns(FragmentAddress<kCols> from) {  // A[m][k] stored k x m: chunks_first
    return [from](int k, uint32_t (&a)[kMAtoms][4]) {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i) ldmatrix_transposed(a[i], from.at(16 * k, 16 * i));
    };
}

template <int kCols>
__device__ __forceinline__ auto b_rows(FragmentAddress<kCols> from) {  // B[k][n] stored n x k: chunks_first
    return [from](int k, int j, uint32_t (&b)[4]) { ldmatrix(b, from.at(16 * j, 16 * k)); };
}

/// B[k][n] stored k x n: rows_first. The pairs of n-atoms lie kStride * 16 columns apart.
template <int kStride, int kCols>
__device__ __forceinline__ auto b_columns(FragmentAddress<kCols> from) {
    return [from](int k, int j, uint32_t (&b)[4]) { ldmatrix_transposed(b, from.at(16 * k, 16 * kStride * j)); };
}

/// A held in registers as packed accumulators: packed[i][j][h] are columns 8j + 2t, 2t + 1 of row g + 8h of atom i.
template <int kMAtoms, int kNAtoms>
__device__ __forceinline__ auto a_registers(const uint32_t (&packed)[kMAtoms][kNAtoms][2]) {
    return [&packed](int k, uint32_t (&a)[kMAtoms][4]) {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i) {
            a[i][0] = packed[i][2 * k][0];
            a[i][1] = packed[i][2 * k][1];
            a[i][2] = packed[i][2 * k + 1][0];
            a[i][3] = packed[i][2 * k + 1][1];
        }
    };
}

/// f(element, i, j, e) for all elements of a warp's tile.
template <int kMAtoms, int kNAtoms, typename F>
__device__ __forceinline__ void for_each(float (&s)[kMAtoms][kNAtoms][4], F f) {
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) f(s[i][j][e], i, j, e);
}

/// f(i, j, h) for the pairs of a warp's tile: elements 2h and 2h + 1
/// of atom (i, j), side by side in a row, one word when packed.
template <int kMAtoms, int kNAtoms, typename F>
__device__ __forceinline__ void for_each_pair(F f) {
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) f(i, j, h);
}

/// Accumulators as the packed A operand of the next product.
template <DType kType, int kMAtoms, int kNAtoms>
__device__ __forceinline__ void pack_fragments(uint32_t (&packed)[kMAtoms][kNAtoms][2],
                                               const float (&s)[kMAtoms][kNAtoms][4]) {
    for_each_pair<kMAtoms, kNAtoms>(
        [&](int i, int j, int h) { packed[i][j][h] = pack<kType>(s[i][j][2 * h], s[i][j][2 * h + 1]); });
}

/// Packed accumulators into a tile of shared memory, whence other
/// warps read them as operands; `to`: FragmentAddress::accumulator.
template <int kCols, int kMAtoms, int kNAtoms>
__device__ __forceinline__ void packed_to_tile(const uint32_t (&packed)[kMAtoms][kNAtoms][2],
                                               FragmentAddress<kCols> to) {
    static_assert(kNAtoms % 2 == 0);
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int j = 0; j < kNAtoms; j += 2) {
            const uint32_t(&left)[2] = packed[i][j], (&right)[2] = packed[i][j + 1];
            if constexpr (kStoresMatrices) {
                stmatrix(to.at(16 * i, 8 * j), {left[0], left[1], right[0], right[1]});
            } else {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    store_shared(to.at_chunk(16 * i + 8 * h, j), left[h]);
                    store_shared(to.at_chunk(16 * i + 8 * h, j + 1), right[h]);
                }
            }
        }
}

template <int kMAtoms, int kNAtoms>
__device__ __forceinline__ void clear(float (&acc)[kMAtoms][kNAtoms][4]) {
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
}

template <int kMAtoms, int kNAtoms>
__device__ __forceinline__ void clear(uint32_t (&packed)[kMAtoms][kNAtoms][2]) {
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int j = 0; j < kNAtoms; ++j) packed[i][j][0] = packed[i][j][1] = 0;
}

}  // namespace strobe::sm80
