// The specification of strobe: attention forward and backward as plain loops over queries and keys, every option, one row
// of scores in memory at a time. Slow and meant to be read; the last implementation of the registry; what every other one
// is compared with.
#pragma once

#include "core/params.hpp"

namespace strobe::reference {

/// One text serves three purposes.
enum class Precision {
    fp64,             // double arithmetic on the caller's buffers: results are rounded once, when they are stored
    fp64_on_doubles,  // the same, and every f32 / bf16 / f16 buffer of the parameters (lse, dlse and alibi_slopes
                      // included) holds doubles: nothing is rounded anywhere
    naive,            // the yardstick of the tolerances: what an eager implementation in the working dtype does. float
                      // arithmetic, scores, probabilities and their gradients rounded to the dtype after each step
};

void forward(const ForwardParams& params, Precision precision = Precision::fp64);
void backward(const BackwardParams& params, Precision precision = Precision::fp64);

/// One partial result over a subset of the keys: out (batch, rows, heads, dim) of type `dtype`, lse (batch, heads, rows).
struct PartialResult {
    TensorRef out;
    RowRef lse;
    DType dtype = DType::f32;
};

struct MergeSize {
    int64_t batch = 0;
    int64_t rows = 0;  // varlen: batch = 1, rows = all of them
    int64_t num_heads = 0;
    int64_t head_dim_v = 0;
};

/// result = the attention over the union of the parts' keys. `result` may be one of the parts.
void merge(const MergeSize& size, const PartialResult* parts, int num_parts, const PartialResult& result);

}  // namespace strobe::reference
