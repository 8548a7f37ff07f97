// Between the caller's tensors (three element types, any strides) and the fp32 tiles of the kernels.
#pragma once

#include "core/params.hpp"
#include "cpu/simd.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

template <class T>
STROBE_CPU_INLINE T lesser(T a, T b) {
    return b < a ? b : a;
}

template <class T>
STROBE_CPU_INLINE T greater(T a, T b) {
    return a < b ? b : a;
}

STROBE_CPU_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

STROBE_CPU_INLINE Vec load_as_float(const float* p) { return load(p); }
STROBE_CPU_INLINE Vec load_as_float(const BFloat16* p) { return load_bfloat(&p->bits); }
STROBE_CPU_INLINE Vec load_as_float(const Float16* p) { return load_half(&p->bits); }
STROBE_CPU_INLINE void store_float_as(float* p, Vec v) { store(p, v); }
STROBE_CPU_INLINE void store_float_as(BFloat16* p, Vec v) { store_bfloat(&p->bits, v); }
STROBE_CPU_INLINE void store_float_as(Float16* p, Vec v) { store_half(&p->bits, v); }

STROBE_CPU_INLINE float to_scalar(float x) { return x; }
STROBE_CPU_INLINE float to_scalar(BFloat16 x) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
STROBE_CPU_INLINE float to_scalar(Float16 x) { return float_from_half(x.bits); }
STROBE_CPU_INLINE void from_scalar(float* p, float x) { *p = x; }
STROBE_CPU_INLINE void from_scalar(BFloat16* p, float x) { p->bits = static_cast<uint16_t>(bfloat_bits(splat(x))[0]); }
STROBE_CPU_INLINE void from_scalar(Float16* p, float x) { p->bits = half_from_float(x); }

/// Calls f with a null pointer of the element type that a dtype names.
template <class F>
STROBE_CPU_INLINE void with_type(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32: f(static_cast<float*>(nullptr)); break;
        case DType::bf16: f(static_cast<BFloat16*>(nullptr)); break;
        case DType::f16: f(static_cast<Float16*>(nullptr)); break;
        default: break;  // no tensor of the kernels has another type
    }
}

template <class T>
STROBE_CPU_INLINE T* row_of(const TensorRef& t, int64_t batch, int64_t row, int64_t head) {
    return static_cast<T*>(t.data) + batch * t.batch_stride + row * t.row_stride + head * t.head_stride;
}

/// dst[0, count) = src[0, count), then zeros up to `padded`.
template <class T>
STROBE_CPU_INLINE void read_row(const T* src, int64_t count, float* dst, int64_t padded) {
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) store(dst + c, load_as_float(src + c));
    for (; c < count; ++c) dst[c] = to_scalar(src[c]);
    for (; c < padded; ++c) dst[c] = 0.0f;
}

/// dst[0, count) = factor * src[0, count), or dst += where `add` is set (fp32 gradients only).
template <class T>
STROBE_CPU_INLINE void write_row(const float* src, float factor, int64_t count, T* dst, bool add) {
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) {
        const Vec v = load(src + c) * splat(factor);
        store_float_as(dst + c, add ? load_as_float(dst + c) + v : v);
    }
    for (; c < count; ++c) from_scalar(dst + c, add ? to_scalar(dst[c]) + src[c] * factor : src[c] * factor);
}

template <class T>
STROBE_CPU_INLINE void zero_row(T* dst, int64_t count) {
    for (int64_t c = 0; c < count; ++c) from_scalar(dst + c, 0.0f);
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
