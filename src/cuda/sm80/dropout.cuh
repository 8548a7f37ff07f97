// Dropout on the accumulator fragments of one warp: a mask of 16 bits an element,
// arranged as the packed probabilities are, so that one AND drops two elements. The masks
// depend on positions alone and are made under the matrix product that makes the scores.
#pragma once

#include "core/variant.hpp"
#include "cuda/sm80/score.cuh"

namespace strobe::sm80 {

/// What decides which of two elements stay: 0xffff in the halves of `kept(bits)` whose rank is not below drop_below.
struct HalvesKept {  // drop_below <= Dropout::kHalfRanks: Dropout::rank says why
    uint32_t limits;

    __device__ explicit HalvesKept(uint32_t drop_below) : limits((0xFC00u - drop_below) * 0x10001u) {}
    __device__ uint32_t operator()(uint32_t bits) const {
        uint32_t mask;
        asm("set.geu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(bits), "r"(limits));
        return mask;
    }
};
struct AnyHalvesKept {
    uint32_t drop_below;

    __device__ explicit AnyHalvesKept(uint32_t drop_below) : drop_below(drop_below) {}
    __device__ uint32_t operator()(uint32_t bits) const {
        const uint32_t low = Dropout::rank(bits & 0xffffu) < drop_below ? 0u : 0xffffu;
        return low | (Dropout::rank(bits >> 16) < drop_below ? 0u : 0xffff0000u);
    }
};

/// x where the low (high) half of a mask is set, else 0.
template <bool kHigh>
__device__ __forceinline__ float kept_or_zero(float x, uint32_t mask) {
    uint32_t wide;
    if constexpr (kHigh) {
        asm("prmt.b32 %0, %1, 0, 0xbbbb;" : "=r"(wide) : "r"(mask));
    } else {
        asm("prmt.b32 %0, %1, 0, 0x9999;" : "=r"(wide) : "r"(mask));
    }
    return __uint_as_float(__float_as_uint(x) & wide);
}

/// kept[i][j][h]: elements 2h and 2h + 1 of atom (i, j).
template <int kMAtoms, int kNAtoms>
struct DropoutMask {
    uint32_t kept[kMAtoms][kNAtoms][2];

    __device__ __forceinline__ void apply(uint32_t (&packed)[kMAtoms][kNAtoms][2]) const {
        for_each_pair<kMAtoms, kNAtoms>([&](int i, int j, int h) { packed[i][j][h] &= kept[i][j][h]; });
    }
    __device__ __forceinline__ void apply(float (&x)[kMAtoms][kNAtoms][4]) const {
        for_each_pair<kMAtoms, kNAtoms>([&](int i, int j, int h) {
            x[i][j][2 * h] = kept_or_zero<false>(x[i][j][2 * h], kept[i][j][h]);
            x[i][j][2 * h + 1] = kept_or_zero<true>(x[i][j][2 * h + 1], kept[i][j][h]);
        });
    }
};

/// Makes the masks of a warp's tiles. Bits are addressed by position: on one axis with other blocks when the caller
/// placed them (MaskParams::has_positions), else from the sequence's start.
template <bool kTransposed>
struct DropoutBits {
    using Origin = FragmentOrigin<kTransposed>;
    const Dropout& dropout;
    uint32_t batch_head;
    uint32_t query0, key0;

    __device__ DropoutBits(const AttentionParams& p, uint32_t batch_head, const FragmentOrigin<kTransposed>& origin)
        : dropout(p.dropout),
          batch_head(batch_head),
          query0(origin.query + (p.mask.has_positions ? static_cast<uint32_t>(p.mask.q_position) : 0u)),
          key0(origin.key + (p.mask.has_positions ? static_cast<uint32_t>(p.mask.k_position) : 0u)) {}

    /// Atoms (i, j) and (i, j + 1), j even, of a tile on multiples of 16 (select.cpp sends others to rows that ask
    /// make_anywhere). One Philox call gives eight neighbours' bits. A thread of an untransposed tile holds all eight
    /// of a group. In a transposed tile two threads, four lanes apart, hold half of the same two groups: each makes one
    /// of them and sends the other's half.
    template <typename Kept, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void make(DropoutMask<kMAtoms, kNAtoms>& mask, int i, int j) const {
        const Kept kept(dropout.drop_below);
        if constexpr (!kTransposed) {
            const Philox4x32 bits = own_group(i, j);
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                mask.kept[i][j + (word & 1)][word >> 1] = kept(bits.word[word]);
            }
        } else {
            const uint32_t odd = key0 & 1u;  // also the half of every word that is this thread's
            const Philox4x32 made = dropout.group_at(batch_head, Dropout::row_group(query0 + odd) + 4 * j,
                                                     Dropout::col_group(key0) + 4 * i);
            const uint32_t own = odd ? 0x7632u : 0x5410u, others = odd ? 0x5410u : 0x7632u;
            // The even query's bits low.
            const uint32_t first = odd ? 0x1054u : 0x5410u, second = odd ? 0x3276u : 0x7632u;
#pragma unroll
            for (int col_high = 0; col_high < 2; ++col_high) {
                const uint32_t low = made.word[2 * col_high], high = made.word[2 * col_high + 1];
                const uint32_t mine = __byte_perm(low, high, own);
                const uint32_t theirs = __shfl_xor_sync(0xffffffffu, __byte_perm(low, high, others), 4);
                mask.kept[i][j + col_high][0] = kept(__byte_perm(mine, theirs, first));
                mask.kept[i][j + col_high][1] = kept(__byte_perm(mine, theirs, second));
            }
        }
    }

    /// What stays of packed probabilities as the A operand of their product with V (a_registers). The bits of a step of
    /// k are made while the step before is multiplied, and no mask is held.
    template <int kMAtoms, int kNAtoms>
    __device__ __forceinline__ auto a_kept(const uint32_t (&packed)[kMAtoms][kNAtoms][2]) const {
        static_assert(!kTransposed);
        return [this, &packed](int k, uint32_t (&a)[kMAtoms][4]) {
            const HalvesKept kept(dropout.drop_below);
#pragma unroll
            for (int i = 0; i < kMAtoms; ++i) {
                const Philox4x32 bits = own_group(i, 2 * k);
                a[i][0] = packed[i][2 * k][0] & kept(bits.word[0]);
                a[i][1] = packed[i][2 * k][1] & kept(bits.word[2]);
                a[i][2] = packed[i][2 * k + 1][0] & kept(bits.word[1]);
                a[i][3] = packed[i][2 * k + 1][1] & kept(bits.word[3]);
            }
        };
    }

    /// Part n of kParts of the whole tile.
    template <int kParts, typename Kept = HalvesKept, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void make_part(DropoutMask<kMAtoms, kNAtoms>& mask, int n) const {
        constexpr int kPairs = kNAtoms / 2, kCalls = kMAtoms * kPairs;
#pragma unroll
        for (int call = 0; call < kCalls; ++call) {
            if (call * kParts / kCalls == n) make<Kept>(mask, call / kPairs, call % kPairs * 2);
        }
    }

    /// The whole tile, wherever it lies.
    template <int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void make_anywhere(DropoutMask<kMAtoms, kNAtoms>& mask, const MaskParams& place) const {
        if (!(place.has_positions && ((place.q_position | place.k_position) & 15) != 0)) {
            make_part<1, AnyHalvesKept>(mask, 0);
            return;
        }
        // The tile straddles the groups of eight: one Philox call for every element.
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int j = 0; j < kNAtoms; ++j) {
                uint32_t kept = 0;
#pragma unroll 1
                for (int e = 0; e < 4; ++e) {
                    const bool keep = dropout.keep(batch_head, query0 + Origin::query_step(i, j, e),
                                                   key0 + Origin::key_step(i, j, e));
                    kept |= static_cast<uint32_t>(keep) << e;
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    mask.kept[i][j][h] = (kept >> 2 * h & 1u ? 0xffffu : 0u) | (kept >> 2 * h & 2u ? 0xffff0000u : 0u);
                }
            }
    }

private:
    /// The bits of atoms (i, j) and (i, j + 1), j even, of an untransposed tile.
    __device__ __forceinline__ Philox4x32 own_group(int i, int j) const {
        return dropout.group_at(batch_head, Dropout::row_group(query0) + 8 * i, Dropout::col_group(key0) + 2 * j);
    }
};

/// DropoutBits of the forward in two parts: what depends on columns alone, two and a half of the seven rounds of
/// Philox, is made once for all rows of the CTA and lies in shared memory, for kStages tiles of kN columns.
template <int kMAtoms, int kN, int kStages>
struct DropoutColumns {
    // philox4x32's.
    static constexpr uint32_t kFirst = 0xD2511F53u, kSecond = 0xCD9E8D57u, kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;
    static constexpr int kRoundsAhead = 3;
    const Dropout& dropout;
    uint32_t smem, batch_head, key_place;
    uint32_t row_mix[kMAtoms], row_low[kMAtoms];

    /// smem: kStages * kN * 4 bytes of shared memory. query: of this thread's first row.
    __device__ DropoutColumns(const AttentionParams& p, uint32_t smem, uint32_t batch_head, int query)
        : dropout(p.dropout),
          smem(smem),
          batch_head(batch_head),
          key_place(p.mask.has_positions ? static_cast<uint32_t>(p.mask.k_position) : 0u) {
        const uint32_t row = query + (p.mask.has_positions ? static_cast<uint32_t>(p.mask.q_position) : 0u);
        const uint32_t high = static_cast<uint32_t>(wide_product(kSecond, batch_head) >> 32) ^ key0();
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i) {
            const uint64_t a = wide_product(kFirst, high ^ (Dropout::row_group(row) + 8 * i));
            row_mix[i] = static_cast<uint32_t>(a >> 32) ^ (key1() + kStep1);
            row_low[i] = static_cast<uint32_t>(a);
        }
    }

    /// The columns of the tile whose first key is `key`, by the first kN / 4 threads.
    __device__ __forceinline__ void make(int key, int stage, int thread) const {
        if (thread >= kN / 4) return;
        const uint64_t first = wide_product(kFirst, Dropout::col_group(key + key_place) + thread);
        const uint64_t second = wide_product(kSecond, static_cast<uint32_t>(first >> 32) ^ key1());
        const uint32_t low = kSecond * batch_head;
        const uint64_t third = wide_product(kFirst, static_cast<uint32_t>(second >> 32) ^ low ^ (key0() + kStep0));
        store_shared(groups(stage) + thread * 16,
                     uint4{static_cast<uint32_t>(first), static_cast<uint32_t>(second) ^ (key0() + 2 * kStep0),
                           static_cast<uint32_t>(third >> 32) ^ (key1() + 2 * kStep1), static_cast<uint32_t>(third)});
    }

    /// keep(k)(i)(n, pair): what stays of word n of fragment i of step k of the A operand.
    __device__ __forceinline__ auto keep(int stage, int lane) const {
        const uint32_t own = groups(stage) + lane % 4 * 16;
        return [this, own](int k) {
            const uint4 column = load_shared_16(own + k * 64);
            return [this, column](int i) {
                const Philox4x32 bits = group(i, column);
                return [bits, kept = HalvesKept(dropout.drop_below)](int n, uint32_t pair) {
                    return pair & kept(bits.word[2 * (n & 1) + n / 2]);
                };
            };
        };
    }

private:
    __device__ uint32_t groups(int stage) const { return smem + stage * kN * 4; }
    __device__ uint64_t key() const { return dropout.seed + dropout.offset * 0x9E3779B97F4A7C15ull; }
    __device__ uint32_t key0() const { return static_cast<uint32_t>(key()); }
    __device__ uint32_t key1() const { return static_cast<uint32_t>(key() >> 32); }

    __device__ __forceinline__ Philox4x32 group(int i, const uint4& column) const {
        const uint64_t b = wide_product(kSecond, row_mix[i] ^ column.x);
        return philox4x32<kPhiloxRounds - kRoundsAhead>(
            {{static_cast<uint32_t>(b >> 32) ^ column.y, static_cast<uint32_t>(b), column.z ^ row_low[i], column.w}},
            key0() + kRoundsAhead * kStep0, key1() + kRoundsAhead * kStep1);
    }
};

}  // namespace strobe::sm80
