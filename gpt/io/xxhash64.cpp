#include "gpt/io/xxhash64.hpp"

#include <algorithm>
#include <bit>

namespace strobe::gpt {
namespace {

static_assert(std::endian::native == std::endian::little, "strobe's file formats are little-endian and read in place");

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ull;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Full;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9ull;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ull;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ull;

template <class T>
T load(const std::byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

uint64_t mix_lane(uint64_t lane, uint64_t input) { return std::rotl(lane + input * kPrime2, 31) * kPrime1; }

}  // namespace

XxHash64::XxHash64(uint64_t seed)
    : lanes_{seed + kPrime1 + kPrime2, seed + kPrime2, seed, seed - kPrime1}, seed_(seed) {}

void XxHash64::consume_stripe(const std::byte* stripe) {
    for (size_t i = 0; i < 4; ++i) lanes_[i] = mix_lane(lanes_[i], load<uint64_t>(stripe + 8 * i));
}

void XxHash64::update(std::span<const std::byte> bytes) {
    if (bytes.empty()) return;
    total_bytes_ += bytes.size();
    if (num_pending_ > 0) {
        const size_t taken = std::min(bytes.size(), pending_.size() - num_pending_);
        std::memcpy(pending_.data() + num_pending_, bytes.data(), taken);
        num_pending_ += taken;
        bytes = bytes.subspan(taken);
        if (num_pending_ < pending_.size()) return;
        consume_stripe(pending_.data());
        num_pending_ = 0;
    }
    while (bytes.size() >= 32) {
        consume_stripe(bytes.data());
        bytes = bytes.subspan(32);
    }
    if (!bytes.empty()) std::memcpy(pending_.data(), bytes.data(), bytes.size());
    num_pending_ = bytes.size();
}

void XxHash64::update(uint64_t value) { update(std::as_bytes(std::span(&value, 1))); }

uint64_t XxHash64::digest() const {
    uint64_t hash;
    if (total_bytes_ >= 32) {
        hash = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) + std::rotl(lanes_[3], 18);
        for (const uint64_t lane : lanes_) hash = (hash ^ mix_lane(0, lane)) * kPrime1 + kPrime4;
    } else {
        hash = seed_ + kPrime5;
    }
    hash += total_bytes_;
    const std::byte* at = pending_.data();
    const std::byte* end = at + num_pending_;
    for (; end - at >= 8; at += 8) hash = std::rotl(hash ^ mix_lane(0, load<uint64_t>(at)), 27) * kPrime1 + kPrime4;
    for (; end - at >= 4; at += 4) hash = std::rotl(hash ^ load<uint32_t>(at) * kPrime1, 23) * kPrime2 + kPrime3;
    for (; at < end; ++at) hash = std::rotl(hash ^ static_cast<uint64_t>(*at) * kPrime5, 11) * kPrime1;
    hash = (hash ^ hash >> 33) * kPrime2;
    hash = (hash ^ hash >> 29) * kPrime3;
    return hash ^ hash >> 32;
}

std::string to_hex(uint64_t value) {
    std::string digits(16, '0');
    for (size_t i = 16; i-- > 0; value >>= 4) digits[i] = "0123456789abcdef"[value & 15];
    return digits;
}

}  // namespace strobe::gpt
