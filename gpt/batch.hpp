// What one forward pass reads: documents, or rows of equal length, behind one another.
#pragma once

#include <cstdint>
#include <vector>

namespace strobe::gpt {

/// Sequence b is tokens [cu_seqlens[b], cu_seqlens[b + 1]): attention and positions start anew at each.
struct Batch {
    std::vector<int32_t> tokens;
    std::vector<int32_t> targets;     // as long as tokens; -1: no loss here
    std::vector<int32_t> cu_seqlens;  // starts with 0, ends with tokens.size()
};

}  // namespace strobe::gpt
