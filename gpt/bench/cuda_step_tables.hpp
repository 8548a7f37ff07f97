// What the GPU's step benchmark tells of a step: what it computed, and each operator against what the machine allows.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>
#include <nlohmann/json.hpp>

#include "gpt/model.hpp"
#include "gpt/ops/cuda/gemm.hpp"
#include "gpt/ops/exec.hpp"

namespace strobe::gpt::step_bench {

// Bytes read and written per second by a large copy on an H100, as measured: the bound of pointwise operators.
constexpr double kCopyBytesPerSecond = 3.02e12;

/// Of the model as the papers count: 6 * tokens * parameters + 12 * layers * width * tokens * seqlen.
inline double flops_of_step(const ModelConfig& c, int64_t seqlen, int64_t tokens, double attention_share) {
    const double attention = 12.0 * static_cast<double>(c.num_layers * c.hidden_size) * static_cast<double>(seqlen);
    return static_cast<double>(tokens) * (6.0 * static_cast<double>(c.num_parameters()) + attention_share * attention);
}

inline nlohmann::ordered_json row_of(const OpTimes::Entry& e, OpKind kind, double steps, double peak) {
    // Causal attention does half of what is counted.
    const double flops = e.flops * (kind == OpKind::attention ? 0.5 : 1.0);
    const double bound = flops / peak + e.bytes / kCopyBytesPerSecond;
    return {{"milliseconds", 1e3 * e.seconds / steps},
            {"calls", static_cast<double>(e.calls) / steps},
            {"tflops_per_second", 1e-12 * flops / e.seconds},
            {"terabytes_per_second", 1e-12 * e.bytes / e.seconds},
            {"bound_over_time", bound / e.seconds}};
}

inline nlohmann::ordered_json operator_table(OpTimes& times, double steps, double peak) {
    nlohmann::ordered_json out;
    for (int i = 0; i < static_cast<int>(OpKind::count); ++i) {
        const auto kind = static_cast<OpKind>(i);
        if (times[kind].calls > 0) out[std::string(to_string(kind))] = row_of(times[kind], kind, steps, peak);
    }
    return out;
}

/// The same by part, and products by shape.
inline nlohmann::ordered_json part_table(const OpTimes& times, double steps, double peak) {
    nlohmann::ordered_json out;
    for (const auto& [part, entry] : times.parts) {
        const auto& [kind, name, in, columns] = part;
        std::string label = std::string(to_string(kind)) + " " + std::string(name);
        if (in > 0) label += " " + std::to_string(in) + "->" + std::to_string(columns);
        out[label] = row_of(entry, kind, steps, peak);
    }
    return out;
}

/// What each product took when its algorithm was chosen, alone on the machine.
inline nlohmann::ordered_json product_table(const cuda::Gemm& gemm) {
    constexpr const char* kEpilogues[] = {"", "bias", "gelu, aux, bias", "gelu, aux", "dgelu", "sums of b"};
    auto out = nlohmann::ordered_json::array();
    for (const auto& [call, milliseconds] : gemm.measured()) {
        const double flops = 2.0 * static_cast<double>(call.m * call.n) * static_cast<double>(call.k);
        out.push_back({{"m", call.m},
                       {"n", call.n},
                       {"k", call.k},
                       {"transposed", std::string(call.transpose_a ? "T" : "N") + (call.transpose_b ? "T" : "N")},
                       {"d", to_string(call.d.precision)},
                       {"accumulate", call.accumulate},
                       {"epilogue", kEpilogues[static_cast<int>(call.epilogue)]},
                       {"milliseconds", milliseconds},
                       {"tflops_per_second", 1e-9 * flops / milliseconds}});
    }
    return out;
}

inline double median_of(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

/// What operators wait for, per step.
inline nlohmann::ordered_json waits_of(const OpTimes& times, double steps) {
    nlohmann::ordered_json out;
    for (const auto& [part, entry] : times.parts) {
        const auto& [kind, name, in, columns] = part;
        if (kind == OpKind::communication) out[std::string(name)] = 1e3 * entry.seconds / steps;
    }
    return out;
}

/// Numbers that are none take less power than numbers: no time is that of training then.
inline void expect_finite(double loss) {
    if (!std::isfinite(loss)) throw std::runtime_error("the loss is not finite, so nothing was measured");
}

}  // namespace strobe::gpt::step_bench
