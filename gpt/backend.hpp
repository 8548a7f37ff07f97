// Owns what operators run with on one device: its runtime, threads, scratch, clock, operator table.
#pragma once

#include <memory>

#include "gpt/arena.hpp"
#include "gpt/runtime.hpp"
#include "gpt/weights.hpp"

namespace strobe::gpt {

class Backend {
public:
    /// threads 0: as many as the process may use. Throws std::invalid_argument where there is no such device.
    explicit Backend(Device device = Device::cpu, int threads = 0);
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;

    Device device() const { return exec_.device; }
    Exec& exec() { return exec_; }
    ThreadTeam& team() { return team_; }
    /// Everything measured so far; waits for the device.
    OpTimes& times();
    Memory& memory() { return *runtime_; }
    Runtime& runtime() { return *runtime_; }

    /// Scratch only grows; called when a model is made, and before a batch that needs more.
    void reserve_scratch(size_t bytes);

    /// FLOP/s of matrix products: what utilisation is measured against. On the CPU of fp32 products of a size that suits the
    /// machine, measured; on a GPU the maker's figure for dense products of that precision.
    double peak(Precision precision = Precision::fp32) { return runtime_->peak_flops(exec_, precision); }

private:
    ThreadTeam team_;
    std::unique_ptr<Runtime> runtime_;
    Arena scratch_;
    OpTimes times_;
    Exec exec_;
};

}  // namespace strobe::gpt
