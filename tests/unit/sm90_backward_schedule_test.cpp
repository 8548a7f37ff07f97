// The host-testable half of the Hopper backward kernel: every key tile is worked on exactly once, against exactly the query
// tiles that see it, with the right mask, the right turn and a place of its own in the workspace.
#include "cuda/sm90/backward_schedule.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "verify/case.hpp"

namespace strobe::sm90 {
namespace {

constexpr Variant kFull{Arch::sm90, Direction::backward, DType::bf16, 128, MaskClass::full, Features::plain, 64, 128, 3, 16};
constexpr Variant kBand{Arch::sm90, Direction::backward, DType::bf16, 128, MaskClass::band, Features::plain, 64, 128, 3, 16};
constexpr Variant kFewKeys{Arch::sm90, Direction::backward, DType::bf16, 128, MaskClass::full, Features::plain, 64, 128, 2, 16, Keys::few};
constexpr Variant kFewKeysBand{Arch::sm90, Direction::backward, DType::bf16, 128, MaskClass::band, Features::plain, 64, 128, 2, 16, Keys::few};

constexpr Variant kPair{Arch::sm90, Direction::backward, DType::bf16, 256, MaskClass::full, Features::plain, 64, 128, 2, 16};

struct Problem {
    BackwardParams params;
    std::vector<int32_t> cu_q, cu_k, used_q, used_k;

    explicit Problem(std::mt19937& rng, bool band) {
        const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
        ProblemSize& n = params.size;
        n.num_heads_k = pick(1, 3);
        n.num_heads = n.num_heads_k * pick(1, 3);
        n.batch = pick(0, 4) ? pick(1, 4) : pick(0, 1) ? 80 : 264;  // several groups of heads, or enough to take them whole
        n.head_dim = n.head_dim_v = 128;
        params.deterministic = pick(0, 1);
        if (band) {
            params.mask.window_left = pick(0, 1) ? -1 : pick(0, 300);
            params.mask.window_right = params.mask.window_left < 0 || pick(0, 1) ? pick(0, 200) : -1;
            if (pick(0, 3) == 0) {
                params.mask.has_positions = true;
                params.mask.q_position = pick(0, 500);
                params.mask.k_position = pick(0, 500);
            }
        }
        const bool varlen = pick(0, 1);
        n.seqlen_q = pick(1, 500), n.seqlen_k = pick(1, pick(0, 1) ? 250 : 500);
        n.total_q = n.batch * n.seqlen_q, n.total_k = n.batch * n.seqlen_k;
        if (varlen) {
            cu_q = {0}, cu_k = {0};
            for (int b = 0; b < n.batch; ++b) {
                cu_q.push_back(cu_q.back() + (pick(0, 4) ? pick(0, static_cast<int>(n.seqlen_q)) : 0));
                cu_k.push_back(cu_k.back() + (pick(0, 4) ? pick(0, static_cast<int>(n.seqlen_k)) : 0));
            }
            params.seqlens.cu_seqlens_q = cu_q.data(), params.seqlens.cu_seqlens_k = cu_k.data();
            n.total_q = cu_q.back(), n.total_k = cu_k.back();
        }
        if (pick(0, 1)) {
            for (int b = 0; b < n.batch; ++b) {
                const Sequence seq = sequence_of(params, b);
                used_q.push_back(pick(0, static_cast<int>(seq.rows_q)));
                used_k.push_back(pick(0, static_cast<int>(seq.rows_k)));
            }
            params.seqlens.seqused_q = used_q.data(), params.seqlens.seqused_k = used_k.data();
        }
    }
};

/// Whether some, and whether all, of the existing queries of tile m see keys [key0, key0 + keys).
std::pair<bool, bool> visibility(const BandMask& mask, int m, int64_t key0, int keys, int block_m) {
    bool some = false, all = true;
    for (int64_t i = int64_t{m} * block_m; i < std::min<int64_t>((m + 1) * block_m, mask.seqlen_q); ++i) {
        for (int64_t j = key0; j < key0 + keys; ++j) (mask.visible(i, j) ? some : all) = mask.visible(i, j);
    }
    return {some, all};
}

template <Variant V>
void check(std::mt19937& rng) {
    const Problem problem(rng, V.mask == MaskClass::band);
    const BackwardParams& p = problem.params;
    BackwardSchedule schedule = backward_schedule(V, p);
    std::vector<int32_t> sequences(static_cast<size_t>(p.size.batch));
    std::iota(sequences.begin(), sequences.end(), 0);
    std::shuffle(sequences.begin(), sequences.end(), rng);
    if (rng() % 2) schedule.sequences = sequences.data();
    const BackwardWorkspace workspace = backward_workspace(V, p);
    std::set<std::tuple<int, int, int>> seen;
    std::set<std::pair<int, int>> parts, shared_pairs;  // (shared tile, part), (shared tile, query tile)
    std::map<std::tuple<int, int, int>, int> additions;  // to a query tile of one key head, by work tiles claimed so far
    std::map<std::tuple<int, int, int>, bool> complete;  // such a query tile has had the last of its key tiles
    for (int index = 0; index < schedule.work_tiles; ++index) {
        BackwardTile tile;
        if (!decode_tile<V>(p, schedule, index, tile)) {
            const int next = behind_missing<V>(p, schedule, index);
            ASSERT_GT(next, index);
            ASSERT_LE(next, schedule.work_tiles);
            for (; index + 1 < next; ++index) ASSERT_FALSE(decode_tile<V>(p, schedule, index + 1, tile));
            continue;
        }
        ASSERT_EQ(tile.batch * p.size.num_heads_k + tile.head_k,
                  schedule.batch_of(tile.head, p) * p.size.num_heads_k + tile.head % p.size.num_heads_k);
        if (tile.shared < 0) {
            ASSERT_TRUE(seen.insert({tile.batch, tile.head_k, tile.n_block}).second);
        } else {  // its parts follow one another
            ASSERT_TRUE(parts.insert({tile.shared, tile.part}).second);
            ASSERT_LT(tile.shared, schedule.shared.tiles);
            ASSERT_LT(tile.part, schedule.shared.parts);
            seen.insert({tile.batch, tile.head_k, tile.n_block});
        }
        const Sequence seq = sequence_of(p, tile.batch);
        const BandMask mask = seq.mask(p.mask);
        const int64_t key0 = int64_t{tile.n_block} * V.block_n;
        for (int m = 0; m < ceil_div(seq.seqlen_q, V.block_m); ++m) {
            const bool covered = m >= tile.m_begin && m < tile.m_end;
            const bool visible = visibility(mask, m, key0, V.block_n, V.block_m).first;
            if (tile.shared < 0) {
                ASSERT_EQ(covered, visible) << "query tile " << m;
            } else {
                ASSERT_LE(covered, visible) << "query tile " << m;
            }
            if (!covered) continue;
            if (tile.shared >= 0) {
                ASSERT_TRUE(shared_pairs.insert({tile.shared, m}).second);
            }
            const int turn = query_turn<V>(tile, m, seq.seqlen_q);
            // Whoever waits for its turn waits for tiles that were claimed before it: they are running or done.
            if (tile.shared < 0) {
                ASSERT_EQ(turn, (additions[{tile.batch, tile.head_k, m}]++));
            }
            if (schedule.whole_heads) {
                const QueryShare share = query_share<V>(tile, m, static_cast<int>(seq.seqlen_q));
                ASSERT_EQ(share.first, turn == 0);
                ASSERT_EQ(complete.count({tile.batch, tile.head_k, m}), 0u);
                if (share.last) complete[{tile.batch, tile.head_k, m}] = true;
            }
            for (int w = 0; w < V.block_n / 64; ++w) {
                const int64_t keys = key0 + 64 * w;
                if (tile.mask.all_visible(m * V.block_m, V.block_m, static_cast<int>(keys), 64)) {
                    ASSERT_TRUE(visibility(mask, m, keys, 64, V.block_m).second);
                }
            }
        }
        for (int64_t j = key0; j < key0 + V.block_n; ++j) {
            const VisibleQueries queries = tile.mask.of_key(static_cast<int>(j));
            for (int64_t i = 0; i < seq.seqlen_q; ++i) ASSERT_EQ(queries.contains(static_cast<int>(i)), mask.visible(i, j));
        }
    }
    size_t expected = 0;
    int64_t used = 0;
    for (int b = 0; b < p.size.batch; ++b) {
        const Sequence seq = sequence_of(p, b);
        expected += static_cast<size_t>(ceil_div(seq.rows_k, V.block_n) * p.size.num_heads_k);
        ASSERT_GE(first_padded_tile(p, seq, b, V.block_m), used);
        used = first_padded_tile(p, seq, b, V.block_m) + ceil_div(seq.rows_q, V.block_m);
        ASSERT_LE(used, workspace.tiles);
    }
    ASSERT_EQ(seen.size(), expected);
    if (schedule.whole_heads) {
        ASSERT_EQ(complete.size(), additions.size());
    }
    ASSERT_EQ(static_cast<int>(parts.size()), schedule.shared.tiles * schedule.shared.parts * (schedule.shared.parts > 1));
    ASSERT_EQ(static_cast<int64_t>(shared_pairs.size()), schedule.shared.tiles * ceil_div(p.size.seqlen_q, V.block_m));
}

TEST(Sm90BackwardSchedule, EveryTileOnceWithItsQueries) {
    std::mt19937 rng(20);
    for (int i = 0; i < 60; ++i) {
        SCOPED_TRACE(i);
        check<kFull>(rng);
        check<kBand>(rng);
        check<kFewKeys>(rng);
        check<kFewKeysBand>(rng);
        check<kPair>(rng);
        if (HasFatalFailure()) return;
    }
}

TEST(Sm90BackwardSchedule, WholeHeadsWhereKeysAreFewAndHeadsAreMany) {
    BackwardParams p;
    p.size = {2, 4, 4, 128, 128, 4096, 128, 8192, 256};
    EXPECT_FALSE(takes_whole_heads(kFewKeys, p));  // eight CTAs would take a tile of keys each, and many of queries
    EXPECT_EQ(backward_schedule(kFewKeys, p).shared.tiles, 8);
    EXPECT_EQ(backward_workspace(kFewKeys, p).dq_tiles, 2 * 64 * 4);
    p.deterministic = true;
    EXPECT_TRUE(takes_whole_heads(kFewKeys, p));  // the parts of a tile come in no order
    p.deterministic = false;
    p.size = {16, 4, 4, 128, 128, 4096, 128, 16 * 4096, 16 * 128};
    EXPECT_TRUE(takes_whole_heads(kFewKeys, p));  // half of the machine has work
    p.size = {2, 4, 4, 128, 128, 300, 128, 600, 256};
    EXPECT_TRUE(takes_whole_heads(kFewKeys, p));  // too little of it to be shared
    EXPECT_EQ(backward_workspace(kFewKeys, p).dq_tiles, 0);
    EXPECT_FALSE(takes_whole_heads(kFull, p));
    p.size.seqlen_k = 129;
    EXPECT_FALSE(takes_whole_heads(kFewKeys, p));  // the machine is not full
    EXPECT_EQ(backward_workspace(kFewKeys, p).dq_tiles, 2 * 5 * 4);
    p.size = {64, 16, 16, 128, 128, 256, 256, 64 * 256, 64 * 256};
    EXPECT_TRUE(takes_whole_heads(kFewKeys, p));
    EXPECT_EQ(backward_workspace(kFewKeys, p).dq_tiles, 132 * 4);
    p.size.batch = 9;
    EXPECT_FALSE(takes_whole_heads(kFewKeys, p));  // 144 heads: the second round would be all but empty
    p.size.batch = 16;
    EXPECT_TRUE(takes_whole_heads(kFewKeys, p));
    p.size.num_heads = 128;
    EXPECT_FALSE(takes_whole_heads(kFewKeys, p));  // dq of eight query heads is too much to wait in L2
    p.size.num_heads = 16;
    p.size.seqlen_q = p.size.seqlen_k = 512;
    EXPECT_FALSE(takes_whole_heads(kFewKeys, p));
    EXPECT_TRUE(takes_whole_heads(kFewKeysBand, p));  // half of it waits half as often
}

TEST(Sm90BackwardSchedule, AClaimIsAHeadOrATile) {
    BackwardSchedule s;
    int next = 5;
    const auto claim = [&] { return next++; };
    EXPECT_EQ(next_tile(s, 2, claim), 5);
    s.claim_tiles = 2;
    EXPECT_EQ(next_tile(s, 4, claim), 5);
    EXPECT_EQ(next_tile(s, 5, claim), 12);
}

TEST(Sm90BackwardSchedule, TilesThatDoNotFillTheMachineAreShared) {
    BackwardParams p;
    p.size = {1, 32, 32, 128, 128, 16384, 16384, 16384, 16384};
    EXPECT_EQ(shared_tiles(kFull, p).tiles, 32 * 128 % 132);
    EXPECT_EQ(shared_tiles(kFull, p).parts, 8);
    EXPECT_EQ(shared_tiles(kBand, p).tiles, 0);
    p.deterministic = true;
    EXPECT_EQ(shared_tiles(kFull, p).tiles, 0);
    p.deterministic = false;
    p.size.num_heads = p.size.num_heads_k = 33;  // 32 rounds
    EXPECT_EQ(shared_tiles(kFull, p).tiles, 0);
    p.size.num_heads = p.size.num_heads_k = 32;
    p.size.seqlen_q = 64;  // nothing to share
    EXPECT_EQ(shared_tiles(kFull, p).tiles, 0);
    p.size = {1, 8, 8, 256, 256, 16384, 16384, 16384, 16384};
    EXPECT_EQ(shared_tiles(kPair, p).tiles, 8 * 128 % 66);
    EXPECT_EQ(shared_tiles(kPair, p).parts, 7);
    Variant narrow = kPair;
    narrow.head_dim = 192;
    EXPECT_EQ(shared_tiles(narrow, p).tiles, 0);
}

TEST(Sm90BackwardSchedule, RowsMoveInsideWhereThereIsTimeForThem) {
    BackwardParams p;
    p.size.seqlen_q = p.size.seqlen_k = 2048;
    EXPECT_TRUE(inner_rows_pay(kFull, p));
    p.mask.window_right = 0;
    EXPECT_TRUE(inner_rows_pay(kBand, p));
    p.mask.window_left = 1023;
    EXPECT_TRUE(inner_rows_pay(kBand, p));
    p.mask.window_left = 127;
    EXPECT_FALSE(inner_rows_pay(kBand, p));
    p.size.seqlen_k = 2047;
    EXPECT_FALSE(inner_rows_pay(kFull, p));
}

/// As the launch decides it, of a case's sizes.
struct InnerHeads {
    int total = 0, outer = 0;

    explicit operator bool() const { return total > outer; }
};
InnerHeads inner_heads(const verify::Case& c) {
    const int dim = std::max(c.head_dim, c.dim_v());
    if (c.dtype == DType::f32 || c.out_f32 || c.grad_f32 || c.deterministic || (dim > 64 && dim <= 96) || dim > 128) return {};
    BackwardParams p;
    p.size.batch = c.batch, p.size.num_heads = c.num_heads, p.size.num_heads_k = c.num_heads_k;
    p.size.seqlen_q = c.seqlen_q, p.size.seqlen_k = c.seqlen_k;
    p.mask.window_left = c.window_left, p.mask.window_right = c.window_right;
    const Variant& v = p.mask.is_band() ? kBand : kFull;
    const BackwardSchedule schedule = backward_schedule(v, p);
    return inner_rows_pay(v, p) ? InnerHeads{schedule.heads, outer_heads(schedule)} : InnerHeads{};
}

TEST(Sm90BackwardSchedule, TheCaseListHasInnerRows) {
    int full = 0, band = 0, grouped = 0, varlen = 0, used = 0, narrower_v = 0;
    for (const verify::Case& c : verify::verify_cases()) {
        const InnerHeads heads = inner_heads(c);
        if (!heads) continue;
        // Of heads whose statistics, and of heads whose dq the main kernel makes, some have queries and keys.
        const std::vector<int64_t> rows = c.used_q(), keys = c.used_k();
        std::vector<size_t> sequences(rows.size());
        std::iota(sequences.begin(), sequences.end(), size_t{0});
        if (c.varlen_q) std::stable_sort(sequences.begin(), sequences.end(), [&](size_t a, size_t b) { return rows[a] > rows[b]; });
        bool begins = false, ends = false;
        for (size_t i = 0; i < rows.size(); ++i) {
            const size_t b = sequences[i];
            if (rows[b] == 0 || keys[b] == 0) continue;
            const int head = static_cast<int>(i) * c.num_heads_k;
            begins = begins || head >= heads.outer;
            ends = ends || head < heads.total - heads.outer;
        }
        EXPECT_TRUE(begins && ends) << c.name();
        (c.window_left < 0 && c.window_right < 0 ? full : band) += 1;
        grouped += c.num_heads > c.num_heads_k;
        varlen += c.varlen_q && c.varlen_k;
        used += c.seqused_q;
        narrower_v += c.dim_v() < c.head_dim;
    }
    for (const int count : {full, band, grouped, varlen, used, narrower_v}) EXPECT_GT(count, 0);
}

TEST(Sm90BackwardSchedule, TheCaseListHasWholeHeads) {
    int one_tile = 0, rounds_of_one = 0, rings_of_one = 0, full = 0, band = 0, grouped = 0, oddly = 0, varlen = 0, accumulating = 0;
    for (const verify::Case& c : verify::verify_cases()) {
        if (c.dtype == DType::f32 || c.head_dim > 256) continue;
        BackwardParams p;
        p.size.batch = c.batch, p.size.num_heads = c.num_heads, p.size.num_heads_k = c.num_heads_k;
        p.size.seqlen_q = c.seqlen_q, p.size.seqlen_k = c.seqlen_k;
        const bool is_band = c.window_left >= 0 || c.window_right >= 0;
        Variant v = is_band ? kFewKeysBand : kFewKeys;
        v.head_dim = c.head_dim <= 64 ? 64 : c.head_dim <= 128 ? 128 : 256;
        v.block_m = v.head_dim == 64 ? 128 : 64;
        if (!takes_whole_heads(v, p)) continue;
        if (c.seqlen_k <= v.block_n) {
            one_tile += 1;
            const int heads = c.batch * c.num_heads_k;
            const bool own_statistics = v.head_dim <= 96 && !c.out_f32, goes_round = heads > machine_tiles(v);
            const int64_t slots = c.num_heads / c.num_heads_k * ceil_div(c.seqlen_q, v.block_m) *
                                  ceil_div(heads, machine_tiles(v));
            rounds_of_one += own_statistics && goes_round;
            rings_of_one += own_statistics && goes_round && slots > 16;  // BackwardConfig::kSlots
            continue;
        }
        (is_band ? band : full) += 1;
        grouped += c.num_heads > c.num_heads_k;
        oddly += c.num_heads / c.num_heads_k % 2 == 1 && c.num_heads > c.num_heads_k;
        varlen += c.varlen_q && c.varlen_k && c.seqused_q;
        accumulating += c.accumulate;
    }
    for (const int count : {one_tile, rounds_of_one, rings_of_one, full, band, grouped, oddly, varlen, accumulating}) EXPECT_GT(count, 0);
}

TEST(Sm90BackwardSchedule, WorkspacePartsFollowOneAnother) {
    std::mt19937 rng(21);
    for (int i = 0; i < 100; ++i) {
        const Problem problem(rng, true);
        const BackwardWorkspace w = backward_workspace(kFewKeysBand, problem.params);
        const int64_t tiles = w.tiles * problem.params.size.num_heads;
        const bool whole = takes_whole_heads(kFewKeysBand, problem.params);
        EXPECT_LE(w.stats_offset + tiles * 2 * kFewKeysBand.block_m * 4, w.dq_offset);
        EXPECT_LE(w.dq_offset + w.dq_tiles * kFewKeysBand.block_m * kFewKeysBand.head_dim * 4, w.semaphore_offset);
        EXPECT_LE(w.semaphore_offset + (whole ? 0 : tiles * 4), w.counter_offset);
        if (!whole) {
            EXPECT_EQ(w.dq_tiles, tiles);
        }
        EXPECT_LE(w.counter_offset + 1024, w.progress_offset);
        EXPECT_LE(w.progress_offset + 2 * 4 * problem.params.size.batch * problem.params.size.num_heads_k, w.sequences_offset);
        EXPECT_LE(w.sequences_offset + 4 * problem.params.size.batch, w.finished_offset);
        for (const Variant& v : {kFull, kPair}) {
            if (takes_whole_heads(v, problem.params)) continue;
            const SharedTiles shared = shared_tiles(v, problem.params);
            const BackwardWorkspace full = backward_workspace(v, problem.params);
            EXPECT_LE(full.finished_offset + 4 * shared.counters(v), full.parts_offset);
            EXPECT_EQ(full.parts_offset + shared.tiles * shared.parts * SharedTiles::part_bytes(v), full.bytes);
        }
        for (const int64_t offset :
             {w.dq_offset, w.semaphore_offset, w.counter_offset, w.progress_offset, w.finished_offset, w.parts_offset}) {
            EXPECT_EQ(offset % 1024, 0);
        }
    }
}

}  // namespace
}  // namespace strobe::sm90
