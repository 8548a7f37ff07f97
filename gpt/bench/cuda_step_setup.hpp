// What the GPU's step benchmark works on: its arguments, the model they name, its weights and its data.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "gpt/bf16.hpp"
#include "gpt/model.hpp"
#include "gpt/random.hpp"

namespace strobe::gpt::step_bench {

constexpr int64_t kVocab = 50304;
constexpr int64_t kLongest = -1;  // a seqlen that is found out

struct Arguments {
    std::string model = "1.3B";
    int64_t seqlen = 2048, rows = 8, steps = 10;
    bool deterministic = false, graph = true, once = false;
    Precision moments = Precision::bf16, gradients = Precision::bf16, masters = Precision::fp32;
    Recompute recompute = Recompute::none;
    int processes = 1;
    bool contest = false;
};

inline Arguments parse(char** argv, const std::vector<std::string>& options) {
    const bool longest = std::string_view(argv[2]) == "longest";
    Arguments a{.model = argv[1], .seqlen = longest ? kLongest : std::atoll(argv[2]), .rows = std::atoll(argv[3]),
                .steps = std::atoll(argv[4])};
    for (const std::string& option : options) {
        if (option == "deterministic") a.deterministic = true;
        else if (option == "no-graph") a.graph = false;
        else if (option == "once") a.once = true;
        else if (option == "contest") a.contest = true;
        else if (option == "fp32-moments") a.moments = Precision::fp32;
        else if (option == "fp32-gradients") a.gradients = Precision::fp32;
        else if (option == "bf16-masters") a.masters = Precision::bf16;
        else if (option.starts_with("processes=")) a.processes = std::atoi(option.c_str() + option.find('=') + 1);
        else a.recompute = recompute_from_string(option);
    }
    return a;
}

struct Shape {
    int64_t layers, hidden, heads;
    bool llama = false;
};

inline Shape shape_of(const std::string& name) {
    const std::map<std::string, Shape> shapes{
        {"124M", {12, 768, 12}}, {"350M", {24, 1024, 16}}, {"1.3B", {24, 2048, 16}}, {"2.7B", {32, 2560, 32}},
        {"llama-1.3B", {24, 2048, 16, true}}};
    const auto found = shapes.find(name);
    if (found == shapes.end())
        throw std::invalid_argument("model '" + name + "' is unknown; choose 124M, 350M, 1.3B, 2.7B or llama-1.3B");
    return found->second;
}

inline ModelOptions model_options_of(const Arguments& a, int processes) {
    return {.max_rows = a.seqlen * a.rows, .recompute = a.recompute,
            .gradients = processes > 1 ? Precision::fp32 : a.gradients, .device = Device::cuda,
            .precision = Precision::bf16, .moments = a.moments, .masters = a.masters, .processes = processes};
}

inline ModelConfig config_of(const Arguments& a) {
    const Shape shape = shape_of(a.model);
    if (shape.llama) return llama_config(shape.layers, shape.hidden, shape.heads, shape.heads, a.seqlen, kVocab);
    return gpt2_config(shape.layers, shape.hidden, shape.heads, a.seqlen, kVocab);
}

inline Batch random_batch(int64_t seqlen, int64_t rows, int rank) {
    Batch batch;
    Random random(1, static_cast<uint64_t>(rank));
    for (int64_t i = 0; i < seqlen * rows; ++i) {
        if (i % seqlen == 0) batch.cu_seqlens.push_back(static_cast<int32_t>(i));
        batch.tokens.push_back(static_cast<int32_t>(random.below(kVocab)));
        batch.targets.push_back(static_cast<int32_t>(random.below(kVocab)));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.tokens.size()));
    return batch;
}

/// Fresh values of the scale that training begins with, all threads at every matrix: `initialize` would take half a
/// minute for the positions of a long context. A pure function of the layout.
inline void fill(const Weights& weights) {
    constexpr int64_t kPiece = int64_t{1} << 24;
    Memory& memory = weights.values.memory();
    std::vector<float> vectors(static_cast<size_t>(weights.layout.matrices_begin()));
    std::vector<uint16_t> bits(static_cast<size_t>(kPiece));
    uint64_t stream = 0;
    for (const Parameter& p : weights.layout.list()) {
        ++stream;
        if (p.init == Init::ones) std::fill_n(vectors.begin() + p.offset, p.size, 1.0f);
        if (p.init == Init::ones || p.init == Init::zeros) continue;
        const double layers = static_cast<double>(weights.config.num_layers);
        const double std = weights.config.init_std / (p.init == Init::normal_residual ? std::sqrt(2.0 * layers) : 1.0);
        const auto scale = static_cast<float>(std * std::sqrt(3.0));
        for (int64_t begin = 0; begin < p.size; begin += kPiece) {
            const int64_t count = std::min(kPiece, p.size - begin);
            const auto write = [&](int64_t from, int64_t to) {
                Random random(static_cast<uint64_t>(begin + from), stream);
                for (int64_t i = from; i < to; ++i) {
                    // The sum of four numbers of 16 bits: nearly normal, and ten times as fast.
                    const uint64_t four = random.next();
                    const uint64_t sum = (four & 0xffff) + (four >> 16 & 0xffff) + (four >> 32 & 0xffff) + (four >> 48);
                    bits[static_cast<size_t>(i)] = round_bf16(scale * (static_cast<float>(sum) * 0x1.0p-16f - 2.0f));
                }
            };
            std::vector<std::jthread> threads;
            constexpr int64_t kShares = 64;  // whatever the number of processors, the same numbers
            std::atomic<int64_t> next = 0;
            const auto work = [&] {
                for (int64_t i; (i = next++) < kShares;) write(count * i / kShares, count * (i + 1) / kShares);
            };
            for (unsigned i = 1; i < std::thread::hardware_concurrency(); ++i) threads.emplace_back(work);
            work();
            threads.clear();
            // The masters' lower halves stay zero.
            memory.copy(weights.all().offset(p.offset + begin).data, bits.data(),
                        static_cast<size_t>(count) * sizeof(uint16_t));
        }
    }
    memory.copy(weights.values.at(0).data, vectors.data(), vectors.size() * sizeof(float));
    std::transform(vectors.begin(), vectors.end(), bits.begin(), round_bf16);
    memory.copy(weights.all().data, bits.data(), vectors.size() * sizeof(uint16_t));
}

}  // namespace strobe::gpt::step_bench
