#include "gpt/train/trainer.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include <fmt/format.h>

#include "gpt/host_view.hpp"
#include "gpt/io/durable_file.hpp"
#include "gpt/random.hpp"
#include "gpt/step_graphs.hpp"
#include "gpt/train/interrupt.hpp"
#include "gpt/train/loss_plot.hpp"

namespace strobe::gpt {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

int64_t count_targets(const Batch& batch) {
    return std::count_if(batch.targets.begin(), batch.targets.end(), [](int32_t t) { return t != kIgnoreTarget; });
}

/// Matrix FLOPs of training on the batch: attention by the true lengths of its sequences.
double flops_of(const ModelConfig& config, const Batch& batch) {
    double flops = config.flops_per_token(0) * static_cast<double>(batch.tokens.size());
    for (size_t b = 0; b + 1 < batch.cu_seqlens.size(); ++b) {
        const auto length = static_cast<double>(batch.cu_seqlens[b + 1] - batch.cu_seqlens[b]);
        flops += 12.0 * static_cast<double>(config.num_layers * config.q_size()) * length * length;
    }
    return flops;
}

nlohmann::ordered_json operator_times(OpTimes& times) {
    double total = 0.0;
    for (const OpTimes::Entry& e : times.entries) total += e.seconds;
    nlohmann::ordered_json out;
    for (int kind = 0; kind < static_cast<int>(OpKind::count); ++kind) {
        const OpTimes::Entry& e = times[static_cast<OpKind>(kind)];
        if (e.calls == 0) continue;
        nlohmann::ordered_json row{{"seconds", e.seconds}, {"share", e.seconds / total}, {"calls", e.calls}};
        if (e.flops > 0) row["flops_per_second"] = e.flops / e.seconds;
        out[std::string(to_string(static_cast<OpKind>(kind)))] = row;
    }
    return out;
}

/// Where a run starts: from a checkpoint of its own, from somebody's weights, or from nothing.
struct Start {
    TrainOptions options;
    std::optional<TrainingState> state;
    std::optional<Checkpoint> checkpoint;
    Tokenizer tokenizer;
};

Start resume_from(const TrainOptions& asked, Checkpoint checkpoint) {
    if (!checkpoint.state())
        throw std::invalid_argument(fmt::format("resume: {} holds weights but no training state", checkpoint.folder().string()));
    TrainOptions options = asked;
    from_json(checkpoint.state()->trainer.at("options"), options);
    check_resumable(asked, options);
    std::optional<TrainingState> state = checkpoint.state();
    Tokenizer tokenizer = checkpoint.tokenizer();
    return {std::move(options), std::move(state), std::move(checkpoint), std::move(tokenizer)};
}

Start find_start(const TrainOptions& asked, Progress& progress) {
    const bool has_run = std::filesystem::exists(asked.out) && !list_checkpoints(asked.out).empty();
    if (has_run && asked.resume) {
        std::vector<std::string> refused;
        Checkpoint checkpoint = open_checkpoint(asked.out, &refused);
        for (const std::string& text : refused) progress.message("passed over a checkpoint: " + text);
        return resume_from(asked, std::move(checkpoint));
    }
    if (has_run && !asked.overwrite)
        throw std::invalid_argument(fmt::format("{} holds checkpoints of a run: give --resume to go on with it, --overwrite to "
                                                "start anew, or another --out", asked.out.string()));
    TrainOptions options = asked;
    std::optional<Checkpoint> checkpoint;
    if (!options.init.empty()) checkpoint.emplace(open_checkpoint(options.init));
    const bool own_tokenizer = checkpoint && checkpoint->has_tokenizer() && options.tokenizer == "bytes";
    Tokenizer tokenizer = own_tokenizer ? checkpoint->tokenizer() : Tokenizer::load(options.tokenizer);
    if (checkpoint) {
        options.model = checkpoint->config();
        if (options.model.vocab_size < tokenizer.vocab_size())
            throw std::invalid_argument(fmt::format("init: the tokenizer has {} tokens, the checkpoint's model {}",
                                                    tokenizer.vocab_size(), options.model.vocab_size));
    } else {
        options.model.vocab_size = tokenizer.vocab_size();
    }
    options.validate();
    return {std::move(options), std::nullopt, std::move(checkpoint), std::move(tokenizer)};
}

class Run {
public:
    Run(Start start, Progress& progress);
    TrainResult go();

private:
    /// What is known of a step before it is made.
    struct Ahead {
        SamplerPosition position;  // behind its batches
        int64_t targets = 0, tokens = 0;
        double flops = 0.0;
    };

    Ahead prepare();
    void step(int64_t number);
    std::optional<double> evaluate(uint64_t max_rows);
    void save(int64_t number);
    void draw();

    Progress& progress_;
    Start start_;
    const TrainOptions& options_;
    CheckpointStore store_;
    Dataset data_;
    Backend backend_;
    Weights weights_;
    Model model_;
    Optimizer optimizer_;
    StepGraphs graphs_;
    Sampler sampler_;
    RunLog log_;
    std::vector<Batch> batches_;
    std::optional<Ahead> ahead_;  // of the step to come; drawn from the data and written down for the device already
    SamplerPosition position_;       // behind the last step that was made
    TrainResult result_;
    double smooth_step_seconds_ = 0.0;
    double step_flops_sum_ = 0.0;
    int64_t tokens_done_ = 0;
    OpTimes* times_ = &backend_.times();
    int64_t steps_here_ = 0;
    std::optional<double> last_held_out_;
};

Dataset load(const Start& start, Progress& progress) {
    progress.message("reading " + start.options.data);
    Dataset data = load_dataset({.source = start.options.data, .cache = {}, .held_out = start.options.held_out,
                                 .num_threads = std::max(1, start.options.threads), .progress = {}},
                                start.tokenizer);
    if (start.state && start.state->data_fingerprint != data.fingerprint)
        throw std::invalid_argument(fmt::format("resume: {} is not the text that the run was started with", start.options.data));
    return data;
}

Run::Run(Start start, Progress& progress)
    : progress_(progress),
      start_(std::move(start)),
      options_(start_.options),
      store_(options_.out),
      data_(load(start_, progress)),
      backend_(options_.device, options_.threads),
      weights_(options_.model, backend_.memory(), options_.precision),
      model_(weights_, backend_, {.max_rows = options_.batch_size * options_.row_length(), .recompute = options_.recompute}),
      optimizer_(weights_.layout, options_.optimizer, backend_.memory(), options_.moments),
      graphs_(backend_),
      sampler_(data_.train, {.row = {.seqlen = options_.row_length(), .split_documents = options_.split_documents},
                             .batch_size = options_.batch_size, .seed = options_.seed}),
      log_(options_.out / "log.jsonl", start_.state ? start_.state->step : 0),
      batches_(static_cast<size_t>(options_.accumulate)) {
    backend_.exec().deterministic = options_.deterministic;
    fill_by_host(weights_.layout, weights_.values, [&](const ParameterArena& values) {
        if (start_.checkpoint)
            start_.checkpoint->read_values(values);
        else
            initialize(weights_.layout, options_.model, options_.seed, values);
    });
    narrow_values(backend_, weights_);
    if (start_.state) {
        fill_by_host(weights_.layout, optimizer_.first_moments(), [&](const ParameterArena& first) {
            fill_by_host(weights_.layout, optimizer_.second_moments(),
                         [&](const ParameterArena& second) { start_.checkpoint->read_moments(first, second); });
        });
        sampler_.seek(start_.state->data_position);
        result_.steps = start_.state->step;
        const int threads = start_.state->trainer.value("threads", 0);
        if (backend_.device() == Device::cpu && threads != backend_.team().size())
            progress_.message(fmt::format("resuming on {} threads a run of {}: sums are ordered differently from here on",
                                          backend_.team().size(), threads));
    }
    start_.checkpoint.reset();
    position_ = sampler_.position();
    result_.parameters = options_.model.num_parameters();
    result_.log = options_.out / "log.jsonl";
    result_.plot = options_.out / "loss.svg";
    result_.peak_flops_per_second = backend_.peak(options_.precision);
}

Run::Ahead Run::prepare() {
    Ahead ahead;
    for (Batch& batch : batches_) {
        sampler_.next(batch);
        ahead.targets += count_targets(batch);
        ahead.tokens += static_cast<int64_t>(batch.tokens.size());
        ahead.flops += flops_of(options_.model, batch);
    }
    ahead.position = sampler_.position();
    model_.prepare(batches_, 1.0f / static_cast<float>(std::max<int64_t>(1, ahead.targets)));
    return ahead;
}

void Run::step(int64_t number) {
    const auto begin = Clock::now();
    if (!ahead_) ahead_ = prepare();
    const auto [position, targets, tokens, flops] = *std::exchange(ahead_, std::nullopt);
    // A GPU's marks around each operator cost time: there the clock looks at every 16th step, once all shapes have been met.
    Exec& exec = backend_.exec();
    exec.times = backend_.device() == Device::cpu || steps_here_ % 16 == 1 ? times_ : nullptr;
    ++steps_here_;
    const float rate = learning_rate_at(options_.optimizer, number, options_.steps);
    model_.begin_step();
    optimizer_.set_rates(number, rate);
    graphs_.run(model_.step_shape(), [&] {
        model_.passes();
        optimizer_.update(exec, weights_, model_.gradients());
    });
    // A GPU is busy with this step now, and the host gets the next one ready.
    if (backend_.device() != Device::cpu && number < options_.steps) ahead_ = prepare();
    const double norm = optimizer_.gradient_norm();
    const double loss = model_.take_loss() / static_cast<double>(std::max<int64_t>(1, targets));
    position_ = position;
    if (exec.times) backend_.times();
    if (!std::isfinite(loss))
        throw std::runtime_error(fmt::format("the loss is {} at step {}: lower the learning rate or raise the warm-up; the last "
                                             "checkpoint is as it was", loss, number));

    const double seconds = seconds_since(begin);
    smooth_step_seconds_ = smooth_step_seconds_ == 0.0 ? seconds : 0.95 * smooth_step_seconds_ + 0.05 * seconds;
    result_.seconds += seconds;
    tokens_done_ += tokens;
    step_flops_sum_ += flops;
    result_.steps = number;
    const double rate_of_flops = flops / seconds;
    log_.write({{"step", number}, {"loss", loss}, {"learning_rate", rate}, {"gradient_norm", norm}, {"tokens", tokens},
                {"seconds", seconds}, {"tokens_per_second", static_cast<double>(tokens) / seconds},
                {"flops_per_second", rate_of_flops}, {"mfu", rate_of_flops / result_.peak_flops_per_second}});
    const double smooth_flops = flops / smooth_step_seconds_;
    progress_.show({.step = number, .total_steps = options_.steps, .loss = loss, .held_out_loss = last_held_out_,
                    .tokens_per_second = static_cast<double>(tokens) / smooth_step_seconds_, .flops_per_second = smooth_flops,
                    .utilisation = smooth_flops / result_.peak_flops_per_second,
                    .seconds_left = smooth_step_seconds_ * static_cast<double>(options_.steps - number)});
}

/// Mean loss per held-out token; nothing without held-out text, or when a signal came meanwhile. 0: all rows.
std::optional<double> Run::evaluate(uint64_t max_rows) {
    if (data_.held_out.num_tokens() < 2) return std::nullopt;
    SequentialBatches batches(data_.held_out, {.seqlen = options_.row_length(), .split_documents = options_.split_documents},
                              options_.batch_size, max_rows);
    // The clock says where training steps spend their time.
    backend_.exec().times = nullptr;
    double sum = 0.0;
    int64_t targets = 0;
    for (Batch batch; batches.next(batch) && !InterruptGuard::requested();) {
        sum += model_.loss(batch);
        targets += count_targets(batch);
    }
    if (targets == 0 || InterruptGuard::requested()) return std::nullopt;
    return sum / static_cast<double>(targets);
}

void Run::save(int64_t number) {
    const TrainingState state{.step = number,
                              .data_position = position_,
                              .data_fingerprint = data_.fingerprint,
                              .rng = Random(options_.seed).state(),
                              .trainer = {{"options", nlohmann::json(to_json(options_))}, {"threads", backend_.team().size()}}};
    const HostView values(weights_.layout, weights_.values), first(weights_.layout, optimizer_.first_moments()),
        second(weights_.layout, optimizer_.second_moments());
    result_.checkpoint = store_.save({.config = &weights_.config, .layout = &weights_.layout, .values = values.get(),
                                      .first_moment = first.get(), .second_moment = second.get(),
                                      .tokenizer = &start_.tokenizer, .state = &state});
}

void Run::draw() {
    const std::string title = fmt::format("{}, {:.2f} M parameters", to_string(options_.model.architecture),
                                          static_cast<double>(result_.parameters) * 1e-6);
    const std::string svg = draw_svg({.title = title, .unit = "loss, nats per token", .training = log_.training(), .held_out = log_.held_out()});
    write_file_atomically(result_.plot, [&](DurableFile& file) { file.write(svg); });
}

TrainResult Run::go() {
    const InterruptGuard guard;
    const std::string where = backend_.device() == Device::cpu
                                  ? fmt::format("{} threads, measured peak", backend_.team().size())
                                  : fmt::format("{} in {}, stated peak", backend_.runtime().name(), to_string(options_.precision));
    progress_.message(fmt::format("{} parameters, {} tokens per step, {} steps, {} {:.1f} GFLOP/s", result_.parameters,
                                  options_.tokens_per_step(), options_.steps, where, result_.peak_flops_per_second * 1e-9));
    if (result_.steps > 0) progress_.message(fmt::format("resumed behind step {}", result_.steps));
    int64_t saved = start_.state ? start_.state->step : -1;
    while (result_.steps < options_.steps && !guard.requested()) {
        const int64_t number = result_.steps + 1;
        step(number);
        if (number == options_.steps) break;
        if (options_.eval_every > 0 && number % options_.eval_every == 0) {
            last_held_out_ = evaluate(static_cast<uint64_t>(options_.eval_rows));
            if (last_held_out_) log_.write({{"step", number}, {"held_out_loss", *last_held_out_}, {"rows", options_.eval_rows}});
        }
        if (options_.save_every > 0 && number % options_.save_every == 0) save(saved = number);
    }
    result_.interrupted = result_.steps < options_.steps;
    if (saved != result_.steps) save(result_.steps);
    else result_.checkpoint = list_checkpoints(options_.out).front();

    if (!result_.interrupted) {
        result_.held_out_loss = evaluate(0);
        if (result_.held_out_loss) {
            log_.write({{"step", result_.steps}, {"held_out_loss", *result_.held_out_loss}, {"rows", "all"}});
            if (data_.held_out.num_text_bytes() > 0)
                result_.held_out_loss_per_byte = *result_.held_out_loss * static_cast<double>(data_.held_out.num_tokens()) /
                                                 static_cast<double>(data_.held_out.num_text_bytes());
        }
    }
    result_.operators = operator_times(backend_.times());
    if (result_.seconds > 0.0) {
        result_.tokens_per_second = static_cast<double>(tokens_done_) / result_.seconds;
        result_.flops_per_second = step_flops_sum_ / result_.seconds;
        log_.write({{"step", result_.steps}, {"operators", result_.operators}});
    }
    draw();
    return result_;
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

constexpr int64_t kLongestRow = int64_t{1} << 24;

/// What a GPU of so many bytes has room for, by kind of recomputation: rows of the run's length in a batch, and tokens of a single
/// row, in multiples of 1024. Learned positions grow with the row.
nlohmann::ordered_json room(const TrainOptions& o, size_t bytes) {
    nlohmann::ordered_json rows, tokens;
    for (const Recompute recompute : {Recompute::none, Recompute::pointwise, Recompute::block}) {
        const auto needs = [&](const ModelConfig& model, int64_t max_rows) {
            return plan_memory(model, {.max_rows = max_rows, .recompute = recompute, .device = o.device, .precision = o.precision,
                                       .moments = o.moments}).total();
        };
        const std::string name(to_string(recompute));
        rows[name] = largest_that_fits(bytes, (int64_t{1} << 30) / o.row_length(), [&](int64_t n) { return needs(o.model, n * o.row_length()); });
        tokens[name] = 1024 * largest_that_fits(bytes, kLongestRow / 1024, [&](int64_t n) {
            ModelConfig longer = o.model;
            longer.context_length = std::max(longer.context_length, 1024 * n);
            return needs(longer, 1024 * n);
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

TrainResult train(const TrainOptions& options) {
    Progress progress(options.quiet);
    Run run(find_start(options, progress), progress);
    return run.go();
}

nlohmann::ordered_json describe(const TrainOptions& o) {
    const MemoryPlan memory = plan_memory(o.model, {.max_rows = o.batch_size * o.row_length(), .recompute = o.recompute,
                                                    .device = o.device, .precision = o.precision, .moments = o.moments});
    nlohmann::ordered_json out{{"architecture", to_string(o.model.architecture)},
                               {"device", to_string(o.device)},
                               {"precision", to_string(o.precision)},
                               {"moments", to_string(o.moments)},
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
