// The contest of the products' algorithms, on a GPU's own steps.
#pragma once

#include <algorithm>
#include <vector>
#include <nlohmann/json.hpp>

#include "gpt/bench/cuda_step_tables.hpp"
#include "gpt/bench/step_contest.hpp"
#include "gpt/ops/cuda/gemm.hpp"

namespace strobe::gpt::step_bench {

/// The products' algorithms by whole steps; what is found is kept if steps with it are shorter than with the usual
/// ones. Returns what there was to be chosen, and by how much.
template <class Step>
nlohmann::ordered_json hold_contest(cuda::Gemm& gemm, Step&& timed_step) {
    constexpr int kRounds = 2, kSteps = 72, kTurns = 4;
    gemm.begin_contest();
    for (int i = 0; i < 3; ++i) timed_step();
    const std::vector<cuda::Gemm::Candidates> products = gemm.candidates();
    std::vector<int> counts;
    for (const auto& p : products) counts.push_back(static_cast<int>(p.alone.size()));
    StepContest contest(counts, 1);
    const auto play = [&] {
        gemm.play(contest.draw());
        const double seconds = timed_step();
        std::vector<double> own = gemm.played();
        for (double& ms : own) ms *= 1e-3;
        contest.add(seconds, own);
    };
    // First what each takes by itself, in its place, then, of the few best, what steps take.
    const int most = *std::ranges::max_element(counts);
    for (int i = 0; i < kRounds * most; ++i) play();
    contest.shorten(0.04, 4);
    for (int i = 0; i < kSteps; ++i) play();
    contest.keep(2);
    for (int i = 0; i < kSteps / 3; ++i) play();
    const std::vector<int> usual(counts.size(), 0), best = contest.best();
    std::vector<double> with_usual, with_best;
    for (int turn = 0; turn < kTurns; ++turn)
        for (const bool found : {turn % 2 == 0, turn % 2 != 0}) {
            gemm.play(found ? best : usual);
            timed_step();
            for (int i = 0; i < 2; ++i) (found ? with_best : with_usual).push_back(timed_step());
        }
    const double before = median_of(with_usual), after = median_of(with_best);
    gemm.play(after < before ? best : usual);
    gemm.end_contest();
    auto table = nlohmann::ordered_json::array();
    const std::vector<std::vector<double>> effects = contest.effects();
    for (size_t i = 0; i < products.size(); ++i) {
        auto rows = nlohmann::ordered_json::array();
        for (size_t c = 0; c < products[i].alone.size(); ++c)
            rows.push_back({{"algorithm", products[i].algorithms[c]}, {"milliseconds_alone", products[i].alone[c]},
                            {"milliseconds_in_a_step", 1e3 * contest.own_seconds(i, static_cast<int>(c))},
                            {"milliseconds_more_of_a_step", 1e3 * effects[i][c]}});
        table.push_back({{"product", products[i].product}, {"best", best[i]}, {"candidates", rows}});
    }
    return {{"seconds_with_the_usual", before}, {"seconds_with_the_best", after}, {"products", table}};
}

}  // namespace strobe::gpt::step_bench
