// Which row of the variant table serves a problem: a pure function of shapes, options and the device's limits, tested without
// a GPU.
#pragma once

#include <span>
#include <string>

#include "core/params.hpp"
#include "core/variant.hpp"

namespace strobe::cuda {

/// What kernels depend on of a device.
struct DeviceLimits {
    int compute_capability = 0;  // 90 for 9.0
    int num_sms = 0;
    int smem_per_cta = 0;        // bytes a CTA may opt in to
};

/// What a problem asks of a kernel.
struct Request {
    Direction direction = Direction::forward;
    DType dtype = DType::bf16;
    int head_dim = 0;        // the larger of head_dim and head_dim_v
    int64_t heads = 1;       // of all sequences
    int64_t seqlen_q = 0;    // at most
    int64_t seqlen_k = 0;    // at most
    bool band = false;       // causal or window
    bool general = false;    // softcap, ALiBi, or a scale that is not positive
    bool capped = false;     // of these a softcap alone
    bool dropout = false;
    bool biased = false;     // an additive bias
    bool tiled = false;      // whose tiles can be copied 16 bytes at a time, and whose gradient is not wanted
    bool rare = false;       // dropout at positions or with probabilities that rows of dropout do not serve
    bool deterministic = false;
    bool tma_layout = false; // rows of every tensor start on 16 bytes and are multiples of 16 bytes long

    bool operator==(const Request&) const = default;
};

Request request_of(const ForwardParams& params);
Request request_of(const BackwardParams& params);

/// The best row of `arch` for the request, or null with the reason in `refusal`.
const Variant* select(std::span<const Variant> rows, Arch arch, const Request& request, const DeviceLimits& device,
                      std::string& refusal);

/// Dynamic shared memory of one CTA of the row's largest kernel.
int smem_bytes(const Variant& variant);

/// "sm90 backward bf16 d128 band plain 64x128, 2 stages, 12 warps"
std::string to_string(const Variant& variant);

}  // namespace strobe::cuda
