// Times whole training steps of GPT-3's shapes on a GPU, and the operators of one step against what the machine allows; writes
// JSON.
//   gpt_cuda_step_bench 124M|350M|1.3B|2.7B SEQLEN ROWS STEPS [deterministic]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "gpt/random.hpp"
#include "gpt/train/optimizer.hpp"

namespace strobe::gpt {

namespace {

constexpr int64_t kVocab = 50304;
// Bytes read and written per second by a large copy on an H100, as measured: the bound of pointwise operators.
constexpr double kCopyBytesPerSecond = 3.02e12;

struct Shape {
    int64_t layers, hidden, heads;
};

Shape shape_of(const std::string& name) {
    const std::map<std::string, Shape> shapes{
        {"124M", {12, 768, 12}}, {"350M", {24, 1024, 16}}, {"1.3B", {24, 2048, 16}}, {"2.7B", {32, 2560, 32}}};
    const auto found = shapes.find(name);
    if (found == shapes.end()) throw std::invalid_argument("model '" + name + "' is unknown; choose 124M, 350M, 1.3B or 2.7B");
    return found->second;
}

Batch random_batch(int64_t seqlen, int64_t rows) {
    Batch batch;
    Random random(1);
    for (int64_t i = 0; i < seqlen * rows; ++i) {
        if (i % seqlen == 0) batch.cu_seqlens.push_back(static_cast<int32_t>(i));
        batch.tokens.push_back(static_cast<int32_t>(random.below(kVocab)));
        batch.targets.push_back(static_cast<int32_t>(random.below(kVocab)));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.tokens.size()));
    return batch;
}

/// Of the model as the papers count: 6 * tokens * parameters + 12 * layers * width * tokens * seqlen.
double flops_of_step(const ModelConfig& c, int64_t seqlen, int64_t tokens, double attention_share) {
    const double attention = 12.0 * static_cast<double>(c.num_layers * c.hidden_size) * static_cast<double>(seqlen);
    return static_cast<double>(tokens) * (6.0 * static_cast<double>(c.num_parameters()) + attention_share * attention);
}

nlohmann::ordered_json operator_table(OpTimes& times, double steps, double peak) {
    nlohmann::ordered_json out;
    for (int kind = 0; kind < static_cast<int>(OpKind::count); ++kind) {
        const OpTimes::Entry& e = times[static_cast<OpKind>(kind)];
        if (e.calls == 0) continue;
        // Causal attention does half of what is counted.
        const double flops = e.flops * (static_cast<OpKind>(kind) == OpKind::attention ? 0.5 : 1.0);
        const double bound = flops / peak + e.bytes / kCopyBytesPerSecond;
        out[std::string(to_string(static_cast<OpKind>(kind)))] = {{"milliseconds", 1e3 * e.seconds / steps},
                                                                  {"calls", static_cast<double>(e.calls) / steps},
                                                                  {"tflops_per_second", 1e-12 * flops / e.seconds},
                                                                  {"bytes_per_second", e.bytes / e.seconds},
                                                                  {"bound_over_time", bound / e.seconds}};
    }
    return out;
}

int run_bench(int argc, char** argv) {
    const std::string name = argv[1];
    const int64_t seqlen = std::atoll(argv[2]), rows = std::atoll(argv[3]), steps = std::atoll(argv[4]);
    const Shape shape = shape_of(name);
    const ModelConfig config = gpt2_config(shape.layers, shape.hidden, shape.heads, seqlen, kVocab);
    Backend backend(Device::cuda);
    Exec& exec = backend.exec();
    exec.deterministic = argc > 5 && std::strcmp(argv[5], "deterministic") == 0;
    const size_t free_before = backend.runtime().free_bytes();
    const Weights weights(config, backend.memory(), Precision::bf16);
    {
        const ParameterArena fresh(weights.layout);
        initialize(weights.layout, config, 1, fresh);
        weights.values.copy_from(fresh);
    }
    narrow_values(backend, weights);
    Model model(weights, backend, {.max_rows = seqlen * rows});
    const OptimizerOptions options;
    Optimizer optimizer(weights.layout, options, backend.memory());
    const Batch batch = random_batch(seqlen, rows);
    const auto tokens = static_cast<int64_t>(batch.tokens.size());

    int64_t number = 0;
    double loss = 0.0;
    const auto step = [&] {
        model.clear_gradients();
        model.accumulate(batch, 1.0f / static_cast<float>(tokens));
        optimizer.apply(exec, weights, model.gradients(), ++number, 1e-4f);
        loss = model.take_loss() / static_cast<double>(tokens);
    };
    OpTimes* const times = exec.times;
    exec.times = nullptr;
    for (int i = 0; i < 3; ++i) step();
    std::vector<double> seconds;
    for (int64_t i = 0; i < steps; ++i) {
        const auto start = std::chrono::steady_clock::now();
        step();
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    exec.times = times;
    constexpr int kProfiled = 3;
    backend.times().clear();
    for (int i = 0; i < kProfiled; ++i) step();

    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2], peak = backend.peak(Precision::bf16);
    const double flops = flops_of_step(config, seqlen, tokens, 1.0), causal = flops_of_step(config, seqlen, tokens, 0.5);
    const nlohmann::ordered_json out{{"model", name},
                                     {"gpu", backend.runtime().name()},
                                     {"parameters", config.num_parameters()},
                                     {"seqlen", seqlen},
                                     {"rows", rows},
                                     {"deterministic", exec.deterministic},
                                     {"seconds_median", median},
                                     {"seconds_min", seconds.front()},
                                     {"tokens_per_second", static_cast<double>(tokens) / median},
                                     {"tflops_per_second", 1e-12 * flops / median},
                                     {"mfu", flops / median / peak},
                                     {"tflops_per_second_causal_halved", 1e-12 * causal / median},
                                     {"peak_memory_bytes", free_before - backend.runtime().free_bytes()},
                                     {"loss", loss},
                                     {"operators", operator_table(backend.times(), kProfiled, peak)}};
    std::printf("%s\n", out.dump(2).c_str());
    return 0;
}

}  // namespace

}  // namespace strobe::gpt

int main(int argc, char** argv) {
    if (argc < 5) {
        std::fprintf(stderr, "usage: %s 124M|350M|1.3B|2.7B SEQLEN ROWS STEPS [deterministic]\n", argv[0]);
        return 2;
    }
    try {
        return strobe::gpt::run_bench(argc, argv);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
