// Owns what operators run with on one device: threads, scratch, clock, operator table.
#pragma once

#include "gpt/arena.hpp"
#include "gpt/ops/ops.hpp"

namespace strobe::gpt {

class Backend {
public:
    /// threads 0: as many as the process may use.
    explicit Backend(Device device = Device::cpu, int threads = 0);
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;

    Exec& exec() { return exec_; }
    ThreadTeam& team() { return team_; }
    OpTimes& times() { return times_; }

    /// Scratch only grows; called when a model is made, never inside a step.
    void reserve_scratch(size_t bytes);

    /// FLOP/s of fp32 matrix products of a size that suits this machine: what utilisation is measured against.
    double measure_peak();

private:
    ThreadTeam team_;
    Arena scratch_;
    OpTimes times_;
    Exec exec_;
};

}  // namespace strobe::gpt
