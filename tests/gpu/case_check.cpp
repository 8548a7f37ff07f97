// The case list through the public interface, the fences around its buffers, and the same list under compute-sanitizer.
#include <fmt/core.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <future>
#include <map>
#include <memory>

#include "cuda/device.hpp"
#include "device_problem.hpp"
#include "fenced_memory.hpp"
#include "parts.hpp"

namespace strobe::gpu_tests {
namespace {

class PlainMemory : public verify::Memory {
public:
    void* allocate(size_t bytes) override {
        void* data = nullptr;
        cuda::check(cudaMalloc(&data, std::max<size_t>(bytes, 1)), "cudaMalloc");
        return data;
    }
    void release(void* data) override { cudaFree(data); }
    void upload(void* to, const void* from, size_t bytes) override {
        cuda::check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
    }
    void download(void* to, const void* from, size_t bytes) override {
        cuda::check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
    }
};

struct Outcome {
    int code = 0;
    std::string output;
};

Outcome run_program(const std::string& command) {
    Outcome outcome;
    std::FILE* const pipe = popen((command + " 2>&1").c_str(), "r");
    if (!pipe) return {-1, "cannot start " + command};
    char line[1024];
    while (std::fgets(line, sizeof line, pipe)) outcome.output += line;
    const int status = pclose(pipe);
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return outcome;
}

std::string last_lines(const std::string& text, size_t bytes) { return text.size() > bytes ? text.substr(text.size() - bytes) : text; }

}  // namespace

Finding check_cases(const Options& options) {
    std::vector<verify::Case> cases;
    const std::vector<verify::Case> all = verify::filtered(verify::verify_cases(), options.filter);
    for (size_t n = 0; n < all.size(); n += static_cast<size_t>(options.stride)) cases.push_back(all[n]);

    std::unique_ptr<verify::Memory> memory;
    if (options.plain_memory) {
        memory = std::make_unique<PlainMemory>();
    } else {
        memory = std::make_unique<cli::FencedMemory>(0);
    }
    Finding finding;
    int64_t passed = 0, failed = 0;
    std::map<std::string, int64_t> refusals;
    double worst = 0;
    std::string worst_case;
    const auto make_subject = [&] {
        return std::make_unique<verify::LibrarySubject>(*memory, STROBE_CUDA, 0, options.implementation, nullptr);
    };
    verify::verify_list(cases, options.workers, make_subject, {}, [&](size_t, const verify::CaseResult& r) {
        if (r.outcome == verify::Outcome::unsupported) {
            const size_t reason = r.message.find("sm80: ");  // the registry's last line about the device
            ++refusals[reason == std::string::npos ? r.message : r.message.substr(reason, r.message.find('\n', reason) - reason)];
            return;
        }
        if (r.worst() > worst) {
            worst = r.worst();
            worst_case = r.name;
        }
        passed += r.outcome == verify::Outcome::passed;
        failed += r.outcome == verify::Outcome::failed;
        if (r.outcome == verify::Outcome::failed) finding.fail(r.name + ": " + r.message);
    });
    finding.json["passed"] = passed;
    finding.json["failed"] = failed;
    finding.json["worst_error_over_bound"] = worst;
    finding.json["worst_case"] = worst_case;
    finding.json["not_served"] = refusals;
    if (passed == 0) finding.fail("no case is served");
    return finding;
}

Finding check_fences(const Options& options) {
    static constexpr int kStopped = 99;  // the faulty program's exit status when the device stopped at an illegal address
    Finding finding;
    for (const char* fault : {"fence_inside", "fence_below", "fence_beyond", "fence_write", "fence_tensor"}) {
        const int expected = std::string(fault) == "fence_inside" ? 0 : kStopped;
        const Outcome outcome = run_program(options.faulty_program + " " + fault);
        if (outcome.code != expected) {
            finding.fail(fmt::format("{}: exit status {} in place of {}: {}", fault, outcome.code, expected, last_lines(outcome.output, 500)));
        }
        finding.json[fault] = outcome.code == kStopped ? "stopped" : "passed";
    }
    return finding;
}

Finding check_sanitizers(const Options& options) {
    static constexpr int kFound = 99;  // the exit status that we ask for when a tool has findings
    constexpr const char* kTools[] = {"memcheck", "racecheck", "initcheck", "synccheck"};
    const std::string list =
        fmt::format("{} --parts cases --plain-memory --stride {} --workers 4 {} {}", options.program, options.sanitizer_stride,
                    options.implementation.empty() ? "" : "--implementation " + options.implementation,
                    options.filter.empty() ? "" : "--filter '" + options.filter + "'");
    std::vector<std::future<std::pair<Outcome, Outcome>>> runs;
    for (const char* tool : kTools) {
        runs.push_back(std::async(std::launch::async, [&options, &list, tool] {
            const std::string with_tool = fmt::format("{} --tool {} --error-exitcode {} ", options.sanitizer, tool, kFound);
            return std::pair(run_program(with_tool + list), run_program(with_tool + options.faulty_program + " " + tool));
        }));
    }
    Finding finding;
    finding.json["list"] = fmt::format("every {}th case", options.sanitizer_stride);
    for (size_t n = 0; n < runs.size(); ++n) {
        const auto [clean, caught] = runs[n].get();
        if (clean.code != 0) {
            finding.fail(fmt::format("{}: exit status {}: {}", kTools[n], clean.code, last_lines(clean.output, 2000)));
        }
        if (caught.code != kFound) {
            finding.fail(fmt::format("{}: did not find the planted fault: exit status {}: {}", kTools[n], caught.code,
                                     last_lines(caught.output, 1000)));
        }
        finding.json["tools"][kTools[n]] = {{"list_clean", clean.code == 0}, {"planted_fault_found", caught.code == kFound}};
    }
    return finding;
}

}  // namespace strobe::gpu_tests
