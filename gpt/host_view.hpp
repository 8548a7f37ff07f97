// Arenas as files are read and written: fp32 in host memory.
#pragma once

#include "gpt/weights.hpp"

namespace strobe::gpt {

inline bool is_host_view(const ParameterArena& arena) { return arena.memory().on_host() && arena.precision() == Precision::fp32; }

/// An arena's numbers, or a model's masters: the arena itself, or a copy of a device's.
class HostView {
public:
    HostView(const ParameterLayout& layout, const ParameterArena& arena) : arena_(arena) {
        if (is_host_view(arena)) return;
        copy_ = ParameterArena(layout);
        copy_.copy_from(arena);
    }
    explicit HostView(const Weights& weights) : arena_(weights.values) {
        if (is_host_view(arena_)) return;
        copy_ = ParameterArena(weights.layout);
        weights.get(copy_);
    }
    HostView(const HostView&) = delete;
    HostView& operator=(const HostView&) = delete;

    const ParameterArena* get() const { return is_host_view(arena_) ? &arena_ : &copy_; }

private:
    const ParameterArena& arena_;
    ParameterArena copy_;
};

/// Calls fill(arena) with one of fp32 in host memory, whose numbers `arena`, or a model, then has.
template <class Fill>
void fill_by_host(const ParameterLayout& layout, const ParameterArena& arena, Fill&& fill) {
    if (is_host_view(arena)) return fill(arena);
    const ParameterArena host(layout);
    fill(host);
    arena.copy_from(host);
}
template <class Fill>
void fill_by_host(const Weights& weights, Fill&& fill) {
    if (is_host_view(weights.values)) return fill(weights.values);
    const ParameterArena host(weights.layout);
    fill(host);
    weights.set(host);
}

}  // namespace strobe::gpt
