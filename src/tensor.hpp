// Small questions about a tensor view.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "strobe/strobe.h"

namespace strobe {

inline bool given(const strobe_tensor& t) { return t.ndim != 0; }

/// Bytes per element; 0 for a number that is no dtype.
size_t dtype_bytes(int32_t dtype);
const char* dtype_name(int32_t dtype);
/// "cpu", "cuda:1"
std::string device_name(const strobe_tensor& t);
/// "(2, 128, 8, 64)"
std::string list_text(std::span<const int64_t> values);
std::string shape_text(const strobe_tensor& t);
std::string strides_text(const strobe_tensor& t);

int64_t num_elements(const strobe_tensor& t);
/// Extent `axis` from the end: 1 is the last.
inline int64_t extent_from_end(const strobe_tensor& t, int axis) { return t.shape[t.ndim - axis]; }
inline int64_t stride_from_end(const strobe_tensor& t, int axis) { return t.strides[t.ndim - axis]; }

/// Elements from the first to the last one touched, plus one; 0 for an empty tensor. Needs non-negative strides whose
/// products do not overflow (validate has seen to that).
int64_t span_elements(const strobe_tensor& t);

/// True when two indices of the view may meet in one element: a tensor that is written must not do that.
bool overlaps_itself(const strobe_tensor& t);

/// False only when the views provably share no byte. Views interleaved over a common stride, as q, k and v inside a
/// packed (B, S, 3, H, D) tensor, are told apart.
bool may_overlap(const strobe_tensor& a, const strobe_tensor& b);

}  // namespace strobe
