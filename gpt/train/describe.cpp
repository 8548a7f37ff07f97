#include "gpt/train/describe.hpp"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

#include "gpt/backend.hpp"
#include "gpt/distributed/step_rows.hpp"
#include "gpt/model.hpp"

namespace strobe::gpt {

namespace {

constexpr int64_t kLongestRow = int64_t{1} << 24;
constexpr int64_t kMostTokens = int64_t{1} << 30;  // of a pass

MemoryPlan memory_of(const TrainOptions& o, const ModelConfig& model, int64_t max_rows, Recompute recompute) {
    return plan_memory(model, {.max_rows = max_rows,
                               .recompute = recompute,
                               .gradients = o.gradients,
                               .device = o.device,
                               .precision = o.precision,
                               .moments = o.moments,
                               .masters = o.masters,
                               .processes = o.launch.size});
}

/// The largest n up to `most` for which needs(n) is at most `bytes`; 0: not one. More of n never needs less.
template <class Needs>
int64_t largest_that_fits(size_t bytes, int64_t most, Needs&& needs) {
    int64_t fits = 0, over = most + 1;
    while (over - fits > 1) {
        const int64_t middle = (fits + over) / 2;
        (needs(middle) <= bytes ? fits : over) = middle;
    }
    return fits;
}

/// What a GPU of so many bytes has room for, by kind of recomputation: rows of the run's length in a batch, and tokens of
/// a single row, in multiples of 1024. Learned positions grow with the row.
nlohmann::ordered_json room(const TrainOptions& o, size_t bytes) {
    nlohmann::ordered_json rows, tokens;
    for (const Recompute recompute : {Recompute::none, Recompute::norms, Recompute::pointwise, Recompute::block}) {
        const std::string name(to_string(recompute));
        rows[name] = largest_that_fits(bytes, kMostTokens / o.row_length(), [&](int64_t n) {
            return memory_of(o, o.model, n * o.row_length(), recompute).total();
        });
        tokens[name] = 1024 * largest_that_fits(bytes, kLongestRow / 1024, [&](int64_t n) {
            ModelConfig longer = o.model;
            longer.context_length = std::max(longer.context_length, 1024 * n);
            return memory_of(o, longer, 1024 * n, recompute).total();
        });
    }
    return {{"rows_by_recompute", rows}, {"tokens_of_one_row_by_recompute", tokens}};
}

/// Whether the run has room on this machine's GPU, and what would have. On a machine without one: on one of 80 GB.
nlohmann::ordered_json fit(const TrainOptions& o, const MemoryPlan& memory) {
    constexpr size_t kUsualBytes = size_t{79} << 30;
    constexpr size_t kReserve = size_t{1} << 30;  // the context, cuBLAS and its workspace
    std::string name = "a GPU of 80 GB";
    size_t bytes = kUsualBytes;
    try {
        const std::unique_ptr<Runtime> runtime = cuda::make_runtime();
        name = runtime->name();
        bytes = runtime->free_bytes();
    } catch (const std::invalid_argument&) {
        // No GPU here.
    }
    bytes -= std::min(bytes, kReserve);
    nlohmann::ordered_json out{{"gpu", name}, {"bytes", bytes}, {"run", memory.total() <= bytes}};
    out.update(room(o, bytes));
    return out;
}

}  // namespace

nlohmann::ordered_json describe(const TrainOptions& o) {
    const int64_t rows = largest_pass(o.batch_size * o.accumulate, o.batch_size, o.launch.size);
    const MemoryPlan memory = memory_of(o, o.model, rows * o.row_length(), o.recompute);
    nlohmann::ordered_json out{{"architecture", to_string(o.model.architecture)},
                               {"device", to_string(o.device)},
                               {"precision", to_string(o.precision)},
                               {"moments", to_string(o.moments)},
                               {"gradients", to_string(o.gradients)},
                               {"masters", to_string(o.masters)},
                               {"processes", o.launch.size},
                               {"parameters", o.model.num_parameters()},
                               {"tokens_per_step", o.tokens_per_step()},
                               {"steps", o.steps},
                               {"flops_per_token", o.model.flops_per_token(o.row_length())},
                               {"bytes",
                                {{"weights", memory.values + memory.narrow_values},
                                 {"gradients", memory.gradients},
                                 {"moments", memory.moments},
                                 {"activations", memory.activations},
                                 {"scratch", memory.scratch},
                                 {"total", memory.total()}}}};
    if (o.device == Device::cuda) out["fits"] = fit(o, memory);
    return out;
}

}  // namespace strobe::gpt
