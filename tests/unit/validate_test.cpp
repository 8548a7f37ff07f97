// Every refusal of an attention call: the status, and a text that names the argument, what was given and what is
// possible.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "refusals.hpp"
#include "strobe/strobe.hpp"

namespace strobe {
namespace {

void expect_forward_refused(const Change& change, const Says& says) {
    DenseCall call;
    ASSERT_EQ(forward(call), STROBE_OK) << strobe_last_error();
    change(call);
    EXPECT_EQ(forward(call), STROBE_INVALID_ARGUMENT) << says[0];
    expect_error_says(says);
}

void expect_backward_refused(const Change& change, const Says& says) {
    DenseCall call;
    ASSERT_EQ(forward(call), STROBE_OK) << strobe_last_error();
    ASSERT_EQ(backward(call), STROBE_OK) << strobe_last_error();
    change(call);
    EXPECT_EQ(backward(call), STROBE_INVALID_ARGUMENT) << says[0];
    expect_error_says(says);
}

/// Refused by forward and backward alike, with the same words, for what memory holds.
void expect_contents_refused(const Change& change, const Says& says) {
    expect_forward_refused(change, says);
    expect_backward_refused(change, says);
}

/// The same for what a call looks like: the plan functions, which look at no memory, refuse it too.
void expect_refused(const Change& change, const Says& says) {
    expect_contents_refused(change, says);
    DenseCall call;
    change(call);
    strobe_plan plan{};
    plan.struct_size = sizeof plan;
    EXPECT_EQ(strobe_attention_forward_plan(&call.attention, &call.forward, &plan), STROBE_INVALID_ARGUMENT);
    expect_error_says(says);
    EXPECT_EQ(strobe_attention_backward_plan(&call.attention, &call.backward, &plan), STROBE_INVALID_ARGUMENT);
    expect_error_says(says);
}

TEST(Validate, ASoundCallPasses) {
    DenseCall dense;
    EXPECT_EQ(forward(dense), STROBE_OK) << strobe_last_error();
    EXPECT_EQ(backward(dense), STROBE_OK) << strobe_last_error();
    EXPECT_STREQ(strobe_last_error(), "");
    DenseCall varlen;
    varlen.make_varlen();
    EXPECT_EQ(forward(varlen), STROBE_OK) << strobe_last_error();
    EXPECT_EQ(backward(varlen), STROBE_OK) << strobe_last_error();
}

TEST(Validate, ElementTypes) {
    expect_refused([](DenseCall& c) { c.attention.q.dtype = STROBE_U8; }, {"q: dtype is 4 (u8)", "f32 or bf16 or f16"});
    expect_refused([](DenseCall& c) { c.attention.v.dtype = 77; },
                   {"v: dtype is 77 (an unknown dtype)", "f32 or bf16 or f16"});
    expect_refused([](DenseCall& c) { c.attention.k.dtype = STROBE_F16; }, {"k: dtype is f16, but q is f32"});
    expect_forward_refused([](DenseCall& c) { c.forward.out.dtype = STROBE_F16; }, {"out: dtype is 2 (f16)", "f32"});
    expect_forward_refused([](DenseCall& c) { c.forward.lse.dtype = STROBE_BF16; },
                           {"lse: dtype is 1 (bf16)", "must be f32"});
    expect_backward_refused([](DenseCall& c) { c.backward.dout.dtype = STROBE_BF16; },
                            {"dout: dtype is 1 (bf16)", "must be f32"});
    expect_backward_refused([](DenseCall& c) { c.backward.dq.dtype = STROBE_I32; }, {"dq: dtype is 3 (i32)", "f32"});
    expect_backward_refused(
        [](DenseCall& c) {
            for (strobe_tensor* t : {&c.attention.q, &c.attention.k, &c.attention.v, &c.backward.out, &c.backward.dout,
                                     &c.backward.dq, &c.backward.dk}) {
                t->dtype = STROBE_BF16;
            }
        },
        {"dv: dtype is f32, but dq is bf16", "share one dtype"});
}

TEST(Validate, Dimensions) {
    expect_refused([](DenseCall& c) { c.attention.q.ndim = 0; }, {"q: is not given", "(B, Sq, H, D)"});
    expect_refused([](DenseCall& c) { c.attention.k.ndim = 3; }, {"k: has 3 dimensions", "(B, Sk, Hk, D)"});
    expect_refused([](DenseCall& c) { c.attention.v.ndim = 5; }, {"v: has 5 dimensions", "(B, Sk, Hk, D)"});
    expect_refused([](DenseCall& c) { c.attention.q.ndim = -1; }, {"q: has -1 dimensions"});
    expect_refused([](DenseCall& c) { c.attention.q.ndim = 1 << 30; }, {"q: has 1073741824 dimensions"});
    expect_refused(
        [](DenseCall& c) {
            c.make_varlen();
            c.attention.q.ndim = 4;
        },
        {"q: has 4 dimensions", "(Tq, H, D) since cu_seqlens_q is given"});
}

TEST(Validate, Extents) {
    expect_refused([](DenseCall& c) { c.attention.q.shape[1] = -5; },
                   {"q: shape is (2, -5, 4, 8)", "must not be negative"});
    expect_refused([](DenseCall& c) { c.attention.q.shape[3] = 0; }, {"q: head_dim is 0", "from 1 to 512"});
    expect_refused([](DenseCall& c) { c.attention.q.shape[3] = 513; }, {"q: head_dim is 513", "from 1 to 512"});
    expect_refused([](DenseCall& c) { c.attention.v.shape[3] = 513; }, {"v: head_dim_v is 513", "from 1 to 512"});
    expect_refused([](DenseCall& c) { c.attention.v.shape[3] = 0; }, {"v: head_dim_v is 0", "from 1 to 512"});
    expect_refused([](DenseCall& c) { c.attention.k.shape[3] = 7; }, {"k: head_dim is 7, but q has 8"});
    expect_refused([](DenseCall& c) { c.attention.v.shape[1] = 6; },
                   {"v: shape is (2, 6, 2, 6)", "those of k, (2, 7, 2, 8)"});
    expect_refused([](DenseCall& c) { c.attention.v.shape[2] = 1; },
                   {"v: shape is (2, 7, 1, 6)", "those of k, (2, 7, 2, 8)"});
    expect_refused([](DenseCall& c) { c.attention.v.shape[0] = 1; },
                   {"v: shape is (1, 7, 2, 6)", "the batch must be that of k"});
    expect_refused([](DenseCall& c) { c.attention.q.shape[2] = 0; }, {"q: shape is (2, 5, 0, 8)", "at least one head"});
    expect_refused([](DenseCall& c) { c.attention.k.shape[2] = c.attention.v.shape[2] = 0; },
                   {"k: has 0 heads", "the 4 of q"});
    expect_refused([](DenseCall& c) { c.attention.k.shape[2] = c.attention.v.shape[2] = 3; },
                   {"k: has 3 heads", "the 4 of q"});
    expect_refused([](DenseCall& c) { c.attention.k.shape[0] = c.attention.v.shape[0] = 1; },
                   {"k: says a batch of 1, but q says 2"});
    expect_refused(
        [](DenseCall& c) {
            c.attention.q.shape[0] = c.attention.k.shape[0] = c.attention.v.shape[0] = int64_t{1} << 30;
        },
        {"q: batch 1073741824 times heads 4 is over 2147483647"});
    expect_refused([](DenseCall& c) { c.attention.q.shape[1] = int64_t{1} << 31; },
                   {"q: has 2147483648 rows", "at most 2147483647"});
    expect_refused([](DenseCall& c) { c.attention.k.shape[1] = c.attention.v.shape[1] = int64_t{1} << 31; },
                   {"k: has 2147483648 rows", "at most 2147483647"});
    expect_forward_refused([](DenseCall& c) { c.forward.out.shape[3] = 8; },
                           {"out: shape is (2, 5, 4, 8)", "= (2, 5, 4, 6)"});
    expect_forward_refused([](DenseCall& c) { c.forward.out.ndim = 0; }, {"out: shape is not given", "= (2, 5, 4, 6)"});
    expect_forward_refused([](DenseCall& c) { c.forward.lse.shape[2] = 6; },
                           {"lse: shape is (2, 4, 6)", "(B, H, Sq) = (2, 4, 5)"});
    const auto wrong = [](strobe_tensor strobe_backward::*member) {
        return [member](DenseCall& c) { (c.backward.*member).shape[1] += 1; };
    };
    expect_backward_refused(wrong(&strobe_backward::out), {"out: shape is (2, 6, 4, 6)", "= (2, 5, 4, 6)"});
    expect_backward_refused(wrong(&strobe_backward::dout), {"dout: shape is (2, 6, 4, 6)", "= (2, 5, 4, 6)"});
    expect_backward_refused(wrong(&strobe_backward::lse), {"lse: shape is (2, 5, 5)", "= (2, 4, 5)"});
    expect_backward_refused(wrong(&strobe_backward::dq), {"dq: shape is (2, 6, 4, 8)", "= (2, 5, 4, 8)"});
    expect_backward_refused(wrong(&strobe_backward::dk), {"dk: shape is (2, 8, 2, 8)", "= (2, 7, 2, 8)"});
    expect_backward_refused(wrong(&strobe_backward::dv), {"dv: shape is (2, 8, 2, 6)", "= (2, 7, 2, 6)"});
    expect_backward_refused([](DenseCall& c) { c.backward.lse.ndim = 0; }, {"lse: shape is not given", "= (2, 4, 5)"});
    expect_backward_refused(
        [](DenseCall& c) {
            c.backward.dlse = c.backward.lse;
            c.backward.dlse.shape[0] = 1;
        },
        {"dlse: shape is (1, 4, 5)", "= (2, 4, 5)"});
}

TEST(Validate, Strides) {
    expect_refused([](DenseCall& c) { c.attention.k.strides[1] = -16; },
                   {"k: strides are (112, -16, 8, 1)", "negative"});
    expect_refused([](DenseCall& c) { c.attention.q.strides[3] = 2; }, {"q: the last stride is 2", "must be 1"});
    expect_refused([](DenseCall& c) { c.attention.q.strides[0] = int64_t{1} << 61; },
                   {"q: shape (2, 5, 4, 8)", "2305843009213693952", "2^63 bytes"});
    expect_refused(
        [](DenseCall& c) {
            c.attention.q.shape[0] = int64_t{1} << 40;
            c.attention.q.shape[1] = int64_t{1} << 40;
        },
        {"q: shape (1099511627776, 1099511627776, 4, 8)", "2^63 bytes"});
    // Dense views of what no memory holds, from both headers' constructors.
    const std::array<int64_t, 4> huge = {9, 5, int64_t{1} << 60, 7};
    const auto in_c = [&](DenseCall& c) {
        c.attention.q = strobe_tensor_dense(c.attention.q.data, STROBE_F32, STROBE_CPU, 4, huge.data());
    };
    const auto in_cpp = [&](DenseCall& c) {
        c.attention.q = Tensor(c.attention.q.data, DType::f32, huge, {});
    };
    expect_refused(in_c, {"q: shape (9, 5, 1152921504606846976, 7)", "strides (9223372036854775807, ", "2^63 bytes"});
    expect_refused(in_cpp, {"q: shape (9, 5, 1152921504606846976, 7)", "strides (9223372036854775807, ", "2^63 bytes"});
    const std::vector<int64_t> many(STROBE_MAX_DIMS + 1, 2);
    const auto dims = static_cast<int32_t>(many.size());
    expect_refused(
        [&](DenseCall& c) { c.attention.q = strobe_tensor_dense(c.attention.q.data, STROBE_F32, STROBE_CPU, dims, many.data()); },
        {"q: has 6 dimensions", "must be (B, Sq, H, D)"});
    expect_forward_refused([](DenseCall& c) { c.forward.out.strides[2] = 0; },
                           {"out: shape (2, 5, 4, 6)", "several elements in one place"});
    expect_forward_refused([](DenseCall& c) { c.forward.lse.strides[1] = 4; },
                           {"lse:", "several elements in one place"});
    expect_forward_refused([](DenseCall& c) { c.forward.lse.strides[2] = 2; },
                           {"lse: the last stride is 2", "must be 1"});
    expect_backward_refused([](DenseCall& c) { c.backward.dk.strides[0] = 0; },
                            {"dk:", "several elements in one place"});
    expect_backward_refused([](DenseCall& c) { c.backward.dout.strides[3] = 3; },
                            {"dout: the last stride is 3", "must be 1"});
}

TEST(Validate, Pointers) {
    expect_contents_refused([](DenseCall& c) { c.attention.q.data = nullptr; }, {"q: data is NULL", "(2, 5, 4, 8)"});
    expect_contents_refused([](DenseCall& c) { c.attention.v.data = static_cast<char*>(c.attention.v.data) + 1; },
                            {"v: data 0x", "not aligned to its element size of 4 bytes"});
    expect_forward_refused([](DenseCall& c) { c.forward.out.data = nullptr; }, {"out: data is NULL"});
    expect_backward_refused([](DenseCall& c) { c.backward.dv.data = nullptr; }, {"dv: data is NULL"});
}

TEST(Validate, Devices) {
    expect_refused([](DenseCall& c) { c.attention.q.device_type = 7; }, {"q: device_type is 7", "0 (cpu) or 1 (cuda)"});
    expect_refused([](DenseCall& c) { c.attention.q.device_index = -1; },
                   {"q: device_index is -1", "must not be negative"});
    expect_refused([](DenseCall& c) { c.attention.k.device_type = STROBE_CUDA; },
                   {"k: is on cuda:0, but q is on cpu", "share one device"});
    expect_forward_refused([](DenseCall& c) { c.forward.out.device_type = STROBE_CUDA; },
                           {"out: is on cuda:0, but q is on cpu"});
    expect_backward_refused([](DenseCall& c) { c.backward.dq.device_type = STROBE_CUDA; },
                            {"dq: is on cuda:0, but q is on cpu"});
}

TEST(Validate, OverlappingOutputs) {
    expect_forward_refused([](DenseCall& c) { c.forward.out.data = c.attention.q.data; },
                           {"out: overlaps q in memory"});
    expect_forward_refused(
        [](DenseCall& c) {
            c.attention.v.data = c.tensor({1000}).data;  // room behind it, so that out reaches into nothing else
            c.forward.out.data = static_cast<float*>(c.attention.v.data) + 100;
        },
        {"out: overlaps v"});
    expect_forward_refused([](DenseCall& c) { c.forward.lse.data = c.forward.out.data; }, {"lse: overlaps out"});
    expect_backward_refused([](DenseCall& c) { c.backward.dk.data = static_cast<float*>(c.backward.dq.data) + 1; },
                            {"dk: overlaps dq"});
    expect_backward_refused([](DenseCall& c) { c.backward.dv.data = c.backward.dout.data; }, {"dv: overlaps dout"});
    expect_backward_refused([](DenseCall& c) { c.backward.lse.data = c.backward.dk.data; }, {"dk: overlaps lse"});
    expect_backward_refused([](DenseCall& c) { c.backward.dq.data = c.attention.q.data; }, {"dq: overlaps q"});
}

TEST(Validate, PackedViewsDoNotOverlap) {
    // dq, dk, dv as views of one (B, S, 3, H, D): interleaved, yet apart.
    constexpr int64_t kB = 2, kS = 5, kH = 3, kD = 4;
    DenseCall c;
    const auto packed = [&](const strobe_tensor& whole, int which) {
        strobe_tensor t = whole;
        const int64_t shape[] = {kB, kS, kH, kD}, strides[] = {kS * 3 * kH * kD, 3 * kH * kD, kD, 1};
        t.ndim = 4;
        std::copy(shape, shape + 4, t.shape);
        std::copy(strides, strides + 4, t.strides);
        t.data = static_cast<float*>(whole.data) + which * kH * kD;
        return t;
    };
    const strobe_tensor qkv = c.tensor({kB, kS, 3, kH, kD}), dqkv = c.tensor({kB, kS, 3, kH, kD});
    c.attention.q = packed(qkv, 0);
    c.attention.k = packed(qkv, 1);
    c.attention.v = packed(qkv, 2);
    c.forward.out = c.backward.out = c.tensor({kB, kS, kH, kD});
    c.backward.dout = c.tensor({kB, kS, kH, kD});
    c.forward.lse = c.backward.lse = c.tensor({kB, kH, kS});
    c.backward.dq = packed(dqkv, 0);
    c.backward.dk = packed(dqkv, 1);
    c.backward.dv = packed(dqkv, 2);
    EXPECT_EQ(forward(c), STROBE_OK) << strobe_last_error();
    EXPECT_EQ(backward(c), STROBE_OK) << strobe_last_error();
    c.backward.dk.data = static_cast<float*>(c.backward.dk.data) - 1;
    EXPECT_EQ(backward(c), STROBE_INVALID_ARGUMENT);
    expect_error_says({"dk: overlaps dq"});
}

TEST(Validate, SequenceLengths) {
    const auto varlen = [](Change change) -> Change {
        return [change](DenseCall& c) {
            c.make_varlen();
            change(c);
        };
    };
    const auto contents = [&](const Change& change, const Says& says) { expect_contents_refused(varlen(change), says); };
    const auto shapes = [&](const Change& change, const Says& says) { expect_refused(varlen(change), says); };
    contents([](DenseCall& c) { c.attention.cu_seqlens_q = c.integers({1, 2, 10}); },
             {"cu_seqlens_q: starts with 1", "start with 0"});
    contents([](DenseCall& c) { c.attention.cu_seqlens_k = c.integers({0, 7, 6}); },
             {"cu_seqlens_k: falls from 7 to 6 at index 2", "never fall"});
    contents([](DenseCall& c) { c.attention.cu_seqlens_q = c.integers({0, 3, 11}); },
             {"cu_seqlens_q: ends with 11", "only 10 rows"});
    contents([](DenseCall& c) { c.attention.cu_seqlens_q = c.integers({0, 0, 9}); },
             {"max_seqlen_q: is 8, but sequence 1 has 9 rows"});
    contents([](DenseCall& c) { c.attention.cu_seqlens_k = c.integers({0, std::numeric_limits<int32_t>::min(), 14}); },
             {"cu_seqlens_k: falls from 0 to -2147483648"});
    contents([](DenseCall& c) { c.attention.seqused_q = c.integers({3, 8}); },
             {"seqused_q: is 3 at index 0", "from 0 to the sequence's 2 rows"});
    contents([](DenseCall& c) { c.attention.seqused_k = c.integers({7, -1}); },
             {"seqused_k: is -1 at index 1", "from 0 to the sequence's 7 rows"});
    shapes([](DenseCall& c) { c.attention.cu_seqlens_q.ndim = 2; },
           {"cu_seqlens_q: has 2 dimensions", "one-dimensional"});
    shapes([](DenseCall& c) { c.attention.cu_seqlens_q.dtype = STROBE_F32; },
           {"cu_seqlens_q: dtype is 0 (f32)", "must be i32"});
    shapes([](DenseCall& c) { c.attention.cu_seqlens_k.shape[0] = 0; }, {"cu_seqlens_k: is empty", "batch + 1"});
    shapes([](DenseCall& c) { c.attention.cu_seqlens_k = c.integers({0, 14}); },
           {"cu_seqlens_k: says a batch of 1, but cu_seqlens_q says 2"});
    shapes([](DenseCall& c) { c.attention.cu_seqlens_q.strides[0] = 2; },
           {"cu_seqlens_q: the last stride is 2", "must be 1"});
    shapes([](DenseCall& c) { c.attention.cu_seqlens_q.device_type = STROBE_CUDA; },
           {"cu_seqlens_q: is on cuda:0, but q is on cpu"});
    shapes([](DenseCall& c) { c.attention.max_seqlen_q = -1; }, {"max_seqlen_q: is -1", "from 0 to 2147483647"});
    shapes([](DenseCall& c) { c.attention.max_seqlen_k = int64_t{1} << 40; },
           {"max_seqlen_k: is 1099511627776", "from 0 to 2147483647"});
    shapes([](DenseCall& c) { c.attention.seqused_k = c.integers({7, 7, 7}); },
           {"seqused_k: shape is (3)", "(B) = (2)"});
    shapes([](DenseCall& c) { c.forward.lse = c.backward.lse = c.tensor({10, 4}); },
           {"lse: shape is (10, 4)", "(H, Tq) = (4, 10)"});

    expect_refused([](DenseCall& c) { c.attention.max_seqlen_q = 6; },
                   {"max_seqlen_q: is 6 without cu_seqlens_q", "the 5 rows"});
    expect_contents_refused([](DenseCall& c) { c.attention.seqused_q = c.integers({5, 6}); },
                            {"seqused_q: is 6 at index 1", "from 0 to the sequence's 5 rows"});
    expect_refused([](DenseCall& c) { c.attention.seqused_q.ndim = 2; },
                   {"seqused_q: has 2 dimensions", "one-dimensional"});
}

TEST(Validate, Options) {
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
    expect_refused([](DenseCall& c) { c.attention.num_threads = -2; }, {"num_threads: is -2", "at least 1, or 0"});
    expect_refused([](DenseCall& c) { c.attention.window_left = -2; }, {"window_left: is -2", "or -1 for no bound"});
    expect_refused([](DenseCall& c) { c.attention.window_right = int64_t{1} << 40; },
                   {"window_right: is 1099511627776", "from 0 to 2147483647"});
    expect_refused([](DenseCall& c) { c.attention.causal = 1, c.attention.window_right = 3; },
                   {"window_right: is 3 beside causal", "leave it -1 or 0"});
    for (double bad : {kNaN, kInf, -kInf}) {
        expect_refused([=](DenseCall& c) { c.attention.has_softmax_scale = 1, c.attention.softmax_scale = bad; },
                       {"softmax_scale: is ", "finite"});
        expect_refused([=](DenseCall& c) { c.attention.softcap = bad; }, {"softcap: is ", "finite and positive, or 0"});
        expect_refused([=](DenseCall& c) { c.attention.dropout_p = bad; },
                       {"dropout_p: is ", "at least 0 and below 1"});
    }
    expect_refused([](DenseCall& c) { c.attention.has_softmax_scale = 1, c.attention.softmax_scale = 1e300; },
                   {"softmax_scale: is 1e+300", "range of f32"});
    expect_refused([](DenseCall& c) { c.attention.softcap = -30; }, {"softcap: is -30", "finite and positive, or 0"});
    expect_refused([](DenseCall& c) { c.attention.softcap = 1e300; },
                   {"softcap: is 1e+300", "finite and positive, or 0"});
    expect_refused([](DenseCall& c) { c.attention.dropout_p = 1; }, {"dropout_p: is 1", "below 1"});
    expect_refused([](DenseCall& c) { c.attention.dropout_p = -0.1; }, {"dropout_p: is -0.1", "at least 0"});
    expect_refused([](DenseCall& c) { c.attention.has_positions = 1, c.attention.q_position = -1; },
                   {"q_position: is -1", "with 5 rows", "from 0 to 2147483642"});
    expect_refused([](DenseCall& c) { c.attention.has_positions = 1, c.attention.k_position = int64_t{1} << 31; },
                   {"k_position: is 2147483648", "with 7 rows", "2147483640"});
    expect_refused([](DenseCall& c) { c.attention.implementation = "abacus"; },
                   {"implementation: is \"abacus\"", "for cpu there are:", "reference"});
}

TEST(Validate, AlibiAndBias) {
    expect_refused([](DenseCall& c) { c.attention.alibi_slopes = c.tensor({5}); },
                   {"alibi_slopes: shape is (5)", "(H) = (4)"});
    expect_refused([](DenseCall& c) { c.attention.alibi_slopes = c.tensor({4, 2}); },
                   {"alibi_slopes: shape is (4, 2)", "(B, H) = (2, 4)"});
    expect_refused([](DenseCall& c) { c.attention.alibi_slopes = c.tensor({2, 4, 1}); },
                   {"alibi_slopes: has 3 dimensions", "(H) or (B, H)"});
    expect_refused([](DenseCall& c) { c.attention.alibi_slopes = c.tensor({4}, STROBE_BF16); },
                   {"alibi_slopes: dtype is 1 (bf16)", "must be f32"});
    expect_refused(
        [](DenseCall& c) {
            c.attention.alibi_slopes = c.tensor({4});
            c.attention.alibi_slopes.strides[0] = 2;
        },
        {"alibi_slopes: the last stride is 2", "must be 1"});
    expect_refused([](DenseCall& c) { c.attention.bias = c.tensor({5, 7}); },
                   {"bias: has 2 dimensions", "(B, H, Sq, Sk)"});
    expect_refused([](DenseCall& c) { c.attention.bias = c.tensor({2, 4, 5, 6}); },
                   {"bias: shape is (2, 4, 5, 6)", "(2, 4, 5, 7)", "possibly 1"});
    expect_refused([](DenseCall& c) { c.attention.bias = c.tensor({2, 2, 5, 7}); },
                   {"bias: shape is (2, 2, 5, 7)", "(2, 4, 5, 7)"});
    expect_refused([](DenseCall& c) { c.attention.bias = c.tensor({2, 4, 5, 7}, STROBE_BF16); },
                   {"bias: dtype is 1 (bf16)", "f32"});
    const auto with_bias = [](Change change) -> Change {
        return [change](DenseCall& c) {
            c.attention.bias = c.tensor({1, 4, 5, 7});
            c.backward.dbias = c.tensor({1, 4, 5, 7});
            change(c);
        };
    };
    expect_backward_refused([](DenseCall& c) { c.backward.dbias = c.tensor({1, 4, 5, 7}); },
                            {"dbias: is given without bias"});
    expect_backward_refused(with_bias([](DenseCall& c) { c.backward.dbias = c.tensor({2, 4, 5, 7}); }),
                            {"dbias: shape is (2, 4, 5, 7)", "the shape of bias = (1, 4, 5, 7)"});
    expect_backward_refused(with_bias([](DenseCall& c) { c.backward.dbias.dtype = STROBE_F16; }),
                            {"dbias: dtype is 2 (f16)", "f32"});
    expect_backward_refused(with_bias([](DenseCall& c) { c.backward.dbias.strides[1] = 0; }),
                            {"dbias:", "several elements in one place"});
    expect_backward_refused(with_bias([](DenseCall& c) { c.backward.dbias.data = c.attention.bias.data; }),
                            {"dbias: overlaps bias"});
}

TEST(Validate, AccumulationIsInF32) {
    expect_backward_refused(
        [](DenseCall& c) {
            for (strobe_tensor* t : {&c.attention.q, &c.attention.k, &c.attention.v, &c.backward.out, &c.backward.dout,
                                     &c.backward.dq, &c.backward.dk, &c.backward.dv}) {
                t->dtype = STROBE_F16;
            }
            c.backward.accumulate = 1;
        },
        {"accumulate: is set while dq is f16", "f32"});
}

}  // namespace
}  // namespace strobe
