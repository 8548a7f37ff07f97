#include "gpt/distributed/shards.hpp"

#include <algorithm>
#include <stdexcept>

namespace strobe::gpt {

std::vector<Bucket> plan_buckets(const ParameterLayout& layout, int ranks) {
    // Large enough to run at the links' speed, small enough that little is left to do when the backward ends.
    constexpr int64_t kMostElements = int64_t{16} << 20;
    constexpr int64_t kFewestBuckets = 8;
    const int64_t grain = static_cast<int64_t>(kArenaAlignment / sizeof(float)) * ranks;
    const int64_t matrices = layout.matrices_begin(), end = layout.arena_elements();
    if (matrices % grain != 0 || end % grain != 0) {
        throw std::logic_error("buckets: the layout was made for another number of processes");
    }
    const int64_t wanted = std::min(kMostElements, (end - matrices) / kFewestBuckets);
    const int64_t size = std::max(grain, wanted / grain * grain);

    std::vector<Bucket> buckets;
    int64_t local = 0;
    const auto add = [&](int64_t from, int64_t to, bool decay) {
        buckets.push_back({.begin = from, .piece = (to - from) / ranks, .local = local, .decay = decay});
        local += buckets.back().piece;
    };
    for (int64_t to = end; to > matrices;) {
        const int64_t from = std::max(matrices, to - size);
        add(from, to, true);
        to = from;
    }
    if (matrices > 0) add(0, matrices, false);
    return buckets;
}

}  // namespace strobe::gpt
