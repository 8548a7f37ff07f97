// One macro lets mask, seqlen, score and philox code compile for the host and for the device alike.
#pragma once

#if defined(__CUDACC__)
#define STROBE_HD __host__ __device__ __forceinline__
#else
#define STROBE_HD inline
#endif
