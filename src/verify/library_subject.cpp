// A case as a call of the public interface.
#include <utility>

#include "strobe/strobe.hpp"
#include "verify/verify.hpp"

namespace strobe::verify {
namespace {

/// The public views of a case's tensors.
struct Views {
    const CaseData& data;
    const Placement& placement;
    Device device;

    Tensor operator()(const View& view) const {
        if (!view.given()) return {};
        return {placement.at(data, view), data.buffers[view.buffer].dtype, view.shape, view.strides, device};
    }
};

Attention attention(const Views& view) {
    const CaseData& data = view.data;
    const Case& c = data.spec;
    Attention a{.q = view(data.q), .k = view(data.k), .v = view(data.v)};
    a.cu_seqlens_q = view(data.cu_seqlens_q);
    a.cu_seqlens_k = view(data.cu_seqlens_k);
    a.seqused_q = view(data.seqused_q);
    a.seqused_k = view(data.seqused_k);
    if (c.varlen_q) a.max_seqlen_q = c.seqlen_q;
    if (c.varlen_k) a.max_seqlen_k = c.seqlen_k;
    a.alibi_slopes = view(data.alibi_slopes);
    a.bias = view(data.bias);
    a.deterministic = c.deterministic;
    a.window_left = c.window_left;
    // Causal has two spellings; dense cases use the flag, varlen ones the window.
    a.causal = c.window_right == 0 && !c.varlen_q;
    a.window_right = a.causal ? -1 : c.window_right;
    if (c.positions) a.positions = Attention::Positions{c.q_position, c.k_position};
    if (c.softmax_scale != 0) a.softmax_scale = c.softmax_scale;
    a.softcap = c.softcap;
    a.dropout_p = c.dropout_p;
    a.dropout_seed = data.dropout_seed;
    a.dropout_offset = data.dropout_offset;
    return a;
}

/// Runs `call` in exactly the workspace that was asked for.
template <class Call, class Run>
void run_guarded(Memory& memory, const Attention& a, Call call, Run run, void* stream) {
    try {
        const size_t bytes = plan(a, call).workspace_bytes;
        const GuardedWorkspace workspace(memory, bytes);
        call.workspace = {workspace.data(), bytes};
        run(a, call, stream);
        workspace.check();
    } catch (const Error& e) {
        if (e.status() == Status::unsupported) throw Unsupported(e.what());
        throw;
    }
}

}  // namespace

LibrarySubject::LibrarySubject(std::string implementation, int num_threads)
    : memory_(host_memory()),
      device_type_(STROBE_CPU),
      device_index_(0),
      implementation_(std::move(implementation)),
      num_threads_(num_threads) {}

LibrarySubject::LibrarySubject(Memory& memory, int device_type, int device_index, std::string implementation, void* stream)
    : memory_(memory),
      device_type_(device_type),
      device_index_(device_index),
      implementation_(std::move(implementation)),
      stream_(stream) {}

PublicCall public_call(const CaseData& data, const Placement& placement, Device device) {
    const Views view{data, placement, device};
    PublicCall call{.attention = attention(view)};
    call.forward = {.out = view(data.out), .lse = view(data.lse)};
    Backward& b = call.backward;
    b.out = view(data.out);
    b.lse = view(data.lse);
    b.dout = view(data.dout);
    b.dq = view(data.dq);
    b.dk = view(data.dk);
    b.dv = view(data.dv);
    b.dlse = view(data.dlse);
    b.dbias = view(data.dbias);
    b.accumulate = data.spec.accumulate;
    return call;
}

PublicCall LibrarySubject::call(const CaseData& data, const Placement& placement) const {
    PublicCall c = public_call(data, placement, {static_cast<DeviceType>(device_type_), device_index_});
    c.attention.num_threads = num_threads_;
    c.attention.implementation = implementation_.empty() ? nullptr : implementation_.c_str();
    return c;
}

void LibrarySubject::forward(const CaseData& data, const Placement& placement) {
    const PublicCall c = call(data, placement);
    run_guarded(memory_, c.attention, c.forward, strobe::forward, stream_);
}

void LibrarySubject::backward(const CaseData& data, const Placement& placement) {
    const PublicCall c = call(data, placement);
    run_guarded(memory_, c.attention, c.backward, strobe::backward, stream_);
}

}  // namespace strobe::verify
