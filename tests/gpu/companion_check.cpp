// Merging by log-sum-exp and dropout masks on the device, against the same functions on the CPU.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "core/numeric.hpp"
#include "cuda/device.hpp"
#include "device_problem.hpp"
#include "parts.hpp"

namespace strobe::gpu_tests {
namespace {

constexpr Device kGpu{DeviceType::cuda, 0};

/// The same bytes on both sides.
struct Mirrored {
    std::vector<std::byte> host;
    DeviceBuffer device;

    explicit Mirrored(size_t bytes) : host(bytes), device(bytes) {}
    void upload() { cuda::check(cudaMemcpy(device.data(), host.data(), host.size(), cudaMemcpyHostToDevice), "copy to the device"); }
    std::vector<std::byte> download() const {
        std::vector<std::byte> seen(host.size());
        cuda::check(cudaMemcpy(seen.data(), device.data(), seen.size(), cudaMemcpyDeviceToHost), "copy from the device");
        return seen;
    }
};

/// `parts` random parts; on some rows a part has seen nothing and its out is NaN, on some rows all have.
void check_merge(Finding& finding, DType dtype, int num_parts, bool in_place) {
    const std::vector<int64_t> out_shape{2, 37, 3, 40}, lse_shape{2, 3, 37};
    const int64_t rows = 2 * 37 * 3, dim = 40;
    const size_t element = dtype == DType::f32 ? 4 : 2;
    std::mt19937 engine(static_cast<unsigned>(num_parts));
    std::normal_distribution<float> normal;
    std::vector<Mirrored> outs, lses;
    for (int part = 0; part <= num_parts; ++part) {  // the last is the result
        outs.emplace_back(static_cast<size_t>(rows * dim) * element);
        lses.emplace_back(static_cast<size_t>(rows) * 4);
        Mirrored &out = outs.back(), &lse = lses.back();
        for (int64_t b = 0; b < 2; ++b) {
            for (int64_t h = 0; h < 3; ++h) {
                for (int64_t i = 0; i < 37; ++i) {
                    const bool sees = i != 5 && engine() % 4 != 0;
                    reinterpret_cast<float*>(lse.host.data())[(b * 3 + h) * 37 + i] = sees ? 4 * normal(engine) : -INFINITY;
                    for (int64_t d = 0; d < dim; ++d) {
                        store_element(out.host.data(), dtype, ((b * 37 + i) * 3 + h) * dim + d, sees ? normal(engine) : NAN);
                    }
                }
            }
        }
        out.upload();
        lse.upload();
    }
    const auto views = [&](bool on_device) {
        std::vector<strobe_tensor> o, l;
        for (int part = 0; part <= num_parts; ++part) {
            Mirrored &out = outs[static_cast<size_t>(part)], &lse = lses[static_cast<size_t>(part)];
            o.push_back(Tensor(on_device ? out.device.data() : out.host.data(), dtype, out_shape, {}, on_device ? kGpu : Device{}));
            l.push_back(Tensor(on_device ? lse.device.data() : lse.host.data(), DType::f32, lse_shape, {}, on_device ? kGpu : Device{}));
        }
        return std::pair(o, l);
    };
    const size_t result = in_place ? 0 : static_cast<size_t>(num_parts);
    for (bool on_device : {true, false}) {
        const auto [o, l] = views(on_device);
        if (strobe_lse_merge(num_parts, o.data(), l.data(), &o[result], &l[result], nullptr) != STROBE_OK) {
            finding.fail(fmt::format("merge of {} parts: {}", num_parts, strobe_last_error()));
            return;
        }
    }
    cuda::check(cudaDeviceSynchronize(), "merge");
    const std::vector<std::byte> out = outs[result].download(), lse = lses[result].download();
    double worst = 0;
    const auto compare = [&](float ours, float truth, double tolerance) {
        if (ours == truth) return;
        const double error = std::abs(static_cast<double>(ours) - truth) / (tolerance * std::max(1.0, std::abs(static_cast<double>(truth))));
        worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    };
    const double out_tolerance = dtype == DType::f32 ? 4e-6 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;  // a unit in the last place
    for (int64_t n = 0; n < rows * dim; ++n) {
        compare(load_element(out.data(), dtype, n), load_element(outs[result].host.data(), dtype, n), out_tolerance);
    }
    for (int64_t n = 0; n < rows; ++n) {
        compare(load_element(lse.data(), DType::f32, n), load_element(lses[result].host.data(), DType::f32, n), 2e-6);
    }
    if (!(worst <= 1)) finding.fail(fmt::format("merge of {} parts: error is {} times its bound", num_parts, worst));
    const double before = finding.json.value("merge_worst_error_over_bound", 0.0);
    finding.json["merge_worst_error_over_bound"] = std::max(before, worst);
}

void check_mask(Finding& finding, double dropout_p, bool positions) {
    const std::vector<int64_t> shape{2, 3, 77, 130};
    const int64_t count = 2 * 3 * 77 * 130;
    Mirrored keep(static_cast<size_t>(count));
    const std::vector<int64_t> q_shape{2, 77, 3, 8}, k_shape{2, 130, 3, 8};
    Attention a{.q = Tensor(nullptr, DType::f32, q_shape, {}), .k = Tensor(nullptr, DType::f32, k_shape, {})};
    a.dropout_p = dropout_p;
    a.dropout_seed = 0x123456789abcdefull;
    a.dropout_offset = 17;
    if (positions) a.positions = Attention::Positions{1003, 21};
    dropout_mask(a, Tensor(keep.host.data(), DType::u8, shape, {}));
    keep.upload();
    cuda::check(cudaMemset(keep.device.data(), 7, keep.device.bytes()), "poison");
    dropout_mask(a, Tensor(keep.device.data(), DType::u8, shape, {}, kGpu));
    cuda::check(cudaDeviceSynchronize(), "dropout mask");
    if (keep.download() != keep.host) finding.fail(fmt::format("dropout mask, p = {}: differs from the CPU's", dropout_p));
}

}  // namespace

Finding check_companions(const Options&) {
    Finding finding;
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        for (int parts : {1, 2, 7, 16, 17, 100}) {
            for (bool in_place : {false, true}) check_merge(finding, dtype, parts, in_place);
        }
    }
    for (double p : {0.0, 0.1, 0.9}) {
        for (bool positions : {false, true}) check_mask(finding, p, positions);
    }
    return finding;
}

}  // namespace strobe::gpu_tests
