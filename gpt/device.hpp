// Where an operator runs and what its numbers are. Both are run-time values: one binary serves every machine.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace strobe::gpt {

enum class Device : int { cpu, cuda };
enum class Precision : int { fp32, bf16 };

constexpr std::string_view to_string(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }
constexpr std::string_view to_string(Precision precision) { return precision == Precision::fp32 ? "fp32" : "bf16"; }
/// Throw std::invalid_argument naming the choices.
inline Device device_from_string(std::string_view name) {
    if (name == "cpu") return Device::cpu;
    if (name == "cuda") return Device::cuda;
    throw std::invalid_argument("device '" + std::string(name) + "' is unknown; choose cpu or cuda");
}
inline Precision precision_from_string(std::string_view name) {
    if (name == "fp32") return Precision::fp32;
    if (name == "bf16") return Precision::bf16;
    throw std::invalid_argument("precision '" + std::string(name) + "' is unknown; choose fp32 or bf16");
}
/// "" is what the device computes in when nobody asks.
inline Precision precision_for(Device device, std::string_view name) {
    if (name.empty()) return device == Device::cpu ? Precision::fp32 : Precision::bf16;
    return precision_from_string(name);
}
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
