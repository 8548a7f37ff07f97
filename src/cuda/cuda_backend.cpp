// CUDA in the registry: one implementation per kernel generation, newest first. Each finds its row of the variant table
// and launches it on the caller's stream; nothing is allocated and nothing waits.
#include <fmt/core.h>

#include <array>
#include <vector>

#include "cuda/companion.hpp"
#include "cuda/device.hpp"
#include "cuda/select.hpp"
#include "cuda/sm80/backward_workspace.hpp"
#include "cuda/sm90/backward_workspace.hpp"
#include "cuda/sm90/forward_workspace.hpp"
#include "cuda/trace.hpp"
#include "cuda/variant_table.hpp"
#include "error.hpp"
#include "registry.hpp"

namespace strobe::cuda {
namespace {

std::span<const Variant> variants() {
    static const std::vector<Variant> all = [] {
        std::vector<Variant> list;
        for (const VariantRow& row : variant_rows()) list.push_back(row.variant);
        return list;
    }();
    return all;
}

/// The last few rows that this thread found: calls repeat, and a search goes over the whole table.
class RecentRows {
public:
    const VariantRow* find(Arch arch, const Request& request, int device) const {
        for (const Entry& e : entries_) {
            if (e.row && e.row->variant.arch == arch && e.device == device && e.request == request) return e.row;
        }
        return nullptr;
    }
    void add(const VariantRow& row, const Request& request, int device) {
        entries_[next_] = {&row, device, request};
        next_ = (next_ + 1) % entries_.size();
    }

private:
    struct Entry {
        const VariantRow* row = nullptr;
        int device = 0;
        Request request;
    };
    std::array<Entry, 8> entries_{};
    size_t next_ = 0;
};

/// The row for the call, or null and why not.
template <class Params>
const VariantRow* find_row(Arch arch, const Params& params, const Execution& e, std::string& refusal) {
    thread_local RecentRows recent;
    const Request request = request_of(params);
    if (const VariantRow* row = recent.find(arch, request, e.device_index)) return row;

    std::string no_device;
    if (device_count(&no_device) == 0) {
        refusal = no_device;
        return nullptr;
    }
    const Variant* v = select(variants(), arch, request, device_limits(e.device_index), refusal);
    if (!v) return nullptr;
    const VariantRow& row = variant_rows()[static_cast<size_t>(v - variants().data())];
    recent.add(row, request, e.device_index);
    return &row;
}

template <Arch kArch, class Params>
std::string refusal(const Params& params, const Execution& e) {
    std::string reason;
    find_row(kArch, params, e, reason);
    return reason;
}

template <Arch kArch, class Params>
const VariantRow& row_for(const Params& params, const Execution& e) {
    std::string reason;
    const VariantRow* row = find_row(kArch, params, e, reason);
    if (!row) unsupported(reason);
    return *row;
}

template <Arch kArch, class Params>
std::string describe(const Params& params, const Execution& e) {
    return to_string(row_for<kArch>(params, e).variant);
}

template <Arch kArch>
size_t forward_workspace(const ForwardParams& p, const Execution&) {
    return kArch == Arch::sm90 ? sm90::forward_workspace_bytes(p) : 0;
}

template <Arch kArch>
size_t backward_workspace(const BackwardParams& p, const Execution& e) {
    const Variant& v = row_for<kArch>(p, e).variant;
    if constexpr (kArch == Arch::sm90) {
        return static_cast<size_t>(sm90::backward_workspace(v, p).bytes);
    } else {
        return static_cast<size_t>(
            sm80::backward_workspace_bytes(p.size, p.seqlens.cu_seqlens_q != nullptr, p.deterministic, v));
    }
}

LaunchContext context_of(const Execution& e) {
    return {static_cast<cudaStream_t>(e.stream), e.device_index, device_limits(e.device_index).num_sms};
}

template <Arch kArch>
void forward(const ForwardParams& p, const Execution& e) {
    const DeviceGuard guard(e.device_index);
    const VariantRow& row = row_for<kArch>(p, e);
    const TraceRange range(row.variant);
    check(row.forward(p, context_of(e)), "forward launch");
}

template <Arch kArch>
void backward(const BackwardParams& p, const Execution& e) {
    const DeviceGuard guard(e.device_index);
    const VariantRow& row = row_for<kArch>(p, e);
    const TraceRange range(row.variant);
    check(row.backward(p, context_of(e)), "backward launch");
}

void merge(const MergeParams& p, const Execution& e) {
    if (p.num_parts > kMaxMergeParts) {
        unsupported(fmt::format("num_parts: is {}; on CUDA one call merges at most {}, "
                                "and the first part of the next call may be its result",
                                p.num_parts, kMaxMergeParts));
    }
    const DeviceGuard guard(e.device_index);
    check(launch_merge(p, context_of(e)), "merge launch");
}

void dropout_mask(const DropoutMaskParams& p, const Execution& e) {
    const DeviceGuard guard(e.device_index);
    check(launch_dropout_mask(p, context_of(e)), "dropout mask launch");
}

template <Arch kArch>
Implementation implementation(const char* name) {
    return {
        .name = name,
        .device_type = STROBE_CUDA,
        .forward_refusal = refusal<kArch, ForwardParams>,
        .backward_refusal = refusal<kArch, BackwardParams>,
        .describe_forward = describe<kArch, ForwardParams>,
        .describe_backward = describe<kArch, BackwardParams>,
        .forward_workspace = forward_workspace<kArch>,
        .backward_workspace = backward_workspace<kArch>,
        .forward = forward<kArch>,
        .backward = backward<kArch>,
        .merge = merge,
        .dropout_mask = dropout_mask,
    };
}

}  // namespace

std::span<const Implementation> backend() {
    static const Implementation rows[] = {implementation<Arch::sm90>("sm90"), implementation<Arch::sm80>("sm80")};
    return rows;
}

}  // namespace strobe::cuda
