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

/// Rows by the row of a table that they read, for a sum without atomics. A piece is at most kPieceRows entries of `order` that
/// read one table row; where a row of the table has several, their sums meet in a second pass.
struct RowGroups {
    static constexpr int64_t kPieceRows = 32;
    struct Piece {
        int32_t begin, end;  // in order
        int32_t target;      // the table's row, or ~slot of a partial sum
    };
    struct Merge {
        int32_t begin, end;  // slots
        int32_t target;      // the table's row
    };
    /// Lie beside the groups, not in the call: a call that is recorded does again what is there by then.
    struct Counts {
        int32_t pieces, merges;
    };
    const int32_t* order = nullptr;
    const Piece* pieces = nullptr;
    const Merge* merges = nullptr;
    const Counts* counts = nullptr;
    int64_t max_pieces = 0, max_merges = 0;  // of any batch of so many rows
};

/// Adds into the tables' gradients. No atomics: the order of a sum depends on the tokens alone.
struct EmbeddingBackward {
    int64_t rows, hidden;
    const int32_t* tokens;
    const int32_t* positions;
    Buffer dout;               // (rows, hidden)
    Buffer dtable;             // (vocab, hidden)
    Buffer dposition_table;    // (context, hidden) or null
    RowGroups token_groups{};     // where Ops::uses_row_groups
    RowGroups position_groups{};  // the same, beside dposition_table
};

/// What embedding_backward needs of Exec::scratch where rows are grouped: slots are at most rows / kPieceRows + the rows of a
/// table that have more than one piece.
inline size_t embedding_scratch_bytes(int64_t rows, int64_t hidden) {
    return static_cast<size_t>((2 * rows / RowGroups::kPieceRows + 1) * hidden) * sizeof(float);
}

}  // namespace strobe::gpt
