// Where a block of memory lies and how bytes get there. The host's is here; a device's belongs to its runtime.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace strobe::gpt {

/// Enough for every vector load and for the tensor copy engine of a GPU.
inline constexpr size_t kArenaAlignment = 256;

class Memory {
public:
    virtual ~Memory() = default;
    /// Zeroed, aligned to kArenaAlignment. Throws where there is no room.
    virtual std::byte* allocate(size_t bytes) = 0;
    virtual void release(std::byte* data) noexcept = 0;
    /// Between this memory and the host's, or within it. Comes after all that operators were asked to do, and is done on
    /// return.
    virtual void copy(void* to, const void* from, size_t bytes) = 0;
    /// A few bytes out of the host's memory, in order with the operators; `from` is free on return, `to` need not be there yet.
    virtual void put(void* to, const void* from, size_t bytes) = 0;
    /// In order with the operators.
    virtual void zero(void* data, size_t bytes) = 0;
    virtual bool on_host() const = 0;
};

class HostMemory final : public Memory {
public:
    std::byte* allocate(size_t bytes) override {
        const size_t rounded = (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
        auto* data = static_cast<std::byte*>(std::aligned_alloc(kArenaAlignment, rounded));
        if (!data) throw std::bad_alloc();
        std::memset(data, 0, rounded);
        return data;
    }
    void release(std::byte* data) noexcept override { std::free(data); }
    void copy(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
    void put(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
    void zero(void* data, size_t bytes) override { std::memset(data, 0, bytes); }
    bool on_host() const override { return true; }
};

inline Memory& host_memory() {
    static HostMemory memory;
    return memory;
}

}  // namespace strobe::gpt
