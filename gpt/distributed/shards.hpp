// How the numbers of an arena are shared among processes: in buckets, each cut into one equal piece per process, so that the
// gradients of a bucket can be summed while the backward still computes those of others.
#pragma once

#include <cstdint>
#include <vector>

#include "gpt/parameters.hpp"

namespace strobe::gpt {

struct Bucket {
    int64_t begin = 0;   // in elements of the arena
    int64_t piece = 0;   // elements of one process; rank r has those from begin + r * piece
    int64_t local = 0;   // where a process keeps its piece's optimizer states
    bool decay = false;  // matrices; the vectors are one bucket
};

/// Of a layout made for `ranks` shards, in the order in which the backward finishes them: from the end of the arena.
std::vector<Bucket> plan_buckets(const ParameterLayout& layout, int ranks);

}  // namespace strobe::gpt
