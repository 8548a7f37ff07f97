#include "gpt/ops/gemm_choices.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <bit>
#include <sstream>
#include <system_error>

#include <fmt/core.h>

#include "gpt/io/xxhash64.hpp"

namespace strobe::gpt {

namespace {

/// A file under a lock that other processes respect, while this lives.
class LockedFile {
public:
    explicit LockedFile(const std::filesystem::path& path)
        : fd_(path.empty() ? -1 : open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644)) {
        if (fd_ >= 0) flock(fd_, LOCK_EX);
    }
    ~LockedFile() {
        if (fd_ >= 0) close(fd_);
    }
    LockedFile(const LockedFile&) = delete;
    LockedFile& operator=(const LockedFile&) = delete;

    std::string text() const {
        std::string text;
        char part[1 << 14];
        if (fd_ < 0 || lseek(fd_, 0, SEEK_SET) < 0) return text;
        for (ssize_t n; (n = ::read(fd_, part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(n));
        return text;
    }
    /// A file that does not take it (a full disk, one that may only be read) is a file without this choice.
    void add(const std::string& line) const {
        if (fd_ >= 0 && ::write(fd_, line.data(), line.size()) < 0) return;
    }

private:
    int fd_;
};

// Milliseconds as the bits of a float: what was compared when the choice was made is what is read back.
std::string line_of(const std::string& product, const GemmChoice& choice) {
    std::string line = fmt::format("{} {:08x}", product, std::bit_cast<uint32_t>(choice.milliseconds));
    for (const uint64_t word : choice.algorithm) line += fmt::format(" {:016x}", word);
    return line + " " + to_hex(xxhash64(std::string_view(line)));
}

}  // namespace

GemmChoices::GemmChoices(std::filesystem::path path) : path_(std::move(path)) {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::create_directories(path_.parent_path(), ignored);
    read(LockedFile(path_).text());
}

void GemmChoices::read(std::string_view text) {
    std::istringstream lines{std::string(text)};
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string product;
        uint32_t milliseconds = 0;
        GemmChoice choice;
        words >> product >> std::hex >> milliseconds;
        for (uint64_t& word : choice.algorithm) words >> word;
        choice.milliseconds = std::bit_cast<float>(milliseconds);
        // Whatever was misread does not give the line again.
        if (words && line == line_of(product, choice)) choices_[product] = choice;
    }
}

std::optional<GemmChoice> GemmChoices::find(const std::string& product) const {
    const auto found = choices_.find(product);
    return found == choices_.end() ? std::nullopt : std::optional(found->second);
}

GemmChoice GemmChoices::settle(const std::string& product, const GemmChoice& choice) {
    const LockedFile file(path_);
    const std::string text = file.text();
    read(text);
    if (const auto [at, fresh] = choices_.emplace(product, choice); !fresh) return at->second;
    const bool torn = !text.empty() && text.back() != '\n';
    file.add((torn ? "\n" : "") + line_of(product, choice) + "\n");
    return choice;
}

void GemmChoices::replace(const std::string& product, const GemmChoice& choice) {
    choices_[product] = choice;
    LockedFile(path_).add("\n" + line_of(product, choice) + "\n");
}

}  // namespace strobe::gpt
