#include "problem.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>

#include "error.hpp"
#include "tensor.hpp"

namespace strobe {
namespace {

/// More bytes than any version will have: what lies behind a struct that nobody initialised is not read.
constexpr size_t kLargestStruct = 8192;

/// Copies a versioned struct: `first_version` bytes are the least that any version has.
template <class Struct>
Struct adopt(const Struct* given, const Struct& defaults, size_t first_version, const char* name) {
    if (!given) invalid_argument(fmt::format("{}: is NULL", name));
    uint32_t size;
    std::memcpy(&size, given, sizeof size);
    if (size < first_version || size > kLargestStruct) {
        invalid_argument(fmt::format("{}.struct_size: is {}; versions have from {} to {} bytes: call {}_init first", name, size,
                                     first_version, kLargestStruct, name));
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(given);
    for (size_t i = sizeof(Struct); i < size; ++i) {
        if (bytes[i] != 0) {
            invalid_argument(fmt::format(
                "{}.struct_size: is {}, and byte {} is set: it belongs to a newer strobe.h than this library (version {}, {} bytes)",
                name, size, i, strobe_version(), sizeof(Struct)));
        }
    }
    Struct s = defaults;
    std::memcpy(&s, given, std::min<size_t>(size, sizeof(Struct)));
    s.struct_size = sizeof(Struct);
    return s;
}

void append_if_given(std::string& text, const char* name, const strobe_tensor& t) {
    if (t.ndim != 0) text += fmt::format(" {}={}", name, to_string(t));
}

}  // namespace

strobe_attention adopt_attention(const strobe_attention* given) {
    strobe_attention defaults;
    strobe_attention_init(&defaults);
    return adopt(given, defaults, sizeof(strobe_attention), "strobe_attention");
}

Problem make_problem(const strobe_attention* attention, const strobe_forward* forward) {
    Problem p;
    p.direction = Direction::forward;
    p.attention = adopt_attention(attention);
    strobe_forward defaults;
    strobe_forward_init(&defaults);
    p.forward = adopt(forward, defaults, sizeof(strobe_forward), "strobe_forward");
    return p;
}

Problem make_problem(const strobe_attention* attention, const strobe_backward* backward) {
    Problem p;
    p.direction = Direction::backward;
    p.attention = adopt_attention(attention);
    strobe_backward defaults;
    strobe_backward_init(&defaults);
    p.backward = adopt(backward, defaults, sizeof(strobe_backward), "strobe_backward");
    return p;
}

std::string to_string(const strobe_tensor& t) {
    if (t.ndim == 0) return "not given";
    return fmt::format("{} {} on {}", dtype_name(t.dtype), shape_text(t), device_name(t));
}

std::string to_string(const Problem& p) {
    const strobe_attention& a = p.attention;
    std::string text = p.direction == Direction::forward ? "forward" : "backward";
    append_if_given(text, "q", a.q);
    append_if_given(text, "k", a.k);
    append_if_given(text, "v", a.v);
    append_if_given(text, "cu_seqlens_q", a.cu_seqlens_q);
    append_if_given(text, "cu_seqlens_k", a.cu_seqlens_k);
    append_if_given(text, "seqused_q", a.seqused_q);
    append_if_given(text, "seqused_k", a.seqused_k);
    append_if_given(text, "alibi_slopes", a.alibi_slopes);
    append_if_given(text, "bias", a.bias);
    if (a.causal) text += " causal";
    if (a.window_left >= 0 || a.window_right >= 0) {
        text += fmt::format(" window=({}, {})", a.window_left, a.window_right);
    }
    if (a.has_positions) text += fmt::format(" positions=({}, {})", a.q_position, a.k_position);
    if (a.has_softmax_scale) text += fmt::format(" softmax_scale={}", a.softmax_scale);
    if (a.softcap != 0) text += fmt::format(" softcap={}", a.softcap);
    if (a.dropout_p != 0) text += fmt::format(" dropout_p={}", a.dropout_p);
    if (a.deterministic) text += " deterministic";
    return text;
}

}  // namespace strobe
