// Kernels with one planted fault each, for compute-sanitizer: a tool that does not find the fault of its name cannot vouch for the
// kernels of the library.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

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

}  // namespace

int main(int argc, char** argv) {
    const char* const tool = argc > 1 ? argv[1] : "";
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
        std::fprintf(stderr, "faulty: say which fault: memcheck, racecheck, initcheck or synccheck\n");
        return 2;
    }
    std::printf("%s: %s\n", tool, cudaGetErrorString(cudaDeviceSynchronize()));
    return 0;
}
