// Attention on the CPU: tiled, online softmax, memory beyond the tensors linear in the sequence length. The kernels are
// compiled once per instruction set and chosen at run time. Nothing here allocates per call: all scratch lies in
// params.workspace, whose size the two pure functions give.
#pragma once

#include <cstddef>
#include <span>

#include "core/params.hpp"

namespace strobe::cpu {

/// Instruction sets the kernels are compiled for, poorest first.
enum class Isa { portable, avx2, avx512, avx512_bf16 };

const char* isa_name(Isa isa);

/// What this build contains and this machine can run, poorest first. Never empty: `portable` is always there.
std::span<const Isa> available_isas();

/// The best of available_isas(), or the one that the environment variable STROBE_CPU_ISA names. Throws
/// CallError when that variable names something that is not available.
Isa best_isa();

/// Forces an instruction set for all later calls of this process. Throws CallError when not available.
void force_isa(Isa isa);

/// The instruction set that forward() and backward() use now.
Isa current_isa();

/// Bytes that params.workspace must hold, aligned to kScratchAlignment. They depend on shapes and options only, never
/// on tensor contents or the instruction set.
inline constexpr size_t kScratchAlignment = 64;
size_t forward_workspace_size(const ForwardParams& params, int num_threads);
size_t backward_workspace_size(const BackwardParams& params, int num_threads);

/// Both run on the calling thread and up to num_threads - 1 pooled ones, and return when the result is complete. They may
/// be called from several threads at once. The result does not depend on num_threads, to the bit; the backward is
/// deterministic whether asked to be or not.
void forward(const ForwardParams& params, int num_threads);
void backward(const BackwardParams& params, int num_threads);

/// fp32 multiply-adds per second x 2 that one core sustains from registers with the current instruction set, measured.
double measured_fma_peak();

/// The same for bf16 dot products into fp32; 0 where the instruction set has none.
double measured_bf16_dot_peak();

}  // namespace strobe::cpu
