#include "validate.hpp"

#include <fmt/core.h>

#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "error.hpp"
#include "tensor.hpp"

namespace strobe {
namespace {

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxBatchHeads = std::numeric_limits<int32_t>::max();

struct Named {
    const char* name;
    const strobe_tensor& tensor;
};

/// The tensors of a call that are given, in place: a sound call allocates nothing.
class NamedList {
public:
    NamedList(std::initializer_list<Named> all) {
        for (const Named& n : all) add(n);
    }
    void add(const Named& n) {
        if (given(n.tensor)) entries_[size_++] = {n.name, &n.tensor};
    }
    int size() const { return size_; }
    Named operator[](int i) const { return {entries_[i].name, *entries_[i].tensor}; }

private:
    struct Entry {
        const char* name;
        const strobe_tensor* tensor;
    };
    std::array<Entry, 16> entries_{};  // no call has as many
    int size_ = 0;
};

template <class... Args>
[[noreturn]] void refuse(const char* name, fmt::format_string<Args...> text, Args&&... args) {
    invalid_argument(fmt::format("{}: {}", name, fmt::vformat(text, fmt::make_format_args(args...))));
}

// ---- one view on its own
// ------------------------------------------------------------------------------------------------

void check_dtype(const Named& n, std::initializer_list<int32_t> allowed) {
    std::string names;
    for (int32_t dtype : allowed) {
        if (n.tensor.dtype == dtype) return;
        names += names.empty() ? "" : " or ";
        names += dtype_name(dtype);
    }
    refuse(n.name, "dtype is {} ({}); it must be {}", n.tensor.dtype, dtype_name(n.tensor.dtype), names);
}

void check_ndim(const Named& n, std::initializer_list<int> allowed, const char* layout) {
    for (int ndim : allowed) {
        if (n.tensor.ndim == ndim) return;
    }
    if (n.tensor.ndim == 0) refuse(n.name, "is not given; it must be {}", layout);
    refuse(n.name, "has {} dimensions; it must be {}", n.tensor.ndim, layout);
}

void check_device(const Named& n) {
    const strobe_tensor& t = n.tensor;
    if (t.device_type != STROBE_CPU && t.device_type != STROBE_CUDA) {
        refuse(n.name, "device_type is {}; it must be {} (cpu) or {} (cuda)", t.device_type, int{STROBE_CPU}, int{STROBE_CUDA});
    }
    if (t.device_index < 0) refuse(n.name, "device_index is {}; it must not be negative", t.device_index);
}

/// Extents and strides are sane and the view's span fits 64 bits in bytes.
void check_geometry(const Named& n, DataPointers pointers) {
    const strobe_tensor& t = n.tensor;
    if (t.ndim < 1 || t.ndim > STROBE_MAX_DIMS) {
        refuse(n.name, "has {} dimensions; there can be 1 to {}", t.ndim, STROBE_MAX_DIMS);
    }
    const auto bytes = static_cast<int64_t>(dtype_bytes(t.dtype));
    int64_t elements = 1, span = bytes;
    bool overflow = false;
    for (int i = 0; i < t.ndim; ++i) {
        if (t.shape[i] < 0) refuse(n.name, "shape is {}; extents must not be negative", shape_text(t));
        if (t.strides[i] < 0) refuse(n.name, "strides are {}; negative strides are not supported", strides_text(t));
        overflow |= __builtin_mul_overflow(elements, t.shape[i], &elements);
    }
    for (int i = 0; i < t.ndim && elements != 0; ++i) {
        int64_t reach = 0;
        overflow |= __builtin_mul_overflow(t.shape[i] - 1, t.strides[i], &reach);
        overflow |= __builtin_mul_overflow(reach, bytes, &reach);
        overflow |= __builtin_add_overflow(span, reach, &span);
    }
    if (overflow) {
        refuse(n.name, "shape {} with strides {} spans more than 2^63 bytes", shape_text(t), strides_text(t));
    }
    if (pointers == DataPointers::ignored || elements == 0) return;
    if (!t.data) refuse(n.name, "data is NULL for shape {}", shape_text(t));
    if (reinterpret_cast<uintptr_t>(t.data) % bytes != 0) {
        refuse(n.name, "data {} is not aligned to its element size of {} bytes", t.data, bytes);
    }
}

void check_unit_stride(const Named& n) {
    const strobe_tensor& t = n.tensor;
    if (t.shape[t.ndim - 1] > 1 && t.strides[t.ndim - 1] != 1) {
        refuse(n.name, "the last stride is {} (strides {}); it must be 1", t.strides[t.ndim - 1], strides_text(t));
    }
}

void check_writable(const Named& n) {
    if (overlaps_itself(n.tensor)) {
        refuse(n.name, "shape {} with strides {} puts several elements in one place; an output needs a place for each",
               shape_text(n.tensor), strides_text(n.tensor));
    }
}

void check_same_device(const Named& n, const Named& as) {
    if (n.tensor.device_type != as.tensor.device_type || n.tensor.device_index != as.tensor.device_index) {
        refuse(n.name, "is on {}, but {} is on {}; all tensors of a call share one device", device_name(n.tensor), as.name,
               device_name(as.tensor));
    }
}

void check_shape(const Named& n, std::initializer_list<int64_t> expected, const char* axes) {
    const strobe_tensor& t = n.tensor;
    bool same = t.ndim == static_cast<int32_t>(expected.size());
    int i = 0;
    for (int64_t e : expected) same = same && t.shape[i++] == e;
    if (!same) {
        refuse(n.name, "shape is {}; it must be {} = {}", t.ndim == 0 ? "not given" : shape_text(t), axes,
               list_text({expected.begin(), expected.end()}));
    }
}

/// Everything about one view but its shape.
void check_view(const Named& n, std::initializer_list<int32_t> dtypes, const Named& reference, DataPointers pointers) {
    check_dtype(n, dtypes);
    check_device(n);
    check_same_device(n, reference);
    check_geometry(n, pointers);
}

// ---- the parts of a call
// ------------------------------------------------------------------------------------------------

/// The sizes that q, k and v agree on.
struct Sizes {
    int64_t batch, rows_q, rows_k;     // rows_*: Sq / Sk, or Tq / Tk where varlen
    int64_t longest_q, longest_k;      // Sq / Sk, or max_seqlen_*
    int64_t num_heads, num_heads_k, head_dim, head_dim_v;
};

class Validator {
public:
    Validator(const Problem& problem, DataPointers pointers) : p_(problem), a_(problem.attention), pointers_(pointers) {}

    void run() {
        check_qkv();
        check_sequences();
        check_options();
        check_alibi();
        check_bias();
        if (p_.direction == Direction::forward) {
            check_forward();
        } else {
            check_backward();
        }
    }

private:
    const Problem& p_;
    const strobe_attention& a_;
    DataPointers pointers_;
    Sizes size_{};

    const char* layout_q() const { return p_.varlen_q() ? "(Tq, H, D) since cu_seqlens_q is given" : "(B, Sq, H, D)"; }
    const char* layout_k() const { return p_.varlen_k() ? "(Tk, Hk, D) since cu_seqlens_k is given" : "(B, Sk, Hk, D)"; }

    void check_qkv() {
        const Named q{"q", a_.q}, k{"k", a_.k}, v{"v", a_.v};
        check_ndim(q, {p_.varlen_q() ? 3 : 4}, layout_q());
        check_ndim(k, {p_.varlen_k() ? 3 : 4}, layout_k());
        check_ndim(v, {p_.varlen_k() ? 3 : 4}, layout_k());
        for (const Named& n : {q, k, v}) {
            check_view(n, {STROBE_F32, STROBE_BF16, STROBE_F16}, q, pointers_);
            check_unit_stride(n);
            if (n.tensor.dtype != a_.q.dtype) {
                refuse(n.name, "dtype is {}, but q is {}; q, k and v share one dtype", dtype_name(n.tensor.dtype),
                       dtype_name(a_.q.dtype));
            }
        }
        size_.head_dim = extent_from_end(a_.q, 1);
        size_.head_dim_v = extent_from_end(a_.v, 1);
        size_.num_heads = extent_from_end(a_.q, 2);
        size_.num_heads_k = extent_from_end(a_.k, 2);
        size_.rows_q = extent_from_end(a_.q, 3);
        size_.rows_k = extent_from_end(a_.k, 3);
        if (size_.head_dim < 1 || size_.head_dim > kMaxHeadDim) {
            refuse("q", "head_dim is {}; it must be from 1 to {}", size_.head_dim, kMaxHeadDim);
        }
        if (size_.head_dim_v < 1 || size_.head_dim_v > kMaxHeadDim) {
            refuse("v", "head_dim_v is {}; it must be from 1 to {}", size_.head_dim_v, kMaxHeadDim);
        }
        if (extent_from_end(a_.k, 1) != size_.head_dim) {
            refuse("k", "head_dim is {}, but q has {}", extent_from_end(a_.k, 1), size_.head_dim);
        }
        if (extent_from_end(a_.v, 2) != size_.num_heads_k || extent_from_end(a_.v, 3) != size_.rows_k) {
            refuse("v", "shape is {}; rows and heads must be those of k, {}", shape_text(a_.v), shape_text(a_.k));
        }
        if (size_.num_heads < 1) refuse("q", "shape is {}; there must be at least one head", shape_text(a_.q));
        if (size_.num_heads_k < 1 || size_.num_heads % size_.num_heads_k != 0) {
            refuse("k", "has {} heads, which do not divide the {} of q", size_.num_heads_k, size_.num_heads);
        }
        check_batch();
        if (size_.batch > kMaxBatchHeads / size_.num_heads) {
            refuse("q", "batch {} times heads {} is over {}", size_.batch, size_.num_heads, kMaxBatchHeads);
        }
        if (size_.rows_q > kMaxRows) refuse("q", "has {} rows; at most {} are possible", size_.rows_q, kMaxRows);
        if (size_.rows_k > kMaxRows) refuse("k", "has {} rows; at most {} are possible", size_.rows_k, kMaxRows);
    }

    void check_batch() {
        if (p_.varlen_q()) check_prefix_sums_view({"cu_seqlens_q", a_.cu_seqlens_q});
        if (p_.varlen_k()) check_prefix_sums_view({"cu_seqlens_k", a_.cu_seqlens_k});
        const int64_t from_q = p_.varlen_q() ? a_.cu_seqlens_q.shape[0] - 1 : a_.q.shape[0];
        const int64_t from_k = p_.varlen_k() ? a_.cu_seqlens_k.shape[0] - 1 : a_.k.shape[0];
        if (!p_.varlen_k() && a_.v.shape[0] != from_k) {
            refuse("v", "shape is {}; the batch must be that of k, {}", shape_text(a_.v), shape_text(a_.k));
        }
        if (from_q != from_k) {
            refuse(p_.varlen_k() ? "cu_seqlens_k" : "k", "says a batch of {}, but {} says {}", from_k,
                   p_.varlen_q() ? "cu_seqlens_q" : "q", from_q);
        }
        size_.batch = from_q;
    }

    void check_prefix_sums_view(const Named& n) {
        check_index_vector(n);
        if (n.tensor.shape[0] < 1) refuse(n.name, "is empty; it must hold batch + 1 values");
    }

    void check_index_vector(const Named& n) {
        check_ndim(n, {1}, "one-dimensional");
        check_view(n, {STROBE_I32}, {"q", a_.q}, pointers_);
        check_unit_stride(n);
    }

    bool host_contents(const strobe_tensor& t) const {
        return pointers_ == DataPointers::required && t.device_type == STROBE_CPU;
    }

    void check_sequences() {
        size_.longest_q = check_sequence_side("cu_seqlens_q", a_.cu_seqlens_q, "seqused_q", a_.seqused_q, "max_seqlen_q",
                                              a_.max_seqlen_q, size_.rows_q);
        size_.longest_k = check_sequence_side("cu_seqlens_k", a_.cu_seqlens_k, "seqused_k", a_.seqused_k, "max_seqlen_k",
                                              a_.max_seqlen_k, size_.rows_k);
    }

    int64_t check_sequence_side(const char* cu_name, const strobe_tensor& cu, const char* used_name, const strobe_tensor& used,
                                const char* max_name, int64_t max_seqlen, int64_t rows) {
        const bool varlen = given(cu);
        if (!varlen && max_seqlen != 0 && max_seqlen != rows) {
            refuse(max_name, "is {} without {}; leave it 0, or give the {} rows there are", max_seqlen, cu_name, rows);
        }
        if (varlen && (max_seqlen < 0 || max_seqlen > kMaxRows)) {
            refuse(max_name, "is {}; it must be from 0 to {}", max_seqlen, kMaxRows);
        }
        const int32_t* sums = nullptr;
        if (varlen && host_contents(cu)) {
            sums = static_cast<const int32_t*>(cu.data);
            if (sums[0] != 0) refuse(cu_name, "starts with {}; prefix sums start with 0", sums[0]);
            for (int64_t b = 0; b < size_.batch; ++b) {
                const int64_t length = int64_t{sums[b + 1]} - sums[b];
                if (length < 0) {
                    refuse(cu_name, "falls from {} to {} at index {}; prefix sums never fall", sums[b], sums[b + 1], b + 1);
                }
                if (length > max_seqlen) {
                    refuse(max_name, "is {}, but sequence {} has {} rows", max_seqlen, b, length);
                }
            }
            if (sums[size_.batch] > rows) {
                refuse(cu_name, "ends with {}, but there are only {} rows", sums[size_.batch], rows);
            }
        }
        if (given(used)) {
            check_index_vector({used_name, used});
            check_shape({used_name, used}, {size_.batch}, "(B)");
            if (host_contents(used) && (sums || !varlen)) {
                const auto* counts = static_cast<const int32_t*>(used.data);
                for (int64_t b = 0; b < size_.batch; ++b) {
                    const int64_t length = sums ? sums[b + 1] - sums[b] : rows;
                    if (counts[b] < 0 || counts[b] > length) {
                        refuse(used_name, "is {} at index {}; it must be from 0 to the sequence's {} rows", counts[b], b, length);
                    }
                }
            }
        }
        return varlen ? max_seqlen : rows;
    }

    void check_options() {
        if (a_.num_threads < 0) {
            refuse("num_threads", "is {}; it must be at least 1, or 0 for the default", a_.num_threads);
        }
        check_window("window_left", a_.window_left);
        check_window("window_right", a_.window_right);
        if (a_.causal && a_.window_right > 0) {
            refuse("window_right", "is {} beside causal, which means 0; leave it -1 or 0", a_.window_right);
        }
        if (a_.has_softmax_scale && !std::isfinite(a_.softmax_scale)) {
            refuse("softmax_scale", "is {}; it must be finite", a_.softmax_scale);
        }
        if (a_.has_softmax_scale && !std::isfinite(static_cast<float>(a_.softmax_scale))) {
            refuse("softmax_scale", "is {}; it must be within the range of f32", a_.softmax_scale);
        }
        if (!std::isfinite(static_cast<float>(a_.softcap)) || a_.softcap < 0) {
            refuse("softcap", "is {}; it must be finite and positive, or 0 for none", a_.softcap);
        }
        if (!(a_.dropout_p >= 0 && a_.dropout_p < 1)) {
            refuse("dropout_p", "is {}; it must be at least 0 and below 1", a_.dropout_p);
        }
        if (a_.has_positions) {
            check_position("q_position", a_.q_position, size_.longest_q);
            check_position("k_position", a_.k_position, size_.longest_k);
        }
    }

    void check_window(const char* name, int64_t value) {
        if (value < -1 || value > kMaxRows) {
            refuse(name, "is {}; it must be from 0 to {}, or -1 for no bound", value, kMaxRows);
        }
    }

    void check_position(const char* name, int64_t value, int64_t rows) {
        if (value < 0 || value > kMaxRows - rows) {
            refuse(name, "is {}; with {} rows it must be from 0 to {}", value, rows, kMaxRows - rows);
        }
    }

    void check_alibi() {
        if (!given(a_.alibi_slopes)) return;
        const Named n{"alibi_slopes", a_.alibi_slopes};
        check_ndim(n, {1, 2}, "(H) or (B, H)");
        check_view(n, {STROBE_F32}, {"q", a_.q}, pointers_);
        check_unit_stride(n);
        if (n.tensor.ndim == 1) {
            check_shape(n, {size_.num_heads}, "(H)");
        } else {
            check_shape(n, {size_.batch, size_.num_heads}, "(B, H)");
        }
    }

    void check_bias() {
        if (!given(a_.bias)) return;
        const Named n{"bias", a_.bias};
        check_ndim(n, {4}, "(B, H, Sq, Sk), each extent possibly 1");
        check_view(n, {STROBE_F32, a_.q.dtype}, {"q", a_.q}, pointers_);
        const int64_t full[] = {size_.batch, size_.num_heads, size_.longest_q, size_.longest_k};
        for (int i = 0; i < 4; ++i) {
            if (n.tensor.shape[i] != full[i] && n.tensor.shape[i] != 1) {
                refuse("bias", "shape is {}; it must be (B, H, Sq, Sk) = {}, each extent possibly 1", shape_text(n.tensor),
                       list_text(full));
            }
        }
    }

    void check_rows(const Named& n) {
        if (p_.varlen_q()) {
            check_shape(n, {size_.num_heads, size_.rows_q}, "(H, Tq)");
        } else {
            check_shape(n, {size_.batch, size_.num_heads, size_.rows_q}, "(B, H, Sq)");
        }
        check_view(n, {STROBE_F32}, {"q", a_.q}, pointers_);
        check_unit_stride(n);
    }

    void check_like_q(const Named& n, int64_t dim, std::initializer_list<int32_t> dtypes) {
        if (p_.varlen_q()) {
            check_shape(n, {size_.rows_q, size_.num_heads, dim}, "(Tq, H, D)");
        } else {
            check_shape(n, {size_.batch, size_.rows_q, size_.num_heads, dim}, "(B, Sq, H, D)");
        }
        check_view(n, dtypes, {"q", a_.q}, pointers_);
        check_unit_stride(n);
    }

    void check_like_k(const Named& n, int64_t dim, std::initializer_list<int32_t> dtypes) {
        if (p_.varlen_k()) {
            check_shape(n, {size_.rows_k, size_.num_heads_k, dim}, "(Tk, Hk, D)");
        } else {
            check_shape(n, {size_.batch, size_.rows_k, size_.num_heads_k, dim}, "(B, Sk, Hk, D)");
        }
        check_view(n, dtypes, {"q", a_.q}, pointers_);
        check_unit_stride(n);
    }

    NamedList inputs() const {
        return {{"q", a_.q}, {"k", a_.k}, {"v", a_.v}, {"cu_seqlens_q", a_.cu_seqlens_q}, {"cu_seqlens_k", a_.cu_seqlens_k},
                {"seqused_q", a_.seqused_q}, {"seqused_k", a_.seqused_k}, {"alibi_slopes", a_.alibi_slopes}, {"bias", a_.bias}};
    }

    void check_outputs(const NamedList& outputs, const NamedList& inputs) {
        for (int i = 0; i < outputs.size(); ++i) {
            check_writable(outputs[i]);
            if (pointers_ == DataPointers::ignored) continue;
            for (int j = 0; j < i; ++j) check_apart(outputs[i], outputs[j]);
            for (int j = 0; j < inputs.size(); ++j) check_apart(outputs[i], inputs[j]);
        }
    }

    static void check_apart(const Named& output, const Named& other) {
        if (may_overlap(output.tensor, other.tensor)) {
            refuse(output.name, "overlaps {} in memory; an output needs memory of its own", other.name);
        }
    }

    void check_forward() {
        const strobe_forward& f = p_.forward;
        check_like_q({"out", f.out}, size_.head_dim_v, {a_.q.dtype, STROBE_F32});
        if (given(f.lse)) check_rows({"lse", f.lse});
        check_outputs({{"out", f.out}, {"lse", f.lse}}, inputs());
    }

    void check_backward() {
        const strobe_backward& b = p_.backward;
        check_like_q({"out", b.out}, size_.head_dim_v, {a_.q.dtype, STROBE_F32});
        check_rows({"lse", b.lse});
        check_like_q({"dout", b.dout}, size_.head_dim_v, {a_.q.dtype});
        if (given(b.dlse)) check_rows({"dlse", b.dlse});
        check_like_q({"dq", b.dq}, size_.head_dim, {a_.q.dtype, STROBE_F32});
        check_like_k({"dk", b.dk}, size_.head_dim, {a_.q.dtype, STROBE_F32});
        check_like_k({"dv", b.dv}, size_.head_dim_v, {a_.q.dtype, STROBE_F32});
        for (const Named& n : {Named{"dk", b.dk}, Named{"dv", b.dv}}) {
            if (n.tensor.dtype != b.dq.dtype) {
                refuse(n.name, "dtype is {}, but dq is {}; dq, dk and dv share one dtype", dtype_name(n.tensor.dtype),
                       dtype_name(b.dq.dtype));
            }
        }
        if (b.accumulate && b.dq.dtype != STROBE_F32) {
            refuse("accumulate", "is set while dq is {}; gradients are added up in f32", dtype_name(b.dq.dtype));
        }
        if (given(b.dbias)) check_dbias({"dbias", b.dbias});
        NamedList read = inputs();
        for (const Named& n : {Named{"out", b.out}, Named{"lse", b.lse}, Named{"dout", b.dout}, Named{"dlse", b.dlse}}) read.add(n);
        check_outputs({{"dq", b.dq}, {"dk", b.dk}, {"dv", b.dv}, {"dbias", b.dbias}}, read);
    }

    void check_dbias(const Named& n) {
        if (!given(a_.bias)) refuse("dbias", "is given without bias");
        const int64_t* s = a_.bias.shape;
        check_shape(n, {s[0], s[1], s[2], s[3]}, "the shape of bias");
        check_view(n, {STROBE_F32, a_.bias.dtype}, {"q", a_.q}, pointers_);
    }
};

}  // namespace

void validate(const Problem& problem, DataPointers pointers) { Validator(problem, pointers).run(); }

void validate_dropout_mask(const strobe_attention& a, const strobe_tensor& keep) {
    const bool varlen_q = given(a.cu_seqlens_q), varlen_k = given(a.cu_seqlens_k);
    const Named q{"q", a.q}, k{"k", a.k}, out{"keep", keep};
    check_ndim(q, {varlen_q ? 3 : 4}, varlen_q ? "(Tq, H, D)" : "(B, Sq, H, D)");
    check_ndim(k, {varlen_k ? 3 : 4}, varlen_k ? "(Tk, Hk, D)" : "(B, Sk, Hk, D)");
    for (const Named& n : {q, k}) {
        check_dtype(n, {STROBE_F32, STROBE_BF16, STROBE_F16});
        check_geometry(n, DataPointers::ignored);
    }
    if (varlen_q) check_ndim({"cu_seqlens_q", a.cu_seqlens_q}, {1}, "one-dimensional");
    const int64_t batch = varlen_q ? a.cu_seqlens_q.shape[0] - 1 : a.q.shape[0];
    if (!(a.dropout_p >= 0 && a.dropout_p < 1)) {
        refuse("dropout_p", "is {}; it must be at least 0 and below 1", a.dropout_p);
    }
    check_shape(out, {batch, extent_from_end(a.q, 2), varlen_q ? a.max_seqlen_q : a.q.shape[1],
                      varlen_k ? a.max_seqlen_k : a.k.shape[1]}, "(B, H, Sq, Sk)");
    check_dtype(out, {STROBE_U8});
    check_device(out);
    check_geometry(out, DataPointers::required);
    check_writable(out);
}

void validate_lse_merge(int32_t num_parts, const strobe_tensor* part_out, const strobe_tensor* part_lse,
                        const strobe_tensor* out, const strobe_tensor* lse) {
    if (num_parts < 1) refuse("num_parts", "is {}; there must be at least one part", num_parts);
    if (!part_out) refuse("part_out", "is NULL");
    if (!part_lse) refuse("part_lse", "is NULL");
    if (!out) refuse("out", "is NULL");
    if (!lse) refuse("lse", "is NULL");
    const Named first{"out", *out};
    check_ndim(first, {3, 4}, "(B, Sq, H, Dv), or (Tq, H, Dv)");

    const auto check_pair = [&](const Named& o, const Named& l) {
        check_view(o, {STROBE_F32, STROBE_BF16, STROBE_F16}, first, DataPointers::required);
        check_unit_stride(o);
        const int64_t* s = first.tensor.shape;
        if (first.tensor.ndim == 4) {
            check_shape(o, {s[0], s[1], s[2], s[3]}, "(B, Sq, H, Dv)");
            check_shape(l, {s[0], s[2], s[1]}, "(B, H, Sq)");
        } else {
            check_shape(o, {s[0], s[1], s[2]}, "(Tq, H, Dv)");
            check_shape(l, {s[1], s[0]}, "(H, Tq)");
        }
        check_view(l, {STROBE_F32}, first, DataPointers::required);
        check_unit_stride(l);
    };
    check_pair(first, {"lse", *lse});
    check_writable(first);
    check_writable({"lse", *lse});

    const auto same_view = [](const strobe_tensor& a, const strobe_tensor& b) {
        bool same = a.data == b.data && a.dtype == b.dtype;
        for (int i = 0; i < a.ndim; ++i) same = same && (a.shape[i] <= 1 || a.strides[i] == b.strides[i]);
        return same;
    };
    for (int32_t i = 0; i < num_parts; ++i) {
        const std::string out_name = fmt::format("part_out[{}]", i), lse_name = fmt::format("part_lse[{}]", i);
        const Named o{out_name.c_str(), part_out[i]}, l{lse_name.c_str(), part_lse[i]};
        check_pair(o, l);
        if (i == 0 && same_view(o.tensor, *out) && same_view(l.tensor, *lse)) continue;
        for (const Named& written : {first, Named{"lse", *lse}}) {
            for (const Named& part : {o, l}) {
                if (may_overlap(written.tensor, part.tensor)) {
                    refuse(written.name, "overlaps {} in memory; only the first part may be the result itself, out and lse alike",
                           part.name);
                }
            }
        }
    }
}

}  // namespace strobe
