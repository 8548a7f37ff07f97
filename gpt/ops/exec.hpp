// What every operator runs with: the device's operator table, the threads or stream, scratch memory, and the clock that
// says where a step's time goes.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <string_view>

#include "gpt/arena.hpp"
#include "gpt/device.hpp"
#include "gpt/threads.hpp"

namespace strobe::gpt {

struct Ops;

enum class OpKind : int { embedding, norm, linear, rope, attention, activation, cross_entropy, optimizer, count };

constexpr std::string_view to_string(OpKind kind) {
    constexpr std::string_view kNames[] = {"embedding", "norm",       "linear",        "rope",
                                           "attention", "activation", "cross_entropy", "optimizer"};
    return kNames[static_cast<int>(kind)];
}

/// Seconds and matrix FLOPs by operator since the last clear().
struct OpTimes {
    struct Entry {
        double seconds = 0.0;
        double flops = 0.0;
        int64_t calls = 0;
    };
    std::array<Entry, static_cast<size_t>(OpKind::count)> entries{};

    Entry& operator[](OpKind kind) { return entries[static_cast<size_t>(kind)]; }
    void clear() { entries = {}; }
};

struct Exec {
    Device device = Device::cpu;
    const Ops* ops = nullptr;
    ThreadTeam* team = nullptr;   // cpu
    void* stream = nullptr;       // cuda
    void* scratch = nullptr;      // contents undefined between operators
    size_t scratch_bytes = 0;
    OpTimes* times = nullptr;     // null: not measured
};

}  // namespace strobe::gpt
