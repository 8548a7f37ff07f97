// The same call again and again: alone, in a graph, beside others.
#include <fmt/core.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "cuda/device.hpp"
#include "device_problem.hpp"
#include "parts.hpp"

namespace strobe::gpu_tests {
namespace {

using cuda::check;
using verify::Case;

/// Shapes with several tiles per CTA and several CTAs per sequence, where a missing barrier shows; and one in which the sm90 backward
/// does the rows of some heads inside its main kernel (see inner_rows_pay), where CTAs wait for one another.
std::vector<Case> race_cases(bool deterministic) {
    std::vector<Case> cases;
    for (DType dtype : {DType::bf16, DType::f16, DType::f32}) {
        for (int head_dim : {32, 64, 96, 128, 192, 256}) {
            for (int64_t right : {int64_t{-1}, int64_t{0}}) {
                Case c{.dtype = dtype, .batch = 1, .num_heads = 4, .num_heads_k = 2, .seqlen_q = 333, .seqlen_k = 401};
                c.head_dim = head_dim;
                c.window_right = right;
                c.deterministic = deterministic;
                cases.push_back(c);
            }
        }
    }
    Case inner{.dtype = DType::bf16, .batch = 20, .num_heads = 2, .num_heads_k = 1, .seqlen_q = 2048, .seqlen_k = 2048, .head_dim = 128};
    inner.window_right = 0;
    inner.varlen_q = inner.varlen_k = true;
    inner.deterministic = deterministic;
    cases.push_back(inner);
    return cases;
}

/// A few problems that differ in everything a launch depends on, each repeatable to the bit.
std::vector<Case> mixed_cases() {
    std::vector<Case> cases;
    Case base{.dtype = DType::bf16, .batch = 2, .num_heads = 4, .num_heads_k = 2, .seqlen_q = 300, .seqlen_k = 420};
    base.head_dim = 128;
    base.deterministic = true;
    cases.push_back(base);
    Case causal = base;
    causal.window_right = 0;
    causal.head_dim = 64;
    cases.push_back(causal);
    Case general = causal;
    general.dropout_p = 0.17;
    general.softcap = 20;
    general.alibi = verify::Alibi::per_head;
    cases.push_back(general);
    Case ragged = base;
    ragged.varlen_q = ragged.varlen_k = true;
    ragged.dtype = DType::f16;
    cases.push_back(ragged);
    Case wide = base;
    wide.head_dim = 256;
    cases.push_back(wide);
    Case single = base;
    single.dtype = DType::f32;
    cases.push_back(single);
    return cases;
}

void in_threads(int count, const std::function<void(int)>& work) {
    std::vector<std::thread> threads;
    std::exception_ptr broken;
    std::mutex mutex;
    for (int n = 0; n < count; ++n) {
        threads.emplace_back([&, n] {
            try {
                work(n);
            } catch (...) {
                const std::lock_guard lock(mutex);
                broken = std::current_exception();
            }
        });
    }
    for (std::thread& t : threads) t.join();
    if (broken) std::rethrow_exception(broken);
}

Finding repeat(const std::vector<Case>& cases, int repeats, const Options& options) {
    Finding finding;
    std::mutex mutex;
    std::atomic<size_t> next{0};
    int64_t served = 0;
    in_threads(std::min(options.workers, 4), [&](int) {
        const Stream stream;
        for (size_t i = next++; i < cases.size(); i = next++) {
            try {
                const DeviceProblem problem(cases[i], options.implementation);
                problem.poison(stream);
                problem.run(stream);
                const DeviceProblem::Snapshot first = problem.snapshot(stream);
                int different = 0;
                std::string what;
                for (int n = 0; n < repeats; ++n) {
                    problem.poison(stream);
                    problem.run(stream);
                    const std::string now = difference(first, problem.snapshot(stream));
                    different += !now.empty();
                    if (!now.empty()) what = now;
                }
                const std::lock_guard lock(mutex);
                ++served;
                if (different > 0) {
                    finding.fail(fmt::format("{} ({}): {} of {} runs differ in {}", problem.name(), problem.implementation(), different,
                                             repeats, what));
                }
            } catch (const Error& e) {
                if (e.status() != Status::unsupported) throw;
            }
        }
    });
    finding.json["cases"] = served;
    finding.json["repeats"] = repeats;
    if (served == 0) finding.fail("no case is served");
    return finding;
}

/// The mixed cases that this build serves.
std::vector<std::unique_ptr<DeviceProblem>> mixed_problems(const Options& options) {
    std::vector<std::unique_ptr<DeviceProblem>> problems;
    for (const Case& c : mixed_cases()) {
        try {
            problems.push_back(std::make_unique<DeviceProblem>(c, options.implementation));
        } catch (const Error& e) {
            if (e.status() != Status::unsupported) throw;
        }
    }
    return problems;
}

DeviceProblem::Snapshot run_alone(const DeviceProblem& problem, const Stream& stream) {
    problem.poison(stream);
    problem.run(stream);
    return problem.snapshot(stream);
}

}  // namespace

Finding check_races(const Options& options) { return repeat(race_cases(false), options.race_repeats, options); }

Finding check_determinism(const Options& options) { return repeat(race_cases(true), options.determinism_repeats, options); }

Finding check_graphs(const Options& options) {
    Finding finding;
    const Stream stream;
    int64_t replays = 0;
    for (const auto& problem : mixed_problems(options)) {
        const DeviceProblem::Snapshot alone = run_alone(*problem, stream);
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
        problem->run(stream);
        check(cudaStreamEndCapture(stream, &graph), "end capture");
        check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
        for (int n = 0; n < 3; ++n, ++replays) {
            problem->poison(stream);
            check(cudaGraphLaunch(executable, stream), "graph launch");
            const std::string what = difference(alone, problem->snapshot(stream));
            if (!what.empty()) finding.fail(fmt::format("{}: replay {} differs in {}", problem->name(), n, what));
        }
        cudaGraphExecDestroy(executable);
        cudaGraphDestroy(graph);
    }
    finding.json["replays"] = replays;
    if (replays == 0) finding.fail("no case is served");
    return finding;
}

Finding check_streams(const Options& options) {
    constexpr int kRounds = 50;
    Finding finding;
    const auto problems = mixed_problems(options);
    std::vector<DeviceProblem::Snapshot> alone;
    {
        const Stream stream;
        for (const auto& p : problems) alone.push_back(run_alone(*p, stream));
    }
    std::mutex mutex;
    const auto compare = [&](size_t n, const Stream& stream, const char* how) {
        const std::string what = difference(alone[n], problems[n]->snapshot(stream));
        const std::lock_guard lock(mutex);
        if (!what.empty()) finding.fail(fmt::format("{} {}: differs in {}", problems[n]->name(), how, what));
    };

    // One thread, a stream for every problem, nothing waited for in between.
    std::vector<std::unique_ptr<Stream>> streams;
    for (size_t n = 0; n < problems.size(); ++n) streams.push_back(std::make_unique<Stream>());
    for (int round = 0; round < kRounds; ++round) {
        for (size_t n = 0; n < problems.size(); ++n) {
            problems[n]->poison(*streams[n]);
            problems[n]->run(*streams[n]);
        }
    }
    for (size_t n = 0; n < problems.size(); ++n) compare(n, *streams[n], "beside others on their streams");

    // A thread for every problem, each with its own stream.
    in_threads(static_cast<int>(problems.size()), [&](int thread) {
        const auto n = static_cast<size_t>(thread);
        const Stream stream;
        for (int round = 0; round < kRounds; ++round) {
            problems[n]->poison(stream);
            problems[n]->run(stream);
            compare(n, stream, "beside other threads");
        }
    });
    finding.json["problems"] = problems.size();
    finding.json["rounds"] = kRounds;
    if (problems.size() < 2) finding.fail("fewer than two problems are served");
    return finding;
}

}  // namespace strobe::gpu_tests
