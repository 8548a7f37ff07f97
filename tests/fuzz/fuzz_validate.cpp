// Arbitrary calls: whatever the structs hold, the answer is a status and a text, never a crash; and a call that is accepted
// runs inside its buffers. Most bytes become small shapes of a call that is nearly right, so that deep checks are reached;
// data pointers lead to blocks of known size behind which the address sanitizer watches.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "strobe/strobe.h"
#include "tensor.hpp"

namespace {

/// Takes values off the input; zeros once it is used up.
class Input {
public:
    Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

    uint8_t byte() { return at_ < size_ ? data_[at_++] : uint8_t{0}; }
    bool one_in(int n) { return byte() % n == 0 && at_ < size_; }
    template <class T>
    T raw() {
        T value{};
        for (size_t i = 0; i < sizeof value; ++i) reinterpret_cast<uint8_t*>(&value)[i] = byte();
        return value;
    }

private:
    const uint8_t* data_;
    size_t size_;
    size_t at_ = 0;
};

struct Call {
    Input in;
    std::vector<std::unique_ptr<std::byte[]>> blocks;
    int64_t batch, seqlen_q, seqlen_k, heads, heads_k, dim, dim_v;
    int32_t dtype;

    Call(const uint8_t* data, size_t size) : in(data, size) {
        batch = in.byte() % 3;
        seqlen_q = in.byte() % 5;
        seqlen_k = in.byte() % 5;
        heads_k = 1 + in.byte() % 2;
        heads = heads_k * (1 + in.byte() % 2);
        dim = 1 + in.byte() % 9;
        dim_v = in.one_in(2) ? 1 + in.byte() % 9 : dim;
        dtype = in.byte() % 3;
    }

    /// A block that holds just what the view spans, if that is little; else nothing.
    void provide(strobe_tensor& t) {
        t.data = nullptr;
        if (t.ndim < 1 || t.ndim > STROBE_MAX_DIMS) return;
        int64_t span = 1;
        for (int i = 0; i < t.ndim; ++i) {
            if (t.shape[i] < 0 || t.shape[i] > 64 || t.strides[i] < 0 || t.strides[i] > 4096) return;
            span += t.shape[i] > 0 ? (t.shape[i] - 1) * t.strides[i] : 0;
        }
        const size_t bytes = static_cast<size_t>(span) * strobe::dtype_bytes(t.dtype);
        blocks.push_back(std::make_unique<std::byte[]>(bytes));
        for (size_t i = 0; i < bytes; ++i) blocks.back()[i] = static_cast<std::byte>(in.byte() & 0x3F);
        t.data = blocks.back().get();
    }

    strobe_tensor tensor(int32_t type, std::initializer_list<int64_t> shape) {
        strobe_tensor t = strobe_tensor_dense(nullptr, static_cast<strobe_dtype>(type), STROBE_CPU,
                                              static_cast<int32_t>(shape.size()), shape.begin());
        if (in.one_in(12)) t.shape[in.byte() % STROBE_MAX_DIMS] = in.one_in(3) ? in.raw<int64_t>() : in.byte() % 8;
        if (in.one_in(12)) t.strides[in.byte() % STROBE_MAX_DIMS] = in.one_in(3) ? in.raw<int64_t>() : in.byte() % 64;
        if (in.one_in(24)) t.dtype = in.raw<int8_t>();
        if (in.one_in(24)) t.ndim = in.raw<int8_t>();
        if (in.one_in(48)) t.device_type = in.raw<int8_t>();
        if (in.one_in(48)) t.device_index = in.raw<int8_t>();
        provide(t);
        return t;
    }

    strobe_tensor rows(int32_t type, bool varlen, int64_t seqlen, int64_t num_heads, int64_t d) {
        return varlen ? tensor(type, {batch * seqlen, num_heads, d}) : tensor(type, {batch, seqlen, num_heads, d});
    }

    strobe_tensor prefix_sums(int64_t seqlen) {
        strobe_tensor t = tensor(STROBE_I32, {batch + 1});
        if (t.data && t.ndim == 1 && t.dtype == STROBE_I32 && t.strides[0] == 1) {
            auto* sums = static_cast<int32_t*>(t.data);
            for (int64_t b = 0; b < t.shape[0]; ++b) sums[b] = static_cast<int32_t>(b * seqlen);
            if (in.one_in(4) && t.shape[0] > 0) sums[in.byte() % t.shape[0]] = in.raw<int32_t>();
        }
        return t;
    }

    strobe_tensor counts(int64_t seqlen) {
        strobe_tensor t = tensor(STROBE_I32, {batch});
        if (t.data && t.ndim == 1 && t.dtype == STROBE_I32 && t.strides[0] == 1) {
            for (int64_t b = 0; b < t.shape[0]; ++b) static_cast<int32_t*>(t.data)[b] = static_cast<int32_t>(in.byte() % (seqlen + 2));
        }
        return t;
    }

    double number() { return in.one_in(4) ? in.raw<double>() : in.byte() / 16.0; }
    int64_t window() { return in.one_in(8) ? in.raw<int64_t>() : in.byte() % 6 - 1; }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Call c(data, size);
    const bool varlen_q = c.in.one_in(4), varlen_k = c.in.one_in(4);

    strobe_attention a;
    strobe_attention_init(&a);
    a.num_threads = c.in.one_in(16) ? c.in.raw<int8_t>() : 1;
    a.q = c.rows(c.dtype, varlen_q, c.seqlen_q, c.heads, c.dim);
    a.k = c.rows(c.dtype, varlen_k, c.seqlen_k, c.heads_k, c.dim);
    a.v = c.rows(c.dtype, varlen_k, c.seqlen_k, c.heads_k, c.dim_v);
    if (varlen_q) a.cu_seqlens_q = c.prefix_sums(c.seqlen_q), a.max_seqlen_q = c.seqlen_q;
    if (varlen_k) a.cu_seqlens_k = c.prefix_sums(c.seqlen_k), a.max_seqlen_k = c.seqlen_k;
    if (c.in.one_in(6)) a.max_seqlen_q = c.window();
    if (c.in.one_in(6)) a.max_seqlen_k = c.window();
    if (c.in.one_in(4)) a.seqused_q = c.counts(c.seqlen_q);
    if (c.in.one_in(4)) a.seqused_k = c.counts(c.seqlen_k);
    if (c.in.one_in(4)) a.alibi_slopes = c.in.one_in(2) ? c.tensor(STROBE_F32, {c.heads}) : c.tensor(STROBE_F32, {c.batch, c.heads});
    const bool has_bias = c.in.one_in(3);
    if (has_bias) {
        a.bias = c.tensor(c.in.one_in(2) ? c.dtype : STROBE_F32,
                          {c.in.one_in(2) ? 1 : c.batch, c.in.one_in(2) ? 1 : c.heads, c.in.one_in(2) ? 1 : c.seqlen_q,
                           c.in.one_in(2) ? 1 : c.seqlen_k});
    }
    a.causal = c.in.one_in(3);
    a.deterministic = c.in.one_in(2);
    a.window_left = c.window();
    a.window_right = c.window();
    a.has_positions = c.in.one_in(4);
    a.q_position = c.window();
    a.k_position = c.window();
    a.has_softmax_scale = c.in.one_in(2);
    a.softmax_scale = c.number();
    a.softcap = c.in.one_in(2) ? c.number() : 0;
    a.dropout_p = c.in.one_in(3) ? c.number() : 0;
    a.dropout_seed = c.in.raw<uint64_t>();
    if (c.in.one_in(4)) a.implementation = c.in.one_in(3) ? "nobody" : "reference";
    if (c.in.one_in(32)) a.struct_size = c.in.raw<uint32_t>() % sizeof a;

    strobe_backward b;
    strobe_backward_init(&b);
    const int32_t out_dtype = c.in.one_in(4) ? STROBE_F32 : c.dtype, grad_dtype = c.in.one_in(4) ? STROBE_F32 : c.dtype;
    b.out = c.rows(out_dtype, varlen_q, c.seqlen_q, c.heads, c.dim_v);
    b.lse = varlen_q ? c.tensor(STROBE_F32, {c.heads, c.batch * c.seqlen_q}) : c.tensor(STROBE_F32, {c.batch, c.heads, c.seqlen_q});
    b.dout = c.rows(c.dtype, varlen_q, c.seqlen_q, c.heads, c.dim_v);
    b.dq = c.rows(grad_dtype, varlen_q, c.seqlen_q, c.heads, c.dim);
    b.dk = c.rows(grad_dtype, varlen_k, c.seqlen_k, c.heads_k, c.dim);
    b.dv = c.rows(grad_dtype, varlen_k, c.seqlen_k, c.heads_k, c.dim_v);
    if (has_bias && c.in.one_in(2)) b.dbias = c.tensor(STROBE_F32, {a.bias.shape[0], a.bias.shape[1], a.bias.shape[2], a.bias.shape[3]});
    b.accumulate = c.in.one_in(4);
    if (c.in.one_in(16)) b.dq.data = a.q.data;

    strobe_forward f;
    strobe_forward_init(&f);
    f.out = b.out;
    if (!c.in.one_in(4)) f.lse = b.lse;

    strobe_plan plan;
    plan.struct_size = sizeof plan;
    const auto workspace = [&](strobe_status planned) -> std::unique_ptr<std::byte[]> {
        if (planned != STROBE_OK || plan.workspace_bytes > (size_t{64} << 20)) return nullptr;
        return std::make_unique<std::byte[]>(plan.workspace_bytes);
    };
    const auto forward_workspace = workspace(strobe_attention_forward_plan(&a, &f, &plan));
    f.workspace = forward_workspace.get();
    f.workspace_bytes = forward_workspace ? plan.workspace_bytes : 0;
    if (strobe_attention_forward(&a, &f, nullptr) != STROBE_OK && strobe_last_error()[0] == '\0') std::abort();

    const auto backward_workspace = workspace(strobe_attention_backward_plan(&a, &b, &plan));
    b.workspace = backward_workspace.get();
    b.workspace_bytes = backward_workspace ? plan.workspace_bytes : 0;
    if (strobe_attention_backward(&a, &b, nullptr) != STROBE_OK && strobe_last_error()[0] == '\0') std::abort();
    return 0;
}
