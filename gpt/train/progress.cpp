#include "gpt/train/progress.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include <fmt/core.h>

namespace strobe::gpt {

namespace {

constexpr std::chrono::milliseconds kTerminalInterval{100};
constexpr std::chrono::milliseconds kFileInterval{10'000};
constexpr int kBarCells = 24;

int terminal_columns() {
    winsize size{};
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
    return 120;
}

std::string bar(double fraction) {
    // Eighths of a cell, so that a long run is seen to move.
    static constexpr const char* kParts[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
    const int eighths = static_cast<int>(std::clamp(fraction, 0.0, 1.0) * kBarCells * 8);
    std::string out;
    for (int i = 0; i < eighths / 8; ++i) out += "█";
    out += kParts[eighths % 8];
    for (int i = (eighths + 7) / 8; i < kBarCells; ++i) out += " ";
    return out;
}

std::string scaled(double value) {
    static constexpr const char* kUnits[] = {"", "k", "M", "G", "T", "P"};
    size_t unit = 0;
    while (std::abs(value) >= 1000.0 && unit + 1 < std::size(kUnits)) value /= 1000.0, ++unit;
    return fmt::format("{:.{}f} {}", value, value < 10 ? 2 : value < 100 ? 1 : 0, kUnits[unit]);
}

}  // namespace

std::string clock_text(double seconds) {
    if (!std::isfinite(seconds) || seconds < 0) return "-:--";
    const auto s = static_cast<int64_t>(seconds + 0.5);
    if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
    return fmt::format("{}:{:02}", s / 60, s % 60);
}

Progress::Progress(bool quiet) : quiet_(quiet), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
    if (open_line_) std::fputc('\n', stderr);
}

void Progress::show(const ProgressValues& v) {
    if (quiet_) return;
    const auto now = std::chrono::steady_clock::now();
    const bool last_step = v.step == v.total_steps;
    const std::chrono::milliseconds interval = terminal_ ? kTerminalInterval : kFileInterval;
    if (last_ && !last_step && now - *last_ < interval) return;
    last_ = now;
    const double fraction = static_cast<double>(v.step) / static_cast<double>(std::max<int64_t>(1, v.total_steps));
    std::string text = fmt::format("step {}/{}  loss {:.4f}", v.step, v.total_steps, v.loss);
    if (v.held_out_loss) text += fmt::format("  held out {:.4f}", *v.held_out_loss);
    text += fmt::format("  {}tok/s  {}FLOP/s  MFU {:.0f} %  {} left", scaled(v.tokens_per_second),
                        scaled(v.flops_per_second), 100.0 * v.utilisation, clock_text(v.seconds_left));
    if (!terminal_) {
        fmt::print(stderr, "{}\n", text);
        return;
    }
    if (terminal_columns() >= static_cast<int>(text.size()) + kBarCells + 10)
        text = fmt::format("{:3.0f} % │{}│ {}", std::floor(100.0 * fraction), bar(fraction), text);
    fmt::print(stderr, "\r{}\x1b[K", text);
    std::fflush(stderr);
    open_line_ = true;
}

void Progress::message(const std::string& text) {
    if (quiet_) return;
    fmt::print(stderr, "{}{}\n", open_line_ ? "\r\x1b[K" : "", text);
    open_line_ = false;
}

}  // namespace strobe::gpt
