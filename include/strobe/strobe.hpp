// strobe for C++20: views, optional arguments and exceptions over the C ABI of strobe.h. Header only.
//
//     std::vector<float> q(B * S * H * D), ...;
//     strobe::Attention a{.q = {q.data(), {B, S, H, D}}, .k = {k.data(), {B, S, Hk, D}}, .v = {v.data(), {B, S, Hk, D}}};
//     a.causal = true;
//     strobe::forward(a, {.out = {out.data(), {B, S, H, D}}, .lse = {lse.data(), {B, H, S}}});
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "strobe/dtype.hpp"
#include "strobe/strobe.h"

namespace strobe {

enum class Status : int {
    invalid_argument = STROBE_INVALID_ARGUMENT,
    unsupported = STROBE_UNSUPPORTED,
    device_error = STROBE_DEVICE_ERROR,
    internal_error = STROBE_INTERNAL_ERROR,
};

/// Thrown by every function here; what() names the argument, its value and what is possible.
class Error : public std::runtime_error {
public:
    Error(Status status, const std::string& text) : std::runtime_error(text), status_(status) {}
    Status status() const { return status_; }

private:
    Status status_;
};

enum class DeviceType : int32_t { cpu = STROBE_CPU, cuda = STROBE_CUDA };

struct Device {
    DeviceType type = DeviceType::cpu;
    int32_t index = 0;
};

/// A view: pointer, element type, shape, strides (in elements), device. Owns nothing.
struct Tensor : strobe_tensor {
    /// Not given.
    Tensor() : strobe_tensor{} {}

    /// A dense row-major view.
    Tensor(void* pointer, DType type, std::initializer_list<int64_t> extents, Device device = {})
        : Tensor(pointer, type, std::span<const int64_t>(extents.begin(), extents.size()), {}, device) {}

    /// Empty `steps` (the strides): dense row-major.
    Tensor(void* pointer, DType type, std::span<const int64_t> extents, std::span<const int64_t> steps, Device device = {})
        : strobe_tensor{} {
        if (extents.size() > STROBE_MAX_DIMS || (!steps.empty() && steps.size() != extents.size())) {
            throw Error(Status::invalid_argument, "tensor: " + std::to_string(extents.size()) + " extents with " +
                                                      std::to_string(steps.size()) + " strides; at most " +
                                                      std::to_string(STROBE_MAX_DIMS) + ", and as many of both");
        }
        static_cast<strobe_tensor&>(*this) =
            strobe_tensor_dense(pointer, static_cast<strobe_dtype>(type), static_cast<strobe_device_type>(device.type),
                                static_cast<int32_t>(extents.size()), extents.data());
        device_index = device.index;
        for (size_t i = 0; i < steps.size(); ++i) strides[i] = steps[i];
    }

    Tensor(float* pointer, std::initializer_list<int64_t> extents, Device device = {})
        : Tensor(pointer, DType::f32, extents, device) {}
    Tensor(const float* pointer, std::initializer_list<int64_t> extents, Device device = {})
        : Tensor(const_cast<float*>(pointer), DType::f32, extents, device) {}
    Tensor(const int32_t* pointer, std::initializer_list<int64_t> extents, Device device = {})
        : Tensor(const_cast<int32_t*>(pointer), DType::i32, extents, device) {}
};

/// Inputs and options; the meaning of each is in strobe.h.
struct Attention {
    Tensor q, k, v;
    Tensor cu_seqlens_q{}, cu_seqlens_k{}, seqused_q{}, seqused_k{};
    int64_t max_seqlen_q = 0;
    int64_t max_seqlen_k = 0;
    Tensor alibi_slopes{}, bias{};
    bool causal = false;
    bool deterministic = false;
    int64_t window_left = -1;
    int64_t window_right = -1;
    struct Positions {
        int64_t q = 0;
        int64_t k = 0;
    };
    std::optional<Positions> positions{};
    std::optional<double> softmax_scale{};
    double softcap = 0.0;
    double dropout_p = 0.0;
    uint64_t dropout_seed = 0;
    uint64_t dropout_offset = 0;
    int32_t num_threads = 0;
    const char* implementation = nullptr;
};

/// Memory that a call may scribble in. Left empty, the functions below provide it themselves on the CPU.
struct Workspace {
    void* data = nullptr;
    size_t bytes = 0;
};

struct Forward {
    Tensor out;
    Tensor lse{};
    Workspace workspace{};
};

struct Backward {
    Tensor out, lse, dout, dq, dk, dv;
    Tensor dlse{}, dbias{};
    bool accumulate = false;
    Workspace workspace{};
};

struct Plan {
    std::string implementation;
    std::string explanation;
    size_t workspace_bytes = 0;
};

namespace detail {

inline void check(strobe_status status) {
    if (status != STROBE_OK) throw Error(static_cast<Status>(status), strobe_last_error());
}

inline strobe_attention to_c(const Attention& a) {
    strobe_attention c;
    strobe_attention_init(&c);
    c.num_threads = a.num_threads;
    c.q = a.q;
    c.k = a.k;
    c.v = a.v;
    c.cu_seqlens_q = a.cu_seqlens_q;
    c.cu_seqlens_k = a.cu_seqlens_k;
    c.seqused_q = a.seqused_q;
    c.seqused_k = a.seqused_k;
    c.max_seqlen_q = a.max_seqlen_q;
    c.max_seqlen_k = a.max_seqlen_k;
    c.alibi_slopes = a.alibi_slopes;
    c.bias = a.bias;
    c.causal = a.causal;
    c.deterministic = a.deterministic;
    c.window_left = a.window_left;
    c.window_right = a.window_right;
    c.has_positions = a.positions.has_value();
    if (a.positions) {
        c.q_position = a.positions->q;
        c.k_position = a.positions->k;
    }
    c.has_softmax_scale = a.softmax_scale.has_value();
    c.softmax_scale = a.softmax_scale.value_or(0.0);
    c.softcap = a.softcap;
    c.dropout_p = a.dropout_p;
    c.dropout_seed = a.dropout_seed;
    c.dropout_offset = a.dropout_offset;
    c.implementation = a.implementation;
    return c;
}

inline strobe_forward to_c(const Forward& f) {
    strobe_forward c;
    strobe_forward_init(&c);
    c.out = f.out;
    c.lse = f.lse;
    c.workspace = f.workspace.data;
    c.workspace_bytes = f.workspace.bytes;
    return c;
}

inline strobe_backward to_c(const Backward& b) {
    strobe_backward c;
    strobe_backward_init(&c);
    c.accumulate = b.accumulate;
    c.out = b.out;
    c.lse = b.lse;
    c.dout = b.dout;
    c.dlse = b.dlse;
    c.dq = b.dq;
    c.dk = b.dk;
    c.dv = b.dv;
    c.dbias = b.dbias;
    c.workspace = b.workspace.data;
    c.workspace_bytes = b.workspace.bytes;
    return c;
}

template <class Call, class Ask>
Plan plan(const strobe_attention& a, const Call& call, Ask ask) {
    strobe_plan p{};
    p.struct_size = sizeof p;
    check(ask(&a, &call, &p));
    return {p.implementation, p.explanation, p.workspace_bytes};
}

/// Runs `call`, on the CPU with a workspace of its own where the caller gave none.
template <class Call, class Ask, class Run>
void run(const strobe_attention& a, Call call, Ask ask, Run run, void* stream) {
    std::unique_ptr<std::byte[]> own;
    if (!call.workspace && a.q.device_type == STROBE_CPU) {
        call.workspace_bytes = plan(a, call, ask).workspace_bytes;
        own = std::make_unique_for_overwrite<std::byte[]>(call.workspace_bytes);
        call.workspace = own.get();
    }
    check(run(&a, &call, stream));
}

}  // namespace detail

/// Which implementation would serve the call, with how much workspace. Data pointers are not looked at.
inline Plan plan(const Attention& a, const Forward& f) {
    return detail::plan(detail::to_c(a), detail::to_c(f), strobe_attention_forward_plan);
}
inline Plan plan(const Attention& a, const Backward& b) {
    return detail::plan(detail::to_c(a), detail::to_c(b), strobe_attention_backward_plan);
}

/// out and lse from q, k, v.
inline void forward(const Attention& a, const Forward& f, void* stream = nullptr) {
    detail::run(detail::to_c(a), detail::to_c(f), strobe_attention_forward_plan, strobe_attention_forward, stream);
}

/// dq, dk, dv (and dbias) from dout (and dlse), recomputing the scores from q, k and lse.
inline void backward(const Attention& a, const Backward& b, void* stream = nullptr) {
    detail::run(detail::to_c(a), detail::to_c(b), strobe_attention_backward_plan, strobe_attention_backward, stream);
}

/// Adds the partial result (part_out, part_lse) over other keys to (out, lse), in place.
inline void lse_merge(const Tensor& out, const Tensor& lse, const Tensor& part_out, const Tensor& part_lse,
                      void* stream = nullptr) {
    const strobe_tensor outs[] = {out, part_out};
    const strobe_tensor lses[] = {lse, part_lse};
    detail::check(strobe_lse_merge(2, outs, lses, &out, &lse, stream));
}

/// keep: u8 (B, H, Sq, Sk), 1 where the element survives dropout.
inline void dropout_mask(const Attention& a, const Tensor& keep, void* stream = nullptr) {
    const strobe_attention c = detail::to_c(a);
    detail::check(strobe_dropout_mask(&c, &keep, stream));
}

inline std::string version() { return strobe_version(); }
inline int num_threads() { return strobe_num_threads(); }
inline void set_num_threads(int n) { detail::check(strobe_set_num_threads(n)); }

}  // namespace strobe
