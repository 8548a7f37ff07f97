// strobe: attention from the terminal.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>

#include "commands.hpp"
#include "error.hpp"
#include "strobe/strobe.hpp"
#if defined(STROBE_HAS_GPT)
#include "gpt_commands.hpp"
#endif

namespace strobe::cli {

void add_common_options(CLI::App& command, CommonOptions& options) {
    command.add_option("--device", options.device, "cpu, cuda or cuda:N")->capture_default_str();
    command.add_option("--filter", options.filter,
                       "only cases whose name holds one of these comma-separated pieces; '!piece' leaves cases out, '*' and "
                       "'?' are wildcards");
    command.add_option("--json", options.json, "also write the result to this file");
    command.add_option("--threads", options.threads, "CPU threads (default: the processors this process may use)")
        ->check(CLI::Range(1, 1 << 16));
}

namespace {

/// The parser itself would say of a misspelt command only that one is wanted.
void refuse_unknown_command(const CLI::App& app, const std::string& name) {
    if (name.rfind('-', 0) == 0) return;
    std::string names;
    for (const CLI::App* command : app.get_subcommands({})) {
        if (command->check_name(name)) return;
        names += (names.empty() ? "" : ", ") + command->get_name();
    }
    throw Exit{kExitUsage, "\"" + name + "\" is no command; there are " + names};
}

}  // namespace
}  // namespace strobe::cli

int main(int argc, char** argv) {
    CLI::App app{"strobe: exact attention on real hardware", "strobe"};
    app.set_version_flag("--version", strobe::version());
    app.require_subcommand(1);
    strobe::cli::add_info_command(app);
    strobe::cli::add_verify_command(app);
    strobe::cli::add_bench_command(app);
#if defined(STROBE_HAS_GPT)
    strobe::gpt::add_train_command(app);
    strobe::gpt::add_generate_command(app);
    strobe::gpt::add_tokenizer_command(app);
    strobe::gpt::add_checkpoint_command(app);
#endif
    try {
        if (argc > 1) strobe::cli::refuse_unknown_command(app, argv[1]);
        app.parse(argc, argv);
        return 0;
    } catch (const CLI::ParseError& e) {
        return app.exit(e) == 0 ? 0 : strobe::cli::kExitUsage;
    } catch (const strobe::cli::Exit& e) {
        if (!e.message.empty()) std::fprintf(stderr, "strobe: %s\n", e.message.c_str());
        return e.code;
    } catch (const strobe::Error& e) {
        std::fprintf(stderr, "strobe: %s\n", e.what());
        return e.status() == strobe::Status::invalid_argument ? strobe::cli::kExitUsage : strobe::cli::kExitDevice;
    } catch (const strobe::CallError& e) {
        std::fprintf(stderr, "strobe: %s\n", e.what());
        return e.status() == STROBE_INVALID_ARGUMENT ? strobe::cli::kExitUsage : strobe::cli::kExitDevice;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "strobe: %s\n", e.what());
        return strobe::cli::kExitNo;
    }
}
