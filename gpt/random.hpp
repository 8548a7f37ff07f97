// xoshiro256** (Blackman, Vigna, "Scrambled linear pseudorandom number generators", 2021), seeded by splitmix64. Its state
// is four words that a checkpoint can keep.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace strobe::gpt {

class Random {
public:
    explicit Random(uint64_t seed, uint64_t stream = 0) {
        uint64_t x = seed ^ (stream * 0xD1342543DE82EF95ull);
        for (uint64_t& word : state_) {
            x += 0x9E3779B97F4A7C15ull;
            uint64_t z = x;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
            word = z ^ (z >> 31);
        }
    }
    explicit Random(const std::array<uint64_t, 4>& state) : state_(state) {}

    const std::array<uint64_t, 4>& state() const { return state_; }

    uint64_t next() {
        const uint64_t result = std::rotl(state_[1] * 5, 7) * 9;
        const uint64_t t = state_[1] << 17;
        state_[2] ^= state_[0];
        state_[3] ^= state_[1];
        state_[1] ^= state_[2];
        state_[0] ^= state_[3];
        state_[2] ^= t;
        state_[3] = std::rotl(state_[3], 45);
        return result;
    }

    /// In [0, 1), 53 bits.
    double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }
    /// In [0, n), unbiased.
    uint64_t below(uint64_t n) {
        const uint64_t limit = n * (UINT64_MAX / n);
        uint64_t x = next();
        while (x >= limit) x = next();
        return x % n;
    }
    /// Standard normal by Box and Muller; one value per call keeps the stream position simple.
    double normal() {
        const double u = 1.0 - uniform();
        const double v = uniform();
        return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
    }

private:
    std::array<uint64_t, 4> state_;
};

}  // namespace strobe::gpt
