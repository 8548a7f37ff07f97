// The case list on a CUDA device, against the fp64 specification; then the race and determinism tests. Writes its findings
// as JSON. A kernel that is built but never right cannot hide here: every case that the implementation does not refuse counts.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "cuda_subject.hpp"

namespace strobe::gpu_tests {
namespace {

using verify::Case;
using verify::CaseResult;
using verify::Outcome;

struct Options {
    std::string implementation = "sm80";
    std::string filter;
    std::string json;
    std::string commit = "unknown";
    int workers = static_cast<int>(std::thread::hardware_concurrency());
    int race_repeats = 500;
    int determinism_repeats = 50;
};

struct Tally {
    int64_t passed = 0, failed = 0, unsupported = 0;
    double worst = 0;
    std::string worst_case;
    nlohmann::ordered_json failures = nlohmann::ordered_json::array();

    void add(const CaseResult& r) {
        passed += r.outcome == Outcome::passed;
        unsupported += r.outcome == Outcome::unsupported;
        if (r.outcome == Outcome::unsupported) return;
        if (r.worst() > worst) {
            worst = r.worst();
            worst_case = r.name;
        }
        if (r.outcome != Outcome::failed) return;
        ++failed;
        failures.push_back({{"case", r.name}, {"message", r.message}});
        if (failed <= 40) std::printf("FAILED %s: %s\n", r.name.c_str(), r.message.c_str());
    }
};

Tally run_cases(const std::vector<Case>& cases, const Options& options, const verify::VerifyOptions& how) {
    Tally tally;
    std::mutex mutex;
    std::atomic<size_t> next{0};
    const auto work = [&] {
        CudaSubject subject(implementation_named(options.implementation));
        for (size_t i = next++; i < cases.size(); i = next++) {
            const CaseResult r = verify::verify_case(cases[i], subject, how);
            const std::lock_guard lock(mutex);
            tally.add(r);
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < options.workers; ++i) threads.emplace_back(work);
    work();
    for (std::thread& t : threads) t.join();
    return tally;
}

/// Shapes with several tiles per CTA and several CTAs per sequence, where a missing barrier shows.
std::vector<Case> race_cases(bool deterministic) {
    std::vector<Case> cases;
    for (DType dtype : {DType::bf16, DType::f16}) {
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
    return cases;
}

nlohmann::ordered_json report(const char* what, const Tally& t, double seconds) {
    std::printf("%s: %ld passed, %ld failed, %ld not served; largest error %.2f of its bound in %s; %.1f s\n", what,
                static_cast<long>(t.passed), static_cast<long>(t.failed), static_cast<long>(t.unsupported), t.worst,
                t.worst_case.c_str(), seconds);
    return {{"passed", t.passed},   {"failed", t.failed},         {"not_served", t.unsupported},
            {"worst_error_over_bound", t.worst}, {"worst_case", t.worst_case}, {"failures", t.failures},
            {"seconds", seconds}};
}

int run(const Options& options) {
    const cuda::DeviceInfo device = cuda::device_info(0);
    std::printf("%s, driver %d, runtime %d, %s\n", device.name.c_str(), device.driver_version, device.runtime_version,
                options.implementation.c_str());
    nlohmann::ordered_json record{{"program", "gpu_check"},
                                  {"commit", options.commit},
                                  {"device", device.name},
                                  {"driver", device.driver_version},
                                  {"runtime", device.runtime_version},
                                  {"implementation", options.implementation},
                                  {"filter", options.filter}};
    int64_t failed = 0;
    const auto part = [&](const char* name, const std::vector<Case>& cases, const verify::VerifyOptions& how) {
        const auto start = std::chrono::steady_clock::now();
        const Tally t = run_cases(cases, options, how);
        failed += t.failed + (t.passed == 0);
        record[name] =
            report(name, t, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    };
    part("cases", verify::filtered(verify::verify_cases(), options.filter), {});
    if (options.race_repeats > 0) part("race", race_cases(false), {.repeats = options.race_repeats});
    if (options.determinism_repeats > 0) part("determinism", race_cases(true), {.repeats = options.determinism_repeats});
    if (!options.json.empty()) std::ofstream(options.json) << record.dump(1) << "\n";
    return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace strobe::gpu_tests

int main(int argc, char** argv) {
    CLI::App app{"Holds the CUDA kernels against the fp64 specification"};
    strobe::gpu_tests::Options options;
    app.add_option("--implementation", options.implementation, "sm80 or sm90")->capture_default_str();
    app.add_option("--filter", options.filter, "pieces of case names, comma-separated, '!' excludes");
    app.add_option("--json", options.json, "where to write the record");
    app.add_option("--commit", options.commit, "recorded as given");
    app.add_option("--workers", options.workers, "CPU threads (the specification takes the time)")->capture_default_str();
    app.add_option("--race-repeats", options.race_repeats, "0: leave out")->capture_default_str();
    app.add_option("--determinism-repeats", options.determinism_repeats, "0: leave out")->capture_default_str();
    CLI11_PARSE(app, argc, argv);
    try {
        return strobe::gpu_tests::run(options);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "gpu_check: %s\n", e.what());
        return 2;
    }
}
