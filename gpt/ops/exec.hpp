// What every operator runs with: the device's operator table, the threads or stream, scratch memory, and the clock that
// says where a step's time goes.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <string_view>
#include <tuple>

#include "gpt/arena.hpp"
#include "gpt/device.hpp"
#include "gpt/threads.hpp"

namespace strobe::gpt {

struct Ops;

enum class OpKind : int { embedding, norm, linear, rope, attention, activation, cross_entropy, optimizer, communication, count };

constexpr std::string_view to_string(OpKind kind) {
    constexpr std::string_view kNames[] = {"embedding", "norm",       "linear",        "rope",
                                           "attention", "activation", "cross_entropy", "optimizer", "communication"};
    return kNames[static_cast<int>(kind)];
}

/// What a call cannot do without: FLOPs of matrix products, and bytes of large tensors read and written once (of pointwise
/// operators only). And which of its kind's calls it is.
struct Work {
    double flops = 0.0;
    double bytes = 0.0;
    const char* part = "";       // "forward", "backward", ...
    int64_t in = 0, out = 0;     // of products: columns of x and y
};

/// Seconds and work by operator since the last clear().
struct OpTimes {
    struct Entry {
        double seconds = 0.0;
        double flops = 0.0;
        double bytes = 0.0;
        int64_t calls = 0;

        void add(double more_seconds, const Work& work) {
            seconds += more_seconds;
            flops += work.flops;
            bytes += work.bytes;
            ++calls;
        }
    };
    /// Calls of one part and, of products, one shape.
    using Part = std::tuple<OpKind, std::string_view, int64_t, int64_t>;

    std::array<Entry, static_cast<size_t>(OpKind::count)> entries{};
    std::map<Part, Entry> parts;

    Entry& operator[](OpKind kind) { return entries[static_cast<size_t>(kind)]; }
    void add(OpKind kind, double seconds, const Work& work) {
        (*this)[kind].add(seconds, work);
        parts[{kind, work.part, work.in, work.out}].add(seconds, work);
    }
    void clear() {
        entries = {};
        parts.clear();
    }
};

/// A device's clock where operators return before they are done: begin and end are marks in the device's own order of work.
class OpClock {
public:
    virtual ~OpClock() = default;
    virtual void begin() = 0;
    virtual void end(OpKind kind, const Work& work) = 0;
};

namespace cuda {
class Gemm;
}

struct Exec {
    Device device = Device::cpu;
    const Ops* ops = nullptr;
    ThreadTeam* team = nullptr;   // cpu
    void* stream = nullptr;       // cuda
    int device_index = 0;         // cuda: which GPU the stream and all memory belong to
    cuda::Gemm* gemm = nullptr;   // cuda
    int parts = 1;                // into which sums over rows are split; the same on every run of a machine
    bool deterministic = true;    // every result repeats bit for bit
    void* scratch = nullptr;      // contents undefined between operators
    size_t scratch_bytes = 0;
    OpTimes* times = nullptr;     // null: not measured
    OpClock* clock = nullptr;     // null: the host's clock tells
};

}  // namespace strobe::gpt
