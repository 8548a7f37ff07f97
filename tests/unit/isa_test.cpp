// The CPU kernels of every instruction set that this machine has, and the bfloat16-pair code of AVX-512-BF16 with its one
// instruction written out, so that machines without it test it too.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/cpu_backend.hpp"
#include "cpu/plan.hpp"
#include "error.hpp"
#include "sanitized.hpp"
#include "strobe/strobe.hpp"
#include "verify/verify.hpp"

namespace strobe::cpu {

namespace emulated_pairs {
void forward(const ForwardParams&, const ForwardPlan&);
void backward(const BackwardParams&, const BackwardPlan&);
}  // namespace emulated_pairs

namespace {

using namespace strobe::verify;

/// Under sanitizers the whole list runs elsewhere, on the machine's best instruction set.
constexpr size_t kThinned = kSanitized ? 5 : 1;

/// A list is tested in so many parts, which ctest runs side by side.
constexpr int kParts = 4;

/// A part of the case list that meets every head dimension, option and ragged edge of one dtype or all.
std::vector<Case> sample(std::string_view filter, size_t every) {
    const std::vector<Case> all = filtered(verify_cases(), filter);
    std::vector<Case> some;
    for (size_t n = 0; n < all.size(); n += every * kThinned) {
        if (all[n].seqlen_k <= 1000) some.push_back(all[n]);
    }
    return some;
}

void expect_passed(const std::vector<Case>& cases, Subject& subject, int part = 0, int parts = 1) {
    EXPECT_GT(cases.size(), 200u / kThinned);
    for (size_t n = static_cast<size_t>(part); n < cases.size(); n += static_cast<size_t>(parts)) {
        const CaseResult r = verify_case(cases[n], subject);
        EXPECT_EQ(r.outcome, Outcome::passed) << r.name << ": " << r.message;
    }
}

/// While it lives the library computes with this instruction set.
class ForcedIsa {
public:
    explicit ForcedIsa(Isa isa) { force_isa(isa); }
    ~ForcedIsa() { force_isa(best_isa()); }
};

class EachIsaAndPart : public testing::TestWithParam<std::tuple<Isa, int>> {};

TEST_P(EachIsaAndPart, ServesTheCaseList) {
    const auto [isa, part] = GetParam();
    const ForcedIsa forced(isa);
    LibrarySubject subject("cpu", 3);
    expect_passed(sample("", 7), subject, part, kParts);
}

std::string name_of_part(const testing::TestParamInfo<std::tuple<Isa, int>>& test) {
    const auto [isa, part] = test.param;
    return std::string(isa_name(isa)) + "_part_" + std::to_string(part);
}

INSTANTIATE_TEST_SUITE_P(Isa, EachIsaAndPart,
                         testing::Combine(testing::ValuesIn(available_isas().begin(), available_isas().end()),
                                          testing::Range(0, kParts)),
                         name_of_part);

class EachIsa : public testing::TestWithParam<Isa> {};

TEST_P(EachIsa, IsTheOneThatThePlanNames) {
    const ForcedIsa forced(GetParam());
    EXPECT_EQ(current_isa(), GetParam());
    float x[8] = {};
    Attention a{.q = {x, {1, 2, 1, 4}}, .k = {x, {1, 2, 1, 4}}, .v = {x, {1, 2, 1, 4}}};
    a.implementation = "cpu";
    const std::string text = plan(a, Forward{.out = {x, {1, 2, 1, 4}}}).explanation;
    EXPECT_EQ(text.rfind(std::string("cpu: ") + isa_name(GetParam()) + ", ", 0), 0u) << text;
}

INSTANTIATE_TEST_SUITE_P(Isa, EachIsa, testing::ValuesIn(available_isas().begin(), available_isas().end()),
                         [](const auto& test) { return std::string(isa_name(test.param)); });

TEST(Isa, OnesThatAreNotThereAreRefusedByName) {
    EXPECT_EQ(available_isas().front(), Isa::portable);
    for (const Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
        if (isa <= available_isas().back()) continue;
        try {
            force_isa(isa);
            ADD_FAILURE() << isa_name(isa);
        } catch (const CallError& e) {
            EXPECT_EQ(e.status(), STROBE_INVALID_ARGUMENT);
            EXPECT_NE(std::string(e.what()).find(std::string(isa_name(isa)) + " is not available"), std::string::npos) << e.what();
        }
    }
}

/// Calls the kernels past the registry, which does not know them.
class EmulatedPairs : public Subject {
public:
    Memory& memory() override { return host_memory(); }

    void forward(const CaseData& data, const Placement& placement) override {
        ForwardParams p = forward_params(data, placement);
        const ForwardPlan plan = plan_forward(p, 3);
        const GuardedWorkspace workspace(memory(), plan.bytes());
        p.workspace = workspace.data();
        emulated_pairs::forward(p, plan);
        workspace.check();
    }

    void backward(const CaseData& data, const Placement& placement) override {
        BackwardParams p = backward_params(data, placement);
        const BackwardPlan plan = plan_backward(p, 3);
        const GuardedWorkspace workspace(memory(), plan.bytes());
        p.workspace = workspace.data();
        emulated_pairs::backward(p, plan);
        workspace.check();
    }
};

class BFloat16PairsInParts : public testing::TestWithParam<int> {};

TEST_P(BFloat16PairsInParts, ServeTheCaseList) {
    EmulatedPairs subject;
    expect_passed(sample("bf16", 2), subject, GetParam(), kParts);
}

INSTANTIATE_TEST_SUITE_P(Part, BFloat16PairsInParts, testing::Range(0, kParts));

/// A value that only later queries see leaves the bits of the earlier ones alone, although it shares words with theirs.
TEST(BFloat16Pairs, HiddenNaNsChangeNoBit) {
    const CaseData data(Case{.dtype = DType::bf16, .batch = 1, .seqlen_q = 100, .seqlen_k = 100, .head_dim = 40, .window_right = 0});
    for (const int64_t poisoned_row : {50, 51}) {
        const auto out_with = [&](double value) {
            std::vector<std::vector<std::byte>> images;
            Placement placement;
            for (const Buffer& buffer : data.buffers) images.push_back(encode(buffer, false));
            for (std::vector<std::byte>& image : images) placement.buffers.push_back(image.data());
            View row = data.v;
            row.offset += poisoned_row * row.strides[1];
            row.shape[1] = 1;
            const Buffer& v = data.buffers[data.v.buffer];
            if (value != 0) row.for_each([&](int64_t at) { encode_element(v, false, images[data.v.buffer].data(), at, value); });
            EmulatedPairs().forward(data, placement);
            std::vector<double> out;
            data.out.for_each([&](int64_t at) { out.push_back(decode(data.buffers[data.out.buffer], false, images[data.out.buffer].data(), at)); });
            return out;
        };
        const std::vector<double> clean = out_with(0);
        const int64_t before = poisoned_row * data.spec.num_heads * data.spec.head_dim;
        for (const double value : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
            const std::vector<double> seen = out_with(value);
            EXPECT_TRUE(std::equal(clean.begin(), clean.begin() + before, seen.begin())) << value << " in row " << poisoned_row;
            EXPECT_FALSE(std::isfinite(seen[before]));
        }
    }
}

TEST(BFloat16Pairs, LeaveTheOtherTypesAlone) {
    EmulatedPairs subject;
    expect_passed(sample("!bf16", 12), subject);
}

}  // namespace
}  // namespace strobe::cpu
