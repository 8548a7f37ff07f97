// A sequence cut into blocks, as on a ring of devices: forward per block and merged is forward of the whole; the blocks'
// backward with the global out and lse adds up to the whole's gradients.
#include <gtest/gtest.h>

#include <cmath>

#include "owned_call.hpp"

namespace strobe {
namespace {

struct Ring {
    const char* name;
    int64_t seqlen;
    int64_t blocks_q, blocks_k;
    void (*options)(Attention&, OwnedCall&);
};

std::ostream& operator<<(std::ostream& stream, const Ring& r) { return stream << r.name; }

class RingTest : public testing::TestWithParam<std::tuple<Ring, DType>> {};

TEST_P(RingTest, BlocksAddUpToTheWhole) {
    const auto [ring, dtype] = GetParam();
    const int64_t block_q = ring.seqlen / ring.blocks_q, block_k = ring.seqlen / ring.blocks_k;
    OwnedShape shape{dtype, 2, ring.seqlen, ring.seqlen, 4, 2, 32, 24, DType::f32, DType::f32};
    OwnedCall whole(shape), parts(shape);
    for (OwnedCall* call : {&whole, &parts}) {
        ring.options(call->attention, *call);
        call->attention.positions = Attention::Positions{0, 0};
        call->backward.dlse = call->random(DType::f32, {2, 4, ring.seqlen}, 0.5f);
        call->backward.accumulate = true;
    }
    whole.run();

    const auto block = [&](int64_t bq, int64_t bk) {
        Attention a = parts.attention;
        a.q = token_rows(a.q, bq * block_q, block_q);
        a.k = token_rows(a.k, bk * block_k, block_k);
        a.v = token_rows(a.v, bk * block_k, block_k);
        a.positions = Attention::Positions{bq * block_q, bk * block_k};
        return a;
    };
    for (int64_t bq = 0; bq < ring.blocks_q; ++bq) {
        const Tensor out = token_rows(parts.forward.out, bq * block_q, block_q);
        const Tensor lse = lse_rows(parts.forward.lse, bq * block_q, block_q);
        OwnedCall part({DType::f32, 2, block_q, block_k, 4, 2, 32, 24});
        for (int64_t bk = 0; bk < ring.blocks_k; ++bk) {
            if (bk == 0) {
                forward(block(bq, bk), {.out = out, .lse = lse});
                continue;
            }
            forward(block(bq, bk), {.out = part.forward.out, .lse = part.forward.lse});
            lse_merge(out, lse, part.forward.out, part.forward.lse);
        }
    }
    for (int64_t bq = 0; bq < ring.blocks_q; ++bq) {
        for (int64_t bk = 0; bk < ring.blocks_k; ++bk) {
            Backward b = parts.backward;
            b.out = token_rows(b.out, bq * block_q, block_q);
            b.dout = token_rows(b.dout, bq * block_q, block_q);
            b.dq = token_rows(b.dq, bq * block_q, block_q);
            b.lse = lse_rows(b.lse, bq * block_q, block_q);
            b.dlse = lse_rows(b.dlse, bq * block_q, block_q);
            b.dk = token_rows(b.dk, bk * block_k, block_k);
            b.dv = token_rows(b.dv, bk * block_k, block_k);
            backward(block(bq, bk), b);
        }
    }

    // In 16-bit types an implementation may round probabilities, block by block differently.
    const double tolerance = dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 6e-3 : 5e-2;
    EXPECT_LE(largest_difference(whole.forward.out, parts.forward.out), tolerance);
    EXPECT_LE(largest_difference(whole.forward.lse, parts.forward.lse), 1e-5);
    EXPECT_LE(largest_difference(whole.backward.dq, parts.backward.dq), tolerance);
    EXPECT_LE(largest_difference(whole.backward.dk, parts.backward.dk), tolerance);
    EXPECT_LE(largest_difference(whole.backward.dv, parts.backward.dv), tolerance);
}

const Ring kRings[] = {
    {"full", 96, 2, 4, [](Attention&, OwnedCall&) {}},
    {"causal", 96, 4, 4, [](Attention& a, OwnedCall&) { a.causal = true; }},
    {"causal_uneven_blocks", 120, 5, 3, [](Attention& a, OwnedCall&) { a.causal = true; }},
    {"window", 96, 4, 6, [](Attention& a, OwnedCall&) { a.window_left = 20, a.window_right = 5; }},
    {"dropout", 96, 3, 4, [](Attention& a, OwnedCall&) { a.causal = true, a.dropout_p = 0.2, a.dropout_seed = 17, a.dropout_offset = 4; }},
    {"softcap_alibi", 96, 4, 2,
     [](Attention& a, OwnedCall& c) {
         a.softcap = 2.0;
         a.window_right = 0;
         a.alibi_slopes = c.zeros(DType::f32, {4});
         for (int64_t h = 0; h < 4; ++h) OwnedCall::set(a.alibi_slopes, h, 0.05f * static_cast<float>(h + 1));
     }},
};

INSTANTIATE_TEST_SUITE_P(Ring, RingTest, testing::Combine(testing::ValuesIn(kRings), testing::Values(DType::f32, DType::bf16, DType::f16)));

TEST(RingMerge, ManyPartsAtOnceAndOneByOneAgree) {
    OwnedCall memory({DType::f32, 1, 1, 1, 1, 1, 1});
    constexpr int kParts = 5;
    strobe_tensor outs[kParts], lses[kParts];
    const Tensor out = memory.zeros(DType::f32, {2, 9, 3, 8}), lse = memory.zeros(DType::f32, {2, 3, 9});
    const Tensor step_out = memory.zeros(DType::f32, {2, 9, 3, 8}), step_lse = memory.zeros(DType::f32, {2, 3, 9});
    for (int n = 0; n < kParts; ++n) {
        outs[n] = memory.random(DType::f32, {2, 9, 3, 8});
        const Tensor part_lse = memory.random(DType::f32, {2, 3, 9}, 3.0f);
        for (int64_t row = n; row < 54; row += 7) OwnedCall::set(part_lse, row, -INFINITY);
        lses[n] = part_lse;
    }
    ASSERT_EQ(strobe_lse_merge(kParts, outs, lses, &out, &lse, nullptr), STROBE_OK) << strobe_last_error();
    ASSERT_EQ(strobe_lse_merge(1, outs, lses, &step_out, &step_lse, nullptr), STROBE_OK) << strobe_last_error();
    for (int n = 1; n < kParts; ++n) {
        const strobe_tensor pair_out[] = {step_out, outs[n]}, pair_lse[] = {step_lse, lses[n]};
        ASSERT_EQ(strobe_lse_merge(2, pair_out, pair_lse, &step_out, &step_lse, nullptr), STROBE_OK) << strobe_last_error();
    }
    EXPECT_LE(largest_difference(out, step_out), 1e-5);
    EXPECT_LE(largest_difference(lse, step_lse), 1e-5);
}

TEST(RingMerge, SixteenBitPartsAndVarlen) {
    OwnedCall memory({DType::f32, 1, 1, 1, 1, 1, 1});
    for (DType dtype : {DType::bf16, DType::f16}) {
        const strobe_tensor outs[] = {memory.random(dtype, {11, 3, 8}), memory.random(DType::f32, {11, 3, 8})};
        const strobe_tensor lses[] = {memory.random(DType::f32, {3, 11}), memory.random(DType::f32, {3, 11})};
        const Tensor out = memory.zeros(DType::f32, {11, 3, 8}), lse = memory.zeros(DType::f32, {3, 11});
        ASSERT_EQ(strobe_lse_merge(2, outs, lses, &out, &lse, nullptr), STROBE_OK) << strobe_last_error();
        for (int64_t i = 0; i < 11; ++i) {
            for (int64_t h = 0; h < 3; ++h) {
                const double a = static_cast<float*>(lses[0].data)[h * 11 + i], b = static_cast<float*>(lses[1].data)[h * 11 + i];
                const double sum = std::exp(a) + std::exp(b);
                EXPECT_NEAR(OwnedCall::get(lse, h * 11 + i), std::log(sum), 1e-5);
                for (int64_t d = 0; d < 8; ++d) {
                    const int64_t at = (i * 3 + h) * 8 + d;
                    const double x = load_element(outs[0].data, dtype, at), y = static_cast<float*>(outs[1].data)[at];
                    EXPECT_NEAR(OwnedCall::get(out, at), (std::exp(a) * x + std::exp(b) * y) / sum, 1e-5);
                }
            }
        }
    }
}

}  // namespace
}  // namespace strobe
