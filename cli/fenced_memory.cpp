#include "fenced_memory.hpp"

#include <cuda.h>
#include <cuda_runtime.h>
#include <fmt/core.h>

#include <algorithm>

#include "cuda/device.hpp"
#include "error.hpp"

namespace strobe::cli {
namespace {

constexpr size_t kEndAlignment = 256;

/// A driver function by name: the program must start on a machine without a driver, so nothing links against it.
template <class Function>
Function driver_function(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cuda::check(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess) throw CallError(STROBE_DEVICE_ERROR, fmt::format("the driver has no {}", name));
    return reinterpret_cast<Function>(entry);
}

void check(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    throw CallError(STROBE_DEVICE_ERROR, fmt::format("{}: CUDA driver error {}", what, static_cast<int>(result)));
}

struct Driver {
    decltype(&cuMemGetAllocationGranularity) granularity;
    decltype(&cuMemAddressReserve) reserve;
    decltype(&cuMemCreate) create;
    decltype(&cuMemMap) map;
    decltype(&cuMemSetAccess) set_access;

    static const Driver& get() {
        static const Driver driver{
            driver_function<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity"),
            driver_function<decltype(&cuMemAddressReserve)>("cuMemAddressReserve"),
            driver_function<decltype(&cuMemCreate)>("cuMemCreate"),
            driver_function<decltype(&cuMemMap)>("cuMemMap"),
            driver_function<decltype(&cuMemSetAccess)>("cuMemSetAccess"),
        };
        return driver;
    }
};

CUmemAllocationProp properties(int device) {
    CUmemAllocationProp p{};
    p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    p.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
    return p;
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

FencedMemory::FencedMemory(int device) : device_(device) {
    const cuda::DeviceGuard guard(device_);
    cuda::check(cudaFree(nullptr), "CUDA context");
    const CUmemAllocationProp p = properties(device_);
    check(Driver::get().granularity(&page_bytes_, &p, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "cuMemGetAllocationGranularity");
}

std::byte* FencedMemory::map_pages(size_t bytes) {
    const cuda::DeviceGuard guard(device_);
    const Driver& driver = Driver::get();
    CUdeviceptr range = 0;
    check(driver.reserve(&range, bytes + 2 * page_bytes_, 0, 0, 0), "cuMemAddressReserve");
    const CUdeviceptr pages = range + page_bytes_;
    const CUmemAllocationProp p = properties(device_);
    CUmemGenericAllocationHandle handle = 0;
    check(driver.create(&handle, bytes, &p, 0), "cuMemCreate");
    check(driver.map(pages, bytes, 0, handle, 0), "cuMemMap");
    const CUmemAccessDesc access{.location = p.location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    check(driver.set_access(pages, bytes, &access, 1), "cuMemSetAccess");
    return reinterpret_cast<std::byte*>(pages);
}

void* FencedMemory::allocate(size_t bytes) {
    const size_t mapped = round_up(std::max<size_t>(bytes, 1), page_bytes_);
    const std::lock_guard lock(mutex_);
    std::vector<std::byte*>& free = free_[mapped];
    if (free.empty()) free.push_back(map_pages(mapped));
    std::byte* const pages = free.back();
    free.pop_back();
    std::byte* const data = count_++ % 2 == 0 ? pages : pages + mapped - round_up(std::max<size_t>(bytes, 1), kEndAlignment);
    used_[data] = {pages, mapped};
    return data;
}

void FencedMemory::release(void* data) {
    if (!data) return;
    const std::lock_guard lock(mutex_);
    const auto at = used_.find(data);
    free_[at->second.second].push_back(at->second.first);
    used_.erase(at);
}

void FencedMemory::upload(void* to, const void* from, size_t bytes) {
    cuda::check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}

void FencedMemory::download(void* to, const void* from, size_t bytes) {
    cuda::check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}

}  // namespace strobe::cli
