#include "gpt/bench/step_contest.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace strobe::gpt {

namespace {

// A chip warms up: so many steps in a row have a level of their own.
constexpr size_t kStretch = 8;
// Sweeps over the parts; each takes from a part's effects what the others explain.
constexpr int kSweeps = 200;
// A step further off than so many times the usual was disturbed. What is usual becomes clearer from round to round.
constexpr double kDisturbed = 6.0;
constexpr int kRounds = 4;

}  // namespace

StepContest::StepContest(const std::vector<int>& candidates, uint64_t seed)
    : candidates_(candidates), left_(candidates.size()), deck_(candidates.size()), drawn_(candidates.size()), random_(seed, 0) {
    for (size_t i = 0; i < candidates.size(); ++i) {
        left_[i].resize(static_cast<size_t>(candidates[i]));
        std::iota(left_[i].begin(), left_[i].end(), 0);
    }
}

const std::vector<int>& StepContest::draw() {
    for (size_t i = 0; i < left_.size(); ++i) {
        if (deck_[i].empty()) {
            deck_[i] = left_[i];
            for (size_t j = deck_[i].size(); j > 1; --j) std::swap(deck_[i][j - 1], deck_[i][random_.below(j)]);
        }
        drawn_[i] = deck_[i].back();
        deck_[i].pop_back();
    }
    return drawn_;
}

void StepContest::add(double seconds, std::span<const double> own) {
    steps_.push_back({drawn_, seconds, {own.begin(), own.end()}});
}

double StepContest::own_seconds(size_t part, int candidate) const {
    double sum = 0.0;
    int count = 0;
    for (const Step& s : steps_)
        if (s.drawn[part] == candidate) sum += s.own[part], ++count;
    return count > 0 ? sum / count : INFINITY;
}

void StepContest::shorten(double margin, size_t most) {
    for (size_t i = 0; i < left_.size(); ++i) {
        std::vector<double> own(static_cast<size_t>(candidates_[i]), INFINITY);
        for (const int c : left_[i]) own[static_cast<size_t>(c)] = own_seconds(i, c);
        const auto seconds = [&](int c) { return own[static_cast<size_t>(c)]; };
        std::ranges::stable_sort(left_[i], {}, seconds);
        const double bound = (1.0 + margin) * seconds(left_[i].front());
        std::erase_if(left_[i], [&](int c) { return seconds(c) > bound; });
        if (left_[i].size() > most) left_[i].resize(most);
        deck_[i].clear();
    }
}

void StepContest::keep(size_t most) {
    const std::vector<std::vector<double>> all = effects();
    for (size_t i = 0; i < left_.size(); ++i) {
        std::ranges::stable_sort(left_[i], {}, [&](int c) { return all[i][static_cast<size_t>(c)]; });
        if (left_[i].size() > most) left_[i].resize(most);
        deck_[i].clear();
    }
}

// One effect after the other is the mean of what the others leave, again and again: that converges to the least squares.
std::vector<std::vector<double>> StepContest::fit(const std::vector<bool>& counts, std::vector<double>& residuals) const {
    const size_t parts = candidates_.size(), stretches = steps_.size() / kStretch + 1;
    std::vector<std::vector<double>> effects(parts + 1);
    for (size_t i = 0; i < parts; ++i) effects[i].assign(static_cast<size_t>(candidates_[i]), 0.0);
    effects[parts].assign(stretches, 0.0);
    const auto level = [&](size_t part, size_t step) {
        return part < parts ? static_cast<size_t>(steps_[step].drawn[part]) : step / kStretch;
    };
    residuals.clear();
    for (const Step& s : steps_) residuals.push_back(s.seconds);
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
        for (size_t turn = 0; turn <= parts; ++turn) {
            const size_t part = (parts + turn) % (parts + 1);  // the stretches first
            std::vector<double> sums(effects[part].size(), 0.0);
            std::vector<int> numbers(effects[part].size(), 0);
            for (size_t s = 0; s < steps_.size(); ++s) {
                if (!counts[s]) continue;
                sums[level(part, s)] += residuals[s];
                ++numbers[level(part, s)];
            }
            for (size_t l = 0; l < sums.size(); ++l) sums[l] = numbers[l] > 0 ? sums[l] / numbers[l] : 0.0;
            for (size_t l = 0; l < sums.size(); ++l) effects[part][l] += sums[l];
            for (size_t s = 0; s < steps_.size(); ++s) residuals[s] -= sums[level(part, s)];
        }
    }
    effects.pop_back();
    return effects;
}

// Steps that something else disturbed are left out: at first those far from the median of all, then those far from what is fitted.
std::vector<std::vector<double>> StepContest::effects() const {
    std::vector<bool> counts(steps_.size(), true);
    std::vector<double> off;
    for (const Step& s : steps_) off.push_back(s.seconds);
    const auto median = [](std::vector<double> x) {
        std::ranges::nth_element(x, x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2));
        return x[x.size() / 2];
    };
    std::vector<std::vector<double>> all;
    if (off.empty()) return fit(counts, off);
    for (int round = 0; round < kRounds; ++round) {
        const double middle = median(off);
        std::vector<double> sizes;
        for (double& x : off) sizes.push_back(x = std::abs(x - middle));
        const double bound = kDisturbed * median(sizes);
        for (size_t s = 0; s < counts.size(); ++s) counts[s] = off[s] <= bound;
        all = fit(counts, off);
    }
    return all;
}

std::vector<int> StepContest::best() const {
    const std::vector<std::vector<double>> all = effects();
    std::vector<int> out;
    for (size_t i = 0; i < left_.size(); ++i)
        out.push_back(*std::ranges::min_element(left_[i], {}, [&](int c) { return all[i][static_cast<size_t>(c)]; }));
    return out;
}

}  // namespace strobe::gpt
