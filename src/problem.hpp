// What the user asked, as he asked it: the C structs of one call, brought to this library's version of them. Nothing
// here knows about tiles.
#pragma once

#include <string>

#include "core/variant.hpp"
#include "strobe/strobe.h"

namespace strobe {

struct Problem {
    Direction direction = Direction::forward;
    strobe_attention attention{};
    strobe_forward forward{};    // set when direction is forward
    strobe_backward backward{};  // set when direction is backward

    bool varlen_q() const { return attention.cu_seqlens_q.ndim != 0; }
    bool varlen_k() const { return attention.cu_seqlens_k.ndim != 0; }
};

/// Takes the caller's structs, of his version: a shorter one is filled up with defaults, a longer one is accepted while
/// its unknown tail is zero. Throws CallError.
Problem make_problem(const strobe_attention* attention, const strobe_forward* forward);
Problem make_problem(const strobe_attention* attention, const strobe_backward* backward);
strobe_attention adopt_attention(const strobe_attention* attention);

/// A view as text: "f32 (2, 128, 8, 64) on cpu".
std::string to_string(const strobe_tensor& tensor);
/// The whole call in one line, for messages and logs.
std::string to_string(const Problem& problem);

}  // namespace strobe
