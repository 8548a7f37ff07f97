// The checker is checked: the specification itself passes, and every fault that an implementation could have - planted here,
// one at a time - is found.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>

#include "core/numeric.hpp"
#include "reference/reference.hpp"
#include "verify/verify.hpp"

namespace strobe::verify {
namespace {

/// The specification with a fault: parameters are changed before the call, or results after it.
class Faulty : public Subject {
public:
    std::function<void(ForwardParams&)> before_forward = [](ForwardParams&) {};
    std::function<void(ForwardParams&)> after_forward = [](ForwardParams&) {};
    std::function<void(BackwardParams&)> before_backward = [](BackwardParams&) {};
    std::function<void(BackwardParams&)> after_backward = [](BackwardParams&) {};

    Memory& memory() override { return host_memory(); }

    void forward(const CaseData& data, const Placement& placement) override {
        ForwardParams p = forward_params(data, placement);
        before_forward(p);
        reference::forward(p);
        after_forward(p);
    }

    void backward(const CaseData& data, const Placement& placement) override {
        BackwardParams p = backward_params(data, placement);
        before_backward(p);
        reference::backward(p);
        after_backward(p);
    }
};

constexpr Case kCase{.dtype = DType::bf16, .head_dim = 32};

void expect_found(const Case& c, Faulty& faulty, const std::string& message) {
    Faulty sound;
    const CaseResult good = verify_case(c, sound);
    EXPECT_EQ(good.outcome, Outcome::passed) << good.message;
    const CaseResult bad = verify_case(c, faulty);
    EXPECT_EQ(bad.outcome, Outcome::failed) << c.name();
    EXPECT_NE(bad.message.find(message), std::string::npos) << bad.message;
}

void scale_element(const TensorRef& t, DType dtype, int64_t at, float factor) {
    store_element(t.data, dtype, at, factor * load_element(t.data, dtype, at));
}

TEST(Checker, TheSpecificationPassesEveryOption) {
    Faulty sound;
    for (const Case& c : option_cases(kCase)) {
        const CaseResult r = verify_case(c, sound);
        EXPECT_EQ(r.outcome, Outcome::passed) << r.name << ": " << r.message;
        EXPECT_LE(r.worst(), 1.0);
        EXPECT_EQ(r.errors.size(), c.dbias ? 6u : 5u);
        EXPECT_EQ(r.name, c.name());
    }
}

TEST(Checker, FindsAMaskOffByOne) {
    Faulty f;
    f.before_forward = [](ForwardParams& p) { p.mask.window_right += 1; };
    Case c = kCase;
    c.window_right = 0;
    expect_found(c, f, "out: error");
    expect_found(c, f, "lse: error");
}

TEST(Checker, FindsAWrongScale) {
    Faulty f;
    f.before_forward = [](ForwardParams& p) { p.score.softmax_scale *= 1.02f; };
    expect_found(kCase, f, "lse: error");
}

TEST(Checker, FindsAnLseInBaseTwo) {
    Faulty f;
    f.after_forward = [](ForwardParams& p) {
        for (int64_t n = 0; n < p.size.batch * p.lse.batch_stride; ++n) p.lse.data[n] *= 1.442695f;
    };
    expect_found(kCase, f, "lse: error");
}

TEST(Checker, FindsPlusInfinityOnEmptyRows) {
    Faulty f;
    f.after_forward = [](ForwardParams& p) {
        for (int64_t n = 0; n < p.size.num_heads * p.size.total_q; ++n) {
            if (std::isinf(p.lse.data[n])) p.lse.data[n] = INFINITY;
        }
    };
    Case c = kCase;
    c.batch = 5;
    c.varlen_q = c.varlen_k = true;
    expect_found(c, f, "lse: error inf");
}

TEST(Checker, FindsAnOutputLeftUnwritten) {
    Faulty f;
    f.before_forward = [](ForwardParams& p) { p.lse = {}; };
    const CaseResult r = verify_case(kCase, f, {.backward = false});
    EXPECT_EQ(r.outcome, Outcome::failed);
    EXPECT_NE(r.message.find("lse: error inf"), std::string::npos) << r.message;
}

TEST(Checker, FindsAWriteBehindAnOutput) {
    Faulty f;
    f.after_forward = [](ForwardParams& p) {
        static_cast<Bf16*>(p.out.data)[p.size.batch * p.out.batch_stride] = to_bf16(0.0f);
    };
    expect_found(kCase, f, "of buffer out has changed");
}

TEST(Checker, FindsAWriteInFrontOfAnOutput) {
    Faulty f;
    f.after_backward = [](BackwardParams& p) { static_cast<Bf16*>(p.dk.data)[-1] = to_bf16(0.0f); };
    expect_found(kCase, f, "of buffer dk has changed");
}

TEST(Checker, FindsAWriteIntoTheGapOfAPaddedRow) {
    Faulty f;
    f.after_backward = [](BackwardParams& p) {
        static_cast<Bf16*>(p.dv.data)[p.size.head_dim_v] = to_bf16(1.0f);
    };
    Case c = kCase;
    c.layout = Layout::padded;
    expect_found(c, f, "of buffer dv has changed");
}

TEST(Checker, FindsAnInputThatWasChanged) {
    Faulty f;
    f.after_forward = [](ForwardParams& p) { scale_element(p.q, p.dtype, 5, 2.0f); };
    expect_found(kCase, f, "of buffer q has changed");
}

TEST(Checker, FindsALookBehindSeqused) {
    // The rows behind seqused are NaN: an implementation that takes one key too many shows it.
    Faulty f;
    static std::vector<int32_t> longer;
    f.before_forward = [](ForwardParams& p) {
        longer.assign(p.seqlens.seqused_k, p.seqlens.seqused_k + p.size.batch);
        for (int32_t& n : longer) n = std::min<int32_t>(n + 1, static_cast<int32_t>(p.size.seqlen_k));
        p.seqlens.seqused_k = longer.data();
    };
    Case c = kCase;
    c.batch = 4;
    c.seqused_k = true;
    expect_found(c, f, "out: error inf");
}

TEST(Checker, FindsEachGradientFault) {
    const auto fault = [](std::function<void(BackwardParams&)> before, const Case& c, const char* message) {
        Faulty f;
        f.before_backward = std::move(before);
        expect_found(c, f, message);
    };
    Case dlse = kCase;
    dlse.dlse = true;
    fault([](BackwardParams& p) { p.dlse = {}; }, dlse, "dq: error");
    Case dropout = kCase;
    dropout.dropout_p = 0.17;
    fault([](BackwardParams& p) { p.dropout.offset += 1; }, dropout, "dv: error");
    fault([](BackwardParams& p) { p.dropout.drop_below = 0; }, dropout, "dk: error");
    Case softcap = kCase;
    softcap.softcap = 1.5;
    fault([](BackwardParams& p) { p.score.softcap = 0; }, softcap, "dq: error");
    Case alibi = kCase;
    alibi.alibi = Alibi::per_batch_and_head;
    fault([](BackwardParams& p) { p.score.alibi_batch_stride = 0; }, alibi, "dv: error");
    Case bias = kCase;
    bias.bias = BiasShape::full;
    bias.dbias = true;
    fault([](BackwardParams& p) { p.dbias = {}; }, bias, "dbias: error inf");
    Case accumulate = kCase;
    accumulate.grad_f32 = accumulate.accumulate = true;
    fault([](BackwardParams& p) { p.accumulate = false; }, accumulate, "dq: error");
    Case gqa = kCase;
    gqa.num_heads = 4;
    fault([](BackwardParams& p) { p.size.num_heads = 2; p.size.num_heads_k = 2; }, gqa, "dk: error");
    Case positions = kCase;
    positions.positions = true;
    positions.q_position = 20;
    positions.k_position = 9;
    positions.window_right = 0;
    fault([](BackwardParams& p) { p.mask.q_position += 1; }, positions, "dv: error");
    Case global = kCase;
    global.global_out = true;
    Faulty f;  // delta from this block's own out instead of the one handed in
    f.before_backward = [](BackwardParams& p) {
        ForwardParams again;
        static_cast<AttentionParams&>(again) = p;
        reference::forward(again);
    };
    const CaseResult r = verify_case(global, f);
    EXPECT_EQ(r.outcome, Outcome::failed);
}

TEST(Checker, FindsASingleWrongElement) {
    Faulty f;
    f.after_backward = [](BackwardParams& p) {
        const int64_t at = (p.size.seqlen_k - 1) * p.dk.row_stride + p.dk.head_stride + 3;
        store_element(p.dk.data, p.grad_dtype, at, load_element(p.dk.data, p.grad_dtype, at) + 0.05f);
    };
    expect_found(kCase, f, "dk: error");
}

TEST(Checker, FindsResultsThatDifferBetweenRuns) {
    Case c = kCase;
    Faulty f;
    int runs = 0;
    f.after_backward = [&](BackwardParams& p) {  // one unit in the last place, every second run
        if (runs++ % 2 == 1) static_cast<Bf16*>(p.dq.data)[0].bits ^= 1;
    };
    CaseResult r = verify_case(c, f, {.repeats = 3});
    EXPECT_EQ(r.outcome, Outcome::passed) << "dq may differ unless `deterministic` is set: " << r.message;
    c.deterministic = true;
    runs = 0;
    r = verify_case(c, f);
    EXPECT_EQ(r.outcome, Outcome::failed);
    EXPECT_NE(r.message.find("dq: a second run gave other bits"), std::string::npos) << r.message;

    c.deterministic = false;
    runs = 0;
    f.after_backward = [&](BackwardParams& p) {
        if (runs++ % 2 == 1) static_cast<Bf16*>(p.dv.data)[0].bits ^= 1;
    };
    r = verify_case(c, f, {.repeats = 3});
    EXPECT_NE(r.message.find("dv: a second run gave other bits"), std::string::npos) << r.message;
}

TEST(Checker, TellsUnsupportedFromFailed) {
    Faulty f;
    f.before_forward = [](ForwardParams&) { throw Unsupported("not on a Sunday"); };
    CaseResult r = verify_case(kCase, f);
    EXPECT_EQ(r.outcome, Outcome::unsupported);
    EXPECT_EQ(r.message, "not on a Sunday");
    f.before_forward = [](ForwardParams&) { throw std::runtime_error("out of luck"); };
    r = verify_case(kCase, f);
    EXPECT_EQ(r.outcome, Outcome::failed);
    EXPECT_EQ(r.message, "out of luck");
}

TEST(Checker, WorkspaceGuardsNoticeBothEnds) {
    for (int64_t at : {int64_t{-1}, int64_t{0}, int64_t{99}, int64_t{100}}) {
        GuardedWorkspace workspace(host_memory(), 100);
        static_cast<std::byte*>(workspace.data())[at] = std::byte{0};
        if (at == -1 || at == 100) {
            EXPECT_THROW(workspace.check(), std::runtime_error) << at;
        } else {
            EXPECT_NO_THROW(workspace.check()) << at;
        }
    }
}

}  // namespace
}  // namespace strobe::verify
