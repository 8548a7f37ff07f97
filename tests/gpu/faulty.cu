// Kernels with one planted fault each: a tool that does not find the fault of its name cannot vouch for the kernels of the library.
// Four are for compute-sanitizer; those named fence_* access memory beside a buffer of FencedMemory, and the device must stop them.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "cuda/common/tensor_map.hpp"
#include "cuda/sm90/ptx.cuh"
#include "fenced_memory.hpp"

namespace {

constexpr int kThreads = 64;

__global__ void writes_beyond(int* data, int count) { data[threadIdx.x + count] = 1; }

/// A neighbour's element is read without a barrier.
__global__ void reads_too_early(int* out) {
    __shared__ int values[kThreads];
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = values[(threadIdx.x + kThreads / 2) % kThreads];
}

__global__ void reads_unwritten(const int* data, int* out) { out[threadIdx.x] = data[threadIdx.x]; }

/// Half of each warp waits at a barrier that the other half passes by.
__global__ void waits_apart(int* out) {
    if (threadIdx.x % 2 == 0) {
        out[threadIdx.x] = 1;
        __syncthreads();
    }
    out[threadIdx.x] += 1;
}

int sanitizer_fault(const char* tool) {
    int *data = nullptr, *out = nullptr;
    cudaMalloc(&data, kThreads * sizeof(int));
    cudaMalloc(&out, kThreads * sizeof(int));
    if (std::strcmp(tool, "memcheck") == 0) {
        writes_beyond<<<1, kThreads>>>(data, kThreads);
    } else if (std::strcmp(tool, "racecheck") == 0) {
        reads_too_early<<<1, kThreads>>>(out);
    } else if (std::strcmp(tool, "initcheck") == 0) {
        reads_unwritten<<<1, kThreads>>>(data, out);
    } else if (std::strcmp(tool, "synccheck") == 0) {
        waits_apart<<<1, kThreads>>>(out);
    } else {
        std::fprintf(stderr, "faulty: say which fault: memcheck, racecheck, initcheck, synccheck, fence_inside, fence_below, "
                             "fence_beyond, fence_write or fence_tensor\n");
        return 2;
    }
    std::printf("%s: %s\n", tool, cudaGetErrorString(cudaDeviceSynchronize()));
    return 0;
}

// A tensor of kRows rows of 128 bytes, whose size is a multiple of what buffers are aligned to: nothing lies between it and the fence.
constexpr int kCols = 64, kRows = 24, kBoxRows = 8;
constexpr size_t kBytes = size_t{kRows} * kCols * sizeof(uint16_t);

__global__ void reads_at(const uint16_t* data, int64_t index, uint32_t* out) { *out = data[index]; }
__global__ void writes_at(uint16_t* data, int64_t index) { data[index] = 1; }

/// One box of a tensor map, as the copy engine reads it.
__global__ void reads_box(const __grid_constant__ CUtensorMap map, int row, uint32_t* out) {
#if __CUDA_ARCH__ >= 900
    __shared__ __align__(1024) uint16_t box[kBoxRows * kCols];
    __shared__ strobe::sm90::Barrier barrier;
    barrier.init(1);
    strobe::sm90::fence_barrier_init();
    barrier.arrive_expect(sizeof box);
    strobe::sm90::tma_load(box, &map, barrier, 0, row, 0, 0, strobe::sm90::CachePolicy::normal);
    barrier.wait(0);
    *out = box[0];
#endif
}

/// The tensor map of a caller that is wrong about the number of rows.
cudaError_t read_boxes(uint16_t* data, int rows_claimed, int row, uint32_t* out) {
    using namespace strobe;
    CUtensorMap map;
    const TensorRef tensor{data, rows_claimed * kCols, kCols, kCols};
    const cudaError_t encoded = cuda::make_tensor_map(map, tensor, DType::bf16, 1, rows_claimed, 1, kCols, {kBoxRows, kCols});
    if (encoded == cudaSuccess) reads_box<<<1, 1>>>(map, row, out);
    return encoded;
}

/// Exit status 99: the device stopped at the access. 0: it did not.
int fence_fault(const char* fault) {
    constexpr int kStopped = 99;
    strobe::cli::FencedMemory memory(0);
    auto* const at_start = static_cast<uint16_t*>(memory.allocate(kBytes));  // buffers lie at the start and at the end of their pages
    auto* const at_end = static_cast<uint16_t*>(memory.allocate(kBytes));    // in turn
    uint32_t* out = nullptr;
    cudaMalloc(&out, sizeof *out);
    constexpr int64_t kElements = int64_t{kRows} * kCols;
    cudaError_t status = cudaSuccess;
    if (std::strcmp(fault, "fence_inside") == 0) {  // no fault: all that may be accessed
        for (uint16_t* data : {at_start, at_end}) {
            writes_at<<<1, 1>>>(data, 0);
            writes_at<<<1, 1>>>(data, kElements - 1);
            reads_at<<<1, 1>>>(data, 0, out);
            reads_at<<<1, 1>>>(data, kElements - 1, out);
            if (status == cudaSuccess) status = read_boxes(data, kRows, kRows - kBoxRows, out);
        }
    } else if (std::strcmp(fault, "fence_below") == 0) {
        reads_at<<<1, 1>>>(at_start, -1, out);
    } else if (std::strcmp(fault, "fence_beyond") == 0) {
        reads_at<<<1, 1>>>(at_end, kElements, out);
    } else if (std::strcmp(fault, "fence_write") == 0) {
        writes_at<<<1, 1>>>(at_end, kElements);
    } else if (std::strcmp(fault, "fence_tensor") == 0) {
        status = read_boxes(at_end, kRows + kBoxRows, kRows, out);
    } else {
        return sanitizer_fault("");
    }
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
    std::printf("%s: %s\n", fault, cudaGetErrorString(status));
    return status == cudaErrorIllegalAddress ? kStopped : status == cudaSuccess ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    const char* const fault = argc > 1 ? argv[1] : "";
    return std::strncmp(fault, "fence_", 6) == 0 ? fence_fault(fault) : sanitizer_fault(fault);
}
