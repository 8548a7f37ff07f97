// Device memory between unmapped pages: an access beyond a buffer, by any engine of the GPU, is an illegal address at once
// and not now and then. What the guard bands of a buffer show of writes, this shows of reads.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <vector>

#include "verify/verify.hpp"

namespace strobe::cli {

/// Every other buffer starts where its pages start, every other one ends where they end (to 256 bytes). Pages are used again,
/// so that a case costs no driver calls; they are given back with the process.
class FencedMemory : public verify::Memory {
public:
    /// Throws CallError when the device has no virtual memory management.
    explicit FencedMemory(int device);

    void* allocate(size_t bytes) override;
    void release(void* data) override;
    void upload(void* to, const void* from, size_t bytes) override;
    void download(void* to, const void* from, size_t bytes) override;

private:
    std::byte* map_pages(size_t bytes);

    int device_;
    size_t page_bytes_ = 0;
    std::mutex mutex_;
    std::map<size_t, std::vector<std::byte*>> free_;       // by bytes of pages
    std::map<void*, std::pair<std::byte*, size_t>> used_;  // the pages and their bytes
    size_t count_ = 0;
};

}  // namespace strobe::cli
