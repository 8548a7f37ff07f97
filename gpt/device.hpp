// Where an operator runs and what its numbers are. Both are run-time values: one binary serves every machine.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string_view>

namespace strobe::gpt {

enum class Device : int { cpu, cuda };
enum class Precision : int { fp32, bf16 };

constexpr std::string_view to_string(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }
constexpr std::string_view to_string(Precision precision) { return precision == Precision::fp32 ? "fp32" : "bf16"; }
constexpr size_t size_of(Precision precision) { return precision == Precision::fp32 ? 4 : 2; }

/// Memory of one activation, weight or gradient with its element type; the shape is said by the operator's arguments.
struct Buffer {
    void* data = nullptr;
    Precision precision = Precision::fp32;

    Buffer() = default;
    Buffer(float* p) : data(p) {}
    Buffer(const float* p) : data(const_cast<float*>(p)) {}
    Buffer(void* p, Precision type) : data(p), precision(type) {}

    explicit operator bool() const { return data != nullptr; }

    /// The memory as fp32, for operators that compute in nothing else.
    float* f32() const {
        if (precision != Precision::fp32) throw std::invalid_argument("operator: this device computes in fp32 only");
        return static_cast<float*>(data);
    }
    Buffer offset(int64_t elements) const {
        return {static_cast<char*>(data) + elements * static_cast<int64_t>(size_of(precision)), precision};
    }
};

}  // namespace strobe::gpt
