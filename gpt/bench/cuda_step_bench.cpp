// Times whole training steps of GPT-3's shapes, and of a Llama of that size, on a GPU, and the operators of one step
// against what the machine allows; writes JSON. With "once" the first STEPS steps are timed as they are and none is
// looked at by operator: for steps of a minute. SEQLEN "longest": the largest multiple of 1024 for which the plan of
// the run's memory fits what is free.
//   gpt_cuda_step_bench 124M|350M|1.3B|2.7B|llama-1.3B SEQLEN ROWS STEPS [OPTION...]
// Options: deterministic, no-graph, fp32-moments, fp32-gradients, once, norms|pointwise|block (what is computed again),
// bf16-masters, processes=N, contest (the products' algorithms are chosen anew by whole steps, and kept if these are
// shorter). Sets of options with "vs" between them take turns in one process, from the same weights on: what a chip's
// temperature does to one it does to all. ROWS are those of one process. Of several, which a launcher may have started
// too, rank 0 prints; there turns of steps of all together and of each by itself follow one another.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>
#include <nlohmann/json.hpp>

#include "gpt/bench/gpu_watch.hpp"
#include "gpt/bench/step_contest.hpp"
#include "gpt/bf16.hpp"
#include "gpt/distributed/data_parallel.hpp"
#include "gpt/distributed/spawn.hpp"
#include "gpt/io/xxhash64.hpp"
#include "gpt/ops/cuda/gemm.hpp"
#include "gpt/random.hpp"
#include "gpt/step_graphs.hpp"
#include "gpt/train/optimizer.hpp"

namespace strobe::gpt {

namespace {

constexpr int64_t kVocab = 50304;
constexpr int64_t kLongest = -1;  // a seqlen that is found out
// Bytes read and written per second by a large copy on an H100, as measured: the bound of pointwise operators.
constexpr double kCopyBytesPerSecond = 3.02e12;

struct Shape {
    int64_t layers, hidden, heads;
    bool llama = false;
};

Shape shape_of(const std::string& name) {
    const std::map<std::string, Shape> shapes{
        {"124M", {12, 768, 12}}, {"350M", {24, 1024, 16}}, {"1.3B", {24, 2048, 16}}, {"2.7B", {32, 2560, 32}},
        {"llama-1.3B", {24, 2048, 16, true}}};
    const auto found = shapes.find(name);
    if (found == shapes.end())
        throw std::invalid_argument("model '" + name + "' is unknown; choose 124M, 350M, 1.3B, 2.7B or llama-1.3B");
    return found->second;
}

Batch random_batch(int64_t seqlen, int64_t rows, int rank) {
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
void fill(const Weights& weights) {
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

/// Of the model as the papers count: 6 * tokens * parameters + 12 * layers * width * tokens * seqlen.
double flops_of_step(const ModelConfig& c, int64_t seqlen, int64_t tokens, double attention_share) {
    const double attention = 12.0 * static_cast<double>(c.num_layers * c.hidden_size) * static_cast<double>(seqlen);
    return static_cast<double>(tokens) * (6.0 * static_cast<double>(c.num_parameters()) + attention_share * attention);
}

nlohmann::ordered_json row_of(const OpTimes::Entry& e, OpKind kind, double steps, double peak) {
    // Causal attention does half of what is counted.
    const double flops = e.flops * (kind == OpKind::attention ? 0.5 : 1.0);
    const double bound = flops / peak + e.bytes / kCopyBytesPerSecond;
    return {{"milliseconds", 1e3 * e.seconds / steps},
            {"calls", static_cast<double>(e.calls) / steps},
            {"tflops_per_second", 1e-12 * flops / e.seconds},
            {"terabytes_per_second", 1e-12 * e.bytes / e.seconds},
            {"bound_over_time", bound / e.seconds}};
}

nlohmann::ordered_json operator_table(OpTimes& times, double steps, double peak) {
    nlohmann::ordered_json out;
    for (int i = 0; i < static_cast<int>(OpKind::count); ++i) {
        const auto kind = static_cast<OpKind>(i);
        if (times[kind].calls > 0) out[std::string(to_string(kind))] = row_of(times[kind], kind, steps, peak);
    }
    return out;
}

/// The same by part, and products by shape.
nlohmann::ordered_json part_table(const OpTimes& times, double steps, double peak) {
    nlohmann::ordered_json out;
    for (const auto& [part, entry] : times.parts) {
        const auto& [kind, name, in, columns] = part;
        std::string label = std::string(to_string(kind)) + " " + std::string(name);
        if (in > 0) label += " " + std::to_string(in) + "->" + std::to_string(columns);
        out[label] = row_of(entry, kind, steps, peak);
    }
    return out;
}

/// What each product took when its algorithm was chosen, alone on the machine.
nlohmann::ordered_json product_table(const cuda::Gemm& gemm) {
    constexpr const char* kEpilogues[] = {"", "bias", "gelu, aux, bias", "gelu, aux", "dgelu", "sums of b"};
    auto out = nlohmann::ordered_json::array();
    for (const auto& [call, milliseconds] : gemm.measured()) {
        const double flops = 2.0 * static_cast<double>(call.m * call.n) * static_cast<double>(call.k);
        out.push_back({{"m", call.m},
                       {"n", call.n},
                       {"k", call.k},
                       {"transposed", std::string(call.transpose_a ? "T" : "N") + (call.transpose_b ? "T" : "N")},
                       {"d", to_string(call.d.precision)},
                       {"accumulate", call.accumulate},
                       {"epilogue", kEpilogues[static_cast<int>(call.epilogue)]},
                       {"milliseconds", milliseconds},
                       {"tflops_per_second", 1e-9 * flops / milliseconds}});
    }
    return out;
}

double median_of(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

void hash_device_memory(Memory& memory, const void* from, size_t bytes, XxHash64& hash) {
    std::vector<std::byte> piece(std::min(bytes, size_t{64} << 20));
    for (size_t at = 0; at < bytes; at += piece.size()) {
        const std::span now(piece.data(), std::min(piece.size(), bytes - at));
        memory.copy(now.data(), static_cast<const std::byte*>(from) + at, now.size());
        hash.update(now);
    }
}

/// Whether what operators read of the weights is the same on all processes, bit for bit: the narrow values, and the
/// masters of norms and biases.
bool replicas_agree(ProcessGroup& group, Memory& memory, const Weights& weights) {
    XxHash64 hash;
    const auto values = static_cast<size_t>(weights.values.size());
    const auto vectors = static_cast<size_t>(weights.layout.matrices_begin());
    hash_device_memory(memory, weights.all().data, values * size_of(weights.precision), hash);
    hash_device_memory(memory, weights.values.at(0).data, vectors * sizeof(float), hash);
    const std::vector<std::string> all = group.exchange(std::to_string(hash.digest()));
    return std::all_of(all.begin(), all.end(), [&](const std::string& digest) { return digest == all.front(); });
}

/// Numbers that are none take less power than numbers: no time is that of training then.
void expect_finite(double loss) {
    if (!std::isfinite(loss)) throw std::runtime_error("the loss is not finite, so nothing was measured");
}

/// What operators wait for, per step.
nlohmann::ordered_json waits_of(const OpTimes& times, double steps) {
    nlohmann::ordered_json out;
    for (const auto& [part, entry] : times.parts) {
        const auto& [kind, name, in, columns] = part;
        if (kind == OpKind::communication) out[std::string(name)] = 1e3 * entry.seconds / steps;
    }
    return out;
}

struct Arguments {
    std::string model = "1.3B";
    int64_t seqlen = 2048, rows = 8, steps = 10;
    bool deterministic = false, graph = true, once = false;
    Precision moments = Precision::bf16, gradients = Precision::bf16, masters = Precision::fp32;
    Recompute recompute = Recompute::none;
    int processes = 1;
    bool contest = false;
};

Arguments parse(char** argv, const std::vector<std::string>& options) {
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

ModelOptions model_options_of(const Arguments& a, int processes) {
    return {.max_rows = a.seqlen * a.rows, .recompute = a.recompute,
            .gradients = processes > 1 ? Precision::fp32 : a.gradients, .device = Device::cuda,
            .precision = Precision::bf16, .moments = a.moments, .masters = a.masters, .processes = processes};
}

ModelConfig config_of(const Arguments& a) {
    const Shape shape = shape_of(a.model);
    if (shape.llama) return llama_config(shape.layers, shape.hidden, shape.heads, shape.heads, a.seqlen, kVocab);
    return gpt2_config(shape.layers, shape.hidden, shape.heads, a.seqlen, kVocab);
}

/// One set of options among others.
class Variant {
public:
    Variant(const Arguments& a, Backend& backend)
        : a_(a), weights_(config_of(a), backend.memory(), Precision::bf16, 1, a.masters), backend_(backend),
          model_(weights_, backend, model_options_of(a, 1)),
          optimizer_(weights_.layout, OptimizerOptions{}, backend.memory(), a.moments), graphs_(backend),
          batches_{random_batch(a.seqlen, a.rows, 0)} {
        fill(weights_);
        prepare();
    }
    void step() {
        const auto start = std::chrono::steady_clock::now();
        backend_.exec().deterministic = a_.deterministic;
        model_.begin_step();
        optimizer_.set_rates(++number_, 1e-4f);
        const auto enqueue = [&] {
            model_.passes();
            optimizer_.update(backend_.exec(), weights_, model_.gradients());
        };
        a_.graph ? graphs_.run(model_.step_shape(), enqueue) : enqueue();
        prepare();
        optimizer_.gradient_norm();
        expect_finite(model_.take_loss());
        seconds_.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    void forget() { seconds_.clear(); }
    const std::vector<double>& seconds() const { return seconds_; }

private:
    void prepare() { model_.prepare(batches_, 1.0f / static_cast<float>(batches_.front().tokens.size())); }

    Arguments a_;
    Weights weights_;
    Backend& backend_;
    Model model_;
    Optimizer optimizer_;
    StepGraphs graphs_;
    std::vector<Batch> batches_;
    int64_t number_ = 0;
    std::vector<double> seconds_;
};

int run_variants(const std::vector<Arguments>& sets, const std::vector<std::string>& names) {
    const Arguments& first = sets.front();
    const ModelConfig config = config_of(first);
    Backend backend(Device::cuda);
    backend.exec().times = nullptr;
    std::vector<std::unique_ptr<Variant>> variants;
    std::vector<size_t> bytes;
    const auto warm = [](Variant& v) {
        for (int i = 0; i < 3; ++i) v.step();
        v.forget();
    };
    for (const Arguments& a : sets) {
        const size_t before = backend.runtime().free_bytes();
        variants.push_back(std::make_unique<Variant>(a, backend));
        warm(*variants.back());
        bytes.push_back(before - backend.runtime().free_bytes());
    }
    GpuWatch watch;
    watch.begin();
    // Two steps in a turn; every second round in the opposite order.
    for (int64_t round = 0; 2 * round < first.steps; ++round)
        for (size_t i = 0; i < sets.size(); ++i)
            for (int twice = 0; twice < 2; ++twice) variants[round % 2 == 0 ? i : sets.size() - 1 - i]->step();
    const nlohmann::ordered_json gpu_state = watch.end();
    auto rows = nlohmann::ordered_json::array();
    const double flops = flops_of_step(config, first.seqlen, first.seqlen * first.rows, 1.0);
    for (size_t i = 0; i < sets.size(); ++i) {
        const std::vector<double>&mine = variants[i]->seconds(), &firsts = variants.front()->seconds();
        std::vector<double> ratios;
        for (size_t s = 0; s < mine.size(); ++s) ratios.push_back(mine[s] / firsts[s]);
        const double median = median_of(mine);
        rows.push_back({{"options", names[i]},
                        {"seconds_median", median},
                        {"seconds_min", *std::ranges::min_element(mine)},
                        {"tflops_per_second", 1e-12 * flops / median},
                        {"time_over_the_firsts", median_of(ratios)},
                        {"memory_bytes", bytes[i]}});
    }
    const nlohmann::ordered_json out{{"model", first.model},
                                     {"gpu", backend.runtime().name()},
                                     {"gpu_while_timed", gpu_state},
                                     {"seqlen", first.seqlen},
                                     {"rows", first.rows},
                                     {"steps", first.steps},
                                     {"variants", rows}};
    std::printf("%s\n", out.dump(2).c_str());
    return 0;
}

/// The products' algorithms by whole steps; what is found is kept if steps with it are shorter than with the usual
/// ones. Returns what there was to be chosen, and by how much.
template <class Step>
nlohmann::ordered_json hold_contest(cuda::Gemm& gemm, Step&& timed_step) {
    constexpr int kRounds = 2, kSteps = 72, kTurns = 4;
    gemm.begin_contest();
    for (int i = 0; i < 3; ++i) timed_step();
    const std::vector<cuda::Gemm::Candidates> products = gemm.candidates();
    std::vector<int> counts;
    for (const auto& p : products) counts.push_back(static_cast<int>(p.alone.size()));
    StepContest contest(counts, 1);
    const auto play = [&] {
        gemm.play(contest.draw());
        const double seconds = timed_step();
        std::vector<double> own = gemm.played();
        for (double& ms : own) ms *= 1e-3;
        contest.add(seconds, own);
    };
    // First what each takes by itself, in its place, then, of the few best, what steps take.
    const int most = *std::ranges::max_element(counts);
    for (int i = 0; i < kRounds * most; ++i) play();
    contest.shorten(0.04, 4);
    for (int i = 0; i < kSteps; ++i) play();
    contest.keep(2);
    for (int i = 0; i < kSteps / 3; ++i) play();
    const std::vector<int> usual(counts.size(), 0), best = contest.best();
    std::vector<double> with_usual, with_best;
    for (int turn = 0; turn < kTurns; ++turn)
        for (const bool found : {turn % 2 == 0, turn % 2 != 0}) {
            gemm.play(found ? best : usual);
            timed_step();
            for (int i = 0; i < 2; ++i) (found ? with_best : with_usual).push_back(timed_step());
        }
    const double before = median_of(with_usual), after = median_of(with_best);
    gemm.play(after < before ? best : usual);
    gemm.end_contest();
    auto table = nlohmann::ordered_json::array();
    const std::vector<std::vector<double>> effects = contest.effects();
    for (size_t i = 0; i < products.size(); ++i) {
        auto rows = nlohmann::ordered_json::array();
        for (size_t c = 0; c < products[i].alone.size(); ++c)
            rows.push_back({{"algorithm", products[i].algorithms[c]}, {"milliseconds_alone", products[i].alone[c]},
                            {"milliseconds_in_a_step", 1e3 * contest.own_seconds(i, static_cast<int>(c))},
                            {"milliseconds_more_of_a_step", 1e3 * effects[i][c]}});
        table.push_back({{"product", products[i].product}, {"best", best[i]}, {"candidates", rows}});
    }
    return {{"seconds_with_the_usual", before}, {"seconds_with_the_best", after}, {"products", table}};
}

/// What a GPU keeps for itself: the context's growth, what is allocated in small pieces.
constexpr size_t kReserve = size_t{1} << 30;

int64_t longest_row(Arguments a, size_t bytes) {
    constexpr int64_t kStep = 1024;
    int64_t fits = 0, over = int64_t{1} << 12;  // in steps
    while (over - fits > 1) {
        const int64_t middle = (fits + over) / 2;
        a.seqlen = middle * kStep;
        (plan_memory(config_of(a), model_options_of(a, 1)).total() + kReserve <= bytes ? fits : over) = middle;
    }
    if (fits == 0) throw std::runtime_error("not even a row of 1024 tokens fits");
    return fits * kStep;
}

int run_bench(Arguments a) {
    const Launch launch = read_launch();
    if (a.processes > launch.size) return run_as_processes(a.processes);
    const std::unique_ptr<ProcessGroup> group = join_group(launch);
    if (group) cuda::choose_gpu(*group);
    Backend backend(Device::cuda);
    Exec& exec = backend.exec();
    exec.deterministic = a.deterministic;
    const size_t free_before = backend.runtime().free_bytes();
    if (a.seqlen == kLongest) a.seqlen = longest_row(a, free_before);
    const ModelConfig config = config_of(a);
    const Weights weights(config, backend.memory(), Precision::bf16, launch.size, a.masters);
    fill(weights);
    const ModelOptions model_options = model_options_of(a, launch.size);
    Model model(weights, backend, model_options);
    std::optional<Optimizer> optimizer;
    std::unique_ptr<DataParallel> parallel;
    if (group)
        parallel = std::make_unique<DataParallel>(*group, backend, weights, model.gradients(), OptimizerOptions{},
                                                  a.moments);
    else
        optimizer.emplace(weights.layout, OptimizerOptions{}, backend.memory(), a.moments);
    bool together = group != nullptr;  // the step at hand is one of all processes
    StepGraphs graphs(backend);
    const std::vector<Batch> batches{random_batch(a.seqlen, a.rows, launch.rank)};
    const int64_t tokens = launch.size * static_cast<int64_t>(batches.front().tokens.size());

    int64_t number = 0;
    double loss = 0.0;
    const auto prepare = [&] { model.prepare(batches, 1.0f / static_cast<float>(tokens)); };
    const auto enqueue = [&] {
        model.passes(together ? parallel.get() : nullptr);
        together ? parallel->update(model.loss_sum()) : optimizer->update(exec, weights, model.gradients());
    };
    bool recorded = a.graph && !a.contest;
    nlohmann::ordered_json contest;
    // As the trainer does it: the next batch is written while the GPU works.
    prepare();
    const auto step = [&] {
        model.begin_step();
        ++number;
        together ? parallel->set_rates(number, 1e-4f) : optimizer->set_rates(number, 1e-4f);
        std::vector<int64_t> shape = model.step_shape();
        shape.push_back(together);
        recorded ? graphs.run(shape, enqueue) : enqueue();
        prepare();
        together ? parallel->gradient_norm() : optimizer->gradient_norm();
        loss = model.take_loss() / static_cast<double>(tokens);
    };
    const auto timed_step = [&] {
        const auto start = std::chrono::steady_clock::now();
        step();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    // A step of all together leaves masters whole on their owners alone; elsewhere a new upper half lies beside an old
    // lower one, and where the number has become zero the two may be NaN.
    const auto begin_alone = [&] {
        parallel->gather_values();
        backend.runtime().synchronize();
        together = false;
    };
    OpTimes* const times = exec.times;
    exec.times = nullptr;
    if (a.contest) {
        contest = hold_contest(*exec.gemm, timed_step);
        recorded = a.graph;
    }
    const int warm_up = a.once ? 0 : 3;
    for (int i = 0; i < warm_up; ++i) step();
    std::vector<double> seconds, seconds_alone;
    size_t optimizer_alone = 0;  // bytes that steps of all together do without
    if (group) {
        optimizer.emplace(weights.layout, OptimizerOptions{}, backend.memory(), a.moments);
        optimizer_alone = optimizer->first_moments().size_bytes() + optimizer->second_moments().size_bytes();
        begin_alone();
        for (int i = 0; i < warm_up; ++i) step();
    }
    GpuWatch watch;
    watch.begin();
    // The first step of a turn of several processes is not timed: the GPU has rested before it, and steps behind a rest
    // are faster, at the power limit, than those in a row.
    constexpr int64_t kTurn = 4;
    for (int64_t i = 0; i < a.steps; i += group ? kTurn : 1) {
        if (!group) {
            seconds.push_back(timed_step());
            continue;
        }
        begin_alone();
        step();
        for (int64_t k = 0; k < kTurn; ++k) seconds_alone.push_back(timed_step());
        group->barrier();
        together = true;
        step();
        for (int64_t k = 0; k < kTurn; ++k) seconds.push_back(timed_step());
    }
    const nlohmann::ordered_json gpu_state = watch.end();
    const size_t peak_memory = free_before - backend.runtime().free_bytes() - optimizer_alone;
    exec.times = times;
    const int num_profiled = a.once ? 0 : 3;
    backend.times().clear();
    for (int i = 0; i < num_profiled; ++i) step();
    OpTimes profiled = backend.times();

    expect_finite(loss);

    const double median = median_of(seconds), peak = backend.peak(Precision::bf16);
    nlohmann::ordered_json shared;
    if (group) {
        // What processes wait for one another where no backward hides it.
        backend.times().clear();
        for (int i = 0; i < num_profiled; ++i) parallel->update(model.loss_sum());
        std::vector<double> alone(static_cast<size_t>(launch.size));
        alone[static_cast<size_t>(launch.rank)] = static_cast<double>(tokens) / launch.size / median_of(seconds_alone);
        group->sum(alone);
        auto states = nlohmann::ordered_json::array();
        for (const std::string& state : group->exchange(gpu_state.dump())) {
            states.push_back(nlohmann::ordered_json::parse(state));
        }
        const double of_all = std::accumulate(alone.begin(), alone.end(), 0.0);
        shared = {{"communication", parallel->communicator().name()},
                  {"replicas_identical", replicas_agree(*group, backend.memory(), weights)},
                  {"waits_milliseconds", waits_of(profiled, num_profiled)},
                  {"waits_milliseconds_without_passes", waits_of(backend.times(), num_profiled)},
                  {"tokens_per_second_of_each_alone", alone},
                  {"gpus_while_timed", states},
                  {"speedup", static_cast<double>(tokens * launch.size) / median / of_all}};
        if (!group->leads()) return 0;
    }
    const double flops = flops_of_step(config, a.seqlen, tokens, 1.0);
    const double causal = flops_of_step(config, a.seqlen, tokens, 0.5);
    const char* const commit = std::getenv("STROBE_COMMIT");
    const nlohmann::ordered_json out{{"model", a.model},
                                     {"commit", commit ? commit : ""},
                                     {"gpu", backend.runtime().name()},
                                     {"gpu_while_timed", gpu_state},
                                     {"cublaslt", exec.gemm->version()},
                                     {"parameters", config.num_parameters()},
                                     {"seqlen", a.seqlen},
                                     {"rows", a.rows},
                                     {"processes", launch.size},
                                     {"deterministic", a.deterministic},
                                     {"graph", a.graph},
                                     {"moments", to_string(a.moments)},
                                     {"gradients", to_string(model_options.gradients)},
                                     {"masters", to_string(model_options.masters)},
                                     {"recompute", to_string(a.recompute)},
                                     {"seconds_median", median},
                                     {"seconds_min", *std::min_element(seconds.begin(), seconds.end())},
                                     {"tokens_per_second", static_cast<double>(tokens) / median},
                                     {"tflops_per_second", 1e-12 * flops / median},
                                     {"mfu", flops / median / (peak * launch.size)},
                                     {"tflops_per_second_causal_halved", 1e-12 * causal / median},
                                     {"peak_memory_bytes", peak_memory},
                                     {"planned_memory_bytes", plan_memory(config, model_options).total()},
                                     {"loss", loss},
                                     {"several", shared},
                                     {"operators", operator_table(profiled, num_profiled, peak)},
                                     {"parts", part_table(profiled, num_profiled, peak)},
                                     {"products", product_table(*exec.gemm)},
                                     {"contest", contest}};
    std::printf("%s\n", out.dump(2).c_str());
    std::fflush(stdout);
    return 0;
}

}  // namespace

}  // namespace strobe::gpt

int main(int argc, char** argv) {
    if (argc < 5) {
        std::fprintf(stderr,
                     "usage: %s 124M|350M|1.3B|2.7B|llama-1.3B SEQLEN ROWS STEPS [deterministic] [no-graph] "
                     "[fp32-moments] [fp32-gradients] [bf16-masters] [once] [norms|pointwise|block] [processes=N] "
                     "[contest] [vs OPTION...]...\n"
                     "       SEQLEN may be \"longest\"\n", argv[0]);
        return 2;
    }
    try {
        std::vector<std::vector<std::string>> sets(1);
        for (int i = 5; i < argc; ++i) {
            if (std::string_view(argv[i]) == "vs")
                sets.emplace_back();
            else
                sets.back().emplace_back(argv[i]);
        }
        if (sets.size() == 1) return strobe::gpt::run_bench(strobe::gpt::parse(argv, sets.front()));
        std::vector<strobe::gpt::Arguments> variants;
        std::vector<std::string> names;
        for (const auto& options : sets) {
            variants.push_back(strobe::gpt::parse(argv, options));
            names.emplace_back();
            for (const std::string& option : options) names.back() += (names.back().empty() ? "" : " ") + option;
        }
        return strobe::gpt::run_variants(variants, names);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
