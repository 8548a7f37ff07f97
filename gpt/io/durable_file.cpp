#include "gpt/io/durable_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <string>
#include <utility>

#include "gpt/io/file_error.hpp"

namespace strobe::gpt {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 18;
// Linux moves at most 2 GiB - 4 KiB per call; smaller pieces also keep a signal from waiting long.
constexpr size_t kMaxWriteBytes = size_t{1} << 28;

}  // namespace

DurableFile::DurableFile(const std::filesystem::path& path) : path_(path) {
    fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd_ < 0) throw_system_error(path, "cannot create", errno);
    buffer_.reserve(kBufferBytes);
}

DurableFile::~DurableFile() {
    if (fd_ >= 0) ::close(fd_);
}

void DurableFile::write(std::span<const std::byte> bytes) {
    hash_.update(bytes);
    size_ += bytes.size();
    if (buffer_.size() + bytes.size() > kBufferBytes) flush();
    if (bytes.size() >= kBufferBytes) {
        write_through(bytes);
    } else {
        buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
    }
}

void DurableFile::flush() {
    write_through(buffer_);
    buffer_.clear();
}

void DurableFile::write_through(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
        const ssize_t written = ::write(fd_, bytes.data(), std::min(bytes.size(), kMaxWriteBytes));
        if (written < 0) {
            if (errno == EINTR) continue;
            throw_system_error(path_, "cannot write", errno);
        }
        bytes = bytes.subspan(static_cast<size_t>(written));
    }
}

void DurableFile::overwrite_start(std::span<const std::byte> bytes) {
    flush();
    for (size_t at = 0; at < bytes.size();) {
        const ssize_t written = ::pwrite(fd_, bytes.data() + at, bytes.size() - at, static_cast<off_t>(at));
        if (written < 0 && errno != EINTR) throw_system_error(path_, "cannot write", errno);
        if (written > 0) at += static_cast<size_t>(written);
    }
}

void DurableFile::finish() {
    flush();
    if (::fsync(fd_) != 0) throw_system_error(path_, "cannot fsync", errno);
    const int fd = std::exchange(fd_, -1);
    if (::close(fd) != 0) throw_system_error(path_, "cannot close", errno);
}

void fsync_folder(const std::filesystem::path& folder) {
    const std::filesystem::path name = folder.empty() ? std::filesystem::path(".") : folder;
    const int fd = ::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) throw_system_error(name, "cannot open", errno);
    const int result = ::fsync(fd);
    const int error = errno;
    ::close(fd);
    // Some network and FUSE file systems have no fsync for folders; their renames are as durable as they get.
    if (result != 0 && error != EINVAL && error != ENOTSUP) throw_system_error(name, "cannot fsync", error);
}

std::filesystem::path temporary_sibling(const std::filesystem::path& path) {
    static std::atomic<unsigned> counter{0};
    const std::string name = "." + path.filename().string() + ".tmp-" + std::to_string(::getpid()) + "-" +
                             std::to_string(counter.fetch_add(1));
    return path.parent_path() / name;
}

void write_file_atomically(const std::filesystem::path& path, const std::function<void(DurableFile&)>& write) {
    const std::filesystem::path temporary = temporary_sibling(path);
    try {
        DurableFile file(temporary);
        write(file);
        file.finish();
        if (std::rename(temporary.c_str(), path.c_str()) != 0) {
            throw_system_error(path, "cannot rename into place", errno);
        }
    } catch (...) {
        ::unlink(temporary.c_str());
        throw;
    }
    fsync_folder(path.parent_path());
}

}  // namespace strobe::gpt
