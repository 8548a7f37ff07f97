// What launchers say of themselves, and the messages for those that say nonsense.
#include <map>

#include <gtest/gtest.h>

#include "gpt/distributed/launch.hpp"

namespace strobe::gpt::test {

namespace {

using Variables = std::map<std::string, std::string>;

Launch launch_of(const Variables& variables) {
    return read_launch([&](const char* name) {
        const auto found = variables.find(name);
        return found == variables.end() ? nullptr : found->second.c_str();
    });
}

std::string refusal_of(const Variables& variables) {
    try {
        launch_of(variables);
    } catch (const std::invalid_argument& e) {
        return e.what();
    }
    return "nothing was refused";
}

Variables with(Variables variables, const std::string& name, const std::string& value) {
    variables[name] = value;
    return variables;
}

const Variables kTorchrun{{"RANK", "5"},          {"WORLD_SIZE", "8"},      {"LOCAL_RANK", "1"},
                          {"LOCAL_WORLD_SIZE", "4"}, {"MASTER_ADDR", "node-0"}, {"MASTER_PORT", "29501"}};
const Variables kMpirun{{"OMPI_COMM_WORLD_RANK", "1"},       {"OMPI_COMM_WORLD_SIZE", "2"},
                        {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
const Variables kSrun{{"SLURM_PROCID", "6"}, {"SLURM_STEP_NUM_TASKS", "8"}, {"SLURM_LOCALID", "2"}, {"SLURM_NODEID", "1"},
                      {"SLURM_STEP_TASKS_PER_NODE", "4(x2)"}, {"SLURM_STEP_NODELIST", "gpu[03-04]"}, {"SLURM_JOB_ID", "31234"}};

void expect_place(const Launch& launch, int rank, int size, int local_rank, int local_size) {
    EXPECT_EQ(launch.rank, rank);
    EXPECT_EQ(launch.size, size);
    EXPECT_EQ(launch.local_rank, local_rank);
    EXPECT_EQ(launch.local_size, local_size);
}

}  // namespace

TEST(Launch, nothing_said_is_a_single_process) {
    expect_place(launch_of({}), 0, 1, 0, 1);
    // As in a machine's profile, or in a batch script outside of srun.
    expect_place(launch_of({{"MASTER_ADDR", "x"}, {"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}}), 0, 1, 0, 1);
    expect_place(launch_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}}), 0, 1, 0, 1);
}

TEST(Launch, torchrun) {
    const Launch launch = launch_of(kTorchrun);
    expect_place(launch, 5, 8, 1, 4);
    EXPECT_EQ(launch.address, "node-0");
    EXPECT_EQ(launch.port, 29501);
    EXPECT_EQ(launch.timeout_seconds, 120.0);
    EXPECT_EQ(launch_of(with(kTorchrun, "TORCHELASTIC_USE_AGENT_STORE", "True")).port, 29502);
    EXPECT_EQ(launch_of(with(kTorchrun, "TORCHELASTIC_USE_AGENT_STORE", "False")).port, 29501);
    EXPECT_EQ(launch_of(with(kTorchrun, "STROBE_RENDEZVOUS_SECONDS", "7")).timeout_seconds, 7.0);
    // What a launcher within another says counts.
    Variables both = kTorchrun;
    both.insert(kSrun.begin(), kSrun.end());
    expect_place(launch_of(both), 5, 8, 1, 4);
}

TEST(Launch, mpirun) {
    const Launch launch = launch_of(kMpirun);
    expect_place(launch, 1, 2, 1, 2);
    EXPECT_EQ(launch.address, "127.0.0.1");
    const Launch elsewhere = launch_of(with(with(with(kMpirun, "MASTER_ADDR", "node-0"), "MASTER_PORT", "4000"), "OMPI_COMM_WORLD_SIZE", "4"));
    expect_place(elsewhere, 1, 4, 1, 2);
    EXPECT_EQ(elsewhere.address, "node-0");
    EXPECT_EQ(elsewhere.port, 4000);
    EXPECT_NE(refusal_of(with(kMpirun, "OMPI_COMM_WORLD_SIZE", "4")).find("MASTER_ADDR is not set"), std::string::npos);
}

TEST(Launch, srun) {
    const Launch launch = launch_of(kSrun);
    expect_place(launch, 6, 8, 2, 4);
    EXPECT_EQ(launch.address, "gpu03");
    EXPECT_EQ(launch.port, 21234);
    EXPECT_EQ(launch_of(with(kSrun, "SLURM_STEP_NODELIST", "a1,b[2-3]")).address, "a1");
    EXPECT_EQ(launch_of(with(kSrun, "SLURM_STEP_NODELIST", "rack[7,9]")).address, "rack7");
    EXPECT_EQ(launch_of(with(kSrun, "SLURM_STEP_TASKS_PER_NODE", "5,3")).local_size, 3);
    EXPECT_EQ(launch_of(with(kSrun, "MASTER_ADDR", "other")).address, "other");
}

TEST(Launch, nonsense_is_refused_by_name_and_value) {
    const auto expect = [](const Variables& variables, const char* a, const char* b) {
        const std::string text = refusal_of(variables);
        EXPECT_NE(text.find(a), std::string::npos) << text;
        EXPECT_NE(text.find(b), std::string::npos) << text;
    };
    expect(with(kTorchrun, "RANK", "8"), "RANK is '8'", "from 0 to 7");
    expect(with(kTorchrun, "RANK", "-1"), "RANK is '-1'", "from 0 to 7");
    expect(with(kTorchrun, "RANK", "one"), "RANK is 'one'", "whole number");
    expect(with(kTorchrun, "RANK", ""), "RANK is not set", "environment");
    expect(with(kTorchrun, "WORLD_SIZE", "0"), "WORLD_SIZE is '0'", "from 1");
    expect(with(kTorchrun, "WORLD_SIZE", ""), "WORLD_SIZE is not set", "environment");
    expect(with(kTorchrun, "LOCAL_RANK", "4"), "LOCAL_RANK is '4'", "from 0 to 3");
    expect(with(kTorchrun, "LOCAL_WORLD_SIZE", "9"), "LOCAL_WORLD_SIZE is '9'", "from 1 to 8");
    expect(with(kTorchrun, "MASTER_PORT", "70000"), "MASTER_PORT is '70000'", "from 1 to 65534");
    expect(with(kTorchrun, "MASTER_PORT", "12x"), "MASTER_PORT is '12x'", "whole number");
    expect(with(kTorchrun, "MASTER_ADDR", ""), "MASTER_ADDR is not set", "environment");
    expect(with(kTorchrun, "STROBE_RENDEZVOUS_SECONDS", "0"), "STROBE_RENDEZVOUS_SECONDS is '0'", "from 1");
    expect(with(kSrun, "SLURM_STEP_TASKS_PER_NODE", "4(y"), "SLURM_STEP_TASKS_PER_NODE is '4(y'", "node 1");
    expect(with(kSrun, "SLURM_PROCID", "8"), "SLURM_PROCID is '8'", "from 0 to 7");
}

}  // namespace strobe::gpt::test
