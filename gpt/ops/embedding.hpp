// out[r] = table[tokens[r]] + position_table[positions[r]].
#pragma once

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

struct EmbeddingForward {
    int64_t rows, hidden;
    const int32_t* tokens;     // (rows)
    const int32_t* positions;  // (rows)
    Buffer table;              // (vocab, hidden)
    Buffer position_table;     // (context, hidden) or null
    Buffer out;                // (rows, hidden)
};

/// Adds into the tables' gradients. No atomics: columns are split, rows are walked in order.
struct EmbeddingBackward {
    int64_t rows, hidden;
    const int32_t* tokens;
    const int32_t* positions;
    Buffer dout;               // (rows, hidden)
    float* dtable;             // (vocab, hidden)
    float* dposition_table;    // (context, hidden) or null
};

}  // namespace strobe::gpt
