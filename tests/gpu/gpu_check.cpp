// Everything that is claimed about the CUDA kernels' correctness, in one run on a machine with a GPU; writes its findings as JSON.
// `strobe verify --device cuda` runs the case list alone.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <thread>

#include "cuda/device.hpp"
#include "parts.hpp"
#include "strobe/strobe.hpp"
#include "utc_now.hpp"

namespace strobe::gpu_tests {

void Finding::fail(const std::string& what) {
    json["failures"].push_back(what);
    if (json["failures"].size() <= 40) std::printf("FAILED %s\n", what.c_str());
}

namespace {

struct Part {
    const char* name;
    Finding (*run)(const Options&);
};

constexpr Part kParts[] = {{"cases", check_cases},       {"races", check_races},           {"determinism", check_determinism},
                           {"graphs", check_graphs},     {"streams", check_streams},       {"companions", check_companions},
                           {"large", check_large},       {"fences", check_fences},         {"sanitizers", check_sanitizers}};

std::string part_names() {
    std::string names;
    for (const Part& p : kParts) names += (names.empty() ? "" : ", ") + std::string(p.name);
    return names;
}

bool wanted(const Options& options, const std::string& name) {
    return options.parts.empty() || std::find(options.parts.begin(), options.parts.end(), name) != options.parts.end();
}

int run(const Options& options, const std::string& commit, const std::string& path) {
    const cuda::DeviceInfo device = cuda::device_info(0);
    std::printf("%s, driver %d, runtime %d\n", device.name.c_str(), device.driver_version, device.runtime_version);
    Json record{{"record", "check"},
                {"program", "gpu_check"},
                {"version", version()},
                {"commit", commit},
                {"utc", cli::utc_now()},
                {"device", {{"name", device.name},
                            {"compute_capability", device.compute_capability},
                            {"multiprocessors", device.num_sms},
                            {"driver", device.driver_version},
                            {"runtime", device.runtime_version}}},
                {"implementation", options.implementation.empty() ? "the first that serves" : options.implementation},
                {"filter", options.filter}};
    bool ok = true;
    for (const Part& part : kParts) {
        if (!wanted(options, part.name)) continue;
        const auto start = std::chrono::steady_clock::now();
        Finding finding;
        try {
            finding = part.run(options);
        } catch (const std::exception& e) {
            finding.fail(e.what());
        }
        finding.json["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        ok = ok && finding.ok();
        Json shown = finding.json;
        shown["failures"] = shown["failures"].size();
        std::printf("%s: %s %s\n", part.name, finding.ok() ? "ok" : "FAILED", shown.dump().c_str());
        std::fflush(stdout);
        record[part.name] = std::move(finding.json);
        if (!path.empty()) std::ofstream(path) << record.dump(1) << "\n";
    }
    return ok ? 0 : 1;
}

}  // namespace
}  // namespace strobe::gpu_tests

int main(int argc, char** argv) {
    CLI::App app{"Checks the CUDA kernels on this machine's GPU"};
    strobe::gpu_tests::Options options;
    options.workers = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const std::string self = argv[0];
    options.program = self;
    options.faulty_program = self.substr(0, self.rfind('/') + 1) + "faulty";
    std::string commit = "unknown", json;
    app.add_option("--parts", options.parts, "some of: " + strobe::gpu_tests::part_names())->delimiter(',');
    app.add_option("--implementation", options.implementation, "sm90 or sm80 (default: the first that serves each case)");
    app.add_option("--filter", options.filter, "cases: pieces of their names, comma-separated, '!' excludes");
    app.add_option("--stride", options.stride, "cases: every n-th")->check(CLI::PositiveNumber);
    app.add_flag("--plain-memory", options.plain_memory, "cases: no unmapped pages around buffers");
    app.add_option("--workers", options.workers, "CPU threads (the specification takes the time)")->capture_default_str();
    app.add_option("--race-repeats", options.race_repeats)->capture_default_str();
    app.add_option("--determinism-repeats", options.determinism_repeats)->capture_default_str();
    app.add_option("--large-seqlen", options.large_seqlen)->capture_default_str();
    app.add_option("--sanitizer", options.sanitizer, "the compute-sanitizer program")->capture_default_str();
    app.add_option("--sanitizer-stride", options.sanitizer_stride, "sanitizers: every n-th case")->capture_default_str();
    app.add_option("--commit", commit, "recorded as given");
    app.add_option("--json", json, "where to write the record");
    CLI11_PARSE(app, argc, argv);
    try {
        return strobe::gpu_tests::run(options, commit, json);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "gpu_check: %s\n", e.what());
        return 2;
    }
}
