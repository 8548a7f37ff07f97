// The shared memory of every sm80 row against the devices it is meant for, which of two sm90 tiles serves a length, and the order in
// which CTAs take tiles. Needs no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/common/kernel_variant.hpp"
#include "cuda/select.hpp"
#include "cuda/sm80/backward_order.hpp"
#include "cuda/sm80/backward_workspace.hpp"
#include "cuda/sm80/config.hpp"
#include "verify/case.hpp"
#include "verify/case_data.hpp"

namespace strobe::sm80 {
namespace {

constexpr Keys few = Keys::few;
#define STROBE_VARIANT(arch, direction, dtype, head_dim, mask, features, block_m, block_n, stages, ...)                    \
    Variant{Arch::arch, Direction::direction, DType::dtype, head_dim, MaskClass::mask, Features::features, block_m, block_n, \
            stages, __VA_ARGS__},
const Variant kRows[] = {
#include "variants.def"
};
#undef STROBE_VARIANT

// Bytes a CTA may opt in to.
constexpr int kSm80Bytes = 163 << 10, kSm86Bytes = 99 << 10, kSm90Bytes = 227 << 10;

/// A problem that asks for these features and nothing else.
cuda::Request request_for(Features features) {
    return {.general = features == Features::general || features == Features::capped,
            .capped = features == Features::capped,
            .dropout = features == Features::dropout,
            .biased = has_bias(features),
            .tiled = features == Features::tiled,
            .tma_layout = true};
}

TEST(Sm80Plan, EveryRowFitsHopper) {
    for (const Variant& v : kRows) {
        if (v.arch != Arch::sm80) continue;
        EXPECT_LE(smem_bytes(v), kSm90Bytes) << v.head_dim << " " << v.block_m << "x" << v.block_n;
    }
}

TEST(Sm80Plan, EveryDeviceIsServed) {
    for (int smem : {kSm80Bytes, kSm86Bytes, kSm90Bytes}) {
        for (Direction direction : {Direction::forward, Direction::backward}) {
            for (DType dtype : {DType::bf16, DType::f16, DType::f32}) {
                for (Features features : {Features::plain, Features::capped, Features::general, Features::dropout, Features::tiled, Features::biased}) {
                    for (int head_dim = 1; head_dim <= 256; ++head_dim) {
                        cuda::Request request = request_for(features);
                        request.direction = direction;
                        request.dtype = dtype;
                        request.head_dim = head_dim;
                        std::string refusal;
                        EXPECT_NE(cuda::select(kRows, Arch::sm80, request, {80, 108, smem}, refusal), nullptr)
                            << head_dim << " in " << smem << ": " << refusal;
                    }
                }
            }
        }
    }
}

TEST(Sm80Plan, KernelsAreNamedByTheirWholeRow) {
    for (const Variant& v : kRows) EXPECT_EQ(cuda::decode_variant(cuda::encode_variant(v)), v);
}

TEST(Sm80Plan, WarpsCoverTheTiles) {
    for (const Variant& v : kRows) {
        if (v.arch != Arch::sm80 || v.direction != Direction::backward || v.dtype == DType::f32) continue;
        const BackwardConfig c(v);
        EXPECT_EQ(c.score_warps_n * c.score_warps_m, v.warps);
        EXPECT_EQ(c.out_warps_n * c.out_warps_d, v.warps);
        EXPECT_EQ(c.dq_warps_m * c.dq_warps_d, v.warps);
        EXPECT_EQ(v.block_n / c.score_warps_n % 16, 0);
        EXPECT_EQ(c.step_m / c.score_warps_m % 16, 0);
        EXPECT_EQ(v.head_dim / c.out_warps_d % 16, 0);
        EXPECT_EQ(v.head_dim / c.dq_warps_d % 16, 0);
        EXPECT_EQ(v.block_m / c.dq_warps_m % 16, 0);
    }
}

TEST(Sm80Plan, ThreadsCoverTheTilesOfFp32) {
    for (const Variant& v : kRows) {
        if (v.dtype != DType::f32 || uses_tf32(v)) continue;
        const SimtConfig c(v);
        EXPECT_EQ(c.kThreads, v.warps * kWarpSize);
        EXPECT_EQ(c.rows % c.kSide, 0);
        EXPECT_EQ(c.cols % c.kSide, 0);
        EXPECT_EQ(v.head_dim % 64, 0);
    }
}

TEST(Sm80Plan, WarpsCoverTheTilesOfTf32) {
    for (const Variant& v : kRows) {
        if (!uses_tf32(v)) continue;
        const Tf32Config c(v);
        EXPECT_EQ(c.rows, 16 * c.m_atoms * v.warps);
        EXPECT_EQ(c.cols, 8 * c.n_atoms);
        EXPECT_EQ(c.n_atoms % 2, 0);  // ldmatrix fetches pairs
        EXPECT_EQ(v.head_dim % 32, 0);
        EXPECT_EQ(c.threads % (v.head_dim / 4), 0);  // 16 bytes a thread
        const int rows_at_once = c.threads / (v.head_dim / 4);
        EXPECT_EQ(c.rows % rows_at_once, 0);
        EXPECT_EQ(c.cols % rows_at_once, 0);
        EXPECT_LE(c.smem_bytes, kSm86Bytes);
    }
}

TEST(Sm80Plan, TheSmallestBucketThatServes) {
    std::string refusal;
    cuda::Request request{.direction = Direction::forward, .dtype = DType::bf16, .head_dim = 80, .band = true, .tma_layout = true};
    const Variant* row = cuda::select(kRows, Arch::sm80, request, {86, 80, kSm86Bytes}, refusal);
    ASSERT_NE(row, nullptr) << refusal;
    EXPECT_EQ(row->head_dim, 96);
    EXPECT_EQ(row->features, Features::plain);
    request.tma_layout = false;  // the plain rows copy 16 bytes at a time
    row = cuda::select(kRows, Arch::sm80, request, {86, 80, kSm86Bytes}, refusal);
    ASSERT_NE(row, nullptr) << refusal;
    EXPECT_EQ(row->features, Features::general);
}

TEST(Sm80Plan, TilesAreCountedIn32Bits) {
    constexpr int64_t kLong = int64_t{1} << 20;
    for (const Direction direction : {Direction::forward, Direction::backward}) {
        for (const auto& [seqlen_q, seqlen_k] : {std::pair{kLong, int64_t{1}}, std::pair{int64_t{1}, kLong}}) {
            const auto served = [&](int64_t heads) {
                const cuda::Request request{.direction = direction, .dtype = DType::bf16, .head_dim = 64, .heads = heads, .seqlen_q = seqlen_q,
                                            .seqlen_k = seqlen_k, .tma_layout = true};
                std::string refusal;
                const bool found = cuda::select(kRows, Arch::sm90, request, {90, 132, kSm90Bytes}, refusal) != nullptr;
                EXPECT_EQ(found, refusal.empty());
                EXPECT_TRUE(found || refusal.find("max_seqlen_q") != std::string::npos) << refusal;
                return found;
            };
            EXPECT_TRUE(served(1 << 16));
            EXPECT_FALSE(served(1 << 20));
        }
    }
}

TEST(Sm80Plan, RowsOfOneOptionServeNothingElse) {
    const auto features = [](cuda::Request request) {
        request.dtype = DType::bf16;
        request.head_dim = 64;
        std::string refusal;
        const Variant* row = cuda::select(kRows, Arch::sm80, request, {90, 132, kSm90Bytes}, refusal);
        EXPECT_NE(row, nullptr) << refusal;
        return row ? row->features : Features::plain;
    };
    EXPECT_EQ(features({.tma_layout = true}), Features::plain);
    EXPECT_EQ(features({.general = true, .tma_layout = true}), Features::general);
    EXPECT_EQ(features({.general = true, .capped = true, .tma_layout = true}), Features::capped);
    EXPECT_EQ(features({.general = true, .capped = true}), Features::general);
    EXPECT_EQ(features({.general = true, .capped = true, .dropout = true, .tma_layout = true}), Features::biased);
    EXPECT_EQ(features({.general = true, .capped = true, .biased = true, .tiled = true, .tma_layout = true}), Features::biased);
    EXPECT_EQ(features({.direction = Direction::backward, .general = true, .capped = true, .tma_layout = true}), Features::general);
    EXPECT_EQ(features({.dropout = true, .tma_layout = true}), Features::dropout);
    EXPECT_EQ(features({.biased = true, .tiled = true, .tma_layout = true}), Features::tiled);
    EXPECT_EQ(features({.biased = true, .tma_layout = true}), Features::biased);
    EXPECT_EQ(features({.general = true, .dropout = true, .tma_layout = true}), Features::biased);
    EXPECT_EQ(features({.dropout = true}), Features::biased);
    EXPECT_EQ(features({.dropout = true, .rare = true, .tma_layout = true}), Features::biased);
    EXPECT_EQ(features({.dropout = true, .biased = true, .tiled = true, .tma_layout = true}), Features::biased);
    EXPECT_EQ(features({.general = true, .biased = true, .tiled = true, .tma_layout = true}), Features::biased);
    EXPECT_EQ(features({.biased = true, .tiled = true}), Features::biased);
}

TEST(Sm80Plan, WarpsOfTheForwardCoverTheTiles) {
    for (const Variant& v : kRows) {
        if (v.arch != Arch::sm80 || v.direction != Direction::forward || v.dtype == DType::f32) continue;
        const ForwardConfig c(v);
        EXPECT_EQ(c.rows * v.warps, v.block_m * c.warps_of_rows);
        EXPECT_EQ(c.m_atoms * 16, c.rows);
        EXPECT_EQ(c.n_atoms * 8 * c.warps_of_rows, v.block_n);
        EXPECT_EQ(c.n_atoms % 2, 0);  // ldmatrix fetches pairs
        EXPECT_EQ(c.d_atoms * 8 * c.warps_of_rows, v.head_dim);
        EXPECT_EQ(c.d_atoms % 2, 0);
    }
}

TEST(Sm90Plan, TheLargerForwardTileFrom2048KeysOn) {
    const auto area = [](const Variant& v) { return v.block_m * v.block_n; };
    for (const Variant& v : kRows) {
        if (v.arch != Arch::sm90 || v.direction != Direction::forward) continue;
        cuda::Request request{.dtype = v.dtype, .head_dim = v.head_dim, .seqlen_q = 300, .band = v.mask == MaskClass::band, .tma_layout = true};
        std::string refusal;
        for (const int64_t seqlen_k : {1, 2047, 2048, 1 << 20}) {
            request.seqlen_k = seqlen_k;
            const Variant* row = cuda::select(kRows, Arch::sm90, request, {90, 132, kSm90Bytes}, refusal);
            ASSERT_NE(row, nullptr) << refusal;
            EXPECT_EQ(row->head_dim, v.head_dim);
            EXPECT_EQ(row->mask, v.mask);
            if (seqlen_k < 2048) EXPECT_LE(area(*row), area(v));
            else EXPECT_GE(area(*row), area(v));
        }
    }
}

TEST(Sm90Plan, NoForwardTileTwiceAsTallAsTheQueries) {
    for (DType dtype : {DType::bf16, DType::f16}) {
        for (bool band : {false, true}) {
            for (const int64_t seqlen_k : {128, 4096}) {
                for (const int64_t seqlen_q : {1, 64, 128, 129, 256, 2048}) {
                    const cuda::Request request{.dtype = dtype, .head_dim = 64, .seqlen_q = seqlen_q, .seqlen_k = seqlen_k, .band = band,
                                                .tma_layout = true};
                    std::string refusal;
                    const Variant* row = cuda::select(kRows, Arch::sm90, request, {90, 132, kSm90Bytes}, refusal);
                    ASSERT_NE(row, nullptr) << refusal;
                    if (seqlen_q <= 128) EXPECT_LT(row->block_m, 256) << seqlen_q << " x " << seqlen_k;
                    else EXPECT_EQ(row->mask, band ? MaskClass::band : MaskClass::full) << seqlen_q << " x " << seqlen_k;
                }
            }
        }
    }
}

/// Up to 256 keys, 512 under a mask, by the row that may take whole heads, deterministically at head dim 64 also without one; up to 2047
/// queries by the other row for few keys, unless deterministic; what is longer by the one for many.
TEST(Sm90Plan, BackwardOfFewKeysHasRowsOfItsOwn) {
    for (DType dtype : {DType::bf16, DType::f16}) {
        for (int head_dim : {64, 128}) {
            for (bool band : {false, true}) {
                for (bool deterministic : {false, true}) {
                    for (const int64_t seqlen_q : {300, 2047, 2048}) {
                        for (const int64_t seqlen_k : {1, 256, 257, 512, 513, 8192}) {
                            const cuda::Request request{.direction = Direction::backward, .dtype = dtype, .head_dim = head_dim,
                                                        .seqlen_q = seqlen_q, .seqlen_k = seqlen_k, .band = band,
                                                        .deterministic = deterministic, .tma_layout = true};
                            std::string refusal;
                            const Variant* row = cuda::select(kRows, Arch::sm90, request, {90, 132, kSm90Bytes}, refusal);
                            ASSERT_NE(row, nullptr) << refusal;
                            EXPECT_EQ(row->mask, band ? MaskClass::band : MaskClass::full);
                            const bool whole = seqlen_k <= (band || (deterministic && head_dim == 64) ? 512 : 256);
                            const bool brief = !whole && !deterministic && seqlen_q < 2048;
                            EXPECT_EQ(row->keys, whole || brief ? Keys::few : Keys::any) << seqlen_q << " x " << seqlen_k;
                            if (whole || brief) {
                                EXPECT_EQ(row->stages == 2, whole) << seqlen_q << " x " << seqlen_k;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What the planner is asked for a case, forward and backward, as if its buffers lay on the device.
std::array<cuda::Request, 2> requests_of(const verify::Case& c) {
    const verify::CaseData data(c, verify::Contents::none);
    verify::Placement placement;
    for (size_t i = 0; i < data.buffers.size(); ++i) placement.buffers.push_back(reinterpret_cast<void*>((i + 1) << 36));
    return {cuda::request_of(verify::forward_params(data, placement)), cuda::request_of(verify::backward_params(data, placement))};
}

/// Every compiled kernel is held to the specification by `strobe verify` on some device that it is for.
TEST(CaseList, ReachesEveryRow) {
    struct Use {
        Arch arch;
        cuda::DeviceLimits device;
    };
    const Use uses[] = {{Arch::sm90, {90, 132, kSm90Bytes}}, {Arch::sm80, {90, 132, kSm90Bytes}}, {Arch::sm80, {80, 108, kSm80Bytes}},
                        {Arch::sm80, {86, 80, kSm86Bytes}}};
    std::set<const Variant*> reached;
    for (const verify::Case& c : verify::verify_cases()) {
        for (const cuda::Request& request : requests_of(c)) {
            for (const Use& use : uses) {
                std::string refusal;
                if (const Variant* row = cuda::select(kRows, use.arch, request, use.device, refusal)) reached.insert(row);
            }
        }
    }
    for (const Variant& row : kRows) EXPECT_TRUE(reached.contains(&row)) << cuda::to_string(row);
}

/// A backward whose scores are not the forward's to the bit is off by more than the bound where a softmax is all but one-hot.
TEST(CaseList, Fp32IsForwardAndBackwardOnTensorCoresOrNeither) {
    int on_tensor_cores = 0, not_on_them = 0;
    for (const verify::Case& c : verify::verify_cases()) {
        if (c.dtype != DType::f32) continue;
        for (const cuda::DeviceLimits& device : {cuda::DeviceLimits{80, 108, kSm80Bytes}, cuda::DeviceLimits{86, 80, kSm86Bytes},
                                                 cuda::DeviceLimits{90, 132, kSm90Bytes}}) {
            const auto [forward, backward] = requests_of(c);
            std::string refusal;
            const Variant* rows[] = {cuda::select(kRows, Arch::sm80, forward, device, refusal),
                                     cuda::select(kRows, Arch::sm80, backward, device, refusal)};
            if (!rows[0] || !rows[1]) continue;  // a head dimension beyond them
            EXPECT_EQ(uses_tf32(*rows[0]), uses_tf32(*rows[1])) << c.name() << " on " << device.compute_capability;
            ++(uses_tf32(*rows[0]) ? on_tensor_cores : not_on_them);
        }
    }
    EXPECT_GT(on_tensor_cores, 300);
    EXPECT_GT(not_on_them, 300);
}

/// Only q, k and v say whether fp32 goes over tensor cores: where results and their gradients lie differs between the two.
TEST(Sm80Plan, OnlyInputsOfFp32MustBeAligned) {
    alignas(16) static float memory[64];
    BackwardParams p;
    p.size = {.batch = 1, .num_heads = 1, .num_heads_k = 1, .head_dim = 64, .head_dim_v = 64, .seqlen_q = 1, .seqlen_k = 1};
    p.dtype = p.out_dtype = p.grad_dtype = DType::f32;
    for (TensorRef* t : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv}) *t = {memory, 64, 64, 64};
    const auto aligned = [&] {
        ForwardParams forward;
        static_cast<AttentionParams&>(forward) = p;
        EXPECT_EQ(cuda::request_of(forward).tma_layout, cuda::request_of(p).tma_layout);
        return cuda::request_of(p).tma_layout;
    };
    EXPECT_TRUE(aligned());
    for (TensorRef* t : {&p.out, &p.dout, &p.dq, &p.dk, &p.dv}) {
        t->data = memory + 1;
        EXPECT_TRUE(aligned());
    }
    p.k.data = memory + 1;
    EXPECT_FALSE(aligned());
}

TEST(Sm80Plan, BandsHaveRoomForEverySequenceThatIsTaken) {
    for (const Arch arch : {Arch::sm80, Arch::sm90}) {
        for (const bool queries : {false, true}) {
            cuda::Request request{.dtype = DType::bf16, .head_dim = 64, .band = true, .tma_layout = true};
            int64_t& rows = queries ? request.seqlen_q : request.seqlen_k;
            std::string refusal;
            rows = (int64_t{1} << 30) - 1;
            EXPECT_NE(cuda::select(kRows, arch, request, {90, 132, kSm90Bytes}, refusal), nullptr) << refusal;
            rows = int64_t{1} << 30;
            EXPECT_EQ(cuda::select(kRows, arch, request, {90, 132, kSm90Bytes}, refusal), nullptr);
            EXPECT_NE(refusal.find("1073741823"), std::string::npos) << refusal;
        }
    }
}

TEST(Sm80Plan, RefusalsSayWhatIsPossible) {
    std::string refusal;
    cuda::Request request{.direction = Direction::backward, .dtype = DType::bf16, .head_dim = 257};
    EXPECT_EQ(cuda::select(kRows, Arch::sm80, request, {80, 108, kSm80Bytes}, refusal), nullptr);
    EXPECT_EQ(refusal, "head_dim and head_dim_v go up to 256 on CUDA, 257 is wanted; the CPU serves up to 512");
    request.head_dim = 64;
    EXPECT_EQ(cuda::select(kRows, Arch::sm80, request, {75, 40, 64 << 10}, refusal), nullptr);
    EXPECT_EQ(refusal, "needs compute capability 8 or more, this device has 7.5");
}

TEST(Sm80Schedule, EveryTileOnce) {
    for (int64_t heads : {1, 3, 16, 65}) {
        for (int64_t tiles : {1, 2, 7, 64}) {
            for (int64_t head_bytes : {int64_t{1} << 10, int64_t{9} << 20, int64_t{1} << 30}) {
                for (bool uneven : {false, true}) {
                    const TileOrder order = TileOrder::make(heads, tiles, head_bytes, uneven, true);
                    std::set<std::pair<int64_t, int>> seen;
                    for (int64_t i = 0; i < order.size(); ++i) {
                        const TileIndex t = order.at(i);
                        EXPECT_TRUE(t.head >= 0 && t.head < heads && t.tile >= 0 && t.tile < tiles);
                        seen.emplace(t.head, t.tile);
                    }
                    EXPECT_EQ(seen.size(), static_cast<size_t>(heads * tiles));
                }
            }
        }
    }
}

/// A key tile's turn at a query tile is the number of those claimed before it that add there: nobody waits for a turn that does not
/// come, nor for a CTA that might not be running.
TEST(Sm80Schedule, TurnsAreHandedOnInTheOrderOfClaims) {
    std::mt19937 engine(3);
    const auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); };
    int falling = 0, gone_by = 0;
    for (int trial = 0; trial < 600; ++trial) {
        const int block_m = 64, block_n = pick(0, 1) ? 64 : 128;
        BandMask mask{.seqlen_q = pick(1, 700), .seqlen_k = pick(0, 900)};
        mask.left = pick(0, 2) == 0 ? pick(0, 300) : -1;
        mask.right = pick(0, 2) != 0 ? (pick(0, 1) ? 0 : pick(0, 300)) : -1;
        mask.diagonal = pick(0, 2) == 0 ? pick(-900, 900) : mask.seqlen_k - mask.seqlen_q;
        const bool band = mask.left >= 0 || mask.right >= 0;
        const int low = mask.left < 0 ? -(1 << 30) : static_cast<int>(mask.diagonal - mask.left);
        const int high = mask.right < 0 ? 1 << 30 : static_cast<int>(mask.diagonal + mask.right);
        const int64_t heads = pick(1, 9), tiles = (std::max<int64_t>(mask.seqlen_k, 1) + block_n - 1) / block_n + pick(0, 1);
        const KeyTileOrder order = KeyTileOrder::in_turns(heads, tiles, int64_t{1} << pick(20, 26), band, pick(1, 100));
        std::set<std::pair<int, int>> claimed;
        std::vector<std::vector<int>> turns(static_cast<size_t>(heads), std::vector<int>(20, 0));
        for (int claim = 0; claim < order.size(); ++claim) {
            const KeyTile t = order.claimed(claim);
            claimed.emplace(t.head, t.tile);
            falling += t.falling;
            const int64_t key = int64_t{t.tile} * block_n;
            const IndexRange queries = mask.query_range(key, key + block_n);
            if (queries.empty()) continue;
            for (int64_t m = queries.begin / block_m; m < (queries.end + block_m - 1) / block_m; ++m) {
                const int first = static_cast<int>(m) * block_m, last = static_cast<int>(std::min<int64_t>(first + block_m, mask.seqlen_q)) - 1;
                int& turn = turns[static_cast<size_t>(t.head)][static_cast<size_t>(m)];
                EXPECT_EQ(t.turn(order.first_adding(low, first, block_n),
                                 order.last_adding(high, last, static_cast<int>(mask.seqlen_k), block_n)), turn);
                gone_by += turn++ > 0;
            }
        }
        EXPECT_EQ(claimed.size(), static_cast<size_t>(order.size()));
    }
    EXPECT_GT(falling, 1000);
    EXPECT_GT(gone_by, 1000);
}

/// Without a mask as many heads are begun together as the machine has room for.
TEST(Sm80Schedule, HeadsAreBegunTogether) {
    EXPECT_EQ(KeyTileOrder::in_turns(64, 64, 1 << 20, false, 264).group, 4);
    EXPECT_EQ(KeyTileOrder::in_turns(64, 256, 1 << 20, false, 132).group, 1);
    EXPECT_EQ(KeyTileOrder::in_turns(2, 8, 1 << 20, false, 264).group, 2);
    const KeyTileOrder order = KeyTileOrder::in_turns(8, 16, 1 << 20, false, 64);
    EXPECT_EQ(order.claimed(3).head, 3);
    EXPECT_EQ(order.claimed(4).tile, 1);
    const KeyTileOrder causal = KeyTileOrder::in_turns(8, 16, int64_t{8} << 20, true, 64);  // two groups
    EXPECT_EQ(causal.claimed(0).tile, 15);
    EXPECT_EQ(causal.claimed(64).tile, 0);
}

TEST(Sm80Plan, WorkspaceOfTheDeterministicMode) {
    ProblemSize size{.batch = 2, .num_heads = 3, .num_heads_k = 3, .head_dim = 64, .head_dim_v = 64, .seqlen_q = 100, .seqlen_k = 100,
                     .total_q = 200, .total_k = 200};
    const Variant plain{Arch::sm80, Direction::backward, DType::bf16, 64, MaskClass::band, Features::plain, 64, 128, 1, 4};
    Variant general = plain;
    general.features = Features::general;
    const int64_t tiles = 2 * 2 * 3, statistics = 2 * tiles * 64 * 4, dq = tiles * 64 * 64 * 4;
    EXPECT_EQ(backward_workspace_bytes(size, false, false, plain), statistics + dq);
    EXPECT_EQ(backward_workspace_bytes(size, false, true, plain), statistics + dq + (tiles + 1) * 4);
    EXPECT_EQ(backward_workspace_bytes(size, false, true, general), statistics);
}

TEST(Sm80Schedule, HeaviestFirstInsideAGroup) {
    const TileOrder order = TileOrder::make(4, 8, 1 << 20, true, true);
    ASSERT_EQ(order.group, 4);
    EXPECT_EQ(order.at(0).tile, 7);
    EXPECT_EQ(order.at(order.size() - 1).tile, 0);
}

}  // namespace
}  // namespace strobe::sm80
