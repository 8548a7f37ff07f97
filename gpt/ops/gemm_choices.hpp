// Which algorithm was measured to be the fastest for each matrix product, kept in a file: two processes then choose alike, so a
// run that is resumed repeats bit for bit, and nothing is measured twice.
//
// The file is text, a product per line, all numbers but those of the product in hexadecimal: the product (no spaces), the bits of
// the milliseconds that it took as a float, the library's algorithm (eight words), and the XXH64 of the line so far:
//     T,N,6144,16384,2048,2048,2048,6144,bf16,bf16,0,1 3f1cc1a0 0000000000000042 ... 3f2a9c0d11e45b77
// Lines are only added, one write each, under a lock; of two for one product the later counts. A line that is damaged or of
// another kind is passed over, and the product measured again.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>

namespace strobe::gpt {

struct GemmChoice {
    std::array<uint64_t, 8> algorithm{};
    float milliseconds = 0.0f;

    bool operator==(const GemmChoice&) const = default;
};

class GemmChoices {
public:
    /// Without a path, or where the file cannot be read or written, choices live as long as this object.
    explicit GemmChoices(std::filesystem::path path = {});

    std::optional<GemmChoice> find(const std::string& product) const;
    /// Keeps the choice, unless another process has kept one in the meantime; returns what is kept.
    GemmChoice settle(const std::string& product, const GemmChoice& choice);
    /// In the place of a choice that turned out not to work here.
    void replace(const std::string& product, const GemmChoice& choice);

private:
    void read(std::string_view text);

    std::filesystem::path path_;
    std::map<std::string, GemmChoice> choices_;
};

}  // namespace strobe::gpt
