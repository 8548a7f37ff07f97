// GPT-2's vocabulary files write bytes as printable characters: a byte that prints in Latin-1 stands for itself, the other 68
// stand as U+0100 and up, in order (Radford et al. 2019, bytes_to_unicode).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace strobe::gpt {

/// Byte values in the order of their printable characters, which is the order of GPT-2's first 256 token ids.
const std::array<uint8_t, 256>& printable_byte_order();

std::string bytes_to_printable(std::string_view bytes);

/// Nothing if `printable` holds a character that stands for no byte.
std::optional<std::string> printable_to_bytes(std::string_view printable);

}  // namespace strobe::gpt
