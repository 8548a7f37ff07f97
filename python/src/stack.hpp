// Arguments and results of a boxed kernel: 64-bit words in the order of the operator's schema.
#pragma once

#include <cstring>
#include <optional>

#include "torch_tensor.hpp"

namespace strobe::torch_ops {

/// Takes the arguments off the stack one after another. Every tensor must be taken before anything can throw, since the
/// kernel owns them from the start.
class Arguments {
public:
    explicit Arguments(const StableIValue* stack) : next_(stack) {}

    Tensor tensor() { return Tensor(as<AtenTensorHandle>(*next_++)); }
    int64_t integer() { return as<int64_t>(*next_++); }
    double real() { return as<double>(*next_++); }
    bool boolean() { return as<bool>(*next_++); }

    Tensor optional_tensor() {
        const auto value = optional_word();
        return value ? Tensor(as<AtenTensorHandle>(*value)) : Tensor();
    }

    std::optional<double> optional_real() {
        const auto value = optional_word();
        return value ? std::optional(as<double>(*value)) : std::nullopt;
    }

private:
    const StableIValue* next_;

    template <class T>
    static T as(StableIValue word) {
        static_assert(sizeof(T) <= sizeof word && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
        T value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    }

    std::optional<StableIValue> optional_word() {
        auto* boxed = as<StableIValue*>(*next_++);
        if (!boxed) return std::nullopt;
        const StableIValue word = *boxed;
        delete boxed;
        return word;
    }
};

inline StableIValue as_result(Tensor tensor) {
    AtenTensorHandle handle = tensor.release();
    StableIValue word = 0;
    std::memcpy(&word, &handle, sizeof handle);
    return word;
}

/// None where the tensor is empty; torch deletes the word.
inline StableIValue as_optional_result(Tensor tensor) {
    auto* boxed = tensor ? new StableIValue(as_result(std::move(tensor))) : nullptr;
    StableIValue word = 0;
    std::memcpy(&word, &boxed, sizeof boxed);
    return word;
}

}  // namespace strobe::torch_ops
