// What happens to a score between the product and the exponential, and the dropout factors after it.
#pragma once

#include "core/params.hpp"
#include "cpu/tile_io.hpp"
#include "cpu/vec_math.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kInfinity = __builtin_inff();

/// A score is `plain` when only the scale stands between q.k and the exponent; then the scale is folded into the
/// exponent, else scores are transformed to their final value first. A scale that is not positive would turn the row
/// maximum into a minimum, so it counts as a transformation.
struct ScoreFunction {
    float scale;
    float softcap;
    float inverse_softcap;
    bool plain;
    float final_scale;  // of a score as it enters the softmax: score * final_scale is the exponent

    explicit STROBE_CPU_INLINE ScoreFunction(const ScoreParams& p)
        : scale(p.softmax_scale),
          softcap(p.softcap),
          inverse_softcap(p.softcap > 0 ? 1.0f / p.softcap : 0.0f),
          plain(!(p.softcap > 0) && !p.alibi_slopes && !p.bias && p.softmax_scale > 0),
          final_scale(plain ? p.softmax_scale : 1.0f) {}

    /// The tanh of the softcap; without one, 0, so that 1 - tanh^2 is the derivative in both cases.
    STROBE_CPU_INLINE Vec cap_tanh(Vec product) const {
        return softcap > 0 ? tanh(product * splat(scale) * splat(inverse_softcap)) : zero();
    }
    STROBE_CPU_INLINE Vec capped(Vec product, Vec cap_tanh) const {
        return softcap > 0 ? cap_tanh * splat(softcap) : product * splat(scale);
    }
};

/// -slope * |distance|
STROBE_CPU_INLINE Vec alibi(Vec slope, IVec distance) {
    return as_float(as_int(to_float(distance)) & 0x7FFFFFFF) * -slope;
}

STROBE_CPU_INLINE int32_t saturate(int64_t x) {
    constexpr int64_t kLimit = 1 << 30;
    return static_cast<int32_t>(lesser(greater(x, -kLimit), kLimit));
}

/// Element (i, j) of the bias of one batch entry and head.
template <class T>
STROBE_CPU_INLINE const T* bias_row(const BiasRef& bias, int64_t batch, int64_t head, int64_t i) {
    return static_cast<const T*>(bias.data) + batch * bias.batch_stride + head * bias.head_stride + i * bias.row_stride;
}

/// The generator of core/philox.hpp, one counter per lane.
struct PhiloxLanes {
    UVec word[4];
};

STROBE_CPU_INLINE PhiloxLanes philox_lanes(const Dropout& dropout, UVec batch_head, UVec row, UVec column) {
    const uint64_t key = dropout.seed + dropout.offset * 0x9E3779B97F4A7C15ull;
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    PhiloxLanes c{{(column >> 4 << 2) | ((column & 7u) >> 1), (row >> 4 << 3) | (row & 7u), batch_head, UVec{}}};
    for (int round = 0; round < kPhiloxRounds; ++round) {
        UVec a_low, a_high, b_low, b_high;
        multiply_wide(c.word[0], 0xD2511F53u, a_low, a_high);
        multiply_wide(c.word[2], 0xCD9E8D57u, b_low, b_high);
        c = {{b_high ^ c.word[1] ^ key0, b_low, a_high ^ c.word[3] ^ key1, a_low}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

/// What element gets multiplied by: 0 where its 16 bits say drop, else the rescale.
STROBE_CPU_INLINE Vec dropout_factor(const Dropout& dropout, const PhiloxLanes& bits, UVec row, UVec column) {
    const IVec row_bit = (row & 8u) != 0u, column_bit = (column & 8u) != 0u, odd = (column & 1u) != 0u;
    const UVec word = select(row_bit, select(column_bit, bits.word[3], bits.word[2]),
                             select(column_bit, bits.word[1], bits.word[0]));
    const UVec rank = (0xFC00u - select(odd, word >> 16, word)) & 0xFFFFu;  // Dropout::rank
    return select(reinterpret_cast<IVec>(rank) < static_cast<int32_t>(dropout.drop_below), zero(),
                  splat(dropout.rescale));
}

STROBE_CPU_INLINE UVec load_words(const uint32_t* p) {
    return reinterpret_cast<UVec>(load(reinterpret_cast<const int32_t*>(p)));
}

/// Lanes are queries: out[t * kPanel + lane] for columns column0 + t, t in [0, count). One Philox call per lane serves
/// four columns of an aligned block of 16.
inline void dropout_factors_by_query(const Dropout& dropout, const uint32_t* batch_head, const uint32_t* row,
                                     uint32_t column0, int64_t count, float* out) {
    const uint32_t lead = column0 & 15u;
    for (int lane = 0; lane < kPanel; lane += kWidth) {
        const UVec rows = load_words(row + lane), heads = load_words(batch_head + lane);
        for (int64_t block = 0; block < count + lead; block += 16) {
            for (uint32_t pair = 0; pair < 8; pair += 2) {
                const uint32_t base = column0 - lead + static_cast<uint32_t>(block) + pair;
                const PhiloxLanes bits = philox_lanes(dropout, heads, rows, splat(base));
                constexpr uint32_t kColumns[] = {0, 1, 8, 9};
                for (const uint32_t in_group : kColumns) {
                    const int64_t t = block + pair + in_group - lead;
                    if (t < 0 || t >= count) continue;
                    store(out + t * kPanel + lane, dropout_factor(dropout, bits, rows, splat(base + in_group)));
                }
            }
        }
    }
}

/// Lanes are keys, in columns column0 + lane: out[t * kPanel + lane] for rows row0 + t. One Philox call serves two rows.
inline void dropout_factors_by_key(const Dropout& dropout, uint32_t batch_head, uint32_t row0, int64_t count,
                                   uint32_t column0, float* out) {
    const uint32_t lead = row0 & 15u;
    uint32_t columns[kPanel];
    for (int lane = 0; lane < kPanel; ++lane) columns[lane] = column0 + static_cast<uint32_t>(lane);
    for (int lane = 0; lane < kPanel; lane += kWidth) {
        const UVec column = load_words(columns + lane);
        for (int64_t block = 0; block < count + lead; block += 16) {
            for (uint32_t r = 0; r < 8; ++r) {
                const uint32_t base = row0 - lead + static_cast<uint32_t>(block) + r;
                const PhiloxLanes bits = philox_lanes(dropout, splat(batch_head), splat(base), column);
                for (uint32_t in_group = 0; in_group <= 8; in_group += 8) {
                    const int64_t t = block + r + in_group - lead;
                    if (t < 0 || t >= count) continue;
                    store(out + t * kPanel + lane, dropout_factor(dropout, bits, splat(base + in_group), column));
                }
            }
        }
    }
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
