// A model at rest: its config, its parameter list and their values.
#pragma once

#include "gpt/config.hpp"
#include "gpt/parameters.hpp"

namespace strobe::gpt {

struct Weights {
    explicit Weights(const ModelConfig& c) : config(c), layout(c), values(layout) {}

    ModelConfig config;
    ParameterLayout layout;
    ParameterArena values;

    /// Null for index -1, a parameter that the architecture lacks.
    float* operator[](int index) const { return index < 0 ? nullptr : values.data() + layout[index].offset; }
};

}  // namespace strobe::gpt
