#include "reference/reference.hpp"

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/lse_merge.hpp"
#include "core/numeric.hpp"

namespace strobe::reference {
namespace {

// How numbers are kept in the caller's buffers, and in which arithmetic they are worked on.

struct AsDeclared {
    static float load(const void* data, DType dtype, int64_t index) { return load_element(data, dtype, index); }
    template <class Real>
    static void store(void* data, DType dtype, int64_t index, Real x) {
        store_element(data, dtype, index, x);
    }
};

struct AsDoubles {
    static double load(const void* data, DType, int64_t index) { return static_cast<const double*>(data)[index]; }
    static void store(void* data, DType, int64_t index, double x) { static_cast<double*>(data)[index] = x; }
};

template <class RealType, class StorageType>
struct Arithmetic {
    using Real = RealType;
    using Storage = StorageType;

    /// What is left of an intermediate result when it is written to a tensor of the working dtype.
    static Real rounded(DType dtype, Real x) {
        if constexpr (std::is_same_v<Real, float>) return round_to(dtype, x);
        return x;
    }
};

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

/// The two loops in which all the time goes read and write rows that their caller has copied or keeps to itself, so
/// that no other thread can meet them there. The thread sanitizer would make them twenty times slower to find that out.
#define STROBE_OWN_MEMORY __attribute__((no_sanitize("thread")))

/// In float one term after another, as a matrix product keeps each of its sums in a register; in double, where the
/// order does not matter, in eight lanes for speed.
template <class Real>
STROBE_OWN_MEMORY Real dot(const Real* a, const Real* b, int n) {
    constexpr int kLanes = std::is_same_v<Real, float> ? 1 : 8;
    Real sum[kLanes] = {};
    int d = 0;
    for (; d + kLanes <= n; d += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) sum[lane] += a[d + lane] * b[d + lane];
    }
    for (; d < n; ++d) sum[d % kLanes] += a[d] * b[d];
    for (int lane = 1; lane < kLanes; ++lane) sum[0] += sum[lane];
    return sum[0];
}

/// y += a * x
template <class Real>
STROBE_OWN_MEMORY void add_scaled(Real* y, Real a, const Real* x, int n) {
    for (int d = 0; d < n; ++d) y[d] += a * x[d];
}

/// Terms that are added up in one chain. Longer sums are made of such chains, as those of blocked matrix products and
/// of vectorised reductions are: one chain over 100,000 keys would be too generous a yardstick.
constexpr int64_t kChain = 256;

/// An array of sums that go on side by side.
template <class Real>
class Sums {
public:
    explicit Sums(int64_t count) : total_(static_cast<size_t>(count)), chain_(total_.size()) {}

    /// Comes before the terms number `term` of the sums, counted from 0.
    void next_term(int64_t term) {
        if (term % kChain == 0) end_chain();
    }
    /// sum[first + d] += a * x[d]
    void add(int64_t first, Real a, const Real* x, int n) { add_scaled(&chain_[first], a, x, n); }

    const std::vector<Real>& result() {
        end_chain();
        return total_;
    }

private:
    void end_chain() {
        for (size_t n = 0; n < total_.size(); ++n) total_[n] += chain_[n];
        chain_.assign(chain_.size(), Real(0));
    }

    std::vector<Real> total_, chain_;
};

/// Rows [first, first + rows) of one head of a tensor as a dense (rows, dim) array.
template <class A>
std::vector<typename A::Real> read_rows(const TensorRef& t, DType dtype, int b, int head, int64_t first, int64_t rows,
                                        int dim) {
    std::vector<typename A::Real> x(static_cast<size_t>(rows * dim));
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = b * t.batch_stride + (first + i) * t.row_stride + head * t.head_stride;
        for (int d = 0; d < dim; ++d) x[i * dim + d] = A::Storage::load(t.data, dtype, at + d);
    }
    return x;
}

template <class A>
void write_row(const TensorRef& t, DType dtype, int b, int head, int64_t row, const typename A::Real* x, int dim,
               bool accumulate = false) {
    using Real = typename A::Real;
    if (!t) return;
    const int64_t at = b * t.batch_stride + row * t.row_stride + head * t.head_stride;
    for (int d = 0; d < dim; ++d) {
        const Real before = accumulate ? Real(A::Storage::load(t.data, dtype, at + d)) : Real(0);
        A::Storage::store(t.data, dtype, at + d, before + x[d]);
    }
}

/// One query head of one sequence of the batch: its keys and values, and the scores of its queries.
template <class A>
struct Head {
    using Real = typename A::Real;

    Head(const AttentionParams& params, int batch_index, int head)
        : p(params),
          b(batch_index),
          h(head),
          h_k(head / (params.size.num_heads / params.size.num_heads_k)),
          seq(sequence_of(params, batch_index)),
          mask(seq.mask(params.mask)),
          k(read_rows<A>(p.k, p.dtype, b, h_k, seq.k_row, seq.seqlen_k, p.size.head_dim)),
          v(read_rows<A>(p.v, p.dtype, b, h_k, seq.k_row, seq.seqlen_k, p.size.head_dim_v)) {
        if (p.score.alibi_slopes) {
            alibi_slope = A::Storage::load(p.score.alibi_slopes, DType::f32, b * p.score.alibi_batch_stride + h);
        }
    }

    std::vector<Real> query(int64_t i) const {
        return read_rows<A>(p.q, p.dtype, b, h, seq.q_row + i, 1, p.size.head_dim);
    }

    struct Score {
        Real value;
        Real derivative;  // d value / d (scaled dot product)
    };

    Score score(const std::vector<Real>& q_row, int64_t i, int64_t j) const {
        const ScoreParams& score = p.score;
        Score s{rounded(dot(q_row.data(), &k[j * p.size.head_dim], p.size.head_dim)), Real(1)};
        s.value = rounded(Real(score.softmax_scale) * s.value);
        if (score.softcap > 0) {
            const Real capped = rounded(std::tanh(rounded(s.value / Real(score.softcap))));
            s.value = rounded(Real(score.softcap) * capped);
            s.derivative = 1 - capped * capped;
        }
        if (score.bias) {
            const int64_t at = b * score.bias.batch_stride + h * score.bias.head_stride + i * score.bias.row_stride +
                               j * score.bias.col_stride;
            s.value = rounded(s.value + Real(A::Storage::load(score.bias.data, p.bias_dtype, at)));
        }
        if (score.alibi_slopes) {
            s.value = rounded(s.value - alibi_slope * static_cast<Real>(std::abs(i + seq.diagonal - j)));
        }
        return s;
    }

    /// 0 where the element is dropped, else the factor that keeps the expectation.
    Real dropout_factor(int64_t i, int64_t j) const {
        if (!p.dropout.enabled()) return 1;
        const int64_t row = i + (p.mask.has_positions ? p.mask.q_position : 0);
        const int64_t col = j + (p.mask.has_positions ? p.mask.k_position : 0);
        const bool keep = p.dropout.keep(static_cast<uint32_t>(b * p.size.num_heads + h), static_cast<uint32_t>(row),
                                         static_cast<uint32_t>(col));
        return keep ? Real(65536) / Real(65536 - p.dropout.drop_below) : Real(0);
    }

    Real rounded(Real x) const { return A::rounded(p.dtype, x); }

    int64_t row_at(const RowRef& r, int64_t i) const { return b * r.batch_stride + h * r.head_stride + seq.q_row + i; }
    Real load_row(const RowRef& r, int64_t i) const { return A::Storage::load(r.data, DType::f32, row_at(r, i)); }

    const AttentionParams& p;
    int b, h, h_k;
    Sequence seq;
    BandMask mask;
    std::vector<Real> k;  // (seqlen_k, head_dim)
    std::vector<Real> v;  // (seqlen_k, head_dim_v)
    Real alibi_slope = 0;
};

template <class A>
void forward_head(const ForwardParams& p, const Head<A>& head) {
    using Real = typename A::Real;
    const int head_dim_v = p.size.head_dim_v;
    std::vector<Real> s(head.seq.seqlen_k);

    for (int64_t i = 0; i < head.seq.rows_q; ++i) {
        Real row_max = -kInfinity<Real>;
        if (i < head.seq.seqlen_q) {
            const std::vector<Real> q = head.query(i);
            for (int64_t j = 0; j < head.seq.seqlen_k; ++j) {
                if (!head.mask.visible(i, j)) continue;
                s[j] = head.score(q, i, j).value;
                if (s[j] > row_max || std::isnan(s[j])) row_max = s[j];  // a NaN stays
            }
        }

        Sums<Real> out(head_dim_v);
        Real lse = -kInfinity<Real>;
        if (row_max != -kInfinity<Real>) {
            constexpr Real kOne = 1;
            Sums<Real> exponentials(1);
            for (int64_t j = 0; j < head.seq.seqlen_k; ++j) {
                exponentials.next_term(j);
                if (head.mask.visible(i, j)) exponentials.add(0, std::exp(s[j] - row_max), &kOne, 1);
            }
            const Real row_sum = exponentials.result()[0];
            lse = row_max + std::log(row_sum);
            for (int64_t j = 0; j < head.seq.seqlen_k; ++j) {
                out.next_term(j);
                if (!head.mask.visible(i, j)) continue;
                const Real probability = head.rounded(std::exp(s[j] - row_max) / row_sum);
                const Real dropped = head.rounded(probability * head.dropout_factor(i, j));
                out.add(0, dropped, &head.v[j * head_dim_v], head_dim_v);
            }
        }
        write_row<A>(p.out, p.out_dtype, head.b, head.h, head.seq.q_row + i, out.result().data(), head_dim_v);
        if (p.lse) A::Storage::store(p.lse.data, DType::f32, head.row_at(p.lse, i), lse);
    }
}

/// dbias summed over the axes along which the bias is broadcast.
template <class A>
struct BiasGradient {
    using Real = typename A::Real;

    explicit BiasGradient(const BackwardParams& params)
        : p(params),
          batch(p.dbias.batch_stride ? p.size.batch : 1),
          heads(p.dbias.head_stride ? p.size.num_heads : 1),
          rows(p.dbias.row_stride ? p.size.seqlen_q : 1),
          cols(p.dbias.col_stride ? p.size.seqlen_k : 1),
          sum(p.dbias ? static_cast<size_t>(batch * heads * rows * cols) : 0) {}

    void add(int64_t b, int64_t h, int64_t i, int64_t j, Real x) {
        if (p.dbias) sum[((b % batch * heads + h % heads) * rows + i % rows) * cols + j % cols] += x;
    }

    void write() const {
        const BiasRef& d = p.dbias;
        auto x = sum.begin();
        if (!d) return;
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t h = 0; h < heads; ++h) {
                for (int64_t i = 0; i < rows; ++i) {
                    for (int64_t j = 0; j < cols; ++j) {
                        const int64_t at = b * d.batch_stride + h * d.head_stride + i * d.row_stride + j * d.col_stride;
                        A::Storage::store(d.data, p.dbias_dtype, at, *x++);
                    }
                }
            }
        }
    }

    const BackwardParams& p;
    int64_t batch, heads, rows, cols;
    std::vector<Real> sum;
};

/// Writes dq of this head, and adds its share to dk, dv (dense, of its key head) and dbias.
template <class A>
void backward_head(const BackwardParams& p, const Head<A>& head, Sums<typename A::Real>& dk, Sums<typename A::Real>& dv,
                   BiasGradient<A>& dbias) {
    using Real = typename A::Real;
    const int head_dim = p.size.head_dim;
    const int head_dim_v = p.size.head_dim_v;
    for (int64_t i = 0; i < head.seq.rows_q; ++i) {
        const int64_t row = head.seq.q_row + i;
        Sums<Real> dq(head_dim);
        dk.next_term(i);
        dv.next_term(i);
        const Real lse = i < head.seq.seqlen_q ? head.load_row(p.lse, i) : -kInfinity<Real>;
        if (lse != -kInfinity<Real>) {
            const std::vector<Real> q = head.query(i);
            const std::vector<Real> dout = read_rows<A>(p.dout, p.dtype, head.b, head.h, row, 1, head_dim_v);
            const std::vector<Real> out = read_rows<A>(p.out, p.out_dtype, head.b, head.h, row, 1, head_dim_v);
            const Real dlse = p.dlse ? head.load_row(p.dlse, i) : Real(0);
            const Real delta = dot(dout.data(), out.data(), head_dim_v) - dlse;

            for (int64_t j = 0; j < head.seq.seqlen_k; ++j) {
                dq.next_term(j);
                if (!head.mask.visible(i, j)) continue;
                const auto s = head.score(q, i, j);
                const Real factor = head.dropout_factor(i, j);
                const Real probability = head.rounded(std::exp(s.value - lse));
                dv.add(j * head_dim_v, head.rounded(probability * factor), dout.data(), head_dim_v);

                Real dp = head.rounded(dot(dout.data(), &head.v[j * head_dim_v], head_dim_v));
                dp = head.rounded(dp * factor);
                Real ds = head.rounded(probability * (dp - delta));
                dbias.add(head.b, head.h, i, j, ds);
                ds = head.rounded(ds * s.derivative);
                ds = head.rounded(ds * Real(p.score.softmax_scale));
                dq.add(0, ds, &head.k[j * head_dim], head_dim);
                dk.add(j * head_dim, ds, q.data(), head_dim);
            }
        }
        write_row<A>(p.dq, p.grad_dtype, head.b, head.h, row, dq.result().data(), head_dim, p.accumulate);
    }
}

template <class A>
void run_forward(const ForwardParams& p) {
    for (int b = 0; b < p.size.batch; ++b) {
        for (int h = 0; h < p.size.num_heads; ++h) forward_head(p, Head<A>(p, b, h));
    }
}

template <class A>
void run_backward(const BackwardParams& p) {
    const int heads_per_key_head = p.size.num_heads / p.size.num_heads_k;
    BiasGradient<A> dbias(p);
    for (int b = 0; b < p.size.batch; ++b) {
        const Sequence seq = sequence_of(p, b);
        for (int h_k = 0; h_k < p.size.num_heads_k; ++h_k) {
            // Keys past seqlen_k are never seen: their gradient stays zero.
            Sums<typename A::Real> dk(seq.rows_k * p.size.head_dim), dv(seq.rows_k * p.size.head_dim_v);
            for (int g = 0; g < heads_per_key_head; ++g) {
                backward_head(p, Head<A>(p, b, h_k * heads_per_key_head + g), dk, dv, dbias);
            }
            const auto &dk_rows = dk.result(), &dv_rows = dv.result();
            for (int64_t j = 0; j < seq.rows_k; ++j) {
                write_row<A>(p.dk, p.grad_dtype, b, h_k, seq.k_row + j, &dk_rows[j * p.size.head_dim], p.size.head_dim,
                             p.accumulate);
                write_row<A>(p.dv, p.grad_dtype, b, h_k, seq.k_row + j, &dv_rows[j * p.size.head_dim_v], p.size.head_dim_v,
                             p.accumulate);
            }
        }
    }
    dbias.write();
}

}  // namespace

void forward(const ForwardParams& p, Precision precision) {
    switch (precision) {
        case Precision::fp64: return run_forward<Arithmetic<double, AsDeclared>>(p);
        case Precision::fp64_on_doubles: return run_forward<Arithmetic<double, AsDoubles>>(p);
        case Precision::naive: return run_forward<Arithmetic<float, AsDeclared>>(p);
    }
}

void backward(const BackwardParams& p, Precision precision) {
    switch (precision) {
        case Precision::fp64: return run_backward<Arithmetic<double, AsDeclared>>(p);
        case Precision::fp64_on_doubles: return run_backward<Arithmetic<double, AsDoubles>>(p);
        case Precision::naive: return run_backward<Arithmetic<float, AsDeclared>>(p);
    }
}

void merge(const MergeParams& p) {
    const int dim = static_cast<int>(p.head_dim_v);
    std::vector<double> out(dim);
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t h = 0; h < p.num_heads; ++h) {
            for (int64_t i = 0; i < p.rows; ++i) {
                LseMerge<double> merged;
                out.assign(dim, 0);
                for (const PartialResult* part = p.parts; part != p.parts + p.num_parts; ++part) {
                    merged.add(part->lse.data[b * part->lse.batch_stride + h * part->lse.head_stride + i]);
                    if (merged.weight_new == 0) continue;  // its lse cannot move the sum, and its out may be anything
                    const TensorRef& t = part->out;
                    const int64_t at = b * t.batch_stride + i * t.row_stride + h * t.head_stride;
                    for (int d = 0; d < dim; ++d) {
                        const double x = load_element(t.data, part->dtype, at + d);
                        out[d] = merged.weight_new * x + (merged.weight_old == 0 ? 0.0 : merged.weight_old * out[d]);
                    }
                }
                const TensorRef& t = p.result.out;
                const int64_t at = b * t.batch_stride + i * t.row_stride + h * t.head_stride;
                for (int d = 0; d < dim; ++d) store_element(t.data, p.result.dtype, at + d, out[d]);
                p.result.lse.data[b * p.result.lse.batch_stride + h * p.result.lse.head_stride + i] =
                    static_cast<float>(merged.lse);
            }
        }
    }
}

void dropout_mask(const DropoutMaskParams& p) {
    for (int64_t b = 0; b < p.shape[0]; ++b) {
        for (int64_t h = 0; h < p.shape[1]; ++h) {
            for (int64_t i = 0; i < p.shape[2]; ++i) {
                uint8_t* const row = p.keep + b * p.strides[0] + h * p.strides[1] + i * p.strides[2];
                for (int64_t j = 0; j < p.shape[3]; ++j) row[j * p.strides[3]] = p.value(b, h, i, j);
            }
        }
    }
}

}  // namespace strobe::reference
