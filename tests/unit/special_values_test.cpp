// NaN and infinity anywhere in the inputs: every result is finite, infinite or NaN exactly where the specification's is, for every
// instruction set, AVX-512-BF16 emulated where the machine has none. Rows whose scores are all -inf are among them: whatever they look at, they get 0 and give nothing.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "cpu/cpu_backend.hpp"
#include "cpu/plan.hpp"
#include "owned_call.hpp"
#include "plan.hpp"

namespace strobe {

namespace cpu::emulated_pairs {
void forward(const ForwardParams&, const ForwardPlan&);
void backward(const BackwardParams&, const BackwardPlan&);
}  // namespace cpu::emulated_pairs

namespace {

enum class Class { finite, plus_infinity, minus_infinity, nan };

Class class_of(float x) {
    if (std::isnan(x)) return Class::nan;
    if (std::isinf(x)) return x > 0 ? Class::plus_infinity : Class::minus_infinity;
    return Class::finite;
}

/// Where a tensor of `seen` is of another class than that of `expected`; "" when nowhere.
std::string difference(const char* name, const Tensor& seen, const Tensor& expected) {
    for (int64_t n = 0; n < OwnedCall::count(expected); ++n) {
        const float x = OwnedCall::get(seen, n), y = OwnedCall::get(expected, n);
        if (class_of(x) != class_of(y)) {
            return std::string(name) + " element " + std::to_string(n) + " is " + std::to_string(x) + ", specified is " +
                   std::to_string(y) + "; ";
        }
    }
    return "";
}

std::string difference(const OwnedCall& seen, const OwnedCall& expected) {
    std::string text = difference("out", seen.forward.out, expected.forward.out) + difference("lse", seen.forward.lse, expected.forward.lse) +
                       difference("dq", seen.backward.dq, expected.backward.dq) + difference("dk", seen.backward.dk, expected.backward.dk) +
                       difference("dv", seen.backward.dv, expected.backward.dv);
    if (seen.backward.dbias.ndim) text += difference("dbias", seen.backward.dbias, expected.backward.dbias);
    return text;
}

/// NaN of both signs, quiet and with all payload bits that arithmetic may meet, and the infinities.
constexpr uint32_t kSpecial[] = {0x7FC00000u, 0xFFC00000u, 0x7FC00001u, 0xFFFFFFFFu, 0x7F800000u, 0xFF800000u};

/// The library's public calls.
struct Library {
    static void forward(OwnedCall& call) { call.run_forward(); }
    static void backward(OwnedCall& call) { call.run_backward(); }
};

/// Kernels that the registry does not know: the bfloat16 pairs of AVX-512-BF16 with its one instruction written out.
struct EmulatedPairs {
    static void forward(OwnedCall& call) {
        const strobe_attention attention = detail::to_c(call.attention);
        const strobe_forward results = detail::to_c(call.forward);
        ForwardParams p = forward_params(make_problem(&attention, &results));
        const cpu::ForwardPlan plan = cpu::plan_forward(p, 3);
        const Tensor workspace = call.zeros(DType::u8, {static_cast<int64_t>(plan.bytes() + kAlignment)});
        p.workspace = aligned(workspace);
        cpu::emulated_pairs::forward(p, plan);
    }
    static void backward(OwnedCall& call) {
        const strobe_attention attention = detail::to_c(call.attention);
        const strobe_backward results = detail::to_c(call.backward);
        BackwardParams p = backward_params(make_problem(&attention, &results));
        const cpu::BackwardPlan plan = cpu::plan_backward(p, 3);
        const Tensor workspace = call.zeros(DType::u8, {static_cast<int64_t>(plan.bytes() + kAlignment)});
        p.workspace = aligned(workspace);
        cpu::emulated_pairs::backward(p, plan);
    }

private:
    static constexpr size_t kAlignment = 256;
    static void* aligned(const Tensor& t) {
        const auto address = reinterpret_cast<uintptr_t>(t.data);
        return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }
};

class SpecialValues : public testing::TestWithParam<std::tuple<cpu::Isa, DType>> {
protected:
    SpecialValues() { cpu::force_isa(std::get<0>(GetParam())); }
    ~SpecialValues() override { cpu::force_isa(cpu::best_isa()); }

    DType dtype() const { return std::get<1>(GetParam()); }
};

template <class Subject>
void expect_the_results_that_the_specification_says(DType dtype) {
    constexpr std::pair<int64_t, int64_t> kLengths[] = {{1, 1}, {3, 1}, {1, 5}, {7, 40}, {70, 9}, {40, 70}, {130, 150}};
    for (unsigned seed = 0; seed < 400; ++seed) {
        std::mt19937 random(seed);
        const auto below = [&](uint32_t n) { return static_cast<int64_t>(random() % n); };
        const auto [seqlen_q, seqlen_k] = kLengths[below(std::size(kLengths))];
        const int64_t heads_k = 1 + below(2), heads = heads_k * (1 + below(2));
        const OwnedShape shape{dtype, 1 + below(2), seqlen_q, seqlen_k, heads, heads_k, 1 + below(40), 1 + below(40)};
        OwnedCall seen(shape, seed), expected(shape, seed);
        const int64_t mask = below(3);
        const bool softcap = below(4) == 0, has_bias = below(3) == 0, has_dlse = below(3) == 0, dropout = below(4) == 0;
        for (OwnedCall* call : {&seen, &expected}) {
            call->attention.causal = mask == 1;
            if (mask == 2) call->attention.window_left = seqlen_k / 3, call->attention.window_right = 2;
            if (softcap) call->attention.softcap = 2.0;
            if (dropout) call->attention.dropout_p = 0.3;
            if (has_bias) {
                call->attention.bias = call->random(DType::f32, {1, heads, seqlen_q, seqlen_k});
                call->backward.dbias = call->zeros(DType::f32, {1, heads, seqlen_q, seqlen_k});
            }
            if (has_dlse) call->backward.dlse = call->random(DType::f32, {shape.batch, heads, seqlen_q});
        }
        expected.attention.implementation = "reference";
        const auto poison = [&](const Tensor& a, const Tensor& b) {
            const int64_t at = below(static_cast<uint32_t>(OwnedCall::count(a)));
            const float x = float_from_bits(kSpecial[below(std::size(kSpecial))]);
            for (const Tensor* t : {&a, &b}) OwnedCall::set(*t, at, x);
        };
        for (int64_t n = below(4); n >= 0; --n) {
            switch (below(has_bias ? 5 : 4)) {
                case 0: poison(seen.attention.q, expected.attention.q); break;
                case 1: poison(seen.attention.k, expected.attention.k); break;
                case 2: poison(seen.attention.v, expected.attention.v); break;
                case 3: poison(seen.backward.dout, expected.backward.dout); break;
                default: poison(seen.attention.bias, expected.attention.bias); break;
            }
        }
        Subject::forward(seen);
        expected.run_forward();
        // Both backwards start from the same results: beside an infinite dout the sign of an out that is all but zero decides
        // between infinity and NaN, and rounding decides that sign.
        seen.backward.out = expected.forward.out;
        seen.backward.lse = expected.forward.lse;
        Subject::backward(seen);
        expected.run_backward();
        EXPECT_EQ(difference(seen, expected), "") << "seed " << seed << ", " << seqlen_q << " x " << seqlen_k;
    }
}

TEST_P(SpecialValues, ReachExactlyTheResultsThatTheSpecificationSays) {
    expect_the_results_that_the_specification_says<Library>(dtype());
}

TEST(SpecialValuesInEmulatedPairs, ReachExactlyTheResultsThatTheSpecificationSays) {
    expect_the_results_that_the_specification_says<EmulatedPairs>(DType::bf16);
}

TEST_P(SpecialValues, ARowOfInfinitelyLowScoresIsDead) {
    // k = -inf and q > 0 make every score of head 0 -inf; the values, and what the keys would give to dq, are not finite.
    for (int64_t seqlen_k : {1, 2, 40, 150}) {
        for (bool general : {false, true}) {
            OwnedCall c({dtype(), 1, 20, seqlen_k, 2, 2, 8});
            if (general) c.attention.softcap = 0, c.attention.bias = c.zeros(DType::f32, {1, 1, 1, 1});
            for (int64_t n = 0; n < OwnedCall::count(c.attention.q); ++n) OwnedCall::set(c.attention.q, n, 1.0f);
            for (int64_t n = 0; n < OwnedCall::count(c.attention.k); ++n) {
                if (n / 8 % 2 != 0) continue;
                OwnedCall::set(c.attention.k, n, -INFINITY);
                OwnedCall::set(c.attention.v, n, NAN);
            }
            c.run();
            for (int64_t n = 0; n < OwnedCall::count(c.forward.out); ++n) {
                if (n / 8 % 2 == 0) {
                    EXPECT_EQ(OwnedCall::get(c.forward.out, n), 0) << n;
                    EXPECT_EQ(OwnedCall::get(c.backward.dq, n), 0) << n;
                } else {
                    EXPECT_TRUE(std::isfinite(OwnedCall::get(c.forward.out, n)) && std::isfinite(OwnedCall::get(c.backward.dq, n))) << n;
                }
            }
            for (int64_t n = 0; n < OwnedCall::count(c.backward.dk); ++n) {
                if (n / 8 % 2 != 0) continue;
                EXPECT_EQ(OwnedCall::get(c.backward.dk, n), 0) << n;
                EXPECT_EQ(OwnedCall::get(c.backward.dv, n), 0) << n;
            }
            for (int64_t i = 0; i < 20; ++i) EXPECT_EQ(OwnedCall::get(c.forward.lse, i), -INFINITY);
        }
    }
}

std::string name_of(const testing::TestParamInfo<std::tuple<cpu::Isa, DType>>& info) {
    constexpr const char* kDTypes[] = {"f32", "bf16", "f16"};
    return std::string(cpu::isa_name(std::get<0>(info.param))) + "_" + kDTypes[static_cast<int>(std::get<1>(info.param))];
}

INSTANTIATE_TEST_SUITE_P(Isa, SpecialValues,
                         testing::Combine(testing::ValuesIn(cpu::available_isas().begin(), cpu::available_isas().end()),
                                          testing::Values(DType::f32, DType::bf16, DType::f16)),
                         name_of);

}  // namespace
}  // namespace strobe
