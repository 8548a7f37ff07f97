// A progress line on standard error: redrawn on a terminal, silent elsewhere, so that logs stay readable.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

#include <fmt/core.h>

namespace strobe::cli {

class Progress {
public:
    explicit Progress(int64_t total) : total_(total), shown_(isatty(STDERR_FILENO) != 0) {}
    ~Progress() { clear(); }
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    void step(const std::string& text) {
        ++done_;
        const auto now = std::chrono::steady_clock::now();
        if (!shown_ || (done_ < total_ && now - last_ < std::chrono::milliseconds(100))) return;
        last_ = now;
        constexpr int kWidth = 30;
        const int filled = total_ > 0 ? static_cast<int>(done_ * kWidth / total_) : kWidth;
        const double elapsed = std::chrono::duration<double>(now - start_).count();
        const double left = elapsed / static_cast<double>(done_) * static_cast<double>(total_ - done_);
        std::fputs(fmt::format("\r\033[K[{}{}] {}/{}  {:.0f} s left  {}", std::string(filled, '#'),
                               std::string(kWidth - filled, '.'), done_, total_, left, text.substr(0, 60)).c_str(), stderr);
        std::fflush(stderr);
    }

    /// Takes the line away, before something else is printed.
    void clear() const {
        if (shown_) std::fputs("\r\033[K", stderr);
    }

private:
    int64_t total_;
    int64_t done_ = 0;
    bool shown_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
    std::chrono::steady_clock::time_point last_{};
};

}  // namespace strobe::cli
