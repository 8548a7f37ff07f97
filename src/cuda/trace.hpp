// What is being launched, on a profiler's timeline: with -DSTROBE_NVTX=ON, else nothing.
#pragma once

#ifdef STROBE_NVTX
#include <nvtx3/nvToolsExt.h>
#endif

#include "cuda/select.hpp"

namespace strobe::cuda {

class TraceRange {
public:
#ifdef STROBE_NVTX
    explicit TraceRange(const Variant& variant) { nvtxRangePushA(("strobe " + to_string(variant)).c_str()); }
    ~TraceRange() { nvtxRangePop(); }
#else
    explicit TraceRange(const Variant&) {}
#endif
    TraceRange(const TraceRange&) = delete;
    TraceRange& operator=(const TraceRange&) = delete;
};

}  // namespace strobe::cuda
