// Times whole training steps of one configuration on random tokens and says where the time goes, as JSON.
//   gpt_step_bench gpt2|llama layers hidden heads seqlen batch vocab steps threads
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <nlohmann/json.hpp>

#include "gpt/train/optimizer.hpp"
#include "gpt/random.hpp"

int main(int argc, char** argv) {
    using namespace strobe::gpt;
    if (argc != 10) {
        std::fprintf(stderr, "usage: %s gpt2|llama layers hidden heads seqlen batch vocab steps threads\n", argv[0]);
        return 2;
    }
    const Architecture architecture = architecture_from_string(argv[1]);
    const auto number = [&](int i) { return std::atoll(argv[i]); };
    const int64_t layers = number(2), hidden = number(3), heads = number(4), seqlen = number(5), batch_size = number(6),
                  vocab = number(7), steps = number(8);
    const ModelConfig config = architecture == Architecture::gpt2
                                   ? gpt2_config(layers, hidden, heads, seqlen, vocab)
                                   : llama_config(layers, hidden, heads, heads, seqlen, vocab);
    Weights weights(config);
    initialize(weights.layout, config, 1, weights.values);
    Backend backend(Device::cpu, static_cast<int>(number(9)));
    Model model(weights, backend, {.max_rows = seqlen * batch_size});
    const OptimizerOptions options;
    Optimizer optimizer(weights.layout, options);

    Batch batch;
    Random random(1);
    for (int64_t i = 0; i < seqlen * batch_size; ++i) {
        if (i % seqlen == 0) batch.cu_seqlens.push_back(static_cast<int32_t>(i));
        batch.tokens.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
        batch.targets.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.tokens.size()));

    const double peak = backend.peak();
    std::vector<double> seconds, cpu_seconds;
    double loss = 0.0;
    for (int64_t step = 1; step <= steps + 1; ++step) {
        if (step == 2) backend.times().clear();
        const auto start = std::chrono::steady_clock::now();
        const std::clock_t cpu_start = std::clock();
        model.clear_gradients();
        loss = model.forward_backward(batch, 1.0f / static_cast<float>(batch.tokens.size()));
        optimizer.apply(backend.exec(), weights, model.gradients(), step, 1e-4f);
        if (step == 1) continue;
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        cpu_seconds.push_back(static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC);
    }
    std::sort(seconds.begin(), seconds.end());
    std::sort(cpu_seconds.begin(), cpu_seconds.end());
    const double median = seconds[seconds.size() / 2];
    const double flops = config.flops_per_token(seqlen) * static_cast<double>(batch.tokens.size());
    nlohmann::ordered_json out{{"architecture", argv[1]},
                               {"parameters", config.num_parameters()},
                               {"threads", backend.team().size()},
                               {"tokens_per_step", batch.tokens.size()},
                               {"seconds_median", median},
                               {"seconds_min", seconds.front()},
                               {"cpu_seconds_median", cpu_seconds[cpu_seconds.size() / 2]},
                               {"tokens_per_second", static_cast<double>(batch.tokens.size()) / median},
                               {"gflops_per_second", flops / median * 1e-9},
                               {"peak_gflops_per_second", peak * 1e-9},
                               {"mfu", flops / median / peak},
                               {"loss", loss / static_cast<double>(batch.tokens.size())}};
    for (int kind = 0; kind < static_cast<int>(OpKind::count); ++kind) {
        const OpTimes::Entry& e = backend.times()[static_cast<OpKind>(kind)];
        out["operators"][std::string(to_string(static_cast<OpKind>(kind)))] = {
            {"seconds_per_step", e.seconds / static_cast<double>(steps)},
            {"gflops_per_second", e.flops > 0 ? e.flops / e.seconds * 1e-9 : 0.0}};
    }
    std::printf("%s\n", out.dump(2).c_str());
}
