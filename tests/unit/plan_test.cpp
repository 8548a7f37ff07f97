// A call of the public interface becomes the launch parameters that a case's data say on their own.
#include "plan.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "verify/verify.hpp"

namespace strobe::verify {
namespace {

void expect_same(const TensorRef& a, const TensorRef& b, const char* what) {
    EXPECT_EQ(a.data, b.data) << what;
    EXPECT_EQ(a.batch_stride, b.batch_stride) << what;
    EXPECT_EQ(a.row_stride, b.row_stride) << what;
    EXPECT_EQ(a.head_stride, b.head_stride) << what;
}

void expect_same(const RowRef& a, const RowRef& b, const char* what) {
    EXPECT_EQ(a.data, b.data) << what;
    EXPECT_EQ(a.batch_stride, b.batch_stride) << what;
    EXPECT_EQ(a.head_stride, b.head_stride) << what;
}

void expect_same(const BiasRef& a, const BiasRef& b, const char* what) {
    EXPECT_EQ(a.data, b.data) << what;
    EXPECT_EQ(a.batch_stride, b.batch_stride) << what;
    EXPECT_EQ(a.head_stride, b.head_stride) << what;
    EXPECT_EQ(a.row_stride, b.row_stride) << what;
    EXPECT_EQ(a.col_stride, b.col_stride) << what;
}

void expect_same_attention(const AttentionParams& a, const AttentionParams& b) {
    EXPECT_EQ(a.size.batch, b.size.batch);
    EXPECT_EQ(a.size.num_heads, b.size.num_heads);
    EXPECT_EQ(a.size.num_heads_k, b.size.num_heads_k);
    EXPECT_EQ(a.size.head_dim, b.size.head_dim);
    EXPECT_EQ(a.size.head_dim_v, b.size.head_dim_v);
    EXPECT_EQ(a.size.seqlen_q, b.size.seqlen_q);
    EXPECT_EQ(a.size.seqlen_k, b.size.seqlen_k);
    EXPECT_EQ(a.size.total_q, b.size.total_q);
    EXPECT_EQ(a.size.total_k, b.size.total_k);
    EXPECT_EQ(a.seqlens.cu_seqlens_q, b.seqlens.cu_seqlens_q);
    EXPECT_EQ(a.seqlens.cu_seqlens_k, b.seqlens.cu_seqlens_k);
    EXPECT_EQ(a.seqlens.seqused_q, b.seqlens.seqused_q);
    EXPECT_EQ(a.seqlens.seqused_k, b.seqlens.seqused_k);
    EXPECT_EQ(a.mask.window_left, b.mask.window_left);
    EXPECT_EQ(a.mask.window_right, b.mask.window_right);
    EXPECT_EQ(a.mask.has_positions, b.mask.has_positions);
    EXPECT_EQ(a.mask.q_position, b.mask.q_position);
    EXPECT_EQ(a.mask.k_position, b.mask.k_position);
    EXPECT_EQ(a.score.softmax_scale, b.score.softmax_scale);
    EXPECT_EQ(a.score.softcap, b.score.softcap);
    EXPECT_EQ(a.score.alibi_slopes, b.score.alibi_slopes);
    EXPECT_EQ(a.score.alibi_batch_stride, b.score.alibi_batch_stride);
    expect_same(a.score.bias, b.score.bias, "bias");
    EXPECT_EQ(a.dropout.seed, b.dropout.seed);
    EXPECT_EQ(a.dropout.offset, b.dropout.offset);
    EXPECT_EQ(a.dropout.drop_below, b.dropout.drop_below);
    EXPECT_EQ(a.dropout.rescale, b.dropout.rescale);
    EXPECT_EQ(a.dtype, b.dtype);
    EXPECT_EQ(a.out_dtype, b.out_dtype);
    EXPECT_EQ(a.bias_dtype, b.score.bias ? b.bias_dtype : DType::f32);
    expect_same(a.q, b.q, "q");
    expect_same(a.k, b.k, "k");
    expect_same(a.v, b.v, "v");
    expect_same(a.out, b.out, "out");
    expect_same(a.lse, b.lse, "lse");
}

strobe_tensor view_of(const CaseData& data, const Placement& placement, const View& view) {
    strobe_tensor t{};
    if (!view.given()) return t;
    t.data = placement.at(data, view);
    t.dtype = static_cast<int32_t>(data.buffers[view.buffer].dtype);
    t.ndim = static_cast<int32_t>(view.shape.size());
    std::copy(view.shape.begin(), view.shape.end(), t.shape);
    std::copy(view.strides.begin(), view.strides.end(), t.strides);
    return t;
}

TEST(Plan, NoSequenceIsLongerThanAllOfThem) {
    strobe_attention a;
    strobe_attention_init(&a);
    const int64_t q_shape[] = {70, 2, 8}, k_shape[] = {50, 2, 8}, sums_shape[] = {4};
    a.q = strobe_tensor_dense(nullptr, STROBE_F32, STROBE_CPU, 3, q_shape);
    a.k = a.v = strobe_tensor_dense(nullptr, STROBE_F32, STROBE_CPU, 3, k_shape);
    a.cu_seqlens_q = a.cu_seqlens_k = strobe_tensor_dense(nullptr, STROBE_I32, STROBE_CPU, 1, sums_shape);
    a.max_seqlen_q = a.max_seqlen_k = 1 << 30;
    EXPECT_EQ(strobe::problem_size(a).seqlen_q, 70);
    EXPECT_EQ(strobe::problem_size(a).seqlen_k, 50);
    const int64_t bias_shape[] = {3, 2, 100, 100};  // all of whose gradient is written
    a.bias = strobe_tensor_dense(nullptr, STROBE_F32, STROBE_CPU, 4, bias_shape);
    a.max_seqlen_q = a.max_seqlen_k = 100;
    EXPECT_EQ(strobe::problem_size(a).seqlen_q, 100);
    EXPECT_EQ(strobe::problem_size(a).seqlen_k, 100);
    a.bias = {};
    a.max_seqlen_q = a.max_seqlen_k = 40;
    EXPECT_EQ(strobe::problem_size(a).seqlen_q, 40);
    EXPECT_EQ(strobe::problem_size(a).seqlen_k, 40);
}

TEST(Plan, EveryOptionReachesTheKernel) {
    for (const Case& c : option_cases({.dtype = DType::bf16, .seqlen_q = 7, .seqlen_k = 12, .head_dim = 8})) {
        SCOPED_TRACE(c.name());
        const CaseData data(c);
        std::vector<std::vector<std::byte>> images;
        Placement placement;
        for (const Buffer& buffer : data.buffers) images.push_back(encode(buffer, false));
        for (auto& image : images) placement.buffers.push_back(image.data());
        const auto view = [&](const View& v) { return view_of(data, placement, v); };

        Problem problem;
        strobe_attention& a = problem.attention;
        strobe_attention_init(&a);
        a.q = view(data.q);
        a.k = view(data.k);
        a.v = view(data.v);
        a.cu_seqlens_q = view(data.cu_seqlens_q);
        a.cu_seqlens_k = view(data.cu_seqlens_k);
        a.seqused_q = view(data.seqused_q);
        a.seqused_k = view(data.seqused_k);
        a.max_seqlen_q = c.varlen_q ? c.seqlen_q : 0;
        a.max_seqlen_k = c.varlen_k ? c.seqlen_k : 0;
        a.alibi_slopes = view(data.alibi_slopes);
        a.bias = view(data.bias);
        a.causal = c.window_right == 0;
        a.window_left = c.window_left;
        a.window_right = c.window_right == 0 ? -1 : c.window_right;
        a.has_positions = c.positions;
        a.q_position = c.q_position;
        a.k_position = c.k_position;
        a.has_softmax_scale = c.softmax_scale != 0;
        a.softmax_scale = c.softmax_scale;
        a.softcap = c.softcap;
        a.dropout_p = c.dropout_p;
        a.dropout_seed = data.dropout_seed;
        a.dropout_offset = data.dropout_offset;
        a.deterministic = c.deterministic;

        problem.direction = Direction::forward;
        problem.forward.out = view(data.out);
        problem.forward.lse = view(data.lse);
        expect_same_attention(strobe::forward_params(problem), forward_params(data, placement));

        problem.direction = Direction::backward;
        strobe_backward& b = problem.backward;
        b.out = view(data.out);
        b.lse = view(data.lse);
        b.dout = view(data.dout);
        b.dlse = view(data.dlse);
        b.dq = view(data.dq);
        b.dk = view(data.dk);
        b.dv = view(data.dv);
        b.dbias = view(data.dbias);
        b.accumulate = c.accumulate;
        const BackwardParams made = strobe::backward_params(problem), expected = backward_params(data, placement);
        expect_same_attention(made, expected);
        expect_same(made.dout, expected.dout, "dout");
        expect_same(made.dlse, expected.dlse, "dlse");
        expect_same(made.dq, expected.dq, "dq");
        expect_same(made.dk, expected.dk, "dk");
        expect_same(made.dv, expected.dv, "dv");
        expect_same(made.dbias, expected.dbias, "dbias");
        EXPECT_EQ(made.grad_dtype, expected.grad_dtype);
        EXPECT_EQ(made.dbias_dtype, expected.dbias ? expected.dbias_dtype : DType::f32);
        EXPECT_EQ(made.accumulate, expected.accumulate);
        EXPECT_EQ(made.deterministic, expected.deterministic);
    }
}

TEST(Plan, DropoutIsRoundedToSixteenBitsAndRescaledByWhatIsUsed) {
    for (double p : {0.0, 1e-6, 1.0 / 65536, 0.1, 0.17, 0.5, 0.999, 0.9999999}) {
        const Dropout d = make_dropout(p, 11, 13);
        EXPECT_EQ(d.seed, 11u);
        EXPECT_EQ(d.offset, 13u);
        EXPECT_LT(d.drop_below, 65536u);
        EXPECT_LE(std::abs(d.drop_below / 65536.0 - p), p > 0.9999 ? 1.0 / 65536 : 0.5 / 65536) << p;
        EXPECT_FLOAT_EQ(d.rescale, static_cast<float>(1.0 / (1.0 - d.drop_below / 65536.0)));
    }
}

}  // namespace
}  // namespace strobe::verify
