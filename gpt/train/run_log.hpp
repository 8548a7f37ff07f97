// The record of a run: one JSON object per line, flushed line by line. A resumed run goes on where its checkpoint was:
// what a killed run logged after that is dropped, for it will be computed again.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <vector>

namespace strobe::gpt {

/// What the loss curve is drawn from.
struct CurvePoint {
    int64_t step;
    double loss;  // nats per token
};

class RunLog {
public:
    /// Keeps the lines of `file` whose "step" is at most `keep_until`, and appends behind them.
    RunLog(const std::filesystem::path& file, int64_t keep_until);

    void write(const nlohmann::ordered_json& line);

    const std::vector<CurvePoint>& training() const { return training_; }
    const std::vector<CurvePoint>& held_out() const { return held_out_; }

private:
    void remember(const nlohmann::ordered_json& line);

    struct Close {
        void operator()(std::FILE* f) const { std::fclose(f); }
    };
    std::filesystem::path path_;
    std::unique_ptr<std::FILE, Close> file_;
    std::vector<CurvePoint> training_, held_out_;
};

}  // namespace strobe::gpt
