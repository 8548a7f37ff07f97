// The CPU's operator tables, one per instruction set, and the choice among them at run time.
#include <cblas.h>

#include <fmt/format.h>

#include "gpt/ops/cpu/kernels.hpp"

namespace strobe::gpt {

namespace {

#define STROBE_GPT_TABLE(isa)                                                                                    \
    Ops {                                                                                                        \
        .embedding_forward = cpu::isa::embedding_forward, .embedding_backward = cpu::isa::embedding_backward,    \
        .norm_forward = cpu::isa::norm_forward, .norm_backward = cpu::isa::norm_backward,                        \
        .linear_forward = cpu::linear_forward, .linear_backward = cpu::linear_backward,                          \
        .activation_forward = cpu::isa::activation_forward,                                                      \
        .activation_backward = cpu::isa::activation_backward, .rope = cpu::isa::rope,                            \
        .attention_forward = cpu::attention_forward, .attention_backward = cpu::attention_backward,              \
        .cross_entropy = cpu::isa::cross_entropy, .adamw = cpu::isa::adamw, .squared_norm = cpu::isa::squared_norm, \
    }

const Ops& best_cpu_table() {
    // The team of threads splits every product itself; the library's own threads would only contend with it.
    [[maybe_unused]] static const bool single_threaded = (openblas_set_num_threads(1), true);
#if defined(__x86_64__)
    static const Ops fast = STROBE_GPT_TABLE(avx2);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fast;
#endif
    static const Ops plain = STROBE_GPT_TABLE(baseline);
    return plain;
}

}  // namespace

const Ops& ops_for(Device device) {
    if (device == Device::cpu) return best_cpu_table();
    throw std::invalid_argument(
        fmt::format("device '{}': this build of the trainer has operators for cpu only", to_string(device)));
}

}  // namespace strobe::gpt
