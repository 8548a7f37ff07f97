// strobe verify: the case list against the specification.
#include "verify/verify.hpp"

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "commands.hpp"
#include "device.hpp"
#include "progress.hpp"
#include "record.hpp"
#include "strobe/strobe.hpp"

namespace strobe::cli {
namespace {

using verify::CaseResult;
using verify::Outcome;

struct VerifyCommandOptions : CommonOptions {
    std::string implementation;
    bool list = false;
};

struct Summary {
    int64_t passed = 0, failed = 0, unsupported = 0;
    double worst = 0;  // largest error / bound
    std::string worst_case;

    void add(const CaseResult& r) {
        passed += r.outcome == Outcome::passed;
        failed += r.outcome == Outcome::failed;
        unsupported += r.outcome == Outcome::unsupported;
        if (r.worst() > worst) {
            worst = r.worst();
            worst_case = r.name;
        }
    }
};

void print_failure(const CaseResult& r) {
    std::printf("FAILED %s\n", r.name.c_str());
    if (!r.message.empty()) std::printf("       %s\n", r.message.c_str());
    for (const verify::TensorError& e : r.errors) {
        if (!e.passed()) {
            std::printf("       %-5s error %.3g, naive %.3g, bound %.3g\n", e.tensor.c_str(), e.error, e.naive, e.bound);
        }
    }
}

nlohmann::ordered_json result_json(const CaseResult& r) {
    static constexpr const char* kOutcomes[] = {"passed", "failed", "unsupported"};
    nlohmann::ordered_json json{{"case", r.name}, {"outcome", kOutcomes[static_cast<int>(r.outcome)]}};
    if (!r.message.empty()) json["message"] = r.message;
    for (const verify::TensorError& e : r.errors) json["errors"][e.tensor] = {e.error, e.naive, e.bound};
    return json;
}

std::vector<CaseResult> run_cases(const std::vector<verify::Case>& cases, const VerifyCommandOptions& options,
                                  const Device& device) {
    std::vector<CaseResult> results(cases.size());
    Progress progress(static_cast<int64_t>(cases.size()));
    const auto make_subject = [&]() -> std::unique_ptr<verify::Subject> {
        if (device.type == DeviceType::cpu) return std::make_unique<verify::LibrarySubject>(options.implementation);
        return std::make_unique<verify::LibrarySubject>(fenced_memory(device), STROBE_CUDA, device.index,
                                                        options.implementation, nullptr);
    };
    verify::verify_list(cases, num_threads(), make_subject, {}, [&](size_t i, const CaseResult& result) {
        results[i] = result;
        if (result.outcome == Outcome::failed) {
            progress.clear();
            print_failure(result);
            std::fflush(stdout);
        }
        progress.step(result.name);
    });
    return results;
}

void verify_command(const VerifyCommandOptions& options) {
    const Device device = parse_device(options.device);
    const std::vector<verify::Case> cases = verify::filtered(verify::verify_cases(), options.filter);
    if (cases.empty()) throw Exit{kExitUsage, fmt::format("--filter: no case matches \"{}\"", options.filter)};
    if (options.list) {
        for (const verify::Case& c : cases) std::printf("%s\n", c.name().c_str());
        return;
    }
    check_implementation(options.implementation, device);
    check_writable(options.json);
    if (options.threads > 0) set_num_threads(options.threads);
    const std::vector<CaseResult> results = run_cases(cases, options, device);
    Summary summary;
    for (const CaseResult& r : results) summary.add(r);

    if (!summary.worst_case.empty()) {
        std::printf("largest error: %.2f of its bound, in %s\n", summary.worst, summary.worst_case.c_str());
    }
    std::printf("%ld passed, %ld failed, %ld not supported\n", static_cast<long>(summary.passed),
                static_cast<long>(summary.failed), static_cast<long>(summary.unsupported));
    if (!options.json.empty()) {
        nlohmann::ordered_json record = record_header("verify");
        record["device"] = device_json(device);
        record["passed"] = summary.passed;
        record["failed"] = summary.failed;
        record["unsupported"] = summary.unsupported;
        record["worst_error_over_bound"] = summary.worst;
        for (const CaseResult& r : results) record["cases"].push_back(result_json(r));
        write_json(options.json, record);
    }
    if (summary.failed > 0) throw Exit{kExitNo, ""};
}

}  // namespace

void add_verify_command(CLI::App& app) {
    static VerifyCommandOptions options;
    CLI::App* command = app.add_subcommand("verify", "Hold the case list against the specification, forward and gradients");
    add_common_options(*command, options);
    command->add_option("--implementation", options.implementation,
                        "the implementation to verify (default: the first that serves each case)");
    command->add_flag("--list", options.list, "print the names of the cases and stop");
    command->callback([] { verify_command(options); });
}

}  // namespace strobe::cli
