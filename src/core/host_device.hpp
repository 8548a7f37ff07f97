// One macro lets mask, seqlen, score and philox code compile for the host and for the device alike.
#pragma once

#if defined(__CUDACC__)
#define STROBE_HD __host__ __device__ __forceinline__
#elif defined(STROBE_CPU_ISA)
// Sources compiled once per instruction set leave no out-of-line copy, which the linker could hand to all of them.
#define STROBE_HD inline __attribute__((always_inline))
#else
#define STROBE_HD inline
#endif
