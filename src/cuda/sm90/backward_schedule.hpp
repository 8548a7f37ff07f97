// Which (batch, key head, key tile) a CTA works on next, and which query tiles that takes.
//
// Heads are taken in groups whose key tiles fill the machine about once: a *round*. Inside a group the key tile is the slow
// index, the one with most query tiles first. A causal mask's long tiles start early, and as the CTAs of one round finish in the
// opposite order, the next round's long tiles fall to those that had short ones.
//
// That is also what keeps the CTAs of a causal head at the same query tile, so that all but one find q, dout and dq in L2.
// Rounds with an even number walk the query tiles down: their CTAs start together at the last one, and leave one after the
// other at the diagonal. Rounds with an odd number walk up: each CTA joins at its diagonal just when the others pass it.
#pragma once

#include <climits>

#include "core/params.hpp"
#include "cuda/sm90/backward_workspace.hpp"

namespace strobe::sm90 {

enum class WalkOrder {
    rounds,   // as above, for masks
    up,       // first query tile to last in every round
    falling,  // the same, and the last key tile first; but the last group as an even round, which ends with short tiles
};

struct BackwardSchedule {
    int key_tiles = 0;        // of the longest sequence
    int heads = 0;            // batch * num_heads_k
    int heads_per_group = 1;
    int whole_groups = 0;     // the last group has all heads behind these
    int rounds = 1;           // in which a group is worked on: more than one only for a single head
    int round_tiles = 1;      // work tiles of a round
    int work_tiles = 0;       // heads * key_tiles; each part of a shared one counts
    int claim_tiles = 1;      // work tiles claimed at a time: one, or with whole heads all of a head
    bool whole_heads = false; // see takes_whole_heads
    SharedTiles shared;
    WalkOrder order = WalkOrder::rounds;
    const int32_t* sequences = nullptr;  // in the order in which they are worked on; none: as they come

    STROBE_HD int group_of(int index) const {
        const int group = index / (heads_per_group * key_tiles);
        return group < whole_groups ? group : whole_groups;
    }
    STROBE_HD int heads_of_group(int group) const {
        return group < whole_groups ? heads_per_group : heads - group * heads_per_group;
    }
    STROBE_HD int batch_of(int head, const BackwardParams& p) const {
        const int position = head / p.size.num_heads_k;
        return sequences ? sequences[position] : position;
    }
};

/// The queries that see one key: [first, first + span]. Tested with one unsigned comparison.
struct VisibleQueries {
    int first = INT_MAX;
    uint32_t span = 0;

    STROBE_HD bool contains(int query) const { return static_cast<uint32_t>(query - first) <= span; }
};

/// BandMask in 32 bits, seen from the keys: query i sees key j iff j - above <= i <= j + below and j < seqlen_k.
struct TileMask {
    static constexpr int kFar = 1 << 30;
    int above = kFar;
    int below = kFar;
    int seqlen_k = 0;

    STROBE_HD static TileMask of(const BandMask& mask) {
        const auto clamp = [](int64_t x) { return static_cast<int>(x < -kFar ? -kFar : x > kFar ? kFar : x); };
        return {mask.right < 0 ? kFar : clamp(mask.diagonal + mask.right),
                mask.left < 0 ? kFar : clamp(mask.left - mask.diagonal), static_cast<int>(mask.seqlen_k)};
    }
    STROBE_HD VisibleQueries of_key(int key) const {
        const int64_t span = static_cast<int64_t>(above) + below;
        if (key >= seqlen_k || span < 0) return {};
        return {key - above, static_cast<uint32_t>(span)};
    }
    /// The first and the last key that a query sees.
    STROBE_HD int first_key(int query) const { return query - below > 0 ? query - below : 0; }
    STROBE_HD int last_key(int query) const { return query + above < seqlen_k ? query + above : seqlen_k - 1; }

    STROBE_HD bool all_visible(int query0, int queries, int key0, int keys) const {
        return query0 >= key0 + keys - 1 - above && query0 + queries - 1 <= key0 + below && key0 + keys <= seqlen_k;
    }
};

/// One work tile: a key tile of one key head, against query tiles [m_begin, m_end) of every query head of the group.
struct BackwardTile {
    int batch = -1;  // -1: no more work
    int head_k = 0;
    int head = 0;    // in the order of work
    int n_block = 0;
    int m_begin = 0;
    int m_end = 0;
    bool down = false;  // from m_end - 1 to m_begin
    bool falling = false;  // key tiles of this head were claimed last to first
    int shared = -1;       // number of the shared tile that this is a part of
    int part = 0;
    TileMask mask;
};

template <Variant V>
STROBE_HD TileMask tile_mask(const BackwardParams& p, const Sequence& seq) {
    if constexpr (V.mask == MaskClass::band) return TileMask::of(seq.mask(p.mask));
    TileMask mask;
    mask.seqlen_k = static_cast<int>(seq.seqlen_k);
    return mask;
}

/// Deterministic mode: a key tile waits at each query tile for those that were claimed before it, never for later ones, which
/// might not be running. It should find them gone by.
///
/// Without a mask all begin at query tile 0, each one hand-over behind the other, once for the whole launch. With a mask the last
/// key tile is claimed first: on the way up from their diagonals two neighbours pass a query tile one after the other all by
/// themselves. That spreads a head's CTAs over all of its queries; a group of query heads that L2 cannot hold stays in rounds.
inline WalkOrder deterministic_order(const BackwardParams& p) {
    return p.size.num_heads <= 2 * p.size.num_heads_k ? WalkOrder::falling : WalkOrder::rounds;
}

inline BackwardSchedule backward_schedule(const Variant& v, const BackwardParams& p) {
    const int machine = machine_tiles(v);
    BackwardSchedule s;
    s.key_tiles = static_cast<int>(ceil_div(p.size.seqlen_k, v.block_n));
    s.heads = p.size.batch * p.size.num_heads_k;
    s.work_tiles = s.heads * s.key_tiles;
    s.whole_heads = takes_whole_heads(v, p);
    if (s.work_tiles == 0) return s;
    if (s.whole_heads) {
        s.claim_tiles = s.round_tiles = s.key_tiles;
        s.whole_groups = s.heads;
        s.order = WalkOrder::up;
        return s;
    }
    const int heads = (machine + s.key_tiles / 2) / s.key_tiles;
    s.heads_per_group = heads < 1 ? 1 : heads > s.heads ? s.heads : heads;
    const int rounds = (s.key_tiles + machine / 2) / machine;
    s.rounds = rounds < 1 ? 1 : rounds;
    s.round_tiles = static_cast<int>(ceil_div(s.heads_per_group * s.key_tiles, s.rounds));
    s.order = v.mask == MaskClass::full ? WalkOrder::up : p.deterministic ? deterministic_order(p) : WalkOrder::rounds;
    // Short causal sequences: few lengths of work tiles to end the launch with. Two groups at once leave shorter ones for the end.
    const int last = s.order == WalkOrder::rounds && s.key_tiles >= 4 && s.key_tiles <= 8 ? 2 : 1;
    const int groups = static_cast<int>(ceil_div(s.heads, s.heads_per_group));
    s.whole_groups = groups > last ? groups - last : 0;
    s.shared = shared_tiles(v, p);
    s.work_tiles += s.shared.tiles * (s.shared.parts - 1);
    return s;
}

/// Key heads at either end whose rows the kernels around the main kernel do, when it does the others itself: as many as are
/// worked on or about to be.
inline int outer_heads(const BackwardSchedule& s) { return 2 * s.heads_per_group; }

/// Whether the main kernel has time for the rows: from that many keys for each query row on (measured; below, it waits for them).
inline bool inner_rows_pay(const Variant& v, const BackwardParams& p) {
    constexpr int64_t kKeys = 2048;
    if (p.size.seqlen_q < kKeys || p.size.seqlen_k < kKeys) return false;
    if (v.mask == MaskClass::full) return true;
    const bool window = p.mask.window_left >= 0 && p.mask.window_right >= 0;
    return !window || p.mask.window_left + p.mask.window_right >= 1023;
}

/// Whether dq is added by the copy engine where it can be: not to short sequences by the rows for long ones (measured), and not in
/// deterministic mode, where nobody could tell when it is done without waiting for it.
inline bool bulk_add_pays(const Variant& v, const BackwardParams& p) {
    return !p.deterministic && (v.keys == Keys::few || p.size.seqlen_q >= 2048);
}

/// Whether sequences may be so different that it pays to begin with the longest.
inline bool longest_first(const Variant& v, const BackwardParams& p) {
    return p.seqlens.cu_seqlens_q && p.size.batch > 1 && p.size.seqlen_q >= 8 * v.block_n;
}

/// False when the sequence has no such key tile.
template <Variant V>
STROBE_HD bool decode_tile(const BackwardParams& p, const BackwardSchedule& s, int index, BackwardTile& tile) {
    const int first_shared = s.work_tiles - s.shared.tiles * s.shared.parts;
    if (index >= first_shared) {
        tile.shared = (index - first_shared) / s.shared.parts;
        tile.part = index - first_shared - tile.shared * s.shared.parts;
        index = first_shared + tile.shared;
    }
    const int group = s.group_of(index);
    const int rest = index - group * s.heads_per_group * s.key_tiles;
    const bool last_group = group == s.whole_groups;
    const int group_heads = s.heads_of_group(group);
    const int rank = rest / group_heads;
    const int head = group * s.heads_per_group + rest - rank * group_heads;
    tile.falling = s.order == WalkOrder::falling && !last_group;
    tile.n_block = tile.falling ? s.key_tiles - 1 - rank : rank;
    tile.down = s.order == WalkOrder::rounds ? (group * s.rounds + rest / s.round_tiles) % 2 == 0
                                             : s.order == WalkOrder::falling && last_group;
    tile.batch = s.batch_of(head, p);
    tile.head_k = head % static_cast<int>(p.size.num_heads_k);
    tile.head = head;

    const Sequence seq = sequence_of(p, tile.batch);
    const int64_t key0 = static_cast<int64_t>(tile.n_block) * V.block_n;
    if (key0 >= seq.rows_k) return false;
    IndexRange rows{0, key0 < seq.seqlen_k ? seq.seqlen_q : 0};
    if constexpr (V.mask == MaskClass::band) rows = seq.mask(p.mask).query_range(key0, key0 + V.block_n);
    tile.mask = tile_mask<V>(p, seq);
    tile.m_begin = rows.empty() ? 0 : static_cast<int>(rows.begin / V.block_m);
    tile.m_end = rows.empty() ? 0 : static_cast<int>(ceil_div(rows.end, V.block_m));
    // What a whole head keeps between its key tiles has room for sequences as long as they were said to be.
    const int most = static_cast<int>(ceil_div(p.size.seqlen_q, V.block_m));
    if (s.whole_heads && tile.m_end > most) tile.m_end = most;
    if (tile.m_begin > tile.m_end) tile.m_begin = tile.m_end;
    if (tile.shared >= 0) {
        const int first = tile.m_begin, count = tile.m_end - first;
        tile.m_begin = first + static_cast<int>(int64_t{count} * tile.part / s.shared.parts);
        tile.m_end = first + static_cast<int>(int64_t{count} * (tile.part + 1) / s.shared.parts);
    }
    return true;
}

/// Whether no key tile adds to query tile m before this one, and none after it, where they come first to last.
struct QueryShare {
    bool first, last;
};
template <Variant V>
STROBE_HD QueryShare query_share(const BackwardTile& tile, int m, int seqlen_q) {
    const int first = m * V.block_m;
    const int end = first + V.block_m < seqlen_q ? first + V.block_m : seqlen_q;
    return {tile.mask.first_key(first) / V.block_n == tile.n_block, tile.mask.last_key(end - 1) / V.block_n == tile.n_block};
}

/// The tile to work on behind `index`: another of the same claim, or the first one of the next.
template <typename Claim>
STROBE_HD int next_tile(const BackwardSchedule& s, int index, Claim claim) {
    return (index + 1) % s.claim_tiles != 0 ? index + 1 : claim() * s.claim_tiles;
}

/// The first index behind one that decode_tile refused which it might not refuse: behind the longest sequence of a group of
/// heads no key tile of the group exists.
template <Variant V>
STROBE_HD int behind_missing(const BackwardParams& p, const BackwardSchedule& s, int index) {
    constexpr int kMostSequences = 4;  // worth looking at
    const int group = s.group_of(index);
    const int first = group * s.heads_per_group;
    const int heads = s.heads_of_group(group);
    const int heads_k = p.size.num_heads_k;
    if (s.order == WalkOrder::falling || heads / heads_k >= kMostSequences) return index + 1;
    int64_t longest = 0;
    for (int head = first; head < first + heads; head += heads_k - head % heads_k) {
        const int64_t rows = sequence_of(p, s.batch_of(head, p)).rows_k;
        if (rows > longest) longest = rows;
    }
    const int rank = (index - first * s.key_tiles) / heads;
    return rank * int64_t{V.block_n} < longest ? index + 1 : (first + heads) * s.key_tiles;
}

/// How many key tiles add to query tile m before this one, in deterministic mode: those claimed earlier.
template <Variant V>
STROBE_HD int query_turn(const BackwardTile& tile, int m, int64_t seqlen_q) {
    const int first = m * V.block_m;
    if (!tile.falling) return tile.n_block - tile.mask.first_key(first) / V.block_n;
    const int end = first + V.block_m < seqlen_q ? first + V.block_m : static_cast<int>(seqlen_q);
    return tile.mask.last_key(end - 1) / V.block_n - tile.n_block;
}

}  // namespace strobe::sm90
