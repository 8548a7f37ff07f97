// The specification of strobe: attention forward and backward as plain loops over queries and keys, every option, one
// row of scores in memory at a time. Slow and meant to be read; the last implementation of the registry; what every
// other one is compared with.
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

/// The attention over the union of the parts' keys. The result may be one of the parts.
void merge(const MergeParams& params);

void dropout_mask(const DropoutMaskParams& params);

}  // namespace strobe::reference
