#include "cpu/cpu_backend.hpp"

#if defined(STROBE_CPU_X86)
#include <cpuid.h>
#endif

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

#include "cpu/kernels.hpp"
#include "error.hpp"

namespace strobe::cpu {
namespace {

struct IsaList {
    std::array<Isa, 4> isas{};
    size_t count = 0;

    void add(Isa isa) { isas[count++] = isa; }
};

#if defined(STROBE_CPU_X86)
/// CPUID leaf 7, subleaf 1: a feature that __builtin_cpu_supports of older compilers has no name for.
bool has_avx512_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 5 & 1u) != 0;
}
#endif

IsaList detect() {
    IsaList list;
    list.add(Isa::portable);
#if defined(STROBE_CPU_X86)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every such processor has f16c
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) list.add(Isa::avx2);
    if (avx512) list.add(Isa::avx512);
    if (avx512 && has_avx512_bf16()) list.add(Isa::avx512_bf16);
#endif
    return list;
}

bool is_available(Isa isa) {
    for (const Isa known : available_isas()) {
        if (known == isa) return true;
    }
    return false;
}

std::string names(std::span<const Isa> isas) {
    std::string text;
    for (const Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
    return text;
}

const Kernels& kernels() {
#if defined(STROBE_CPU_X86)
    static constexpr Kernels kKernels[] = {
        {portable::forward, portable::backward, portable::fma_peak, nullptr},
        {avx2::forward, avx2::backward, avx2::fma_peak, nullptr},
        {avx512::forward, avx512::backward, avx512::fma_peak, nullptr},
        {avx512_bf16::forward, avx512_bf16::backward, avx512_bf16::fma_peak, avx512_bf16::bf16_dot_peak},
    };
#else
    static constexpr Kernels kKernels[] = {{portable::forward, portable::backward, portable::fma_peak, nullptr}};
#endif
    return kKernels[static_cast<int>(current_isa())];
}

constexpr int kUnforced = -1;
std::atomic<int> forced_isa{kUnforced};

}  // namespace

const char* isa_name(Isa isa) {
    constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
    return kNames[static_cast<int>(isa)];
}

std::span<const Isa> available_isas() {
    static const IsaList list = detect();
    return {list.isas.data(), list.count};
}

Isa best_isa() {
    static const Isa best = [] {
        const char* const wanted = std::getenv("STROBE_CPU_ISA");
        if (!wanted || !*wanted) return available_isas().back();
        for (const Isa isa : available_isas()) {
            if (isa_name(isa) == std::string(wanted)) return isa;
        }
        invalid_argument("STROBE_CPU_ISA is \"" + std::string(wanted) + "\"; this machine and build have " + names(available_isas()));
    }();
    return best;
}

void force_isa(Isa isa) {
    if (!is_available(isa)) {
        invalid_argument("force_isa: " + std::string(isa_name(isa)) + " is not available; this machine and build have " +
                         names(available_isas()));
    }
    forced_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
}

Isa current_isa() {
    const int forced = forced_isa.load(std::memory_order_relaxed);
    return forced == kUnforced ? best_isa() : static_cast<Isa>(forced);
}

size_t forward_workspace_size(const ForwardParams& params, int num_threads) { return plan_forward(params, num_threads).bytes(); }
size_t backward_workspace_size(const BackwardParams& params, int num_threads) { return plan_backward(params, num_threads).bytes(); }

void forward(const ForwardParams& params, int num_threads) { kernels().forward(params, plan_forward(params, num_threads)); }
void backward(const BackwardParams& params, int num_threads) { kernels().backward(params, plan_backward(params, num_threads)); }

double measured_fma_peak() { return kernels().fma_peak(); }
double measured_bf16_dot_peak() { return kernels().bf16_dot_peak ? kernels().bf16_dot_peak() : 0.0; }

}  // namespace strobe::cpu
