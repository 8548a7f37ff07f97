// Standard base64 (RFC 4648, with padding), strict.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace strobe::gpt {

std::string base64_encode(std::string_view bytes);
/// Nothing on any character, length or padding that an encoder does not write.
std::optional<std::string> base64_decode(std::string_view text);

}  // namespace strobe::gpt
