// Sets of options whose steps take turns in one process.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>
#include <nlohmann/json.hpp>

#include "gpt/bench/cuda_step_setup.hpp"
#include "gpt/bench/cuda_step_tables.hpp"
#include "gpt/bench/gpu_watch.hpp"
#include "gpt/step_graphs.hpp"
#include "gpt/train/optimizer.hpp"

namespace strobe::gpt::step_bench {

/// One set of options among others.
class Variant {
public:
    Variant(const Arguments& a, Backend& backend)
        : a_(a), weights_(config_of(a), backend.memory(), Precision::bf16, 1, a.masters), backend_(backend),
          model_(weights_, backend, model_options_of(a, 1)),
          optimizer_(weights_.layout, OptimizerOptions{}, backend.memory(), a.moments), graphs_(backend),
          batches_{random_batch(a.seqlen, a.rows, 0)} {
        fill(weights_);
        prepare();
    }
    void step() {
        const auto start = std::chrono::steady_clock::now();
        backend_.exec().deterministic = a_.deterministic;
        model_.begin_step();
        optimizer_.set_rates(++number_, 1e-4f);
        const auto enqueue = [&] {
            model_.passes();
            optimizer_.update(backend_.exec(), weights_, model_.gradients());
        };
        a_.graph ? graphs_.run(model_.step_shape(), enqueue) : enqueue();
        prepare();
        optimizer_.gradient_norm();
        expect_finite(model_.take_loss());
        seconds_.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    void forget() { seconds_.clear(); }
    const std::vector<double>& seconds() const { return seconds_; }

private:
    void prepare() { model_.prepare(batches_, 1.0f / static_cast<float>(batches_.front().tokens.size())); }

    Arguments a_;
    Weights weights_;
    Backend& backend_;
    Model model_;
    Optimizer optimizer_;
    StepGraphs graphs_;
    std::vector<Batch> batches_;
    int64_t number_ = 0;
    std::vector<double> seconds_;
};

inline int run_variants(const std::vector<Arguments>& sets, const std::vector<std::string>& names) {
    const Arguments& first = sets.front();
    const ModelConfig config = config_of(first);
    Backend backend(Device::cuda);
    backend.exec().times = nullptr;
    std::vector<std::unique_ptr<Variant>> variants;
    std::vector<size_t> bytes;
    const auto warm = [](Variant& v) {
        for (int i = 0; i < 3; ++i) v.step();
        v.forget();
    };
    for (const Arguments& a : sets) {
        const size_t before = backend.runtime().free_bytes();
        variants.push_back(std::make_unique<Variant>(a, backend));
        warm(*variants.back());
        bytes.push_back(before - backend.runtime().free_bytes());
    }
    GpuWatch watch;
    watch.begin();
    // Two steps in a turn; every second round in the opposite order.
    for (int64_t round = 0; 2 * round < first.steps; ++round)
        for (size_t i = 0; i < sets.size(); ++i)
            for (int twice = 0; twice < 2; ++twice) variants[round % 2 == 0 ? i : sets.size() - 1 - i]->step();
    const nlohmann::ordered_json gpu_state = watch.end();
    auto rows = nlohmann::ordered_json::array();
    const double flops = flops_of_step(config, first.seqlen, first.seqlen * first.rows, 1.0);
    for (size_t i = 0; i < sets.size(); ++i) {
        const std::vector<double>&mine = variants[i]->seconds(), &firsts = variants.front()->seconds();
        std::vector<double> ratios;
        for (size_t s = 0; s < mine.size(); ++s) ratios.push_back(mine[s] / firsts[s]);
        const double median = median_of(mine);
        rows.push_back({{"options", names[i]},
                        {"seconds_median", median},
                        {"seconds_min", *std::ranges::min_element(mine)},
                        {"tflops_per_second", 1e-12 * flops / median},
                        {"time_over_the_firsts", median_of(ratios)},
                        {"memory_bytes", bytes[i]}});
    }
    const nlohmann::ordered_json out{{"model", first.model},
                                     {"gpu", backend.runtime().name()},
                                     {"gpu_while_timed", gpu_state},
                                     {"seqlen", first.seqlen},
                                     {"rows", first.rows},
                                     {"steps", first.steps},
                                     {"variants", rows}};
    std::printf("%s\n", out.dump(2).c_str());
    return 0;
}

}  // namespace strobe::gpt::step_bench
