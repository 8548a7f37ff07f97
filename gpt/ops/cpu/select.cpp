// The CPU's operator tables, one per instruction set, and the choice among them at run time.
#include <cblas.h>

#include <algorithm>

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
        .attention_forward = strobe_attention_forward, .attention_backward = strobe_attention_backward,          \
        .cache_append = cpu::cache_append, .cross_entropy = cpu::isa::cross_entropy, .loss_sum = cpu::loss_sum,  \
        .adamw = cpu::isa::adamw, .squared_norm = cpu::isa::squared_norm,                 \
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

namespace cpu {

const Ops& table() { return best_cpu_table(); }

void cache_append(Exec&, const CacheAppend& a) {
    for (int64_t r = 0; r < a.rows; ++r) {
        std::copy_n(a.k.f32() + r * a.stride, a.columns, a.k_cache.f32() + a.positions[r] * a.columns);
        std::copy_n(a.v.f32() + r * a.stride, a.columns, a.v_cache.f32() + a.positions[r] * a.columns);
    }
}

void loss_sum(Exec&, const LossSum& a) {
    double sum = a.add ? *a.sum : 0.0;
    for (int64_t r = 0; r < a.rows; ++r) sum += static_cast<double>(a.losses[r]);
    *a.sum = sum;
}


}  // namespace cpu

}  // namespace strobe::gpt
