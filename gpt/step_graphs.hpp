// Work of a few shapes that comes again and again. The first time a shape is met its operators are asked for one by one, and
// measure what they must; the second time the device records them; from then on a recording is replayed whole.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "gpt/backend.hpp"

namespace strobe::gpt {

class StepGraphs {
public:
    explicit StepGraphs(Backend& backend) : backend_(backend) {}

    /// `enqueue` asks for operators alone, and for the same ones on the same memory whenever `shape` is the same.
    void run(const std::vector<int64_t>& shape, const std::function<void()>& enqueue);

private:
    // Texts of ragged documents may have many shapes, and a recording takes memory: those that come late are not recorded.
    static constexpr size_t kMost = 16;

    Backend& backend_;
    std::map<std::vector<int64_t>, std::unique_ptr<Recording>> recordings_;  // null: met once
};

}  // namespace strobe::gpt
