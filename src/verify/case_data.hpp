// A case with its data: every buffer as numbers, every tensor as a view of a buffer. The same data can be laid out in
// any memory, in its own element types or widened to doubles, because views count elements and not bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/params.hpp"
#include "verify/case.hpp"

namespace strobe::verify {

/// A strided view of a buffer; not given while `buffer` is negative. At most five extents, as in the public interface.
struct View {
    int buffer = -1;
    int64_t offset = 0;
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;

    bool given() const { return buffer >= 0; }
    int64_t elements() const;

    /// Calls f(element index in the buffer) for each element, last axis fastest.
    template <class F>
    void for_each(F&& f) const;

    /// The same elements in the same order, by pieces that lie behind one another: f(index of the first, how many).
    template <class F>
    void for_each_run(F&& f) const;
};

/// One allocation. Whatever no view covers - the guard bands at both ends, the gaps between strided rows - is NaN.
struct Buffer {
    std::string name;
    DType dtype = DType::f32;
    std::vector<double> values;
};

/// Elements in front of and behind the tensors of each buffer. 128 bytes of the smallest type: alignment is kept.
inline constexpr int64_t kGuard = 64;

/// Without contents a case has its views, and buffers of no length.
enum class Contents { drawn, none };

struct CaseData {
    explicit CaseData(const Case& c, Contents contents = Contents::drawn);

    Case spec;
    std::vector<Buffer> buffers;

    View q, k, v, out;                 // (B, S, H, D), varlen (T, H, D)
    View lse, dlse;                    // (B, H, S), varlen (H, T)
    View alibi_slopes, bias, dbias;    // (H) or (B, H); (B or 1, H or 1, Sq or 1, Sk or 1)
    View cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;
    View dout, dq, dk, dv;

    uint64_t dropout_seed = 0;
    uint64_t dropout_offset = 0;
    float softmax_scale = 1.0f;
};

/// The data in somebody's memory: one pointer per buffer, to its first value.
struct Placement {
    std::vector<void*> buffers;
    bool doubles = false;  // floating-point buffers hold doubles

    void* at(const CaseData& data, const View& view) const;
};

/// Bytes of one element of `buffer` under `placement`.
size_t element_bytes(const Buffer& buffer, bool doubles);

/// The buffer's first contents as they are laid out in memory.
std::vector<std::byte> encode(const Buffer& buffer, bool doubles);

/// Element `index` of a buffer's memory image.
double decode(const Buffer& buffer, bool doubles, const std::byte* image, int64_t index);
void encode_element(const Buffer& buffer, bool doubles, std::byte* image, int64_t index, double value);

/// The parameters with which a kernel would be launched on this placement (without workspace).
ForwardParams forward_params(const CaseData& data, const Placement& placement);
BackwardParams backward_params(const CaseData& data, const Placement& placement);

template <class F>
void View::for_each(F&& f) const {
    for_each_run([&](int64_t first, int64_t count) {
        for (int64_t n = 0; n < count; ++n) f(first + n);
    });
}

template <class F>
void View::for_each_run(F&& f) const {
    if (elements() == 0) return;
    int axes = static_cast<int>(shape.size());
    int64_t run = 1;
    if (axes > 0 && strides[axes - 1] == 1) run = shape[--axes];
    const int64_t runs = elements() / run;
    std::array<int64_t, 8> index{};
    int64_t at = offset;
    for (int64_t n = 0; n < runs; ++n) {
        f(at, run);
        for (int axis = axes - 1; axis >= 0; --axis) {
            at += strides[axis];
            if (++index[axis] < shape[axis]) break;
            at -= shape[axis] * strides[axis];
            index[axis] = 0;
        }
    }
}

}  // namespace strobe::verify
