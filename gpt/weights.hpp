// A model at rest: its config, its parameter list and their values, in fp32 and, where a device computes in less, once more
// in what it computes in.
#pragma once

#include "gpt/config.hpp"
#include "gpt/parameters.hpp"

namespace strobe::gpt {

struct Weights {
    explicit Weights(const ModelConfig& c, Memory& memory = host_memory(), Precision compute = Precision::fp32, int shards = 1)
        : config(c),
          layout(c, shards),
          values(layout, memory),
          precision(compute),
          narrow(compute == Precision::fp32 ? 0 : static_cast<size_t>(layout.arena_elements()) * size_of(compute), memory) {}

    ModelConfig config;
    ParameterLayout layout;
    ParameterArena values;   // the masters
    Precision precision;     // what matrix products and look-ups read
    Arena narrow;            // the values in that precision, at the same element offsets; none for fp32

    /// As operators read it; null for index -1, a parameter that the architecture lacks.
    Buffer operator[](int index) const { return index < 0 ? Buffer() : all().offset(layout[index].offset); }
    /// The master.
    Buffer master(int index) const { return index < 0 ? Buffer() : Buffer(values.data() + layout[index].offset); }
    /// The whole arena as operators read it.
    Buffer all() const {
        return precision == Precision::fp32 ? Buffer(values.data()) : Buffer(narrow.at<void>(0), precision);
    }
};

}  // namespace strobe::gpt
