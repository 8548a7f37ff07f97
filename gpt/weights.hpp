// A model at rest: its config, its parameter list and their values.
#pragma once

#include "gpt/config.hpp"
#include "gpt/parameters.hpp"

namespace strobe::gpt {

/// The masters are fp32. Where a device computes in bf16, `narrow` has what its products and look-ups read; of matrices that is the
/// upper half of the masters (SplitFloat), and `values` has the lower one, so that the two take no more memory than the masters. With
/// masters of matrices in bf16 there is no lower half: what products read is all, and the optimizer rounds it stochastically.
struct Weights {
    explicit Weights(const ModelConfig& c, Memory& memory = host_memory(), Precision compute = Precision::fp32, int shards = 1,
                     Precision masters = Precision::fp32)
        : config(c),
          layout(c, shards),
          values(layout, memory, compute, masters == Precision::fp32),
          precision(compute),
          narrow(compute == Precision::fp32 ? 0 : static_cast<size_t>(layout.arena_elements()) * size_of(compute), memory) {}

    ModelConfig config;
    ParameterLayout layout;
    ParameterArena values;   // the masters; with `narrow`, of matrices their lower halves or nothing
    Precision precision;     // what matrix products and look-ups read
    Arena narrow;            // at the same element offsets; none for fp32

    /// As operators read it; null for index -1, a parameter that the architecture lacks.
    Buffer operator[](int index) const { return index < 0 ? Buffer() : all().offset(layout[index].offset); }
    /// A vector's master.
    Buffer master(int index) const { return index < 0 ? Buffer() : values.at(layout[index].offset); }
    /// The whole arena as operators read it.
    Buffer all() const { return precision == Precision::fp32 ? values.at(0) : Buffer(narrow.at<void>(0), precision); }

    bool has_lower_halves() const { return precision != Precision::fp32 && values.at(layout.matrices_begin()); }

    /// All masters from and to an arena of fp32 in host memory.
    void set(const ParameterArena& masters) const;
    void get(const ParameterArena& masters) const;
};

}  // namespace strobe::gpt
