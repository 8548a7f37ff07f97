// What a call is refused for apart from the arguments of attention: its structs, and the calls beside it; and what is
// no error.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "refusals.hpp"

namespace strobe {
namespace {

TEST(Validate, Structs) {
    DenseCall c;
    EXPECT_EQ(strobe_attention_forward(nullptr, &c.forward, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"strobe_attention: is NULL"});
    EXPECT_EQ(strobe_attention_forward(&c.attention, nullptr, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"strobe_forward: is NULL"});
    EXPECT_EQ(strobe_attention_backward(&c.attention, nullptr, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"strobe_backward: is NULL"});
    EXPECT_EQ(strobe_attention_forward_plan(&c.attention, &c.forward, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"plan: is NULL"});
    strobe_plan plan{};
    EXPECT_EQ(strobe_attention_backward_plan(&c.attention, &c.backward, &plan), STROBE_INVALID_ARGUMENT);
    expect_error_says({"plan.struct_size: is 0"});
    c.attention.struct_size = 0;
    EXPECT_EQ(forward(c), STROBE_INVALID_ARGUMENT);
    expect_error_says({"strobe_attention.struct_size: is 0"});
    c.attention.struct_size = 0xFFFFFFFFu;  // garbage: nothing so far behind the struct may be read
    EXPECT_EQ(forward(c), STROBE_INVALID_ARGUMENT);
    expect_error_says({"struct_size: is 4294967295; versions have from "});
}

TEST(Validate, StructsOfANewerHeaderPassWhileTheirTailIsZero) {
    DenseCall c;
    std::vector<unsigned char> newer(sizeof c.attention + 32, 0);
    c.attention.struct_size = static_cast<uint32_t>(newer.size());
    std::memcpy(newer.data(), &c.attention, sizeof c.attention);
    const auto* attention = reinterpret_cast<const strobe_attention*>(newer.data());
    EXPECT_EQ(strobe_attention_forward(attention, &c.forward, nullptr), STROBE_OK) << strobe_last_error();
    newer[sizeof c.attention + 7] = 1;
    EXPECT_EQ(strobe_attention_forward(attention, &c.forward, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"newer strobe.h"});
}

TEST(Validate, AMeaningfulCallThatNobodyServesIsUnsupported) {
    bool has_cuda = false;
    for (int32_t n = 0; const char* name = strobe_implementation(n); ++n) {
        has_cuda = has_cuda || std::string(name).starts_with("sm");
    }
    if (has_cuda) GTEST_SKIP() << "this build has CUDA implementations";
    DenseCall c;
    for (strobe_tensor* t : {&c.attention.q, &c.attention.k, &c.attention.v, &c.forward.out, &c.forward.lse}) {
        t->device_type = STROBE_CUDA;
    }
    EXPECT_EQ(forward(c), STROBE_UNSUPPORTED);
    expect_error_says({"q: is on cuda:0"});
}

TEST(Validate, TheLastErrorIsClearedByASuccess) {
    DenseCall c;
    c.attention.num_threads = -1;
    EXPECT_NE(forward(c), STROBE_OK);
    EXPECT_STRNE(strobe_last_error(), "");
    c.attention.num_threads = 0;
    EXPECT_EQ(forward(c), STROBE_OK);
    EXPECT_STREQ(strobe_last_error(), "");
    EXPECT_EQ(strobe_set_num_threads(0), STROBE_INVALID_ARGUMENT);
    expect_error_says({"num_threads: is 0; it must be at least 1"});
}

TEST(Validate, DropoutMask) {
    struct Mask {
        DenseCall call;
        std::vector<uint8_t> memory = std::vector<uint8_t>(2 * 4 * 5 * 7);
        strobe_tensor keep;

        Mask() {
            const int64_t shape[] = {2, 4, 5, 7};
            keep = strobe_tensor_dense(memory.data(), STROBE_U8, STROBE_CPU, 4, shape);
            call.attention.dropout_p = 0.5;
        }
        strobe_status make() { return strobe_dropout_mask(&call.attention, &keep, nullptr); }
    };
    const auto refused = [](const std::function<void(Mask&)>& change, const Says& says) {
        Mask mask;
        ASSERT_EQ(mask.make(), STROBE_OK) << strobe_last_error();
        change(mask);
        EXPECT_EQ(mask.make(), STROBE_INVALID_ARGUMENT) << says[0];
        expect_error_says(says);
    };
    refused([](Mask& m) { m.call.attention.dropout_p = 1.5; }, {"dropout_p: is 1.5", "below 1"});
    refused([](Mask& m) { m.call.attention.q.ndim = 2; }, {"q: has 2 dimensions"});
    refused([](Mask& m) { m.keep.shape[3] = 6; }, {"keep: shape is (2, 4, 5, 6)", "= (2, 4, 5, 7)"});
    refused([](Mask& m) { m.keep.dtype = STROBE_BF16; }, {"keep: dtype is 1 (bf16)", "must be u8"});
    DenseCall c;
    EXPECT_EQ(strobe_dropout_mask(&c.attention, nullptr, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"keep: is NULL"});
}

TEST(Validate, LseMerge) {
    struct Merge {
        DenseCall memory;
        strobe_tensor part_out[2], part_lse[2], out, lse;

        Merge() {
            for (int n = 0; n < 2; ++n) {
                part_out[n] = memory.tensor({2, 5, 4, 6});
                part_lse[n] = memory.tensor({2, 4, 5});
            }
            out = memory.tensor({2, 5, 4, 6});
            lse = memory.tensor({2, 4, 5});
        }
        strobe_status run() { return strobe_lse_merge(2, part_out, part_lse, &out, &lse, nullptr); }
    };
    const auto refused = [](const std::function<void(Merge&)>& change, const Says& says) {
        Merge m;
        ASSERT_EQ(m.run(), STROBE_OK) << strobe_last_error();
        change(m);
        EXPECT_EQ(m.run(), STROBE_INVALID_ARGUMENT) << says[0];
        expect_error_says(says);
    };
    refused([](Merge& m) { m.part_out[1].shape[1] = 4; }, {"part_out[1]: shape is (2, 4, 4, 6)", "= (2, 5, 4, 6)"});
    refused([](Merge& m) { m.part_lse[0].shape[1] = 3; }, {"part_lse[0]: shape is (2, 3, 5)", "= (2, 4, 5)"});
    refused([](Merge& m) { m.part_lse[1].dtype = STROBE_F16; }, {"part_lse[1]: dtype is 2 (f16)", "must be f32"});
    refused([](Merge& m) { m.out.dtype = STROBE_U8; }, {"out: dtype is 4 (u8)", "f32 or bf16 or f16"});
    refused([](Merge& m) { m.out.ndim = 2; }, {"out: has 2 dimensions"});
    refused([](Merge& m) { m.lse.strides[0] = 0; }, {"lse:", "several elements in one place"});
    refused([](Merge& m) { m.part_out[0].device_type = STROBE_CUDA; }, {"part_out[0]: is on cuda:0, but out is on cpu"});
    refused([](Merge& m) { m.out.data = m.part_out[1].data; },
            {"out: overlaps part_out[1]", "only the first part may be the result"});
    refused([](Merge& m) { m.lse.data = m.part_lse[0].data; }, {"lse: overlaps part_lse[0]", "out and lse alike"});
    Merge m;
    EXPECT_EQ(strobe_lse_merge(2, m.part_out, m.part_lse, &m.part_out[0], &m.part_lse[0], nullptr), STROBE_OK)
        << strobe_last_error();
    EXPECT_EQ(strobe_lse_merge(0, m.part_out, m.part_lse, &m.out, &m.lse, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"num_parts: is 0", "at least one"});
    EXPECT_EQ(strobe_lse_merge(1, nullptr, m.part_lse, &m.out, &m.lse, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"part_out: is NULL"});
    EXPECT_EQ(strobe_lse_merge(1, m.part_out, nullptr, &m.out, &m.lse, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"part_lse: is NULL"});
    EXPECT_EQ(strobe_lse_merge(1, m.part_out, m.part_lse, nullptr, &m.lse, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"out: is NULL"});
    EXPECT_EQ(strobe_lse_merge(1, m.part_out, m.part_lse, &m.out, nullptr, nullptr), STROBE_INVALID_ARGUMENT);
    expect_error_says({"lse: is NULL"});
}

TEST(Validate, EmptyCallsAreLegal) {
    for (int empty : {0, 1, 2, 3}) {  // no batch, no queries, no keys, neither
        DenseCall c;
        for (strobe_tensor* t : {&c.attention.q, &c.forward.out, &c.backward.out, &c.backward.dout, &c.backward.dq}) {
            if (empty == 0) t->shape[0] = 0;
            if (empty == 1 || empty == 3) t->shape[1] = 0;
        }
        for (strobe_tensor* t : {&c.attention.k, &c.attention.v, &c.backward.dk, &c.backward.dv}) {
            if (empty == 0) t->shape[0] = 0;
            if (empty == 2 || empty == 3) t->shape[1] = 0;
        }
        for (strobe_tensor* t : {&c.forward.lse, &c.backward.lse}) {
            if (empty == 0) t->shape[0] = 0;
            if (empty == 1 || empty == 3) t->shape[2] = 0;
        }
        EXPECT_EQ(forward(c), STROBE_OK) << empty << ": " << strobe_last_error();
        EXPECT_EQ(backward(c), STROBE_OK) << empty << ": " << strobe_last_error();
        if (empty == 2) {  // queries without keys
            EXPECT_EQ(static_cast<float*>(c.forward.out.data)[7], 0.0f);
            EXPECT_EQ(static_cast<float*>(c.forward.lse.data)[3], -std::numeric_limits<float>::infinity());
            EXPECT_EQ(static_cast<float*>(c.backward.dq.data)[7], 0.0f);
        }
        if (empty == 1) {  // keys without queries
            EXPECT_EQ(static_cast<float*>(c.backward.dk.data)[7], 0.0f);
            EXPECT_EQ(static_cast<float*>(c.backward.dv.data)[7], 0.0f);
        }
    }
}

}  // namespace
}  // namespace strobe
