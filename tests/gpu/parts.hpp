// The parts of gpu_check. Each returns what it found; "failures" lists what went wrong and is empty when all is well.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace strobe::gpu_tests {

struct Options {
    std::vector<std::string> parts;  // empty: all
    std::string implementation;      // empty: the first that serves each case
    std::string filter;
    int stride = 1;                  // every n-th case of the list
    bool plain_memory = false;       // no unmapped pages around the buffers: a sanitizer looks after them
    int workers = 1;
    int race_repeats = 500;
    int determinism_repeats = 50;
    int64_t large_seqlen = 65536;
    std::string sanitizer = "compute-sanitizer";
    int sanitizer_stride = 101;
    std::string program;             // this program and the faulty one, for sanitizers and fences
    std::string faulty_program;
};

using Json = nlohmann::ordered_json;

/// {"failures": [...]} and an entry for each failure.
struct Finding {
    Json json = Json::object({{"failures", Json::array()}});

    void fail(const std::string& what);
    bool ok() const { return json.at("failures").empty(); }
};

Finding check_cases(const Options& options);        // the case list against the fp64 specification
Finding check_races(const Options& options);        // out, lse, dk, dv have the same bits in every run
Finding check_determinism(const Options& options);  // and with `deterministic` dq too
Finding check_graphs(const Options& options);       // capture and replay
Finding check_streams(const Options& options);      // two streams at once, several threads
Finding check_companions(const Options& options);   // merging and dropout masks against the CPU's
Finding check_large(const Options& options);        // 64k tokens, forward and backward, with its memory
Finding check_fences(const Options& options);       // the unmapped pages around buffers stop accesses beside them, and no others
Finding check_sanitizers(const Options& options);   // compute-sanitizer's tools, each of which must also catch a planted fault

}  // namespace strobe::gpu_tests
