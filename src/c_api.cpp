// The C ABI: exceptions become a status and a text, structs of any version become a Problem.
#include "strobe/strobe.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "error.hpp"
#include "plan.hpp"
#include "registry.hpp"
#include "run.hpp"
#include "tensor.hpp"
#include "validate.hpp"
#include "version.hpp"

namespace strobe {
namespace {

std::string& last_error() {
    thread_local std::string text;
    return text;
}

template <class Body>
strobe_status guarded(Body body) noexcept {
    try {
        last_error().clear();
        body();
        return STROBE_OK;
    } catch (const CallError& e) {
        last_error() = e.what();
        return e.status();
    } catch (const std::exception& e) {
        last_error() = std::string("internal error: ") + e.what();
        return STROBE_INTERNAL_ERROR;
    } catch (...) {
        last_error() = "internal error";
        return STROBE_INTERNAL_ERROR;
    }
}

template <size_t N>
void copy_text(char (&to)[N], const std::string& from) {
    const size_t n = std::min(from.size(), N - 1);
    std::memcpy(to, from.data(), n);
    to[n] = '\0';
}

void write_plan(const Problem& problem, strobe_plan* out) {
    if (!out) invalid_argument("plan: is NULL");
    if (out->struct_size < sizeof(strobe_plan)) {
        invalid_argument(fmt::format("plan.struct_size: is {}; it must be {}", out->struct_size, sizeof(strobe_plan)));
    }
    const RunPlan p = plan(problem);
    out->workspace_bytes = p.workspace_bytes;
    copy_text(out->implementation, p.implementation->name);
    copy_text(out->explanation, p.explanation);
}

PartialResult partial_result(const strobe_tensor& out, const strobe_tensor& lse) {
    return {{out.data, out.ndim == 4 ? out.strides[0] : 0, stride_from_end(out, 3), stride_from_end(out, 2)},
            {static_cast<float*>(lse.data), lse.ndim == 3 ? lse.strides[0] : 0, stride_from_end(lse, 2)},
            static_cast<DType>(out.dtype)};
}

void merge(int32_t num_parts, const strobe_tensor* part_out, const strobe_tensor* part_lse, const strobe_tensor* out,
           const strobe_tensor* lse, void* stream) {
    validate_lse_merge(num_parts, part_out, part_lse, out, lse);
    std::vector<PartialResult> parts;
    for (int32_t i = 0; i < num_parts; ++i) parts.push_back(partial_result(part_out[i], part_lse[i]));
    const MergeParams p{.batch = out->ndim == 4 ? out->shape[0] : 1,
                        .rows = extent_from_end(*out, 3),
                        .num_heads = extent_from_end(*out, 2),
                        .head_dim_v = extent_from_end(*out, 1),
                        .parts = parts.data(),
                        .num_parts = num_parts,
                        .result = partial_result(*out, *lse)};
    find_companion("out", *out).merge(p, {.stream = stream, .device_index = out->device_index});
}

void write_dropout_mask(const strobe_attention& a, const strobe_tensor& keep, void* stream) {
    validate_dropout_mask(a, keep);
    DropoutMaskParams p{.dropout = make_dropout(a.dropout_p, a.dropout_seed, a.dropout_offset),
                        .q_position = a.has_positions ? a.q_position : 0,
                        .k_position = a.has_positions ? a.k_position : 0,
                        .keep = static_cast<uint8_t*>(keep.data)};
    std::copy_n(keep.shape, 4, p.shape);
    std::copy_n(keep.strides, 4, p.strides);
    find_companion("keep", keep).dropout_mask(p, {.stream = stream, .device_index = keep.device_index});
}

}  // namespace
}  // namespace strobe

using namespace strobe;

extern "C" {

strobe_status strobe_attention_forward(const strobe_attention* attention, const strobe_forward* forward, void* stream) {
    return guarded([&] { run(make_problem(attention, forward), stream); });
}

strobe_status strobe_attention_backward(const strobe_attention* attention, const strobe_backward* backward, void* stream) {
    return guarded([&] { run(make_problem(attention, backward), stream); });
}

strobe_status strobe_attention_forward_plan(const strobe_attention* attention, const strobe_forward* forward,
                                            strobe_plan* plan) {
    return guarded([&] { write_plan(make_problem(attention, forward), plan); });
}

strobe_status strobe_attention_backward_plan(const strobe_attention* attention, const strobe_backward* backward,
                                             strobe_plan* plan) {
    return guarded([&] { write_plan(make_problem(attention, backward), plan); });
}

strobe_status strobe_lse_merge(int32_t num_parts, const strobe_tensor* part_out, const strobe_tensor* part_lse,
                               const strobe_tensor* out, const strobe_tensor* lse, void* stream) {
    return guarded([&] { merge(num_parts, part_out, part_lse, out, lse, stream); });
}

strobe_status strobe_dropout_mask(const strobe_attention* attention, const strobe_tensor* keep, void* stream) {
    return guarded([&] {
        if (!keep) invalid_argument("keep: is NULL");
        write_dropout_mask(adopt_attention(attention), *keep, stream);
    });
}

const char* strobe_last_error(void) { return last_error().c_str(); }

const char* strobe_version(void) { return STROBE_VERSION_STRING; }

const char* strobe_implementation(int32_t index) {
    const auto all = implementations();
    return index >= 0 && static_cast<size_t>(index) < all.size() ? all[static_cast<size_t>(index)].name : nullptr;
}

int32_t strobe_num_threads(void) { return default_num_threads(); }

strobe_status strobe_set_num_threads(int32_t num_threads) {
    return guarded([&] {
        if (num_threads < 1) invalid_argument(fmt::format("num_threads: is {}; it must be at least 1", num_threads));
        set_default_num_threads(num_threads);
    });
}

}  // extern "C"
