#include "gpt/distributed/launch.hpp"

#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include <fmt/core.h>

namespace strobe::gpt {

namespace {

constexpr int kMaxProcesses = 1 << 16;
constexpr int kDefaultPort = 29500;

class Reader {
public:
    explicit Reader(const Environment& environment) : get_(environment) {}

    bool has(const char* name) const {
        const char* value = get_(name);
        return value && *value;
    }
    std::string text(const char* name) const {
        if (!has(name)) throw std::invalid_argument(fmt::format("environment: {} is not set", name));
        return get_(name);
    }
    int number(const char* name, int low, int high) const {
        const std::string value = text(name);
        int result = 0;
        const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
        if (error != std::errc() || end != value.data() + value.size() || result < low || result > high)
            throw std::invalid_argument(fmt::format("environment: {} is '{}', must be a whole number from {} to {}", name, value,
                                                    low, high));
        return result;
    }
    int number(const char* name, int low, int high, int otherwise) const {
        return has(name) ? number(name, low, high) : otherwise;
    }

private:
    const Environment& get_;
};

/// The names under which a launcher tells the four numbers.
struct Names {
    const char *rank, *size, *local_rank, *local_size;
};

void read_place(const Reader& read, const Names& names, Launch& launch) {
    launch.size = read.number(names.size, 1, kMaxProcesses);
    launch.rank = read.number(names.rank, 0, launch.size - 1);
    launch.local_size = read.number(names.local_size, 1, launch.size, 1);
    launch.local_rank = read.number(names.local_rank, 0, launch.local_size - 1, 0);
}

/// "4(x2),3": how many tasks each machine has; the first number is that of the first machines.
int tasks_of_node(std::string_view text, int node) {
    for (const char* at = text.data(), *end = at + text.size(); at < end;) {
        int tasks = 0, times = 1;
        at = std::from_chars(at, end, tasks).ptr;
        if (end - at > 2 && at[0] == '(' && at[1] == 'x') {
            at = std::from_chars(at + 2, end, times).ptr;
            if (at < end && *at == ')') ++at;
        }
        if (tasks < 1 || times < 1 || (at < end && *at++ != ',')) break;
        if (node < times) return tasks;
        node -= times;
    }
    throw std::invalid_argument(fmt::format("environment: SLURM_STEP_TASKS_PER_NODE is '{}', which does not tell the tasks of "
                                            "node {}", text, node));
}

/// "gpu[03-07,9]" or "a,b": the name of the first.
std::string first_node(const std::string& list) {
    const size_t bracket = list.find_first_of("[,");
    if (bracket == std::string::npos || list[bracket] == ',') return list.substr(0, bracket);
    const size_t end = list.find_first_of("-,]", bracket);
    return list.substr(0, bracket) + list.substr(bracket + 1, end == std::string::npos ? end : end - bracket - 1);
}

void read_torchrun(const Reader& read, Launch& launch) {
    read_place(read, {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}, launch);
    if (launch.size == 1) return;
    launch.address = read.text("MASTER_ADDR");
    launch.port = read.number("MASTER_PORT", 1, 65534);
    // torchrun's own agent listens there then.
    if (read.has("TORCHELASTIC_USE_AGENT_STORE") && read.text("TORCHELASTIC_USE_AGENT_STORE") == "True") ++launch.port;
    launch.listening_fd = launch.rank == 0 ? read.number("STROBE_RENDEZVOUS_FD", 3, 1 << 20, -1) : -1;
}

void read_mpirun(const Reader& read, Launch& launch) {
    read_place(read, {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"},
               launch);
    if (read.has("MASTER_ADDR"))
        launch.address = read.text("MASTER_ADDR");
    else if (!launch.on_one_machine())
        throw std::invalid_argument(fmt::format("environment: MASTER_ADDR is not set, and the {} processes are not on one machine: "
                                                "mpirun -x MASTER_ADDR=HOST, with the host of rank 0", launch.size));
    launch.port = read.number("MASTER_PORT", 1, 65535, kDefaultPort);
}

void read_srun(const Reader& read, Launch& launch) {
    read_place(read, {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"}, launch);
    launch.local_size = launch.size;
    if (read.has("SLURM_STEP_TASKS_PER_NODE"))
        launch.local_size = tasks_of_node(read.text("SLURM_STEP_TASKS_PER_NODE"), read.number("SLURM_NODEID", 0, kMaxProcesses, 0));
    if (read.has("MASTER_ADDR"))
        launch.address = read.text("MASTER_ADDR");
    else if (!launch.on_one_machine())
        launch.address = first_node(read.text("SLURM_STEP_NODELIST"));
    // Jobs that share a machine do not meet.
    constexpr int kFirstPort = 20000, kPorts = 10000;
    launch.port = read.has("MASTER_PORT") ? read.number("MASTER_PORT", 1, 65535)
                                          : kFirstPort + read.number("SLURM_JOB_ID", 0, INT32_MAX, 0) % kPorts;
}

}  // namespace

Launch read_launch(const Environment& environment) {
    const Reader read(environment);
    Launch launch;
    // Some of torchrun's names alone are a mistake; a machine's own RANK-less MASTER_ADDR is not.
    if (read.has("RANK") || read.has("WORLD_SIZE"))
        read_torchrun(read, launch);
    else if (read.has("OMPI_COMM_WORLD_RANK"))
        read_mpirun(read, launch);
    else if (read.has("SLURM_STEP_NUM_TASKS") && read.has("SLURM_PROCID"))  // in a batch script itself there is no step
        read_srun(read, launch);
    launch.timeout_seconds = read.number("STROBE_RENDEZVOUS_SECONDS", 1, 86400, static_cast<int>(launch.timeout_seconds));
    return launch;
}

Launch read_launch() {
    return read_launch([](const char* name) { return std::getenv(name); });
}

}  // namespace strobe::gpt
