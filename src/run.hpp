// One call from end to end: validate -> plan -> registry.find -> launch.
#pragma once

#include "problem.hpp"
#include "registry.hpp"

namespace strobe {

/// Validates and runs. Throws CallError.
void run(const Problem& problem, void* stream);

/// Validates everything but the data pointers and says how the call would run. Throws CallError.
struct RunPlan {
    const Implementation* implementation = nullptr;
    std::string explanation;
    size_t workspace_bytes = 0;  // what the caller must provide: alignment included
};
RunPlan plan(const Problem& problem);

/// Threads for CPU calls that do not say: the processors this process may use, until set.
int default_num_threads();
void set_default_num_threads(int num_threads);

}  // namespace strobe
