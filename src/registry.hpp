// Who can serve a call: one ordered list of implementations, fastest first, the plain reference last.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "core/params.hpp"
#include "problem.hpp"

namespace strobe {

/// Where and how a call runs.
struct Execution {
    int num_threads = 1;     // CPU
    void* stream = nullptr;  // CUDA: a cudaStream_t
    int device_index = 0;    // CUDA
};

/// One backend, for one device type. Functions are plain pointers: an implementation is a row of a table.
struct Implementation {
    const char* name;
    int32_t device_type;  // strobe_device_type

    /// "" if it serves the call on this machine, else the reason why not. Pure in shapes, strides and options.
    std::string (*forward_refusal)(const ForwardParams&, const Execution&);
    std::string (*backward_refusal)(const BackwardParams&, const Execution&);

    /// What it would launch, in one line: "fwd bf16 d128 band 128x128, 2 stages", "AVX2, 64 x 128 tiles, 2 threads".
    std::string (*describe_forward)(const ForwardParams&, const Execution&);
    std::string (*describe_backward)(const BackwardParams&, const Execution&);

    size_t (*forward_workspace)(const ForwardParams&, const Execution&);
    size_t (*backward_workspace)(const BackwardParams&, const Execution&);

    /// params.workspace holds the bytes asked for, aligned to kWorkspaceAlignment. Throws CallError.
    void (*forward)(const ForwardParams&, const Execution&);
    void (*backward)(const BackwardParams&, const Execution&);

    /// Null where another implementation for the same device type does it.
    void (*merge)(const MergeParams&, const Execution&) = nullptr;
    void (*dropout_mask)(const DropoutMaskParams&, const Execution&) = nullptr;
};

inline constexpr size_t kWorkspaceAlignment = 256;

/// All implementations of this build in the order in which they are asked.
std::span<const Implementation> implementations();

/// The first implementation that serves the call, or the one that it names. Allocates nothing when there is one; else
/// throws CallError(unsupported) with every candidate's reason.
const Implementation& find(const Problem& problem, const ForwardParams& params, const Execution& execution);
const Implementation& find(const Problem& problem, const BackwardParams& params, const Execution& execution);

/// How find comes to its choice: a line per candidate, why it is passed over or, last, what it will launch.
std::string explain(const Problem& problem, const ForwardParams& params, const Execution& execution);
std::string explain(const Problem& problem, const BackwardParams& params, const Execution& execution);

/// The implementation that merges and writes dropout masks on the tensor's device. Throws CallError(unsupported) if
/// none does.
const Implementation& find_companion(const char* name, const strobe_tensor& tensor);

}  // namespace strobe
