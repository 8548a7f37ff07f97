// The subcommands of `strobe`: each adds itself to the application and runs from its callback.
#pragma once

#include <string>

#include "exit.hpp"

namespace CLI {
class App;
}

namespace strobe::cli {

/// The options that info, verify and bench share.
struct CommonOptions {
    std::string device = "cpu";
    std::string filter;
    std::string json;
    int threads = 0;
};

void add_common_options(CLI::App& command, CommonOptions& options);

void add_info_command(CLI::App& app);
void add_verify_command(CLI::App& app);
void add_bench_command(CLI::App& app);

}  // namespace strobe::cli
