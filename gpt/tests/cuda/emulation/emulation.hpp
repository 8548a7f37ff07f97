// Runs CUDA kernels on the CPU, thread by thread, for tests on machines without a GPU: what kernels compute, not how
// fast. A block's threads are fibers of one host thread that give way at barriers and shuffles, so shared memory is
// static memory, and a barrier or shuffle that not all of a block's or warp's threads reach is an error instead of
// undefined. Blocks run one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned a, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// The running thread's place; the scheduler sets them when it switches.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

/// Until every living thread of the block is here.
void barrier();
/// Until as many threads are at this barrier of the block, 1 to 15.
void barrier(unsigned number, unsigned threads);
/// The value that lane `lane ^ mask` of the warp brings.
uint64_t shuffle_xor(uint64_t value, int mask);
void* dynamic_shared();

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

/// Takes the place of kernel<<<grid, block, shared_bytes, stream>>>.
template <class... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes = 0, const void* = nullptr) {
    return [=](Parameters... arguments) { run(grid, block, shared_bytes, [&] { kernel(arguments...); }); };
}

}  // namespace emulation
