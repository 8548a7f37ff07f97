// The operators strobe::attention, strobe::attention_backward and their companions. Each takes torch tensors, allocates
// results and workspace from torch, and makes one call of strobe's C ABI.
#include <vector>

#include "call.hpp"
#include "sdpa_ops.hpp"

namespace strobe::torch_ops {
namespace {

/// (B, Sq, H, Dv) or (Tq, H, Dv): the shape of q with the last extent of v.
std::vector<int64_t> out_shape(const strobe_attention& a) {
    std::vector<int64_t> shape(a.q.shape, a.q.shape + a.q.ndim);
    shape.back() = a.v.shape[a.v.ndim - 1];
    return shape;
}

/// (B, H, Sq) or (H, Tq).
std::vector<int64_t> lse_shape(const strobe_attention& a) {
    const int64_t* q = a.q.shape;
    if (a.q.ndim == 4) return {q[0], q[2], q[1]};
    if (a.q.ndim == 3) return {q[1], q[0]};
    throw std::invalid_argument("q: has " + std::to_string(a.q.ndim) +
                                " dimensions; it must be (B, Sq, H, D), or (Tq, H, D) with cu_seqlens_q");
}

/// `lse` may be empty: then it is not computed.
void forward_into_views(const strobe_attention& a, const Tensor& out, const Tensor& lse, Device device) {
    strobe_forward f;
    strobe_forward_init(&f);
    f.out = view("out", out);
    f.lse = view("lse", lse);
    run_forward(a, f, device);
}

struct ForwardInputs {
    Tensor q, k, v;
    bool with_lse = true;
    Options options;
    bool float32_out = false;
};

struct ForwardResults {
    Tensor out, lse;
};

ForwardResults allocate_and_run(const ForwardInputs& in) {
    const strobe_attention a = describe(in.q, in.k, in.v, in.options);
    const Device device = in.q.device();
    ForwardResults results;
    if (in.with_lse) results.lse = empty(lse_shape(a), aoti_torch_dtype_float32(), device);
    results.out = empty(out_shape(a), in.float32_out ? aoti_torch_dtype_float32() : in.q.dtype(), device);
    forward_into_views(a, results.out, results.lse, device);
    return results;
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    ForwardInputs in{arguments.tensor(), arguments.tensor(), arguments.tensor(), true, Options::take(arguments)};
    in.float32_out = arguments.boolean();

    ForwardResults results = allocate_and_run(in);
    stack[0] = as_result(std::move(results.out));
    stack[1] = as_result(std::move(results.lse));
}

void forward_unrecorded(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    ForwardInputs in{arguments.tensor(), arguments.tensor(), arguments.tensor(), arguments.boolean(), Options::take(arguments)};
    in.float32_out = arguments.boolean();

    ForwardResults results = allocate_and_run(in);
    stack[0] = as_result(std::move(results.out));
    stack[1] = as_optional_result(std::move(results.lse));
}

ForwardInputs take_plain(Arguments& arguments, bool with_lse) {
    return {arguments.tensor(), arguments.tensor(), arguments.tensor(), with_lse, Options::take_plain(arguments)};
}

void forward_plain(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    stack[0] = as_result(allocate_and_run(take_plain(arguments, false)).out);
}

void forward_plain_lse(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    ForwardResults results = allocate_and_run(take_plain(arguments, true));
    stack[0] = as_result(std::move(results.out));
    stack[1] = as_result(std::move(results.lse));
}

void forward_into(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Tensor out = arguments.tensor(), lse = arguments.tensor();
    const Tensor q = arguments.tensor(), k = arguments.tensor(), v = arguments.tensor();
    const Options options = Options::take(arguments);
    forward_into_views(describe(q, k, v, options), out, lse, q.device());
}

/// What the backward reads beside the options.
struct Saved {
    Tensor dout, dlse, q, k, v, out, lse;

    static Saved take(Arguments& arguments) {
        Saved s;
        s.dout = arguments.tensor();
        s.dlse = arguments.optional_tensor();
        s.q = arguments.tensor();
        s.k = arguments.tensor();
        s.v = arguments.tensor();
        s.out = arguments.tensor();
        s.lse = arguments.tensor();
        return s;
    }

    void accept_any_strides() {
        dout = with_unit_stride(std::move(dout));
        if (dlse) dlse = with_unit_stride(std::move(dlse));
    }
};

struct Gradients {
    Tensor dq, dk, dv, dbias;
};

void backward_into_views(const strobe_attention& a, const Saved& saved, const Gradients& gradients, bool accumulate) {
    strobe_backward b;
    strobe_backward_init(&b);
    b.accumulate = accumulate;
    b.out = view("out", saved.out);
    b.lse = view("lse", saved.lse);
    b.dout = view("dout", saved.dout);
    b.dlse = view("dlse", saved.dlse);
    b.dq = view("dq", gradients.dq);
    b.dk = view("dk", gradients.dk);
    b.dv = view("dv", gradients.dv);
    b.dbias = view("dbias", gradients.dbias);
    run_backward(a, b, saved.q.device());
}

Tensor empty_like(const Tensor& tensor) { return empty(tensor.shape(), tensor.dtype(), tensor.device()); }

void backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Saved saved = Saved::take(arguments);
    const Options options = Options::take(arguments);
    const bool need_dbias = arguments.boolean();

    const strobe_attention a = describe(saved.q, saved.k, saved.v, options);
    saved.accept_any_strides();
    Gradients gradients{empty_like(saved.q), empty_like(saved.k), empty_like(saved.v), {}};
    if (need_dbias) {
        if (!options.bias) throw std::invalid_argument("need_dbias: is set without bias");
        gradients.dbias = empty_like(options.bias);
    }
    backward_into_views(a, saved, gradients, false);

    const int64_t nothing = 0;
    if (!need_dbias) gradients.dbias = empty({&nothing, 1}, saved.q.dtype(), saved.q.device());
    stack[0] = as_result(std::move(gradients.dq));
    stack[1] = as_result(std::move(gradients.dk));
    stack[2] = as_result(std::move(gradients.dv));
    stack[3] = as_result(std::move(gradients.dbias));
}

void backward_plain(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Saved saved = Saved::take(arguments);
    const Options options = Options::take_plain(arguments);

    const strobe_attention a = describe(saved.q, saved.k, saved.v, options);
    saved.accept_any_strides();
    Gradients gradients{empty_like(saved.q), empty_like(saved.k), empty_like(saved.v), {}};
    backward_into_views(a, saved, gradients, false);
    stack[0] = as_result(std::move(gradients.dq));
    stack[1] = as_result(std::move(gradients.dk));
    stack[2] = as_result(std::move(gradients.dv));
}

void backward_into(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Gradients gradients;
    gradients.dq = arguments.tensor();
    gradients.dk = arguments.tensor();
    gradients.dv = arguments.tensor();
    gradients.dbias = arguments.optional_tensor();
    const bool accumulate = arguments.boolean();
    Saved saved = Saved::take(arguments);
    const Options options = Options::take(arguments);

    const strobe_attention a = describe(saved.q, saved.k, saved.v, options);
    saved.accept_any_strides();
    backward_into_views(a, saved, gradients, accumulate);
}

strobe_tensor without_first_axis(const strobe_tensor& t) {
    strobe_tensor part = t;
    part.ndim = t.ndim - 1;
    for (int i = 0; i < part.ndim; ++i) {
        part.shape[i] = t.shape[i + 1];
        part.strides[i] = t.strides[i + 1];
    }
    return part;
}

/// (N, ...) as N views.
std::vector<strobe_tensor> parts_of(const char* name, const Tensor& stacked) {
    const strobe_tensor whole = view(name, stacked);
    if (whole.ndim < 2) throw std::invalid_argument(std::string(name) + ": must have a leading axis of parts");
    const auto bytes = static_cast<int64_t>(whole.dtype == STROBE_F32 ? 4 : 2);
    std::vector<strobe_tensor> parts(static_cast<size_t>(whole.shape[0]), without_first_axis(whole));
    for (size_t i = 0; i < parts.size(); ++i) {
        parts[i].data = static_cast<char*>(whole.data) + static_cast<int64_t>(i) * whole.strides[0] * bytes;
    }
    return parts;
}

void lse_merge(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Tensor outs = arguments.tensor(), lses = arguments.tensor();
    const auto part_out = parts_of("outs", outs), part_lse = parts_of("lses", lses);
    if (part_out.empty() || part_out.size() != part_lse.size()) {
        throw std::invalid_argument("lses: has " + std::to_string(part_lse.size()) + " parts, outs has " +
                                    std::to_string(part_out.size()) + "; there must be as many of both, at least one");
    }
    Tensor out = empty(outs.shape().subspan(1), outs.dtype(), outs.device());
    Tensor lse = empty(lses.shape().subspan(1), lses.dtype(), lses.device());
    const strobe_tensor out_view = view("out", out), lse_view = view("lse", lse);
    check_strobe(strobe_lse_merge(static_cast<int32_t>(part_out.size()), part_out.data(), part_lse.data(), &out_view, &lse_view,
                                  current_stream(out_view)));
    stack[0] = as_result(std::move(out));
    stack[1] = as_result(std::move(lse));
}

void dropout_mask_into(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Tensor keep = arguments.tensor(), rng_state = arguments.tensor();
    const double dropout_p = arguments.real();

    const RngState state = read_rng_state(rng_state);
    const strobe_tensor mask = view("keep", keep);
    if (mask.ndim != 4) throw std::invalid_argument("keep: must be (B, H, Sq, Sk)");
    const int64_t *n = mask.shape, q_shape[4] = {n[0], n[2], n[1], 1}, k_shape[4] = {n[0], n[3], n[1], 1};
    strobe_attention a;
    strobe_attention_init(&a);
    a.q = strobe_tensor_dense(nullptr, STROBE_F32, STROBE_CPU, 4, q_shape);
    a.k = strobe_tensor_dense(nullptr, STROBE_F32, STROBE_CPU, 4, k_shape);
    a.dropout_p = dropout_p;
    a.dropout_seed = state.seed;
    a.dropout_offset = state.offset;
    check_strobe(strobe_dropout_mask(&a, &mask, current_stream(mask)));
}

// ---- registration -------------------------------------------------------------------------------------------------------

constexpr const char* kSchemas[] = {
    "attention(Tensor q, Tensor k, Tensor v, " STROBE_OPTIONS_SCHEMA ", bool float32_out=False) -> (Tensor out, Tensor lse)",
    // For eager calls: no autograd of their own, and a log-sum-exp only where it is wanted.
    "attention_unrecorded(Tensor q, Tensor k, Tensor v, bool with_lse, " STROBE_OPTIONS_SCHEMA
    ", bool float32_out=False) -> (Tensor out, Tensor? lse)",
    "attention_plain(Tensor q, Tensor k, Tensor v, " STROBE_PLAIN_OPTIONS_SCHEMA ") -> Tensor",
    "attention_plain_lse(Tensor q, Tensor k, Tensor v, " STROBE_PLAIN_OPTIONS_SCHEMA ") -> (Tensor out, Tensor lse)",
    "attention_into(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, " STROBE_OPTIONS_SCHEMA ") -> ()",
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    STROBE_OPTIONS_SCHEMA ", bool need_dbias=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    "attention_backward_plain(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    STROBE_PLAIN_OPTIONS_SCHEMA ") -> (Tensor dq, Tensor dk, Tensor dv)",
    "attention_backward_into(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, bool accumulate, Tensor dout, "
    "Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " STROBE_OPTIONS_SCHEMA ") -> ()",
    "lse_merge(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)",
    "dropout_mask_into(Tensor(a!) keep, Tensor rng_state, float dropout_p) -> ()",
    kSdpaForwardSchema,
    kSdpaBackwardSchema,
};

constexpr NamedKernel kKernels[] = {{"attention", forward},
                                    {"attention_unrecorded", forward_unrecorded},
                                    {"attention_plain", forward_plain},
                                    {"attention_plain_lse", forward_plain_lse},
                                    {"attention_into", forward_into},
                                    {"attention_backward", backward},
                                    {"attention_backward_plain", backward_plain},
                                    {"attention_backward_into", backward_into},
                                    {"lse_merge", lse_merge},
                                    {"dropout_mask_into", dropout_mask_into},
                                    {"sdpa_forward", sdpa_forward},
                                    {"sdpa_backward", sdpa_backward}};

/// Keeps the registrations for as long as the library is loaded.
class Registration {
public:
    Registration() {
        check_torch(aoti_torch_library_init_def("strobe", __FILE__, __LINE__, &definitions_), "to define strobe's operators");
        for (const char* schema : kSchemas) check_torch(aoti_torch_library_def(definitions_, schema), schema);
        implement("CPU", cpu_);
        implement("CUDA", cuda_);
    }
    ~Registration() {
        for (TorchLibraryHandle library : {cuda_, cpu_, definitions_}) aoti_torch_delete_library_object(library);
    }

private:
    TorchLibraryHandle definitions_ = nullptr, cpu_ = nullptr, cuda_ = nullptr;

    static void implement(const char* key, TorchLibraryHandle& library) {
        check_torch(aoti_torch_library_init_impl("strobe", key, __FILE__, __LINE__, &library), key);
        for (const NamedKernel& k : kKernels) {
            check_torch(aoti_torch_library_impl(library, k.name, k.kernel), k.name);
        }
    }
};

const Registration registration;

}  // namespace
}  // namespace strobe::torch_ops
