// Memory in two steps: a plan hands out offsets, so that the need is known before anything is allocated; an arena is one
// block of the planned size. No operator and no training step allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "gpt/device.hpp"
#include "gpt/memory.hpp"

namespace strobe::gpt {

/// Hands out aligned byte offsets.
class ArenaPlan {
public:
    /// Offset of a fresh block of `count` elements of `element_size` bytes.
    size_t reserve(int64_t count, size_t element_size = sizeof(float)) {
        const size_t offset = total_;
        total_ += (static_cast<size_t>(count) * element_size + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
        return offset;
    }
    size_t total_bytes() const { return total_; }

private:
    size_t total_ = 0;
};

struct ReleaseTo {
    Memory* memory = nullptr;
    void operator()(std::byte* p) const { memory->release(p); }
};

/// One zeroed block. Its memory must outlive it.
class Arena {
public:
    Arena() = default;
    explicit Arena(size_t bytes, Memory& memory = host_memory()) : bytes_(bytes) {
        if (bytes > 0) data_ = {memory.allocate(bytes), ReleaseTo{&memory}};
    }

    size_t size_bytes() const { return bytes_; }
    template <class T>
    T* at(size_t offset) const {
        return reinterpret_cast<T*>(data_.get() + offset);
    }

private:
    std::unique_ptr<std::byte, ReleaseTo> data_;
    size_t bytes_ = 0;
};

}  // namespace strobe::gpt
