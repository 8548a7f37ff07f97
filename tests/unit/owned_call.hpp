// A dense call of the C++ interface that owns its tensors: for tests of behaviour that a single case cannot show.
#pragma once

#include <cstddef>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "core/numeric.hpp"
#include "strobe/strobe.hpp"

namespace strobe {

struct OwnedShape {
    DType dtype = DType::f32;
    int64_t batch = 1, seqlen_q = 1, seqlen_k = 1, num_heads = 1, num_heads_k = 1, head_dim = 1, head_dim_v = 0;
    DType out_dtype = dtype;
    DType grad_dtype = dtype;

    int64_t dim_v() const { return head_dim_v ? head_dim_v : head_dim; }
};

class OwnedCall {
public:
    explicit OwnedCall(const OwnedShape& s, unsigned seed = 1) : shape(s), random_(seed) {
        const auto [dtype, b, sq, sk, h, hk, d, unused_dv, out_dtype, grad_dtype] = s;
        const int64_t dv = s.dim_v();
        attention.q = random(dtype, {b, sq, h, d});
        attention.k = random(dtype, {b, sk, hk, d});
        attention.v = random(dtype, {b, sk, hk, dv});
        forward.out = backward.out = zeros(out_dtype, {b, sq, h, dv});
        forward.lse = backward.lse = zeros(DType::f32, {b, h, sq});
        backward.dout = random(dtype, {b, sq, h, dv});
        backward.dq = zeros(grad_dtype, {b, sq, h, d});
        backward.dk = zeros(grad_dtype, {b, sk, hk, d});
        backward.dv = zeros(grad_dtype, {b, sk, hk, dv});
    }
    OwnedCall(const OwnedCall&) = delete;
    OwnedCall& operator=(const OwnedCall&) = delete;

    Tensor zeros(DType dtype, std::vector<int64_t> extents) {
        int64_t count = 1;
        for (int64_t extent : extents) count *= extent;
        memory_.emplace_back(static_cast<size_t>(count) * size_of(dtype) + 64);
        return Tensor(memory_.back().data(), dtype, extents, {});
    }

    Tensor random(DType dtype, std::vector<int64_t> extents, float scale = 1.0f) {
        Tensor t = zeros(dtype, extents);
        std::normal_distribution<float> normal(0.0f, scale);
        for (int64_t n = 0; n < count(t); ++n) store_element(t.data, dtype, n, normal(random_));
        return t;
    }

    void run_forward() { strobe::forward(attention, forward); }
    void run_backward() { strobe::backward(attention, backward); }
    void run() {
        run_forward();
        run_backward();
    }

    static int64_t count(const Tensor& t) {
        int64_t n = 1;
        for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
        return n;
    }
    static float get(const Tensor& t, int64_t n) { return load_element(t.data, static_cast<DType>(t.dtype), n); }
    static void set(const Tensor& t, int64_t n, float x) { store_element(t.data, static_cast<DType>(t.dtype), n, x); }

    static std::vector<float> values(const Tensor& t) {
        std::vector<float> v(static_cast<size_t>(count(t)));
        for (size_t n = 0; n < v.size(); ++n) v[n] = get(t, static_cast<int64_t>(n));
        return v;
    }
    static std::vector<std::byte> bits(const Tensor& t) {
        const auto* bytes = static_cast<const std::byte*>(t.data);
        return {bytes, bytes + count(t) * static_cast<int64_t>(size_of(static_cast<DType>(t.dtype)))};
    }

    OwnedShape shape;
    Attention attention;
    Forward forward;
    Backward backward;

private:
    std::vector<std::vector<std::byte>> memory_;
    std::mt19937 random_;
};

/// Rows [begin, begin + rows) of a dense (B, S, H, D) tensor, and of a dense (B, H, S) one.
inline Tensor token_rows(Tensor t, int64_t begin, int64_t rows) {
    t.data = static_cast<std::byte*>(t.data) + begin * t.strides[1] * static_cast<int64_t>(size_of(static_cast<DType>(t.dtype)));
    t.shape[1] = rows;
    return t;
}
inline Tensor lse_rows(Tensor t, int64_t begin, int64_t rows) {
    t.data = static_cast<float*>(t.data) + begin;
    t.shape[2] = rows;
    return t;
}

inline double largest_difference(const Tensor& a, const Tensor& b) {
    double largest = 0;
    for (int64_t n = 0; n < OwnedCall::count(a); ++n) {
        const double difference = std::abs(double{OwnedCall::get(a, n)} - double{OwnedCall::get(b, n)});
        if (!(difference <= largest)) largest = difference;  // a NaN stays
    }
    return largest;
}

}  // namespace strobe
