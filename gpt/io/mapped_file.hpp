// A whole file mapped for reading. Pages come in when touched, so a 10 GB shard or checkpoint opens at once.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace strobe::gpt {

class MappedFile {
public:
    MappedFile() = default;
    /// Throws FileError where `path` is not a readable regular file. An empty file gives an empty span.
    explicit MappedFile(const std::filesystem::path& path);
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;
    ~MappedFile();

    const std::filesystem::path& path() const { return path_; }
    std::span<const std::byte> bytes() const { return {data_, size_}; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

    /// Tells the kernel that the file is read front to back once.
    void expect_sequential_reads() const;

private:
    std::filesystem::path path_;
    const std::byte* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace strobe::gpt
