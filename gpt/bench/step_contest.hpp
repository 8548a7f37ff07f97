// Who of several candidates does each of several parts of a step best, where parts disturb one another: by what lies in the cache
// behind a call, and by the clock that a chip at its power limit keeps. So a candidate does its part in a whole step, all parts draw
// one at random for each step, and what a candidate costs is told from the times of whole steps by least squares.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpt/random.hpp"

namespace strobe::gpt {

class StepContest {
public:
    /// candidates[i]: how many part i has.
    StepContest(const std::vector<int>& candidates, uint64_t seed);

    /// A candidate of each part for the next step. In as many steps as a part has candidates left, each of them gets one.
    const std::vector<int>& draw();
    /// What the step of the last draw took, and of it each part's own calls.
    void add(double seconds, std::span<const double> own);

    /// Of each part stay those whose own calls took at most (1 + margin) times the fastest's, at most so many.
    void shorten(double margin, size_t most);
    /// Of each part stay so many, those that make the shortest steps.
    void keep(size_t most);
    /// Seconds that each candidate of each part adds to a step, beyond the mean over the part's.
    std::vector<std::vector<double>> effects() const;
    /// Mean seconds of a candidate's own calls.
    double own_seconds(size_t part, int candidate) const;
    /// Of each part the one left that makes the shortest step.
    std::vector<int> best() const;

private:
    struct Step {
        std::vector<int> drawn;
        double seconds;
        std::vector<double> own;
    };
    std::vector<std::vector<double>> fit(const std::vector<bool>& counts, std::vector<double>& residuals) const;

    std::vector<int> candidates_;
    std::vector<std::vector<int>> left_, deck_;
    std::vector<int> drawn_;
    std::vector<Step> steps_;
    Random random_;
};

}  // namespace strobe::gpt
