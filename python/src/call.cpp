#include "call.hpp"

#include "workspace.hpp"

namespace strobe::torch_ops {
namespace {

int32_t torch_num_threads() {
    uint32_t threads = 0;
    if (torch_get_num_threads && torch_get_num_threads(&threads) == 0) return static_cast<int32_t>(threads);
    return strobe_num_threads();  // a number, since the workspace that a call needs grows with it
}

}  // namespace

Options Options::take_plain(Arguments& arguments) {
    Options o;
    o.softmax_scale = arguments.optional_real();
    o.causal = arguments.boolean();
    return o;
}

Options Options::take(Arguments& arguments) {
    Options o = take_plain(arguments);
    o.window_left = arguments.integer();
    o.window_right = arguments.integer();
    o.softcap = arguments.real();
    o.bias = arguments.optional_tensor();
    o.alibi_slopes = arguments.optional_tensor();
    o.cu_seqlens_q = arguments.optional_tensor();
    o.cu_seqlens_k = arguments.optional_tensor();
    o.max_seqlen_q = arguments.integer();
    o.max_seqlen_k = arguments.integer();
    o.seqused_q = arguments.optional_tensor();
    o.seqused_k = arguments.optional_tensor();
    o.dropout_p = arguments.real();
    o.rng_state = arguments.optional_tensor();
    o.q_position = arguments.integer();
    o.k_position = arguments.integer();
    o.deterministic = arguments.boolean();
    o.implementation = arguments.integer();
    return o;
}

RngState read_rng_state(const Tensor& rng_state) {
    if (!rng_state) throw std::invalid_argument("rng_state: is not given, but dropout_p is not 0; it is (seed, offset)");
    const auto shape = rng_state.shape(), strides = rng_state.strides();
    const bool integers = rng_state.dtype() == aoti_torch_dtype_int64() || rng_state.dtype() == aoti_torch_dtype_uint64();
    if (!integers || shape.size() != 1 || shape[0] != 2) {
        throw std::invalid_argument("rng_state: must be an int64 tensor of shape (2), the seed and the offset");
    }
    if (rng_state.device().type != aoti_torch_device_type_cpu()) {
        throw std::invalid_argument("rng_state: must be on the cpu; it is read when the call is launched");
    }
    const auto* values = static_cast<const int64_t*>(rng_state.data());
    return {static_cast<uint64_t>(values[0]), static_cast<uint64_t>(values[strides[0]])};
}

strobe_attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
    strobe_attention a;
    strobe_attention_init(&a);
    a.q = view("q", q);
    a.k = view("k", k);
    a.v = view("v", v);
    a.num_threads = a.q.device_type == STROBE_CPU ? torch_num_threads() : 1;  // 0: the library asks the system, at every call
    const auto set = [](strobe_tensor& to, const char* name, const Tensor& tensor) {
        if (tensor) to = view(name, tensor);
    };
    set(a.bias, "bias", o.bias);
    set(a.alibi_slopes, "alibi_slopes", o.alibi_slopes);
    set(a.cu_seqlens_q, "cu_seqlens_q", o.cu_seqlens_q);
    set(a.cu_seqlens_k, "cu_seqlens_k", o.cu_seqlens_k);
    set(a.seqused_q, "seqused_q", o.seqused_q);
    set(a.seqused_k, "seqused_k", o.seqused_k);
    a.max_seqlen_q = o.max_seqlen_q;
    a.max_seqlen_k = o.max_seqlen_k;
    a.causal = o.causal;
    a.deterministic = o.deterministic;
    a.window_left = o.window_left;
    a.window_right = o.window_right;
    if (o.q_position != -1 || o.k_position != -1) {
        a.has_positions = 1;
        a.q_position = o.q_position;
        a.k_position = o.k_position;
    }
    if (o.softmax_scale) {
        a.has_softmax_scale = 1;
        a.softmax_scale = *o.softmax_scale;
    }
    a.softcap = o.softcap;
    a.dropout_p = o.dropout_p;
    if (o.dropout_p != 0) {
        const RngState state = read_rng_state(o.rng_state);
        a.dropout_seed = state.seed;
        a.dropout_offset = state.offset;
    }
    if (o.implementation >= 0) {
        a.implementation = strobe_implementation(static_cast<int32_t>(o.implementation));
        if (!a.implementation) {
            throw std::invalid_argument("implementation: this build has none with index " + std::to_string(o.implementation));
        }
    }
    return a;
}

void* current_stream(const strobe_tensor& tensor) {
    if (tensor.device_type != STROBE_CUDA) return nullptr;
    if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("q: is on cuda, but this torch has no CUDA");
    void* stream = nullptr;
    check_torch(aoti_torch_get_current_cuda_stream(tensor.device_index, &stream), "the current CUDA stream");
    return stream;
}

void run_forward(const strobe_attention& a, strobe_forward& f, Device device) {
    const Workspace workspace(workspace_bytes(a, f), device);
    f.workspace = workspace.data();
    f.workspace_bytes = workspace.bytes();
    check_strobe(strobe_attention_forward(&a, &f, current_stream(a.q)));
}

void run_backward(const strobe_attention& a, strobe_backward& b, Device device) {
    const Workspace workspace(workspace_bytes(a, b), device);
    b.workspace = workspace.data();
    b.workspace_bytes = workspace.bytes();
    check_strobe(strobe_attention_backward(&a, &b, current_stream(a.q)));
}

}  // namespace strobe::torch_ops
