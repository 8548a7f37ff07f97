// What a device offers besides operators: memory, an order of work, a clock, and facts about itself.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "gpt/memory.hpp"
#include "gpt/ops/ops.hpp"

namespace strobe::gpt {

/// A small block that the host writes again and again and operators read: tokens and borders of a batch.
class InputStage {
public:
    virtual ~InputStage() = default;
    /// Where the host writes next; waits for a copy out of it that is still under way.
    virtual std::byte* host() = 0;
    /// Sends the first `bytes` off, in order with the operators, and returns where they will lie for those that follow.
    virtual std::byte* send(size_t bytes) = 0;
};

/// Work that the device does again as a whole: the same operators on the same memory, whatever lies there by then.
class Recording {
public:
    virtual ~Recording() = default;
    virtual void replay() = 0;
};

class Runtime : public Memory {
public:
    virtual std::unique_ptr<InputStage> make_stage(size_t bytes) = 0;
    /// What `enqueue` asks for, not done but written down. It may ask for operators, `zero` and nothing else, and must have been
    /// done once before: choices that need a measurement are made then. Null where the device does not record.
    virtual std::unique_ptr<Recording> record(const std::function<void()>& enqueue) = 0;
    /// Waits until everything asked for is done.
    virtual void synchronize() = 0;
    /// Sets what operators run with.
    virtual void equip(Exec& exec) = 0;
    /// Adds what the clock has marked to `times`. Waits for it.
    virtual void collect(OpTimes& times) = 0;
    /// FLOP/s of matrix products in this precision that the maker states (dense), or that were measured.
    virtual double peak_flops(Exec& exec, Precision precision) = 0;
    virtual std::string name() = 0;
    /// Memory of the whole device, and what other programs have left of it; 0: unknown.
    virtual size_t total_bytes() = 0;
    virtual size_t free_bytes() = 0;
};

std::unique_ptr<Runtime> make_host_runtime();

namespace cuda {
/// Throws std::invalid_argument where this build or machine lacks what it takes.
std::unique_ptr<Runtime> make_runtime();
}  // namespace cuda

}  // namespace strobe::gpt
