// The case list: that it covers what it promises, that names are names, and that a case's data lies where its views say.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "core/numeric.hpp"
#include "verify/case_data.hpp"

namespace strobe::verify {
namespace {

TEST(CaseList, HasThousandsOfCasesEachNamedOnce) {
    const std::vector<Case> cases = verify_cases();
    EXPECT_GE(cases.size(), 3000u);
    std::set<std::string> names;
    for (const Case& c : cases) names.insert(c.name());
    EXPECT_EQ(names.size(), cases.size());
}

TEST(CaseList, CoversEveryAxis) {
    std::set<std::pair<int, DType>> dims;
    std::map<std::string, int> options;
    for (const Case& c : verify_cases()) {
        dims.insert({c.head_dim, c.dtype});
        std::string name = c.name();
        for (const char* option : {"causal", "window", "softcap", "scale", "alibi", "alibi_bh", "bias_full", "bias_heads", "bias_shared",
                                   "bias_keys", "bias_queries", "bias_scalar", "_inf", "dbias", "dropout", "varlen", "varlen_q",
                                   "varlen_k", "seqused_q", "seqused_k", "bhsd", "padded", "packed", "positions", "out_f32",
                                   "grad_f32", "accumulate", "deterministic", "dlse", "global_out", "loud", "h4k2", "h3k1"}) {
            if (name.find(option) != std::string::npos) ++options[option];
        }
    }
    for (int head_dim : {1, 40, 59, 64, 96, 111, 128, 256, 512}) {
        for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
            EXPECT_TRUE(dims.contains({head_dim, dtype})) << head_dim << " " << dtype_name(dtype);
        }
    }
    EXPECT_EQ(options.size(), 33u);
    for (const auto& [option, count] : options) EXPECT_GE(count, 90) << option;
}

/// Workers of a GPU, some 130, that take tiles of 128 rows: several in a row without keys for each.
TEST(CaseList, HasRunsOfRowsWithoutKeys) {
    for (int head_dim : {72, 136}) {
        int64_t most = 0;
        for (const Case& c : filtered(verify_cases(), fmt::format("-d{}-*causal", head_dim))) {
            int64_t unseen = 0;
            const std::vector<int64_t> rows = c.used_q(), keys = c.used_k();
            for (size_t b = 0; b < rows.size(); ++b) unseen += std::max<int64_t>(rows[b] - keys[b], 0) / 128 * c.num_heads;
            most = std::max(most, unseen);
        }
        EXPECT_GE(most, 6 * 132) << head_dim;
    }
}

TEST(CaseList, TheBenchmarkListHasItsCells) {
    const std::vector<Case> cases = bench_cases();
    EXPECT_EQ(cases.size(), 48u);
    EXPECT_EQ(filtered(cases, "bf16-d128").size(), 12u);
    EXPECT_EQ(filtered(cases, "causal").size(), 24u);
    EXPECT_EQ(filtered(cases, "s8192").size(), 16u);
}

TEST(Filter, TermsGlobsAndExclusions) {
    EXPECT_TRUE(matches("f32-d64-causal", ""));
    EXPECT_TRUE(matches("f32-d64-causal", "d64"));
    EXPECT_FALSE(matches("f32-d64-causal", "d128"));
    EXPECT_TRUE(matches("f32-d64-causal", "d128,causal"));
    EXPECT_FALSE(matches("f32-d64-causal", "d64,!causal"));
    EXPECT_TRUE(matches("f32-d64-causal", "!window"));
    EXPECT_TRUE(matches("f32-d64-causal", "f32*causal"));
    EXPECT_FALSE(matches("f32-d64-causal", "causal*f32"));
    EXPECT_TRUE(matches("f32-d64-causal", "d6?-"));
    EXPECT_TRUE(matches("f32-d64-causal", "*"));
}

TEST(Case, ContradictionsAreNoticed) {
    const Case packed{.seqlen_q = 5, .seqlen_k = 5, .layout = Layout::packed};
    EXPECT_TRUE(packed.consistent());
    Case c = packed;
    c.seqlen_k = 6;
    EXPECT_FALSE(c.consistent());
    c = packed;
    c.head_dim_v = 8;
    EXPECT_FALSE(c.consistent());
    EXPECT_FALSE((Case{.num_heads = 3, .num_heads_k = 2}.consistent()));
    EXPECT_FALSE((Case{.dtype = DType::bf16, .accumulate = true}.consistent()));
    EXPECT_FALSE((Case{.dbias = true}.consistent()));
}

TEST(Case, FlopsCountWhatIsVisible) {
    Case c{.batch = 3, .num_heads = 2, .seqlen_q = 4, .seqlen_k = 6, .head_dim = 10, .head_dim_v = 20};
    EXPECT_EQ(c.forward_flops(), 2.0 * 3 * 2 * 4 * 6 * (10 + 20));
    c.window_right = 0;  // rows see 3, 4, 5, 6 keys
    EXPECT_EQ(c.forward_flops(), 2.0 * 3 * 2 * 18 * (10 + 20));
    EXPECT_EQ(c.backward_flops(), 2.5 * c.forward_flops());
}

TEST(CaseData, OutputsStartAsNaNAndInputsAreOfTheirType) {
    for (const Case& c : filtered(verify_cases(), "d40,seqused,padded,packed")) {
        if (c.seqlen_k > 100) continue;
        const CaseData data(c);
        for (const View* view : {&data.out, &data.lse, &data.dq, &data.dk, &data.dv}) {
            if (c.accumulate && view != &data.out && view != &data.lse) continue;
            view->for_each([&](int64_t n) { ASSERT_TRUE(std::isnan(data.buffers[view->buffer].values[n])) << c.name(); });
        }
        for (const View* view : {&data.q, &data.k, &data.v}) {
            double sum_of_squares = 0;
            int64_t count = 0, hidden = 0;
            view->for_each([&](int64_t n) {
                const double x = data.buffers[view->buffer].values[n];
                if (std::isnan(x)) {
                    ++hidden;
                    return;
                }
                ASSERT_EQ(round_to(c.dtype, static_cast<float>(x)), x);
                sum_of_squares += x * x;
                ++count;
            });
            EXPECT_EQ(hidden > 0, view == &data.q ? c.seqused_q : c.seqused_k) << c.name();
            if (count > 1000 && !c.loud) {
                EXPECT_NEAR(sum_of_squares / static_cast<double>(count), 1.0, 0.2) << c.name();
            }
        }
    }
}

TEST(CaseData, ViewsOfOneBufferDoNotShareElements) {
    for (const Case& c : option_cases({.seqlen_q = 6, .seqlen_k = 9, .head_dim = 8})) {
        const CaseData data(c);
        std::set<std::pair<int, int64_t>> taken;
        for (const View* view : {&data.q, &data.k, &data.v, &data.out, &data.lse, &data.dlse, &data.bias, &data.dbias, &data.dout,
                                 &data.dq, &data.dk, &data.dv, &data.alibi_slopes, &data.cu_seqlens_q, &data.cu_seqlens_k}) {
            if (!view->given()) continue;
            const auto size = static_cast<int64_t>(data.buffers[view->buffer].values.size());
            view->for_each([&](int64_t n) {
                ASSERT_TRUE(n >= kGuard && n < size - kGuard) << c.name();
                ASSERT_TRUE(taken.insert({view->buffer, n}).second) << c.name();
            });
        }
    }
}

TEST(CaseData, ImagesOfEveryTypeReadBackWhatWasWritten) {
    const CaseData data(Case{.dtype = DType::f16, .bias = BiasShape::full, .varlen_q = true});
    for (const Buffer& buffer : data.buffers) {
        for (bool doubles : {false, true}) {
            const std::vector<std::byte> image = encode(buffer, doubles);
            EXPECT_EQ(image.size(), buffer.values.size() * element_bytes(buffer, doubles));
            for (size_t n = 0; n < buffer.values.size(); ++n) {
                if (std::isnan(buffer.values[n])) continue;
                ASSERT_EQ(decode(buffer, doubles, image.data(), static_cast<int64_t>(n)), buffer.values[n]) << buffer.name;
            }
        }
    }
}

}  // namespace
}  // namespace strobe::verify
