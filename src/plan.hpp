// Problem -> parameters: what the kernels are launched with. A pure function of shapes, strides and options; contents
// are never looked at. Workspace is placed by the implementation that will run.
#pragma once

#include "problem.hpp"

namespace strobe {

/// The problem must have been validated.
ForwardParams forward_params(const Problem& problem);
BackwardParams backward_params(const Problem& problem);

/// dropout_p in units of 2^-16, and the scale that keeps the expectation exact for the probability actually used.
Dropout make_dropout(double dropout_p, uint64_t seed, uint64_t offset);

/// The batch, heads and lengths of a (validated) problem.
ProblemSize problem_size(const strobe_attention& attention);

}  // namespace strobe
