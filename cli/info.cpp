// strobe info: what this machine and this build can do.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "commands.hpp"
#include "cpu/cpu_backend.hpp"
#include "device.hpp"
#include "record.hpp"
#include "registry.hpp"
#include "strobe/strobe.hpp"
#include "verify/case.hpp"

namespace strobe::cli {
namespace {

nlohmann::ordered_json implementations_json() {
    nlohmann::ordered_json rows = nlohmann::ordered_json::array();
    for (const Implementation& i : implementations()) {
        rows.push_back({{"name", i.name}, {"device", i.device_type == STROBE_CPU ? "cpu" : "cuda"}});
    }
    return rows;
}

void info(const CommonOptions& options) {
    const Device device = parse_device(options.device);  // refuses what this machine lacks, as every command does
    const auto cases = [&](const std::vector<verify::Case>& list) { return verify::filtered(list, options.filter).size(); };
    const size_t verify_cases = cases(verify::verify_cases());
    const size_t bench_cases =
        cases(device.type == DeviceType::cpu ? verify::bench_cases() : verify::device_bench_cases());
    if (verify_cases + bench_cases == 0) throw Exit{kExitUsage, fmt::format("--filter: no case matches \"{}\"", options.filter)};
    check_writable(options.json);
    if (options.threads > 0) set_num_threads(options.threads);
    nlohmann::ordered_json record = record_header("info");
    record["implementations"] = implementations_json();
    record["cases"] = {{"verify", verify_cases}, {"bench", bench_cases}};
    const double fma = cpu::measured_fma_peak(), dot = cpu::measured_bf16_dot_peak();
    record["fma_peak_gflops_per_core"] = fma / 1e9;
    if (dot > 0) record["bf16_dot_peak_gflops_per_core"] = dot / 1e9;

    const auto& machine = record["machine"];
    std::printf("strobe %s, commit %s\n\n", record["version"].get<std::string>().c_str(),
                record["commit"].get<std::string>().c_str());
    std::printf("processor         %s\n", machine["processor"].get<std::string>().c_str());
    std::printf("threads           %d\n", machine["threads"].get<int>());
    std::printf("memory            %s\n", machine["memory"].get<std::string>().c_str());
    std::string isas;
    for (const auto& isa : machine["instruction_sets"]) isas += (isas.empty() ? "" : ", ") + isa.get<std::string>();
    std::printf("instruction sets  %s (uses %s)\n", isas.c_str(), machine["instruction_set_used"].get<std::string>().c_str());
    std::printf("FMA peak          %.1f GFLOP/s per core, f32, measured\n", fma / 1e9);
    if (dot > 0) std::printf("bf16 dot peak     %.1f GFLOP/s per core, measured\n", dot / 1e9);
    std::string reason;
    const int devices = cuda_device_count(&reason);
    if (devices == 0) {
        std::printf("CUDA              none: %s\n", reason.c_str());
        record["cuda"] = reason;
    }
    for (int d = 0; d < devices; ++d) {
        const auto found = device_json({DeviceType::cuda, d});
        std::printf("cuda:%-12d %s, compute capability %s, %.0f GiB, driver %s\n", d,
                    found["name"].get<std::string>().c_str(), found["compute_capability"].get<std::string>().c_str(),
                    found["memory_bytes"].get<double>() / (1 << 30), found["driver"].get<std::string>().c_str());
        record["cuda"].push_back(found);
    }
    std::printf("\nimplementations, in the order in which a call is offered to them\n");
    for (const Implementation& i : implementations()) {
        std::printf("  %-4s  %s\n", i.device_type == STROBE_CPU ? "cpu" : "cuda", i.name);
    }
    std::printf("\ncases             %zu of strobe verify, %zu of strobe bench%s%s\n", verify_cases, bench_cases,
                options.filter.empty() ? "" : ", by --filter ", options.filter.c_str());
    if (!options.json.empty()) write_json(options.json, record);
}

}  // namespace

void add_info_command(CLI::App& app) {
    static CommonOptions options;
    CLI::App* command = app.add_subcommand("info", "What this machine and this build can do");
    add_common_options(*command, options);
    command->callback([] { info(options); });
}

}  // namespace strobe::cli
