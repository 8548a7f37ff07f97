// Writing so that a crash at any moment leaves either the old state or the new one on disk, never a mixture: data goes to a
// file under another name, reaches the disk (fsync), and only then takes its final name (rename, then fsync of the folder).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "gpt/io/xxhash64.hpp"

namespace strobe::gpt {

/// A new file that is written once, front to back. Hashes what it writes.
class DurableFile {
public:
    /// Creates `path`; throws FileError if it exists already or cannot be created.
    explicit DurableFile(const std::filesystem::path& path);
    DurableFile(const DurableFile&) = delete;
    DurableFile& operator=(const DurableFile&) = delete;
    /// Closes without fsync: a file that was not finished is not promised to be on disk.
    ~DurableFile();

    void write(std::span<const std::byte> bytes);
    void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
    template <class T>
    void write_values(std::span<const T> values) {
        static_assert(std::is_trivially_copyable_v<T>);
        write(std::as_bytes(values));
    }

    /// Replaces bytes at the start of the file, for headers that hold counts. Not part of hash().
    void overwrite_start(std::span<const std::byte> bytes);

    /// Writes what is buffered, then fsyncs and closes. Nothing may be written afterwards.
    void finish();

    const std::filesystem::path& path() const { return path_; }
    uint64_t size() const { return size_; }
    uint64_t hash() const { return hash_.digest(); }

private:
    void flush();
    void write_through(std::span<const std::byte> bytes);

    std::filesystem::path path_;
    int fd_ = -1;
    uint64_t size_ = 0;
    XxHash64 hash_;
    std::vector<std::byte> buffer_;
};

/// Makes the names inside `folder` (creations, renames, removals) survive a power cut.
void fsync_folder(const std::filesystem::path& folder);

/// `write` fills a temporary file beside `path`, which then replaces `path` in one step. On an exception the temporary is
/// removed and `path` is as it was.
void write_file_atomically(const std::filesystem::path& path, const std::function<void(DurableFile&)>& write);

/// A hidden name in the folder of `path` that belongs to this process: ".NAME.tmp-PID-COUNTER".
std::filesystem::path temporary_sibling(const std::filesystem::path& path);

}  // namespace strobe::gpt
