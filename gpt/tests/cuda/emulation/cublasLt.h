// Names that the declaration of the trainer's Gemm mentions; emulated_gemm.cpp defines it without them.
#pragma once

using cublasLtHandle_t = void*;
using cublasStatus_t = int;
struct cublasLtMatmulHeuristicResult_t {};
struct cublasLtMatmulAlgo_t {};
