// Tensors as operands of the products: 32-bit words, of which each is one fp32 number, or (where the instruction set
// multiplies bfloat16 pairs) two bfloat16 numbers that are neighbours along the summed index.
#pragma once

#include "cpu/micro_kernel.hpp"
#include "cpu/tile_io.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

template <class T>
inline constexpr bool kPairsOf = kHasPairs && __is_same(T, BFloat16);

/// Numbers in a word, and words for a count of numbers.
template <class T>
inline constexpr int64_t kPerWord = kPairsOf<T> ? 2 : 1;

template <class T>
STROBE_CPU_INLINE int64_t words(int64_t count) {
    return (count + kPerWord<T> - 1) / kPerWord<T>;
}

/// Words, `stride` apart, where the products can read them.
struct Rows {
    const float* data = nullptr;
    int64_t stride = 0;
};

/// One number out of a word that holds it as item `index` % kPerWord.
template <class T>
STROBE_CPU_INLINE float item(const float* word, int64_t index) {
    if constexpr (kPairsOf<T>) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, *word);
        return __builtin_bit_cast(float, index % 2 ? bits & 0xFFFF0000u : bits << 16);
    } else {
        return *word;
    }
}

/// The words of a row that is summed along, zero up to `padded` words.
template <class T>
STROBE_CPU_INLINE void read_words(const T* src, int64_t count, float* dst, int64_t padded) {
    if constexpr (kPairsOf<T>) {
        __builtin_memcpy(dst, src, static_cast<size_t>(count) * sizeof(T));
        if (count % 2) reinterpret_cast<BFloat16*>(dst)[count] = {};
        for (int64_t w = words<T>(count); w < padded; ++w) dst[w] = 0.0f;
    } else {
        read_row(src, count, dst, padded);
    }
}

/// Rows that are summed along. The caller's own memory serves when it consists of words and is not too thin, which would
/// waste most of each page.
template <class T>
STROBE_CPU_INLINE Rows read_rows(const T* src, int64_t src_stride, int64_t rows, int64_t columns, float* scratch) {
    if constexpr (__is_same(T, float) || kPairsOf<T>) {
        const bool whole = columns % kPerWord<T> == 0 && src_stride % kPerWord<T> == 0 &&
                           reinterpret_cast<uintptr_t>(src) % sizeof(float) == 0;
        if (whole && src_stride >= columns && src_stride < 2 * columns) {
            return {reinterpret_cast<const float*>(src), src_stride / kPerWord<T>};
        }
    }
    const int64_t stride = words<T>(columns);
    for (int64_t r = 0; r < rows; ++r) read_words(src + r * src_stride, columns, scratch + r * stride, stride);
    return {scratch, stride};
}

/// One row of words of a matrix that is summed down: row r, or rows 2r and 2r + 1 paired element by element.
template <class T>
STROBE_CPU_INLINE void read_down(const T* src, int64_t src_stride, int64_t rows, int64_t r, int64_t columns, float* dst,
                                 int64_t padded) {
    if constexpr (kPairsOf<T>) {
        const T* const low = src + 2 * r * src_stride;
        const T* const high = 2 * r + 1 < rows ? low + src_stride : nullptr;
        int64_t c = 0;
        for (; c + kWidth <= columns; c += kWidth) {
            const UVec l = reinterpret_cast<UVec>(load_as_float(low + c)) >> 16;
            const UVec h = high ? reinterpret_cast<UVec>(load_as_float(high + c)) : UVec{};
            store(dst + c, reinterpret_cast<Vec>(l | h));
        }
        for (; c < columns; ++c) {
            const uint32_t word = low[c].bits | (high ? static_cast<uint32_t>(high[c].bits) << 16 : 0u);
            dst[c] = __builtin_bit_cast(float, word);
        }
        for (; c < padded; ++c) dst[c] = 0.0f;
    } else {
        read_row(src + r * src_stride, columns, dst, padded);
    }
}

/// All rows of a matrix that is summed down, read in vectors.
template <class T>
STROBE_CPU_INLINE Rows read_rows_down(const T* src, int64_t src_stride, int64_t rows, int64_t columns, int64_t dst_stride,
                                      float* scratch) {
    const int64_t padded = round_up(columns, kWidth);
    for (int64_t r = 0; r < words<T>(rows); ++r) read_down(src, src_stride, rows, r, columns, scratch + r * dst_stride, padded);
    return {scratch, dst_stride};
}

inline constexpr int64_t kMaxHeadDim = 512;

/// A matrix that is summed down, packed for Layout::packed: for each register block of columns, all rows of it behind
/// one another, so that a product reads it as one stream. Words of dst past the last one are left alone.
template <class T>
inline void pack_column_blocks(const T* src, int64_t src_stride, int64_t rows, int64_t columns, float* dst) {
    // A block's row is copied in whole vectors, which run over into the rows that follow and are written later: not so
    // in the last rows, nor where that would read past the end of the source.
    constexpr int64_t kSpan = (kBlockRows + kWidth - 1) / kWidth * kWidth;
    alignas(64) float buffer[kMaxHeadDim];
    const EvenBlocks blocks(columns);
    const int64_t pitch = words<T>(rows), small = blocks.small, large = small + 1;
    const int64_t whole_blocks = columns < kSpan ? 0 : lesser(blocks.count, (columns - kSpan) / large + 1);
    const int64_t whole_rows = small ? pitch - (kSpan + small - 1) / small + 1 : 0;
    for (int64_t r = 0; r < pitch; ++r) {
        const float* row = buffer;
        if constexpr (__is_same(T, float)) {
            row = src + r * src_stride;
        } else {
            read_down(src, src_stride, rows, r, columns, buffer, columns);
        }
        int64_t block = 0;
        float* out = dst;
        const auto copy_blocks = [&](int64_t size, int64_t end) __attribute__((always_inline)) {
            for (; block < end; ++block, row += size, out += size * pitch) {
                for (int64_t x = 0; x < kSpan; x += kWidth) store(out + r * size + x, load(row + x));
            }
        };
        if (r < whole_rows) {
            copy_blocks(large, lesser(blocks.num_large, whole_blocks));
            copy_blocks(small, block < blocks.num_large ? 0 : whole_blocks);
        }
        for (; block < blocks.count; ++block) {
            const int64_t size = blocks.size(block);
            for (int64_t x = 0; x < size; ++x) out[r * size + x] = row[x];
            row += size;
            out += size * pitch;
        }
    }
}

/// Columns that one pass of a transposing copy takes through its stack buffer.
inline constexpr int64_t kTransposeColumns = 64;

/// A panel: dst[c * kPanel + lane] = word c of lane_row[lane], zero where the lane has no row. `widen`: fp32 numbers
/// whatever the type, as for the bias.
template <class T, bool kWiden = false>
inline void pack_panel(const T* const* lane_row, int64_t columns, float* dst) {
    constexpr int64_t kNumbers = kWiden ? 1 : kPerWord<T>;
    alignas(64) float stage[8 * kTransposeColumns];
    const int64_t total = (columns + kNumbers - 1) / kNumbers;
    for (int lane = 0; lane < kPanel; lane += 8) {
        for (int64_t c0 = 0; c0 < total; c0 += kTransposeColumns) {
            const int64_t count = lesser<int64_t>(total - c0, kTransposeColumns);
            const int64_t numbers = lesser(columns - c0 * kNumbers, count * kNumbers);
            const int64_t padded = round_up(count, 8);
            for (int r = 0; r < 8; ++r) {
                const T* const src = lane_row[lane + r];
                float* const out = stage + r * kTransposeColumns;
                if (!src) {
                    for (int64_t c = 0; c < padded; ++c) out[c] = 0.0f;
                } else if constexpr (kWiden) {
                    read_row(src + c0, count, out, padded);
                } else {
                    read_words(src + c0 * kNumbers, numbers, out, padded);
                }
            }
            int64_t c = 0;
            for (; c + 8 <= count; c += 8) {
                transpose_8x8(stage + c, kTransposeColumns, dst + (c0 + c) * kPanel + lane, kPanel);
            }
            for (; c < count; ++c) {
                for (int r = 0; r < 8; ++r) dst[(c0 + c) * kPanel + lane + r] = stage[r * kTransposeColumns + c];
            }
        }
    }
}

/// The inverse for fp32 panels: lane_row[lane][c] = panel[c * kPanel + lane], for lanes that have a row.
template <class T>
inline void unpack_panel(const float* panel, int64_t columns, T* const* lane_row) {
    alignas(64) float stage[8 * kTransposeColumns];
    for (int lane = 0; lane < kPanel; lane += 8) {
        for (int64_t c0 = 0; c0 < columns; c0 += kTransposeColumns) {
            const int64_t count = lesser<int64_t>(columns - c0, kTransposeColumns);
            int64_t c = 0;
            for (; c + 8 <= count; c += 8) {
                transpose_8x8(panel + (c0 + c) * kPanel + lane, kPanel, stage + c, kTransposeColumns);
            }
            for (; c < count; ++c) {
                for (int r = 0; r < 8; ++r) stage[r * kTransposeColumns + c] = panel[(c0 + c) * kPanel + lane + r];
            }
            for (int r = 0; r < 8; ++r) {
                if (lane_row[lane + r]) {
                    write_row(stage + r * kTransposeColumns, 1.0f, count, lane_row[lane + r] + c0, false);
                }
            }
        }
    }
}

/// False when some number is NaN or infinite, so that 0 times it is not 0.
template <class T>
STROBE_CPU_INLINE bool all_finite(const float* words, int64_t count) {
    constexpr uint32_t kExponent = 0x7F800000u;
    IVec bad{};
    bool tail = false;
    int64_t w = 0;
    for (; w + kWidth <= count; w += kWidth) {
        const UVec bits = reinterpret_cast<UVec>(load(words + w));
        bad |= (bits & kExponent) == kExponent;
        if constexpr (kPairsOf<T>) bad |= ((bits << 16) & kExponent) == kExponent;
    }
    for (; w < count; ++w) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, words[w]);
        tail |= (bits & kExponent) == kExponent;
        if constexpr (kPairsOf<T>) tail |= ((bits << 16) & kExponent) == kExponent;
    }
    return !any(bad) && !tail;
}

template <class T>
STROBE_CPU_INLINE bool all_finite(Rows rows, int64_t count, int64_t columns) {
    for (int64_t r = 0; r < count; ++r) {
        if (!all_finite<T>(rows.data + r * rows.stride, columns)) return false;
    }
    return true;
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
