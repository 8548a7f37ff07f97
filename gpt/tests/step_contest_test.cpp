#include "gpt/bench/step_contest.hpp"

#include <gtest/gtest.h>

#include "gpt/random.hpp"

namespace strobe::gpt::test {

namespace {

constexpr int kParts = 15, kCandidates = 4;

/// A step of 240 ms that candidate 2 of each part makes shortest, though its own calls take longest; noise of 0.4 ms, a chip that
/// becomes slower, and a step in twenty that something else disturbs.
void play(StepContest& contest, int steps) {
    Random random(7);
    for (int s = 0; s < steps; ++s) {
        const std::vector<int>& drawn = contest.draw();
        double seconds = 0.240 + 1e-5 * s + 0.4e-3 * random.normal() + (random.below(20) == 0 ? 0.015 : 0.0);
        std::vector<double> own;
        for (const int c : drawn) {
            seconds += c == 2 ? -0.5e-3 : 0.1e-3 * c;
            own.push_back(0.010 + (c == 2 ? 0.2e-3 : 1e-5 * c));
        }
        contest.add(seconds, own);
    }
}

}  // namespace

TEST(StepContest, finds_what_makes_steps_short) {
    StepContest contest(std::vector<int>(kParts, kCandidates), 3);
    play(contest, 120);
    contest.keep(2);
    play(contest, 40);
    EXPECT_EQ(contest.best(), std::vector<int>(kParts, 2));
    const std::vector<std::vector<double>> effects = contest.effects();
    for (const std::vector<double>& part : effects) EXPECT_NEAR(part[1] - part[2], 0.6e-3, 0.35e-3);
}

TEST(StepContest, keeps_those_whose_own_calls_are_fast) {
    StepContest contest({3, 1, 4}, 3);
    for (int s = 0; s < 12; ++s) {
        const std::vector<int>& drawn = contest.draw();
        const std::vector<double> own{drawn[0] == 1 ? 1.0 : 2.0, 5.0, 1.0 + 0.01 * drawn[2]};
        contest.add(1.0, own);
    }
    EXPECT_DOUBLE_EQ(contest.own_seconds(0, 1), 1.0);
    EXPECT_DOUBLE_EQ(contest.own_seconds(0, 2), 2.0);
    contest.shorten(0.5, 2);
    for (int s = 0; s < 12; ++s) {
        const std::vector<int>& drawn = contest.draw();
        EXPECT_EQ(drawn[0], 1);
        EXPECT_EQ(drawn[1], 0);
        EXPECT_LT(drawn[2], 2);
    }
}

}  // namespace strobe::gpt::test
