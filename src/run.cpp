#include "run.hpp"

#include <fmt/core.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "error.hpp"
#include "plan.hpp"
#include "validate.hpp"

namespace strobe {
namespace {

std::atomic<int> g_num_threads{0};

int usable_processors() {
    cpu_set_t set;
    CPU_ZERO(&set);
    return sched_getaffinity(0, sizeof set, &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

Execution execution_of(const Problem& problem, void* stream) {
    const int threads = problem.attention.num_threads > 0 ? problem.attention.num_threads : default_num_threads();
    return {threads, stream, problem.attention.q.device_index};
}

/// The caller's block of memory gives us `bytes` at our alignment, or the call is refused.
void* place_workspace(void* given, size_t given_bytes, size_t bytes) {
    if (bytes == 0) return nullptr;
    size_t space = given_bytes;
    void* aligned = given;
    if (!given || !std::align(kWorkspaceAlignment, bytes, aligned, space)) {
        invalid_argument(fmt::format("workspace: {} bytes are given, {} are needed; the plan functions tell in advance",
                                     given ? given_bytes : 0, bytes + kWorkspaceAlignment));
    }
    return aligned;
}

size_t with_alignment(size_t bytes) { return bytes == 0 ? 0 : bytes + kWorkspaceAlignment; }

}  // namespace

int default_num_threads() {
    const int set = g_num_threads.load(std::memory_order_relaxed);
    return set > 0 ? set : usable_processors();
}

void set_default_num_threads(int num_threads) { g_num_threads.store(num_threads, std::memory_order_relaxed); }

void run(const Problem& problem, void* stream) {
    validate(problem, DataPointers::required);
    const Execution execution = execution_of(problem, stream);
    if (problem.direction == Direction::forward) {
        ForwardParams params = forward_params(problem);
        const Implementation& impl = find(problem, params, execution);
        params.workspace = place_workspace(problem.forward.workspace, problem.forward.workspace_bytes,
                                           impl.forward_workspace(params, execution));
        impl.forward(params, execution);
    } else {
        BackwardParams params = backward_params(problem);
        const Implementation& impl = find(problem, params, execution);
        params.workspace = place_workspace(problem.backward.workspace, problem.backward.workspace_bytes,
                                           impl.backward_workspace(params, execution));
        impl.backward(params, execution);
    }
}

RunPlan plan(const Problem& problem) {
    validate(problem, DataPointers::ignored);
    const Execution execution = execution_of(problem, nullptr);
    if (problem.direction == Direction::forward) {
        const ForwardParams params = forward_params(problem);
        const Implementation& impl = find(problem, params, execution);
        return {&impl, explain(problem, params, execution), with_alignment(impl.forward_workspace(params, execution))};
    }
    const BackwardParams params = backward_params(problem);
    const Implementation& impl = find(problem, params, execution);
    return {&impl, explain(problem, params, execution), with_alignment(impl.backward_workspace(params, execution))};
}

}  // namespace strobe
