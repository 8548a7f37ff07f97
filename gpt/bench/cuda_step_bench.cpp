// Times whole training steps of GPT-3's shapes, and of a Llama of that size, on a GPU, and the operators of one step
// against what the machine allows; writes JSON. With "once" the first STEPS steps are timed as they are and none is
// looked at by operator: for steps of a minute. SEQLEN "longest": the largest multiple of 1024 for which the plan of
// the run's memory fits what is free.
//   gpt_cuda_step_bench 124M|350M|1.3B|2.7B|llama-1.3B SEQLEN ROWS STEPS [OPTION...]
// Options: deterministic, no-graph, fp32-moments, fp32-gradients, once, norms|pointwise|block (what is computed again),
// bf16-masters, processes=N, contest (the products' algorithms are chosen anew by whole steps, and kept if these are
// shorter). Sets of options with "vs" between them take turns in one process, from the same weights on: what a chip's
// temperature does to one it does to all. ROWS are those of one process. Of several, which a launcher may have started
// too, rank 0 prints; there turns of steps of all together and of each by itself follow one another.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>
#include <nlohmann/json.hpp>

#include "gpt/bench/cuda_step_contest.hpp"
#include "gpt/bench/cuda_step_setup.hpp"
#include "gpt/bench/cuda_step_tables.hpp"
#include "gpt/bench/cuda_step_variants.hpp"
#include "gpt/bench/gpu_watch.hpp"
#include "gpt/distributed/data_parallel.hpp"
#include "gpt/distributed/spawn.hpp"
#include "gpt/io/xxhash64.hpp"
#include "gpt/step_graphs.hpp"
#include "gpt/train/optimizer.hpp"

namespace strobe::gpt::step_bench {

namespace {

void hash_device_memory(Memory& memory, const void* from, size_t bytes, XxHash64& hash) {
    std::vector<std::byte> piece(std::min(bytes, size_t{64} << 20));
    for (size_t at = 0; at < bytes; at += piece.size()) {
        const std::span now(piece.data(), std::min(piece.size(), bytes - at));
        memory.copy(now.data(), static_cast<const std::byte*>(from) + at, now.size());
        hash.update(now);
    }
}

/// Whether what operators read of the weights is the same on all processes, bit for bit: the narrow values, and the
/// masters of norms and biases.
bool replicas_agree(ProcessGroup& group, Memory& memory, const Weights& weights) {
    XxHash64 hash;
    const auto values = static_cast<size_t>(weights.values.size());
    const auto vectors = static_cast<size_t>(weights.layout.matrices_begin());
    hash_device_memory(memory, weights.all().data, values * size_of(weights.precision), hash);
    hash_device_memory(memory, weights.values.at(0).data, vectors * sizeof(float), hash);
    const std::vector<std::string> all = group.exchange(std::to_string(hash.digest()));
    return std::all_of(all.begin(), all.end(), [&](const std::string& digest) { return digest == all.front(); });
}

/// What a GPU keeps for itself: the context's growth, what is allocated in small pieces.
constexpr size_t kReserve = size_t{1} << 30;

int64_t longest_row(Arguments a, size_t bytes) {
    constexpr int64_t kStep = 1024;
    int64_t fits = 0, over = int64_t{1} << 12;  // in steps
    while (over - fits > 1) {
        const int64_t middle = (fits + over) / 2;
        a.seqlen = middle * kStep;
        (plan_memory(config_of(a), model_options_of(a, 1)).total() + kReserve <= bytes ? fits : over) = middle;
    }
    if (fits == 0) throw std::runtime_error("not even a row of 1024 tokens fits");
    return fits * kStep;
}

int run_bench(Arguments a) {
    const Launch launch = read_launch();
    if (a.processes > launch.size) return run_as_processes(a.processes);
    const std::unique_ptr<ProcessGroup> group = join_group(launch);
    if (group) cuda::choose_gpu(*group);
    Backend backend(Device::cuda);
    Exec& exec = backend.exec();
    exec.deterministic = a.deterministic;
    const size_t free_before = backend.runtime().free_bytes();
    if (a.seqlen == kLongest) a.seqlen = longest_row(a, free_before);
    const ModelConfig config = config_of(a);
    const Weights weights(config, backend.memory(), Precision::bf16, launch.size, a.masters);
    fill(weights);
    const ModelOptions model_options = model_options_of(a, launch.size);
    Model model(weights, backend, model_options);
    std::optional<Optimizer> optimizer;
    std::unique_ptr<DataParallel> parallel;
    if (group)
        parallel = std::make_unique<DataParallel>(*group, backend, weights, model.gradients(), OptimizerOptions{},
                                                  a.moments);
    else
        optimizer.emplace(weights.layout, OptimizerOptions{}, backend.memory(), a.moments);
    bool together = group != nullptr;  // the step at hand is one of all processes
    StepGraphs graphs(backend);
    const std::vector<Batch> batches{random_batch(a.seqlen, a.rows, launch.rank)};
    const int64_t tokens = launch.size * static_cast<int64_t>(batches.front().tokens.size());

    int64_t number = 0;
    double loss = 0.0;
    const auto prepare = [&] { model.prepare(batches, 1.0f / static_cast<float>(tokens)); };
    const auto enqueue = [&] {
        model.passes(together ? parallel.get() : nullptr);
        together ? parallel->update(model.loss_sum()) : optimizer->update(exec, weights, model.gradients());
    };
    bool recorded = a.graph && !a.contest;
    nlohmann::ordered_json contest;
    // As the trainer does it: the next batch is written while the GPU works.
    prepare();
    const auto step = [&] {
        model.begin_step();
        ++number;
        together ? parallel->set_rates(number, 1e-4f) : optimizer->set_rates(number, 1e-4f);
        std::vector<int64_t> shape = model.step_shape();
        shape.push_back(together);
        recorded ? graphs.run(shape, enqueue) : enqueue();
        prepare();
        together ? parallel->gradient_norm() : optimizer->gradient_norm();
        loss = model.take_loss() / static_cast<double>(tokens);
    };
    const auto timed_step = [&] {
        const auto start = std::chrono::steady_clock::now();
        step();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    // A step of all together leaves masters whole on their owners alone; elsewhere a new upper half lies beside an old
    // lower one, and where the number has become zero the two may be NaN.
    const auto begin_alone = [&] {
        parallel->gather_values();
        backend.runtime().synchronize();
        together = false;
    };
    OpTimes* const times = exec.times;
    exec.times = nullptr;
    if (a.contest) {
        contest = hold_contest(*exec.gemm, timed_step);
        recorded = a.graph;
    }
    const int warm_up = a.once ? 0 : 3;
    for (int i = 0; i < warm_up; ++i) step();
    std::vector<double> seconds, seconds_alone;
    size_t optimizer_alone = 0;  // bytes that steps of all together do without
    if (group) {
        optimizer.emplace(weights.layout, OptimizerOptions{}, backend.memory(), a.moments);
        optimizer_alone = optimizer->first_moments().size_bytes() + optimizer->second_moments().size_bytes();
        begin_alone();
        for (int i = 0; i < warm_up; ++i) step();
    }
    GpuWatch watch;
    watch.begin();
    // The first step of a turn of several processes is not timed: the GPU has rested before it, and steps behind a rest
    // are faster, at the power limit, than those in a row.
    constexpr int64_t kTurn = 4;
    for (int64_t i = 0; i < a.steps; i += group ? kTurn : 1) {
        if (!group) {
            seconds.push_back(timed_step());
            continue;
        }
        begin_alone();
        step();
        for (int64_t k = 0; k < kTurn; ++k) seconds_alone.push_back(timed_step());
        group->barrier();
        together = true;
        step();
        for (int64_t k = 0; k < kTurn; ++k) seconds.push_back(timed_step());
    }
    const nlohmann::ordered_json gpu_state = watch.end();
    const size_t peak_memory = free_before - backend.runtime().free_bytes() - optimizer_alone;
    exec.times = times;
    const int num_profiled = a.once ? 0 : 3;
    backend.times().clear();
    for (int i = 0; i < num_profiled; ++i) step();
    OpTimes profiled = backend.times();

    expect_finite(loss);

    const double median = median_of(seconds), peak = backend.peak(Precision::bf16);
    nlohmann::ordered_json shared;
    if (group) {
        // What processes wait for one another where no backward hides it.
        backend.times().clear();
        for (int i = 0; i < num_profiled; ++i) parallel->update(model.loss_sum());
        std::vector<double> alone(static_cast<size_t>(launch.size));
        alone[static_cast<size_t>(launch.rank)] = static_cast<double>(tokens) / launch.size / median_of(seconds_alone);
        group->sum(alone);
        auto states = nlohmann::ordered_json::array();
        for (const std::string& state : group->exchange(gpu_state.dump())) {
            states.push_back(nlohmann::ordered_json::parse(state));
        }
        const double of_all = std::accumulate(alone.begin(), alone.end(), 0.0);
        shared = {{"communication", parallel->communicator().name()},
                  {"replicas_identical", replicas_agree(*group, backend.memory(), weights)},
                  {"waits_milliseconds", waits_of(profiled, num_profiled)},
                  {"waits_milliseconds_without_passes", waits_of(backend.times(), num_profiled)},
                  {"tokens_per_second_of_each_alone", alone},
                  {"gpus_while_timed", states},
                  {"speedup", static_cast<double>(tokens * launch.size) / median / of_all}};
        if (!group->leads()) return 0;
    }
    const double flops = flops_of_step(config, a.seqlen, tokens, 1.0);
    const double causal = flops_of_step(config, a.seqlen, tokens, 0.5);
    const char* const commit = std::getenv("STROBE_COMMIT");
    const nlohmann::ordered_json out{{"model", a.model},
                                     {"commit", commit ? commit : ""},
                                     {"gpu", backend.runtime().name()},
                                     {"gpu_while_timed", gpu_state},
                                     {"cublaslt", exec.gemm->version()},
                                     {"parameters", config.num_parameters()},
                                     {"seqlen", a.seqlen},
                                     {"rows", a.rows},
                                     {"processes", launch.size},
                                     {"deterministic", a.deterministic},
                                     {"graph", a.graph},
                                     {"moments", to_string(a.moments)},
                                     {"gradients", to_string(model_options.gradients)},
                                     {"masters", to_string(model_options.masters)},
                                     {"recompute", to_string(a.recompute)},
                                     {"seconds_median", median},
                                     {"seconds_min", *std::min_element(seconds.begin(), seconds.end())},
                                     {"tokens_per_second", static_cast<double>(tokens) / median},
                                     {"tflops_per_second", 1e-12 * flops / median},
                                     {"mfu", flops / median / (peak * launch.size)},
                                     {"tflops_per_second_causal_halved", 1e-12 * causal / median},
                                     {"peak_memory_bytes", peak_memory},
                                     {"planned_memory_bytes", plan_memory(config, model_options).total()},
                                     {"loss", loss},
                                     {"several", shared},
                                     {"operators", operator_table(profiled, num_profiled, peak)},
                                     {"parts", part_table(profiled, num_profiled, peak)},
                                     {"products", product_table(*exec.gemm)},
                                     {"contest", contest}};
    std::printf("%s\n", out.dump(2).c_str());
    std::fflush(stdout);
    return 0;
}

}  // namespace

}  // namespace strobe::gpt::step_bench

int main(int argc, char** argv) {
    using namespace strobe::gpt::step_bench;
    if (argc < 5) {
        std::fprintf(stderr,
                     "usage: %s 124M|350M|1.3B|2.7B|llama-1.3B SEQLEN ROWS STEPS [deterministic] [no-graph] "
                     "[fp32-moments] [fp32-gradients] [bf16-masters] [once] [norms|pointwise|block] [processes=N] "
                     "[contest] [vs OPTION...]...\n"
                     "       SEQLEN may be \"longest\"\n", argv[0]);
        return 2;
    }
    try {
        std::vector<std::vector<std::string>> sets(1);
        for (int i = 5; i < argc; ++i) {
            if (std::string_view(argv[i]) == "vs")
                sets.emplace_back();
            else
                sets.back().emplace_back(argv[i]);
        }
        if (sets.size() == 1) return run_bench(parse(argv, sets.front()));
        std::vector<Arguments> variants;
        std::vector<std::string> names;
        for (const auto& options : sets) {
            variants.push_back(parse(argv, options));
            names.emplace_back();
            for (const std::string& option : options) names.back() += (names.back().empty() ? "" : " ") + option;
        }
        return run_variants(variants, names);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
