// JSON from files that may be damaged or hostile: no duplicate keys, bounded depth and size, errors that name the file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace strobe::gpt {

struct JsonLimits {
    size_t max_bytes = size_t{64} << 20;
    size_t max_depth = 32;
};

/// Parses `text`, the contents (or a part) of `file`. Throws FileError on a syntax error, invalid UTF-8, a key that
/// occurs twice in one object, or a broken limit.
nlohmann::json parse_strict_json(std::string_view text, const std::filesystem::path& file, const JsonLimits& limits = {});

/// The same for a whole file.
nlohmann::json read_json_file(const std::filesystem::path& file, const JsonLimits& limits = {});

}  // namespace strobe::gpt
