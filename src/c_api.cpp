// The C ABI: exceptions become a status and a text, structs of any version become a Problem.
#include "strobe/strobe.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "error.hpp"
#include "plan.hpp"
#include "reference/reference.hpp"
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

void require_host(const char* name, const strobe_tensor& t) {
    if (t.device_type != STROBE_CPU) {
        unsupported(fmt::format("{}: is on {}; this function runs on the cpu only", name, device_name(t)));
    }
}

reference::PartialResult partial_result(const strobe_tensor& out, const strobe_tensor& lse) {
    return {{out.data, out.ndim == 4 ? out.strides[0] : 0, stride_from_end(out, 3), stride_from_end(out, 2)},
            {static_cast<float*>(lse.data), lse.ndim == 3 ? lse.strides[0] : 0, stride_from_end(lse, 2)},
            static_cast<DType>(out.dtype)};
}

void merge(int32_t num_parts, const strobe_tensor* part_out, const strobe_tensor* part_lse, const strobe_tensor* out,
           const strobe_tensor* lse) {
    validate_lse_merge(num_parts, part_out, part_lse, out, lse);
    require_host("out", *out);
    std::vector<reference::PartialResult> parts;
    for (int32_t i = 0; i < num_parts; ++i) parts.push_back(partial_result(part_out[i], part_lse[i]));
    const reference::MergeSize size{out->ndim == 4 ? out->shape[0] : 1, extent_from_end(*out, 3), extent_from_end(*out, 2),
                                    extent_from_end(*out, 1)};
    reference::merge(size, parts.data(), num_parts, partial_result(*out, *lse));
}

void write_dropout_mask(const strobe_attention& a, const strobe_tensor& keep) {
    validate_dropout_mask(a, keep);
    require_host("keep", keep);
    const Dropout dropout = make_dropout(a.dropout_p, a.dropout_seed, a.dropout_offset);
    const int64_t q_position = a.has_positions ? a.q_position : 0, k_position = a.has_positions ? a.k_position : 0;
    auto* data = static_cast<uint8_t*>(keep.data);
    for (int64_t b = 0; b < keep.shape[0]; ++b) {
        for (int64_t h = 0; h < keep.shape[1]; ++h) {
            const auto batch_head = static_cast<uint32_t>(b * keep.shape[1] + h);
            for (int64_t i = 0; i < keep.shape[2]; ++i) {
                uint8_t* row = data + b * keep.strides[0] + h * keep.strides[1] + i * keep.strides[2];
                for (int64_t j = 0; j < keep.shape[3]; ++j) {
                    row[j * keep.strides[3]] = !dropout.enabled() || dropout.keep(batch_head, static_cast<uint32_t>(q_position + i),
                                                                                  static_cast<uint32_t>(k_position + j));
                }
            }
        }
    }
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
                               const strobe_tensor* out, const strobe_tensor* lse, void* /*stream*/) {
    return guarded([&] { merge(num_parts, part_out, part_lse, out, lse); });
}

strobe_status strobe_dropout_mask(const strobe_attention* attention, const strobe_tensor* keep, void* /*stream*/) {
    return guarded([&] {
        if (!keep) invalid_argument("keep: is NULL");
        write_dropout_mask(adopt_attention(attention), *keep);
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
