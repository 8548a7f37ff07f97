// The entry points of the sources that are compiled once per instruction set.
#pragma once

#include "core/params.hpp"
#include "cpu/plan.hpp"

namespace strobe::cpu {

struct Kernels {
    void (*forward)(const ForwardParams&, const ForwardPlan&);
    void (*backward)(const BackwardParams&, const BackwardPlan&);
    double (*fma_peak)();
    double (*bf16_dot_peak)();  // null: no such instruction
};

#define STROBE_CPU_KERNELS(isa)                                \
    namespace isa {                                            \
    void forward(const ForwardParams&, const ForwardPlan&);    \
    void backward(const BackwardParams&, const BackwardPlan&); \
    double fma_peak();                                         \
    double bf16_dot_peak();                                    \
    }
STROBE_CPU_KERNELS(portable)
STROBE_CPU_KERNELS(avx2)
STROBE_CPU_KERNELS(avx512)
STROBE_CPU_KERNELS(avx512_bf16)
#undef STROBE_CPU_KERNELS

}  // namespace strobe::cpu
