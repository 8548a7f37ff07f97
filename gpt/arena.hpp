// Memory in two steps: a plan hands out offsets, so that the need is known before anything is allocated; an arena is one
// block of the planned size. No operator and no training step allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>

#include "gpt/device.hpp"

namespace strobe::gpt {

inline constexpr size_t kArenaAlignment = 64;

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

/// One zeroed block of host memory; a device's arena is made by that device's backend.
class Arena {
public:
    Arena() = default;
    explicit Arena(size_t bytes) : bytes_(bytes) {
        if (bytes == 0) return;
        const size_t rounded = (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
        memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kArenaAlignment, rounded)));
        if (!memory_) throw std::bad_alloc();
        std::memset(memory_.get(), 0, rounded);
    }

    size_t size_bytes() const { return bytes_; }
    template <class T>
    T* at(size_t offset) const {
        return reinterpret_cast<T*>(memory_.get() + offset);
    }

private:
    struct Free {
        void operator()(std::byte* p) const { std::free(p); }
    };
    std::unique_ptr<std::byte, Free> memory_;
    size_t bytes_ = 0;
};

}  // namespace strobe::gpt
