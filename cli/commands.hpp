// The subcommands of `strobe`: each adds itself to the application and runs from its callback. A command returns through
// `exit_code`: 0 done, 1 the answer is no (a case failed, ...), 2 unusable arguments, 3 the machine refused.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace strobe::cli {

inline constexpr int kExitNo = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitDevice = 3;

/// Thrown by a command to end the program with a message.
struct Exit {
    int code;
    std::string message;
};

/// The options that info, verify and bench share.
struct CommonOptions {
    std::string device = "cpu";
    std::string filter;
    std::string json;
    int threads = 0;
};

void add_common_options(CLI::App& command, CommonOptions& options, bool has_cases);

void add_info_command(CLI::App& app);
void add_verify_command(CLI::App& app);
void add_bench_command(CLI::App& app);

}  // namespace strobe::cli
