#include "verify/case_data.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string_view>

#include "core/numeric.hpp"

namespace strobe::verify {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double least_number(DType dtype) {
    return dtype == DType::f16 ? -65504.0 : dtype == DType::bf16 ? -0x1.FEp127 : -0x1.FFFFFEp127;
}

/// Normal deviates, the same on every machine and standard library.
class Random {
public:
    explicit Random(std::string_view seed) {
        for (char c : seed) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
    }

    uint64_t bits() {  // SplitMix64
        uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        return z ^ z >> 31;
    }

    double uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }

    double normal() {  // Box and Muller
        if (has_spare_) {
            has_spare_ = false;
            return spare_;
        }
        const double radius = std::sqrt(-2.0 * std::log(uniform()));
        const double angle = 6.283185307179586 * uniform();
        spare_ = radius * std::sin(angle);
        has_spare_ = true;
        return radius * std::cos(angle);
    }

private:
    uint64_t state_ = 0xCBF29CE484222325ull;
    double spare_ = 0;
    bool has_spare_ = false;
};

/// Lays tensors out and fills them.
class Builder {
public:
    Builder(CaseData& data, Contents contents)
        : data_(data), c_(data.spec), random_(c_.name()), drawn_(contents == Contents::drawn) {}

    void build() {
        lengths_q_ = c_.lengths_q();
        lengths_k_ = c_.lengths_k();
        rows_q_ = std::accumulate(lengths_q_.begin(), lengths_q_.end(), int64_t{0});
        rows_k_ = std::accumulate(lengths_k_.begin(), lengths_k_.end(), int64_t{0});

        const double loudness = c_.loud ? 30.0 : 1.0;
        tensors("qkv", data_.q, data_.k, data_.v, c_.dtype);
        fill_used(data_.q, c_.varlen_q, lengths_q_, c_.used_q(), loudness);
        fill_used(data_.k, c_.varlen_k, lengths_k_, c_.used_k(), 1.0);
        fill_used(data_.v, c_.varlen_k, lengths_k_, c_.used_k(), 1.0);
        data_.out = token_tensor("out", c_.out_dtype(), c_.varlen_q, rows_q_, c_.seqlen_q, c_.num_heads, c_.dim_v());
        data_.dout = token_tensor("dout", c_.dtype, c_.varlen_q, rows_q_, c_.seqlen_q, c_.num_heads, c_.dim_v());
        fill_used(data_.dout, c_.varlen_q, lengths_q_, c_.used_q(), 1.0);
        tensors("dqkv", data_.dq, data_.dk, data_.dv, c_.grad_dtype());
        if (c_.accumulate) {
            for (const View* view : {&data_.dq, &data_.dk, &data_.dv}) fill(*view);
        }

        data_.lse = row_tensor("lse");
        if (c_.dlse) {
            data_.dlse = row_tensor("dlse");
            fill(data_.dlse);
        }
        if (c_.alibi != Alibi::none) build_alibi();
        if (c_.bias != BiasShape::none) build_bias();

        if (c_.varlen_q) data_.cu_seqlens_q = integers("cu_seqlens_q", prefix_sums(lengths_q_));
        if (c_.varlen_k) data_.cu_seqlens_k = integers("cu_seqlens_k", prefix_sums(lengths_k_));
        if (c_.seqused_q) data_.seqused_q = integers("seqused_q", c_.used_q());
        if (c_.seqused_k) data_.seqused_k = integers("seqused_k", c_.used_k());

        data_.dropout_seed = random_.bits();
        data_.dropout_offset = random_.bits() >> 40;
        data_.softmax_scale =
            static_cast<float>(c_.softmax_scale != 0 ? c_.softmax_scale : 1.0 / std::sqrt(double(c_.head_dim)));
    }

private:
    /// A buffer that covers `view` (whose offset is still 0) and the guard bands.
    void place(std::string name, DType dtype, View& view) {
        int64_t extent = 1;
        for (size_t axis = 0; axis < view.shape.size(); ++axis) {
            if (view.shape[axis] == 0) extent = 0;
        }
        if (extent) {
            for (size_t axis = 0; axis < view.shape.size(); ++axis) {
                extent += (view.shape[axis] - 1) * view.strides[axis];
            }
        }
        view.buffer = static_cast<int>(data_.buffers.size());
        view.offset = kGuard;
        data_.buffers.push_back({std::move(name), dtype, std::vector<double>(drawn_ ? extent + 2 * kGuard : 0, kNaN)});
    }

    /// (B, S, H, D), or (T, H, D), in the case's layout.
    View token_tensor(const char* name, DType dtype, bool varlen, int64_t total, int64_t seqlen, int64_t heads, int64_t dim) {
        View t;
        const int64_t rows = varlen ? total : seqlen;
        int64_t row, head, batch;
        if (c_.layout == Layout::bhsd) {
            row = dim;
            head = rows * dim;
            batch = heads * head;
        } else if (c_.layout == Layout::padded) {
            head = (dim + 7) / 8 * 8 + 8;
            row = heads * head + 16;
            batch = rows * row + 24;
        } else {
            head = dim;
            row = heads * dim;
            batch = rows * row;
        }
        t.shape = {rows, heads, dim};
        t.strides = {row, head, 1};
        if (!varlen) {
            t.shape.insert(t.shape.begin(), c_.batch);
            t.strides.insert(t.strides.begin(), batch);
        }
        place(name, dtype, t);
        return t;
    }

    /// q, k, v or their gradients: three buffers, or one packed one.
    void tensors(const std::string& names, View& q, View& k, View& v, DType dtype) {
        if (c_.layout != Layout::packed) {
            const std::string prefix = names[0] == 'd' ? "d" : "";
            q = token_tensor((prefix + "q").c_str(), dtype, c_.varlen_q, rows_q_, c_.seqlen_q, c_.num_heads, c_.head_dim);
            k = token_tensor((prefix + "k").c_str(), dtype, c_.varlen_k, rows_k_, c_.seqlen_k, c_.num_heads_k, c_.head_dim);
            v = token_tensor((prefix + "v").c_str(), dtype, c_.varlen_k, rows_k_, c_.seqlen_k, c_.num_heads_k, c_.dim_v());
            return;
        }
        const int64_t heads = c_.num_heads + 2 * c_.num_heads_k;
        const View whole = token_tensor(names.c_str(), dtype, c_.varlen_q, rows_q_, c_.seqlen_q, heads, c_.head_dim);
        const size_t head_axis = whole.shape.size() - 2;
        int64_t first = 0;
        for (View* view : {&q, &k, &v}) {
            *view = whole;
            view->shape[head_axis] = view == &q ? c_.num_heads : c_.num_heads_k;
            view->offset += first * c_.head_dim;
            first += view->shape[head_axis];
        }
    }

    /// (B, H, S), or (H, T): fp32, always dense.
    View row_tensor(const char* name) {
        View t;
        const int64_t rows = c_.varlen_q ? rows_q_ : c_.seqlen_q;
        t.shape = {c_.num_heads, rows};
        t.strides = {rows, 1};
        if (!c_.varlen_q) {
            t.shape.insert(t.shape.begin(), c_.batch);
            t.strides.insert(t.strides.begin(), c_.num_heads * rows);
        }
        place(name, DType::f32, t);
        return t;
    }

    void build_alibi() {
        View t;
        if (c_.alibi == Alibi::per_head) {
            t.shape = {c_.num_heads};
            t.strides = {1};
        } else {
            t.shape = {c_.batch, c_.num_heads};
            t.strides = {c_.num_heads, 1};
        }
        place("alibi_slopes", DType::f32, t);
        data_.alibi_slopes = t;
        if (!drawn_) return;
        t.for_each([&](int64_t at) { set(t, at, static_cast<float>(0.3 * random_.uniform())); });
    }

    void build_bias() {
        const int64_t b = c_.batch, h = c_.num_heads, i = c_.seqlen_q, j = c_.seqlen_k;
        View t;
        switch (c_.bias) {
            case BiasShape::full: t.shape = {b, h, i, j}; break;
            case BiasShape::heads: t.shape = {1, h, i, j}; break;
            case BiasShape::shared: t.shape = {1, 1, i, j}; break;
            case BiasShape::keys: t.shape = {b, 1, 1, j}; break;
            case BiasShape::queries: t.shape = {1, h, i, 1}; break;
            default: t.shape = {1, 1, 1, 1}; break;
        }
        t.strides = {t.shape[1] * t.shape[2] * t.shape[3], t.shape[2] * t.shape[3], t.shape[3], 1};
        data_.bias = t;
        place("bias", c_.bias_dtype(), data_.bias);
        fill(data_.bias);
        if (c_.bias_hides && drawn_) {
            const double hidden = c_.bias_least ? least_number(c_.dtype) : -kInfinity;
            int64_t n = 0;
            data_.bias.for_each([&](int64_t at) {
                const int64_t row = n / t.shape[3], column = n % t.shape[3];
                ++n;
                // Of one batch entry all keys, of the others more and more of the last ones.
                const bool padding = c_.bias == BiasShape::keys && column >= (b - 1 - row) * j / b;
                if (padding || (c_.bias != BiasShape::keys && (row % 5 == 3 || random_.bits() % 4 == 0))) {
                    set(data_.bias, at, hidden);
                }
            });
        }
        if (c_.dbias) {
            data_.dbias = t;
            place("dbias", c_.bias_dtype(), data_.dbias);
        }
    }

    View integers(const char* name, const std::vector<int64_t>& values) {
        View t;
        t.shape = {static_cast<int64_t>(values.size())};
        t.strides = {1};
        place(name, DType::i32, t);
        for (size_t n = 0; drawn_ && n < values.size(); ++n) {
            set(t, t.offset + static_cast<int64_t>(n), static_cast<double>(values[n]));
        }
        return t;
    }

    static std::vector<int64_t> prefix_sums(const std::vector<int64_t>& lengths) {
        std::vector<int64_t> sums{0};
        for (int64_t n : lengths) sums.push_back(sums.back() + n);
        return sums;
    }

    void set(const View& view, int64_t at, double value) { data_.buffers[view.buffer].values[at] = value; }

    void fill(const View& view, double scale = 1.0) {
        if (!drawn_) return;
        const DType dtype = data_.buffers[view.buffer].dtype;
        view.for_each([&](int64_t at) { set(view, at, round_to(dtype, static_cast<float>(scale * random_.normal()))); });
    }

    /// Rows behind seqused stay NaN: nobody may look at them.
    void fill_used(const View& view, bool varlen, const std::vector<int64_t>& lengths, const std::vector<int64_t>& used,
                   double scale) {
        int64_t row = 0;
        for (int b = 0; b < c_.batch; ++b) {
            View part = view;
            if (varlen) {
                part.offset += row * view.strides[0];
                part.shape[0] = used[b];
            } else {
                part.offset += b * view.strides[0];
                part.shape[0] = 1;
                part.shape[1] = used[b];
            }
            fill(part, scale);
            row += lengths[b];
        }
    }

    CaseData& data_;
    const Case& c_;
    Random random_;
    bool drawn_;
    std::vector<int64_t> lengths_q_, lengths_k_;
    int64_t rows_q_ = 0, rows_k_ = 0;
};

TensorRef tensor_ref(const CaseData& data, const Placement& placement, const View& view) {
    TensorRef t;
    const size_t axes = view.shape.size();
    t.data = placement.at(data, view);
    t.row_stride = view.strides[axes - 3];
    t.head_stride = view.strides[axes - 2];
    t.batch_stride = axes == 4 ? view.strides[0] : 0;
    return t;
}

RowRef row_ref(const CaseData& data, const Placement& placement, const View& view) {
    RowRef r;
    if (!view.given()) return r;
    const size_t axes = view.shape.size();
    r.data = static_cast<float*>(placement.at(data, view));
    r.head_stride = view.strides[axes - 2];
    r.batch_stride = axes == 3 ? view.strides[0] : 0;
    return r;
}

BiasRef bias_ref(const CaseData& data, const Placement& placement, const View& view) {
    BiasRef r;
    if (!view.given()) return r;
    const auto stride = [&](int axis) { return view.shape[axis] == 1 ? 0 : view.strides[axis]; };
    r.data = placement.at(data, view);
    r.batch_stride = stride(0);
    r.head_stride = stride(1);
    r.row_stride = stride(2);
    r.col_stride = stride(3);
    return r;
}

AttentionParams attention_params(const CaseData& data, const Placement& placement) {
    const Case& c = data.spec;
    const auto integers = [&](const View& view) {
        return view.given() ? static_cast<const int32_t*>(placement.at(data, view)) : nullptr;
    };
    AttentionParams p;
    p.size.batch = c.batch;
    p.size.num_heads = c.num_heads;
    p.size.num_heads_k = c.num_heads_k;
    p.size.head_dim = c.head_dim;
    p.size.head_dim_v = c.dim_v();
    p.size.seqlen_q = c.seqlen_q;
    p.size.seqlen_k = c.seqlen_k;
    p.size.total_q = c.varlen_q ? data.q.shape[0] : c.batch * c.seqlen_q;
    p.size.total_k = c.varlen_k ? data.k.shape[0] : c.batch * c.seqlen_k;
    p.seqlens = {integers(data.cu_seqlens_q), integers(data.cu_seqlens_k), integers(data.seqused_q),
                 integers(data.seqused_k)};
    p.mask.window_left = c.window_left;
    p.mask.window_right = c.window_right;
    p.mask.has_positions = c.positions;
    p.mask.q_position = c.q_position;
    p.mask.k_position = c.k_position;
    p.score.softmax_scale = data.softmax_scale;
    p.score.softcap = static_cast<float>(c.softcap);
    if (data.alibi_slopes.given()) {
        p.score.alibi_slopes = static_cast<const float*>(placement.at(data, data.alibi_slopes));
        p.score.alibi_batch_stride = data.alibi_slopes.shape.size() == 2 ? data.alibi_slopes.strides[0] : 0;
    }
    p.score.bias = bias_ref(data, placement, data.bias);
    p.dropout.seed = data.dropout_seed;
    p.dropout.offset = data.dropout_offset;
    p.dropout.drop_below = static_cast<uint32_t>(std::lround(c.dropout_p * 65536));
    p.dropout.rescale = 65536.0f / static_cast<float>(65536 - p.dropout.drop_below);
    p.dtype = c.dtype;
    p.out_dtype = c.out_dtype();
    p.bias_dtype = c.bias_dtype();
    p.q = tensor_ref(data, placement, data.q);
    p.k = tensor_ref(data, placement, data.k);
    p.v = tensor_ref(data, placement, data.v);
    p.out = tensor_ref(data, placement, data.out);
    p.lse = row_ref(data, placement, data.lse);
    return p;
}

}  // namespace

int64_t View::elements() const {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    return n;
}

CaseData::CaseData(const Case& c, Contents contents) : spec(c) { Builder(*this, contents).build(); }

void* Placement::at(const CaseData& data, const View& view) const {
    const Buffer& buffer = data.buffers[view.buffer];
    return static_cast<std::byte*>(buffers[view.buffer]) + view.offset * static_cast<int64_t>(element_bytes(buffer, doubles));
}

size_t element_bytes(const Buffer& buffer, bool doubles) {
    return doubles && buffer.dtype != DType::i32 ? sizeof(double) : size_of(buffer.dtype);
}

void encode_element(const Buffer& buffer, bool doubles, std::byte* image, int64_t index, double value) {
    if (buffer.dtype == DType::i32) {
        // The gaps of an integer buffer hold a number that no prefix sum survives.
        const int32_t integer = std::isnan(value) ? -0x7F7F7F7F : static_cast<int32_t>(value);
        std::memcpy(image + index * 4, &integer, sizeof integer);
    } else if (doubles) {
        std::memcpy(image + index * 8, &value, sizeof value);
    } else {
        store_element(image, buffer.dtype, index, value);
    }
}

double decode(const Buffer& buffer, bool doubles, const std::byte* image, int64_t index) {
    if (buffer.dtype == DType::i32) {
        int32_t integer;
        std::memcpy(&integer, image + index * 4, sizeof integer);
        return integer;
    }
    if (doubles) {
        double value;
        std::memcpy(&value, image + index * 8, sizeof value);
        return value;
    }
    return load_element(image, buffer.dtype, index);
}

std::vector<std::byte> encode(const Buffer& buffer, bool doubles) {
    std::vector<std::byte> image(buffer.values.size() * element_bytes(buffer, doubles));
    const double* values = buffer.values.data();
    if (doubles && buffer.dtype != DType::i32) {
        std::memcpy(image.data(), values, image.size());
        return image;
    }
    for (size_t i = 0; i < buffer.values.size(); ++i) {
        encode_element(buffer, doubles, image.data(), static_cast<int64_t>(i), values[i]);
    }
    return image;
}

ForwardParams forward_params(const CaseData& data, const Placement& placement) {
    ForwardParams p;
    static_cast<AttentionParams&>(p) = attention_params(data, placement);
    return p;
}

BackwardParams backward_params(const CaseData& data, const Placement& placement) {
    BackwardParams p;
    static_cast<AttentionParams&>(p) = attention_params(data, placement);
    p.dout = tensor_ref(data, placement, data.dout);
    p.dlse = row_ref(data, placement, data.dlse);
    p.dq = tensor_ref(data, placement, data.dq);
    p.dk = tensor_ref(data, placement, data.dk);
    p.dv = tensor_ref(data, placement, data.dv);
    p.grad_dtype = data.spec.grad_dtype();
    p.dbias_dtype = data.spec.bias_dtype();
    p.dbias = bias_ref(data, placement, data.dbias);
    p.accumulate = data.spec.accumulate;
    p.deterministic = data.spec.deterministic;
    return p;
}

}  // namespace strobe::verify
