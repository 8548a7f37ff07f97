// The only place that refuses a call.
#pragma once

#include "problem.hpp"

namespace strobe {

enum class DataPointers {
    required,  // a call
    ignored,   // a question about a call: shapes, strides, dtypes and devices only
};

/// Throws CallError(invalid_argument) naming the argument, what was given and what is possible. Contents are read of
/// cu_seqlens and seqused alone, and only in host memory: on a device the caller answers for them.
void validate(const Problem& problem, DataPointers pointers);

/// The same for strobe_dropout_mask and strobe_lse_merge.
void validate_dropout_mask(const strobe_attention& attention, const strobe_tensor& keep);
void validate_lse_merge(int32_t num_parts, const strobe_tensor* part_out, const strobe_tensor* part_lse,
                        const strobe_tensor* out, const strobe_tensor* lse);

}  // namespace strobe
