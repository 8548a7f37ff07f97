// One operator on two devices: the same numbers, rounded to the precision under test, go to the CPU as fp32 and to the
// GPU in that precision. Results are held against each other relative to the largest entry.
#pragma once

#include <bit>
#include <deque>
#include <vector>

#include "gpt/backend.hpp"
#include "gpt/tests/numeric.hpp"

namespace strobe::gpt::test {

/// To bf16 and back, ties to even.
inline float to_bf16(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    return std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

/// Numbers on both devices.
struct Twin {
    std::vector<float> host;  // what the CPU's operators use
    Buffer device;            // what the GPU's use
};

class Twins {
public:
    Twins(Backend& gpu, Precision precision) : gpu_(gpu), precision_(precision) {}

    Twin normal(size_t count, uint64_t seed, double scale = 1.0) {
        return make(random_floats(count, seed, scale), precision_);
    }
    Twin normal_f32(size_t count, uint64_t seed, double scale = 1.0) {
        return make(random_floats(count, seed, scale), Precision::fp32);
    }
    Twin of(Floats values) { return make(std::move(values), precision_); }
    Twin filled(size_t count, float value) { return make(Floats(count, value), precision_); }
    Twin filled_f32(size_t count, float value) { return make(Floats(count, value), Precision::fp32); }

    template <class T>
    const T* upload(const std::vector<T>& values) {
        return static_cast<const T*>(put(values.data(), values.size() * sizeof(T)));
    }

    /// What the GPU has there now.
    Floats fetch(const Twin& twin) {
        Floats out(twin.host.size());
        if (twin.device.precision == Precision::fp32) {
            gpu_.memory().copy(out.data(), twin.device.data, out.size() * sizeof(float));
            return out;
        }
        std::vector<uint16_t> bits(out.size());
        gpu_.memory().copy(bits.data(), twin.device.data, bits.size() * sizeof(uint16_t));
        for (size_t i = 0; i < bits.size(); ++i) out[i] = std::bit_cast<float>(uint32_t{bits[i]} << 16);
        return out;
    }

    /// fp32: rounding of sums in another order. bf16: a few roundings of 2^-9 relative to the entry.
    double tolerance() const { return precision_ == Precision::fp32 ? 2e-5 : 1.2e-2; }

    void expect_same(const Twin& twin, const char* what) { expect_same(twin, what, tolerance()); }
    void expect_same(const Twin& twin, const char* what, double tolerance) {
        const Floats actual = fetch(twin);
        double largest = 0.0;
        for (const float v : twin.host) largest = std::max(largest, std::abs(static_cast<double>(v)));
        size_t wrong = 0;
        double worst = 0.0;
        for (size_t i = 0; i < actual.size(); ++i) {
            const double error = std::abs(static_cast<double>(actual[i]) - twin.host[i]) / (largest + 1e-30);
            if (!(error <= tolerance)) ++wrong;
            worst = std::isnan(error) ? error : std::max(worst, error);
        }
        EXPECT_EQ(wrong, 0u) << what << ": of " << actual.size() << " beyond " << tolerance << ", worst " << worst;
    }

private:
    Twin make(Floats values, Precision precision) {
        if (precision == Precision::bf16) {
            std::vector<uint16_t> bits(values.size());
            for (size_t i = 0; i < values.size(); ++i) {
                values[i] = to_bf16(values[i]);
                bits[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(values[i]) >> 16);
            }
            const Buffer device(put(bits.data(), bits.size() * sizeof(uint16_t)), precision);
            return {std::move(values), device};
        }
        const Buffer device(put(values.data(), values.size() * sizeof(float)), precision);
        return {std::move(values), device};
    }
    void* put(const void* data, size_t bytes) {
        arenas_.emplace_back(std::max<size_t>(bytes, 1), gpu_.memory());
        void* there = arenas_.back().at<void>(0);
        gpu_.memory().copy(there, data, bytes);
        return there;
    }

    Backend& gpu_;
    Precision precision_;
    std::deque<Arena> arenas_;
};

}  // namespace strobe::gpt::test
