// The one exception of everything here that touches a file: its message always starts with the file's path.
#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>

namespace strobe::gpt {

class FileError : public std::runtime_error {
public:
    FileError(const std::filesystem::path& file, std::string_view problem)
        : std::runtime_error(file.string() + ": " + std::string(problem)) {}
};

/// A FileError that ends in the text of `error_number` (an errno value).
[[noreturn]] void throw_system_error(const std::filesystem::path& file, std::string_view action, int error_number);

}  // namespace strobe::gpt
