// XXH64 (Yann Collet's published specification): a fast 64-bit fingerprint for cache keys and for telling a damaged file
// from a sound one. It is not cryptographic: it does not protect against someone who forges a file on purpose.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

namespace strobe::gpt {

class XxHash64 {
public:
    explicit XxHash64(uint64_t seed = 0);

    void update(std::span<const std::byte> bytes);
    void update(std::string_view text) { update(std::as_bytes(std::span(text.data(), text.size()))); }
    /// Adds `value` as eight little-endian bytes: used between variable-length fields so that their borders count.
    void update(uint64_t value);

    uint64_t digest() const;

private:
    void consume_stripe(const std::byte* stripe);

    std::array<uint64_t, 4> lanes_;
    uint64_t seed_;
    uint64_t total_bytes_ = 0;
    std::array<std::byte, 32> pending_{};
    size_t num_pending_ = 0;
};

inline uint64_t xxhash64(std::string_view text) {
    XxHash64 hash;
    hash.update(text);
    return hash.digest();
}

inline uint64_t xxhash64(std::span<const std::byte> bytes) {
    XxHash64 hash;
    hash.update(bytes);
    return hash.digest();
}

/// Sixteen lower-case hexadecimal digits.
std::string to_hex(uint64_t value);

}  // namespace strobe::gpt
