// What a person sees while a model trains: one line that renews itself on a terminal, now and then a line elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace strobe::gpt {

struct ProgressValues {
    int64_t step = 0;
    int64_t total_steps = 0;
    double loss = 0.0;
    std::optional<double> held_out_loss;
    double tokens_per_second = 0.0;
    double flops_per_second = 0.0;
    double utilisation = 0.0;  // of the measured peak
    double seconds_left = 0.0;
};

class Progress {
public:
    /// quiet: shows nothing.
    explicit Progress(bool quiet);
    ~Progress();

    void show(const ProgressValues& values);
    /// A line that stays.
    void message(const std::string& text);

private:
    bool quiet_;
    bool terminal_;
    bool open_line_ = false;
    std::optional<std::chrono::steady_clock::time_point> last_;
};

/// 83 s as "1:23".
std::string clock_text(double seconds);

}  // namespace strobe::gpt
