#include "sdpa_ops.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "call.hpp"

extern "C" using strobe_torch_flag = int32_t (*)();

namespace strobe::torch_ops {
namespace {

/// (B, H, S, D) as (B, S, H, D).
strobe_tensor rows_by_heads(strobe_tensor t) {
    if (t.ndim == 4) {
        std::swap(t.shape[1], t.shape[2]);
        std::swap(t.strides[1], t.strides[2]);
    }
    return t;
}

strobe_attention describe_heads_first(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
    strobe_attention a = describe(q, k, v, options);
    for (strobe_tensor* t : {&a.q, &a.k, &a.v}) *t = rows_by_heads(*t);
    return a;
}

/// Whether axis `a` moves faster than axis `b`: 1, 0, or -1 where an expanded axis leaves it open.
int is_faster(const Tensor& tensor, size_t a, size_t b) {
    const auto shape = tensor.shape(), strides = tensor.strides();
    if (strides[a] == 0 || strides[b] == 0) return -1;
    if (strides[a] != strides[b]) return strides[a] < strides[b];
    return shape[a] <= shape[b] ? -1 : 0;
}

using FourAxes = std::array<size_t, 4>;

/// Axes from the fastest to the slowest, as torch.empty_like sorts them: the last axis first where strides leave it open.
FourAxes by_stride(const Tensor& tensor) {
    FourAxes order{3, 2, 1, 0};
    for (size_t i = 1; i < order.size(); ++i) {
        size_t at = i;
        for (size_t before = i; before-- > 0;) {
            const int faster = is_faster(tensor, order[before], order[at]);
            if (faster == 1) break;
            if (faster == -1) continue;
            std::swap(order[before], order[at]);
            at = before;
        }
    }
    return order;
}

/// A new tensor with the strides that torch.empty_like gives, which its compiler counts on; but row-major where those of the
/// last axis would not be 1.
Tensor empty_like(const Tensor& tensor) {
    const auto shape = tensor.shape(), strides = tensor.strides();
    if (shape.size() != 4) throw std::invalid_argument("query, key, value: must be (B, H, S, D)");
    const FourAxes order = by_stride(tensor);
    std::array<int64_t, 4> dense{};
    bool has_gaps = false;
    int64_t stride = 1;
    for (const size_t axis : order) {
        dense[axis] = stride;
        has_gaps = has_gaps || (shape[axis] > 1 && strides[axis] != stride);
        stride *= std::max<int64_t>(shape[axis], 1);
    }
    const bool unit = has_gaps ? dense[3] == 1 : strides[3] == 1;
    if (!unit) return empty(shape, tensor.dtype(), tensor.device());
    return empty_strided(shape, has_gaps ? std::span<const int64_t>(dense) : strides, tensor.dtype(), tensor.device());
}

Tensor undefined() {
    AtenTensorHandle handle = nullptr;
    check_torch(aoti_torch_new_uninitialized_tensor(&handle), "an undefined tensor");
    return Tensor(handle);
}

Tensor empty_on_cpu(int64_t size, int32_t dtype) {
    return empty({&size, 1}, dtype, {aoti_torch_device_type_cpu(), -1});
}

/// What strobe.new_rng_state gives: a seed drawn from torch's CPU generator and the offset 0, on the CPU.
Tensor new_rng_state() {
    const Tensor seed = empty_on_cpu(1, aoti_torch_dtype_int64());
    AtenTensorHandle handle = nullptr;
    check_torch(aoti_torch_new_tensor_handle(seed.get(), &handle), "a second handle of a tensor");
    // random_(from, to, generator=None)
    StableIValue stack[4] = {as_word(handle), as_word(int64_t{0}), as_word(new StableIValue(INT64_MAX)), 0};
    check_torch(aoti_torch_call_dispatcher("aten::random_", "from", stack), "to draw random numbers");
    const Tensor result(word_as<AtenTensorHandle>(stack[0]));

    Tensor state = empty_on_cpu(2, aoti_torch_dtype_int64());
    auto* words = static_cast<int64_t*>(state.data());
    words[0] = *static_cast<const int64_t*>(seed.data());
    words[1] = 0;
    return state;
}

/// A state as torch's own kernels return it: (2) uint64 on the call's device, of any values without dropout.
Tensor returned_state(const Tensor& state, Device device) {
    const int64_t two = 2;
    Tensor copy = empty({&two, 1}, aoti_torch_dtype_uint64(), device);
    if (state) check_torch(aoti_torch_copy_(copy.get(), state.get(), 1), "to copy a tensor");
    return copy;
}

}  // namespace

void sdpa_forward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Tensor q = arguments.tensor(), k = arguments.tensor(), v = arguments.tensor();
    Options options;
    options.dropout_p = arguments.real();
    options.causal = arguments.boolean();
    const bool return_debug_mask = arguments.boolean();
    options.softmax_scale = arguments.optional_real();
    if (return_debug_mask) {
        throw std::runtime_error("return_debug_mask: strobe does not write the attention matrix; "
                                 "strobe.dropout_mask gives the mask");
    }
    if (options.dropout_p != 0) options.rng_state = new_rng_state();

    Tensor out = empty_like(q);
    q = with_unit_stride(std::move(q));
    k = with_unit_stride(std::move(k));
    v = with_unit_stride(std::move(v));
    const strobe_attention a = describe_heads_first(q, k, v, options);
    const Device device = q.device();
    const auto shape = q.shape();
    Tensor lse = empty(shape.first(3), aoti_torch_dtype_float32(), device);
    strobe_forward f;
    strobe_forward_init(&f);
    f.out = rows_by_heads(view("out", out));
    f.lse = view("lse", lse);
    run_forward(a, f, device);

    const int64_t none = 0;
    Tensor rng_state = returned_state(options.rng_state, device);
    Tensor unused = empty({}, aoti_torch_dtype_uint64(), device);
    Tensor debug_mask = empty({&none, 1}, q.dtype(), device);
    Tensor cum_seq_q = undefined(), cum_seq_k = undefined();
    stack[0] = as_result(std::move(out));
    stack[1] = as_result(std::move(lse));
    stack[2] = as_result(std::move(cum_seq_q));
    stack[3] = as_result(std::move(cum_seq_k));
    stack[4] = as_word(shape[2]);
    stack[5] = as_word(k.shape()[2]);
    stack[6] = as_result(std::move(rng_state));
    stack[7] = as_result(std::move(unused));
    stack[8] = as_result(std::move(debug_mask));
}

namespace {

/// What the backward operator begins with.
struct Saved {
    Tensor dout, q, k, v, out, lse;

    static Saved take(Arguments& arguments) {
        Saved s;
        for (Tensor* t : {&s.dout, &s.q, &s.k, &s.v, &s.out, &s.lse}) *t = arguments.tensor();
        return s;
    }
};

void run_backward(StableIValue* stack, Saved saved, const Options& options) {
    auto& [dout, q, k, v, out, lse] = saved;
    Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
    for (Tensor* t : {&dout, &q, &k, &v, &out}) *t = with_unit_stride(std::move(*t));
    const strobe_attention a = describe_heads_first(q, k, v, options);
    strobe_backward b;
    strobe_backward_init(&b);
    b.out = rows_by_heads(view("out", out));
    b.lse = view("logsumexp", lse);
    b.dout = rows_by_heads(view("grad_out", dout));
    b.dq = rows_by_heads(view("dq", dq));
    b.dk = rows_by_heads(view("dk", dk));
    b.dv = rows_by_heads(view("dv", dv));
    torch_ops::run_backward(a, b, q.device());
    stack[0] = as_result(std::move(dq));
    stack[1] = as_result(std::move(dk));
    stack[2] = as_result(std::move(dv));
}

/// The state of a forward call with dropout, read back to the CPU, where the call is launched from.
Tensor saved_state(const Tensor& state) {
    Tensor copy = empty_on_cpu(2, aoti_torch_dtype_uint64());
    check_torch(aoti_torch_copy_(copy.get(), state.get(), 0), "to copy a tensor");
    return copy;
}

std::atomic<strobe_torch_flag> is_deterministic{nullptr};

}  // namespace

void sdpa_backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Saved saved = Saved::take(arguments);
    const Tensor cum_seq_q = arguments.tensor(), cum_seq_k = arguments.tensor();
    arguments.integer();  // the lengths of query and key, which their shapes tell
    arguments.integer();
    Options options;
    options.dropout_p = arguments.real();
    options.causal = arguments.boolean();
    const Tensor state = arguments.tensor(), unused = arguments.tensor();
    options.softmax_scale = arguments.optional_real();
    if (options.dropout_p != 0) options.rng_state = saved_state(state);
    const strobe_torch_flag flag = is_deterministic.load();
    options.deterministic = flag && flag() != 0;
    run_backward(stack, std::move(saved), options);
}

}  // namespace strobe::torch_ops

using namespace strobe::torch_ops;

extern "C" {

/// Puts strobe's kernels in place of those that torch has for CUDA, until the handle is removed; null if torch refuses. `flag`
/// tells whether torch is in its deterministic mode, for which the stable ABI has no function; the last one given is asked.
__attribute__((visibility("default"))) TorchLibraryHandle strobe_torch_override_sdpa(strobe_torch_flag flag) {
    is_deterministic = flag;
    TorchLibraryHandle library = nullptr;
    if (aoti_torch_library_init_impl("aten", "CUDA", __FILE__, __LINE__, &library) != 0) return nullptr;
    if (aoti_torch_library_impl(library, "_scaled_dot_product_flash_attention", sdpa_forward) == 0 &&
        aoti_torch_library_impl(library, "_scaled_dot_product_flash_attention_backward", sdpa_backward) == 0) {
        return library;
    }
    aoti_torch_delete_library_object(library);
    return nullptr;
}

__attribute__((visibility("default"))) void strobe_torch_restore_sdpa(TorchLibraryHandle library) {
    aoti_torch_delete_library_object(library);
}

}  // extern "C"
