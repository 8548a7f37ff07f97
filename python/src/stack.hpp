// Arguments and results of a boxed kernel: 64-bit words in the order of the operator's schema.
#pragma once

#include <cstring>
#include <optional>

#include "torch_tensor.hpp"

namespace strobe::torch_ops {

using Kernel = void (*)(StableIValue* stack, uint64_t num_args, uint64_t num_results);
struct NamedKernel {
    const char* name;
    Kernel kernel;
};

/// What a word of the stack holds.
template <class T>
T word_as(StableIValue word) {
    static_assert(sizeof(T) <= sizeof word && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

/// Takes the arguments off the stack one after another. Every tensor must be taken before anything can throw, since the
/// kernel owns them from the start.
class Arguments {
public:
    explicit Arguments(const StableIValue* stack) : next_(stack) {}

    Tensor tensor() { return Tensor(word_as<AtenTensorHandle>(*next_++)); }
    int64_t integer() { return word_as<int64_t>(*next_++); }
    double real() { return word_as<double>(*next_++); }
    bool boolean() { return word_as<bool>(*next_++); }

    Tensor optional_tensor() {
        const auto value = optional_word();
        return value ? Tensor(word_as<AtenTensorHandle>(*value)) : Tensor();
    }

    std::optional<double> optional_real() {
        const auto value = optional_word();
        return value ? std::optional(word_as<double>(*value)) : std::nullopt;
    }

private:
    const StableIValue* next_;

    std::optional<StableIValue> optional_word() {
        auto* boxed = word_as<StableIValue*>(*next_++);
        if (!boxed) return std::nullopt;
        const StableIValue word = *boxed;
        delete boxed;
        return word;
    }
};

template <class T>
StableIValue as_word(T value) {
    static_assert(sizeof(T) <= sizeof(StableIValue));
    StableIValue word = 0;
    std::memcpy(&word, &value, sizeof value);
    return word;
}

inline StableIValue as_result(Tensor tensor) { return as_word(tensor.release()); }

/// None where the tensor is empty; torch deletes the word.
inline StableIValue as_optional_result(Tensor tensor) {
    return as_word(tensor ? new StableIValue(as_result(std::move(tensor))) : nullptr);
}

}  // namespace strobe::torch_ops
