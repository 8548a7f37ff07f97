#include "record.hpp"

#include <fmt/core.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "commit.hpp"
#include "cpu/cpu_backend.hpp"
#include "exit.hpp"
#include "strobe/strobe.hpp"
#include "utc_now.hpp"

namespace strobe::cli {
namespace {

/// The value behind `key` in a file of "key : value" lines, or "".
std::string field(const char* path, const std::string& key) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        if (line.rfind(key, 0) != 0) continue;
        const size_t colon = line.find(':');
        if (colon == std::string::npos) continue;
        const size_t begin = line.find_first_not_of(" \t", colon + 1);
        return begin == std::string::npos ? "" : line.substr(begin);
    }
    return "";
}

/// The command line as it was typed, words apart.
std::string command_line() {
    std::ifstream file("/proc/self/cmdline");
    std::string text((std::istreambuf_iterator<char>(file)), {});
    while (!text.empty() && text.back() == '\0') text.pop_back();
    for (char& c : text) {
        if (c == '\0') c = ' ';
    }
    const size_t program = text.find(' ');
    return "strobe" + (program == std::string::npos ? std::string() : text.substr(program));
}

std::string temporary_beside(const std::string& path) { return fmt::format("{}.{}.tmp", path, getpid()); }

Exit cannot_write(const std::string& path, const std::string& why) {
    return {kExitUsage, fmt::format("--json: cannot write {}: {}", path, why)};
}

}  // namespace

nlohmann::ordered_json machine_json() {
    utsname system{};
    uname(&system);
    nlohmann::ordered_json isas = nlohmann::ordered_json::array();
    for (const cpu::Isa isa : cpu::available_isas()) isas.push_back(cpu::isa_name(isa));
    return {{"processor", field("/proc/cpuinfo", "model name")},
            {"threads", num_threads()},
            {"memory", field("/proc/meminfo", "MemTotal")},
            {"system", fmt::format("{} {} {}", system.sysname, system.release, system.machine)},
            {"instruction_sets", isas},
            {"instruction_set_used", cpu::isa_name(cpu::best_isa())}};
}

nlohmann::ordered_json record_header(const std::string& kind) {
    return {{"record", kind},
            {"program", "strobe"},
            {"version", version()},
            {"commit", STROBE_COMMIT},
            {"command", command_line()},
            {"utc", utc_now()},
            {"machine", machine_json()}};
}

void check_writable(const std::string& path) {
    if (path.empty()) return;
    if (std::filesystem::is_directory(path)) throw cannot_write(path, "it is a directory");
    const std::string temporary = temporary_beside(path);
    if (!std::ofstream(temporary)) throw cannot_write(path, std::strerror(errno));
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
}

void write_json(const std::string& path, const nlohmann::ordered_json& json) {
    const std::string temporary = temporary_beside(path);
    {
        std::ofstream file(temporary);
        file << json.dump(1) << '\n';
        file.flush();
        if (!file) throw cannot_write(path, std::strerror(errno));
    }
    std::error_code error;
    std::filesystem::rename(temporary, path, error);
    if (error) {
        const std::string why = error.message();
        std::filesystem::remove(temporary, error);
        throw cannot_write(path, why);
    }
}

}  // namespace strobe::cli
