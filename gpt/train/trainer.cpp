#include "gpt/train/trainer.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include <fmt/core.h>

#include "gpt/distributed/data_parallel.hpp"
#include "gpt/distributed/step_rows.hpp"
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

/// Matrix FLOPs of a training step: attention by the true lengths of its sequences.
double flops_of(const ModelConfig& config, const StepTotals& step) {
    return config.flops_per_token(0) * static_cast<double>(step.tokens) +
           12.0 * static_cast<double>(config.num_layers * config.q_size()) * step.squared_lengths;
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
    options.validate();
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
    /// group: null for a single process. Rank 0 writes and reports; the others compute.
    Run(Start start, Progress& progress, ProcessGroup* group);
    TrainResult go();

private:
    /// What is known of a step before it is made.
    struct Ahead {
        SamplerPosition position;  // behind its batches
        StepTotals totals;
    };

    Ahead prepare();
    void step(int64_t number);
    std::optional<double> evaluate(uint64_t max_rows);
    void save(int64_t number);
    void draw();
    bool leads() const { return !group_ || group_->leads(); }
    int num_processes() const { return group_ ? group_->size() : 1; }
    bool shall_stop() const { return group_ ? voted_to_stop_ : InterruptGuard::requested(); }
    void log(const nlohmann::ordered_json& line) {
        if (log_) log_->write(line);
    }

    ProcessGroup* group_;
    Progress& progress_;
    Start start_;
    const TrainOptions& options_;
    std::optional<CheckpointStore> store_;
    Dataset data_;
    StepRows rows_;
    Backend backend_;
    Weights weights_;
    Model model_;
    std::optional<Optimizer> optimizer_;       // of a single process
    std::unique_ptr<DataParallel> parallel_;  // of several
    StepGraphs graphs_;
    std::optional<RunLog> log_;
    std::vector<Batch> batches_;
    std::optional<Ahead> ahead_;  // of the step to come; drawn from the data and written down for the device already
    SamplerPosition position_;    // behind the last step that was made
    TrainResult result_;
    double smooth_step_seconds_ = 0.0;
    double step_flops_sum_ = 0.0;
    int64_t tokens_done_ = 0;
    OpTimes* times_ = &backend_.times();
    int64_t steps_here_ = 0;
    std::optional<double> last_held_out_;
    bool voted_to_stop_ = false;
};

/// The processes were started with the same options and see the same checkpoint.
void check_agreement(const Start& start, ProcessGroup& group) {
    nlohmann::ordered_json mine = to_json(start.options);
    mine["device"] = to_string(start.options.device);
    mine["precision"] = to_string(start.options.precision);
    mine["moments"] = to_string(start.options.moments);
    mine["gradients"] = to_string(start.options.gradients);
    mine["eval-every"] = start.options.eval_every;
    mine["eval-rows"] = start.options.eval_rows;
    mine["save-every"] = start.options.save_every;
    mine["step to resume from"] = start.state ? start.state->step : 0;
    const std::vector<std::string> all = group.exchange(mine.dump());
    const auto leaders = nlohmann::ordered_json::parse(all.front());
    for (size_t rank = 1; rank < all.size(); ++rank) {
        const auto theirs = nlohmann::ordered_json::parse(all[rank]);
        for (const auto& [name, value] : theirs.items())
            if (value != leaders[name])
                throw std::invalid_argument(fmt::format("{} is {} for rank {} and {} for rank 0: all processes need the same options and "
                                                        "must see the same files", name, value.dump(), rank, leaders[name].dump()));
    }
}

Dataset load(const Start& start, Progress& progress, ProcessGroup* group) {
    progress.message("reading " + start.options.data);
    // One process of a machine makes the shards, the others find them.
    const bool first = !group || group->launch().local_rank == 0;
    if (!first) group->barrier();
    Dataset data = load_dataset({.source = start.options.data, .cache = {}, .held_out = start.options.held_out,
                                 .num_threads = std::max(1, start.options.threads), .progress = {}},
                                start.tokenizer);
    if (start.state && start.state->data_fingerprint != data.fingerprint)
        throw std::invalid_argument(fmt::format("resume: {} is not the text that the run was started with", start.options.data));
    if (!group) return data;
    if (first) group->barrier();
    const std::vector<std::string> all = group->exchange(std::to_string(data.fingerprint));
    for (size_t rank = 1; rank < all.size(); ++rank)
        if (all[rank] != all.front())
            throw std::invalid_argument(fmt::format("data: {} is another text for rank {} than for rank 0", start.options.data, rank));
    return data;
}

StepRowsOptions rows_of(const TrainOptions& o, const ProcessGroup* group) {
    return {.row = {.seqlen = o.row_length(), .split_documents = o.split_documents},
            .rows_per_step = o.batch_size * o.accumulate,
            .rows_per_pass = o.batch_size,
            .seed = o.seed,
            .rank = group ? group->rank() : 0,
            .size = group ? group->size() : 1};
}

/// The processors of a machine are shared by its processes, unless a launcher has given each its own.
int threads_of(const TrainOptions& o, const ProcessGroup* group) {
    const bool bound = usable_processors() < static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
    if (o.threads > 0 || !group || bound) return o.threads;
    return std::max(1, usable_processors() / group->launch().local_size);
}

Run::Run(Start start, Progress& progress, ProcessGroup* group)
    : group_(group),
      progress_(progress),
      start_(std::move(start)),
      options_(start_.options),
      store_(leads() ? std::optional<CheckpointStore>(std::in_place, options_.out) : std::nullopt),
      data_(load(start_, progress, group)),
      rows_(data_.train, rows_of(options_, group)),
      backend_(options_.device, threads_of(options_, group)),
      weights_(options_.model, backend_.memory(), options_.precision, num_processes()),
      model_(weights_, backend_, {.max_rows = rows_.largest_pass() * options_.row_length(), .recompute = options_.recompute, .gradients = options_.gradients}),
      graphs_(backend_) {
    if (group)
        parallel_ = std::make_unique<DataParallel>(*group, backend_, weights_, model_.gradients(), options_.optimizer, options_.moments);
    else
        optimizer_.emplace(weights_.layout, options_.optimizer, backend_.memory(), options_.moments);
    if (leads()) log_.emplace(options_.out / "log.jsonl", start_.state ? start_.state->step : 0);
    backend_.exec().deterministic = options_.deterministic;
    fill_by_host(weights_, [&](const ParameterArena& values) {
        if (start_.checkpoint)
            start_.checkpoint->read_values(weights_.layout, values);
        else
            initialize(weights_.layout, options_.model, options_.seed, values);
    });
    if (start_.state) {
        if (parallel_) {
            const ParameterArena first(weights_.layout), second(weights_.layout);
            start_.checkpoint->read_moments(weights_.layout, first, second);
            parallel_->set_moments(first, second);
        } else {
            fill_by_host(weights_.layout, optimizer_->first_moments(), [&](const ParameterArena& first) {
                fill_by_host(weights_.layout, optimizer_->second_moments(),
                             [&](const ParameterArena& second) { start_.checkpoint->read_moments(weights_.layout, first, second); });
            });
        }
        rows_.seek(start_.state->data_position);
        result_.steps = start_.state->step;
        const int processes = start_.state->trainer.value("processes", 1);
        if (processes != num_processes())
            progress_.message(fmt::format("resuming on {} processes a run of {}: sums are ordered differently from here on",
                                          num_processes(), processes));
        const int threads = start_.state->trainer.value("threads", 0);
        if (backend_.device() == Device::cpu && threads != backend_.team().size())
            progress_.message(fmt::format("resuming on {} threads a run of {}: sums are ordered differently from here on",
                                          backend_.team().size(), threads));
    }
    start_.checkpoint.reset();
    position_ = rows_.position();
    result_.parameters = options_.model.num_parameters();
    result_.log = options_.out / "log.jsonl";
    result_.plot = options_.out / "loss.svg";
    result_.peak_flops_per_second = backend_.peak(options_.precision);
    if (group_) group_->sum({&result_.peak_flops_per_second, 1});
}

Run::Ahead Run::prepare() {
    const StepTotals totals = rows_.next(batches_);
    model_.prepare(batches_, 1.0f / static_cast<float>(std::max<int64_t>(1, totals.targets)));
    return {rows_.position(), totals};
}

void Run::step(int64_t number) {
    const auto begin = Clock::now();
    if (!ahead_) ahead_ = prepare();
    const auto [position, totals] = *std::exchange(ahead_, std::nullopt);
    // A GPU's marks around each operator cost time: there the clock looks at every 16th step, once all shapes have been met.
    Exec& exec = backend_.exec();
    exec.times = backend_.device() == Device::cpu || steps_here_ % 16 == 1 ? times_ : nullptr;
    ++steps_here_;
    const float rate = learning_rate_at(options_.optimizer, number, options_.steps);
    model_.begin_step();
    parallel_ ? parallel_->set_rates(number, rate) : optimizer_->set_rates(number, rate);
    const auto enqueue = [&] {
        model_.passes(parallel_.get());
        parallel_ ? parallel_->update(model_.loss_sum()) : optimizer_->update(exec, weights_, model_.gradients());
    };
    options_.graph ? graphs_.run(model_.step_shape(), enqueue) : enqueue();
    // A GPU is busy with this step now, and the host gets the next one ready.
    if (backend_.device() != Device::cpu && number < options_.steps) ahead_ = prepare();
    if (group_) voted_to_stop_ = group_->any(InterruptGuard::requested());
    const double norm = parallel_ ? parallel_->gradient_norm() : optimizer_->gradient_norm();
    const double loss = model_.take_loss() / static_cast<double>(std::max<int64_t>(1, totals.targets));
    position_ = position;
    if (exec.times) backend_.times();
    if (!std::isfinite(loss))
        throw std::runtime_error(fmt::format("the loss is {} at step {}: lower the learning rate or raise the warm-up; the last "
                                             "checkpoint is as it was", loss, number));

    const double seconds = seconds_since(begin);
    smooth_step_seconds_ = smooth_step_seconds_ == 0.0 ? seconds : 0.95 * smooth_step_seconds_ + 0.05 * seconds;
    const auto tokens = static_cast<double>(totals.tokens);
    const double flops = flops_of(options_.model, totals);
    result_.seconds += seconds;
    tokens_done_ += totals.tokens;
    step_flops_sum_ += flops;
    result_.steps = number;
    const double rate_of_flops = flops / seconds;
    log({{"step", number}, {"loss", loss}, {"learning_rate", rate}, {"gradient_norm", norm}, {"tokens", totals.tokens},
         {"seconds", seconds}, {"tokens_per_second", tokens / seconds}, {"flops_per_second", rate_of_flops},
         {"mfu", rate_of_flops / result_.peak_flops_per_second}});
    const double smooth_flops = flops / smooth_step_seconds_;
    progress_.show({.step = number, .total_steps = options_.steps, .loss = loss, .held_out_loss = last_held_out_,
                    .tokens_per_second = tokens / smooth_step_seconds_, .flops_per_second = smooth_flops,
                    .utilisation = smooth_flops / result_.peak_flops_per_second,
                    .seconds_left = smooth_step_seconds_ * static_cast<double>(options_.steps - number)});
}

/// Mean loss per held-out token; nothing without held-out text, or when a signal came meanwhile. 0: all rows.
std::optional<double> Run::evaluate(uint64_t max_rows) {
    if (data_.held_out.num_tokens() < 2) return std::nullopt;
    SequentialBatches batches(data_.held_out, {.seqlen = options_.row_length(), .split_documents = options_.split_documents},
                              rows_.largest_pass(), max_rows);
    // The clock says where training steps spend their time.
    backend_.exec().times = nullptr;
    double sum = 0.0, targets = 0.0;
    int turn = 0;
    for (Batch batch; batches.next(batch) && !InterruptGuard::requested();) {
        if (group_ && turn++ % group_->size() != group_->rank()) continue;
        sum += model_.loss(batch);
        targets += static_cast<double>(count_targets(batch));
    }
    double sums[] = {sum, targets, InterruptGuard::requested() ? 1.0 : 0.0};
    if (group_) group_->sum(sums);
    if (sums[1] == 0.0 || sums[2] > 0.0) return std::nullopt;
    return sums[0] / sums[1];
}

void Run::save(int64_t number) {
    const TrainingState state{.step = number,
                              .data_position = position_,
                              .data_fingerprint = data_.fingerprint,
                              .rng = Random(options_.seed).state(),
                              .trainer = {{"options", nlohmann::json(to_json(options_))},
                                          {"threads", backend_.team().size()},
                                          {"processes", num_processes()}}};
    std::array<ParameterArena, 2> gathered;
    if (parallel_) {
        parallel_->gather_values();
        for (size_t i = 0; i < gathered.size(); ++i) {
            const ParameterArena& whole = i == 0 ? parallel_->gather_first_moments() : parallel_->gather_second_moments();
            if (!leads()) continue;
            gathered[i] = ParameterArena(weights_.layout);
            gathered[i].copy_from(whole);
        }
    }
    if (!leads()) return;
    const HostView values(weights_), first(weights_.layout, parallel_ ? gathered[0] : optimizer_->first_moments()),
        second(weights_.layout, parallel_ ? gathered[1] : optimizer_->second_moments());
    result_.checkpoint = store_->save({.config = &weights_.config, .layout = &weights_.layout, .values = values.get(),
                                      .first_moment = first.get(), .second_moment = second.get(),
                                      .tokenizer = &start_.tokenizer, .state = &state});
}

void Run::draw() {
    const std::string title = fmt::format("{}, {:.2f} M parameters", to_string(options_.model.architecture),
                                          static_cast<double>(result_.parameters) * 1e-6);
    const std::string svg = draw_svg({.title = title, .unit = "loss, nats per token", .training = log_->training(), .held_out = log_->held_out()});
    write_file_atomically(result_.plot, [&](DurableFile& file) { file.write(svg); });
}

TrainResult Run::go() {
    const InterruptGuard guard;
    std::string where = backend_.device() == Device::cpu
                                  ? fmt::format("{} threads, measured peak", backend_.team().size())
                                  : fmt::format("{} in {}, stated peak", backend_.runtime().name(), to_string(options_.precision));
    if (parallel_) where = fmt::format("{} processes over {}, each {}, together", num_processes(), parallel_->communicator().name(), where);
    progress_.message(fmt::format("{} parameters, {} tokens per step, {} steps, {} {:.1f} GFLOP/s", result_.parameters,
                                  options_.tokens_per_step(), options_.steps, where, result_.peak_flops_per_second * 1e-9));
    if (result_.steps > 0) progress_.message(fmt::format("resumed behind step {}", result_.steps));
    int64_t saved = start_.state ? start_.state->step : -1;
    while (result_.steps < options_.steps && !shall_stop()) {
        const int64_t number = result_.steps + 1;
        step(number);
        if (number == options_.steps) break;
        if (options_.eval_every > 0 && number % options_.eval_every == 0) {
            last_held_out_ = evaluate(static_cast<uint64_t>(options_.eval_rows));
            if (last_held_out_) log({{"step", number}, {"held_out_loss", *last_held_out_}, {"rows", options_.eval_rows}});
        }
        if (options_.save_every > 0 && number % options_.save_every == 0) save(saved = number);
    }
    result_.interrupted = result_.steps < options_.steps;
    if (saved != result_.steps) save(result_.steps);
    else if (leads()) result_.checkpoint = list_checkpoints(options_.out).front();

    if (!result_.interrupted) {
        result_.held_out_loss = evaluate(0);
        if (result_.held_out_loss) {
            log({{"step", result_.steps}, {"held_out_loss", *result_.held_out_loss}, {"rows", "all"}});
            if (data_.held_out.num_text_bytes() > 0)
                result_.held_out_loss_per_byte = *result_.held_out_loss * static_cast<double>(data_.held_out.num_tokens()) /
                                                 static_cast<double>(data_.held_out.num_text_bytes());
        }
    }
    result_.operators = operator_times(backend_.times());
    if (result_.seconds > 0.0) {
        result_.tokens_per_second = static_cast<double>(tokens_done_) / result_.seconds;
        result_.flops_per_second = step_flops_sum_ / result_.seconds;
        log({{"step", result_.steps}, {"operators", result_.operators}});
    }
    if (leads()) draw();
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
    for (const Recompute recompute : {Recompute::none, Recompute::norms, Recompute::pointwise, Recompute::block}) {
        const auto needs = [&](const ModelConfig& model, int64_t max_rows) {
            return plan_memory(model, {.max_rows = max_rows, .recompute = recompute, .gradients = o.gradients, .device = o.device,
                                       .precision = o.precision, .moments = o.moments, .processes = o.launch.size}).total();
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
    const std::unique_ptr<ProcessGroup> group = join_group(options.launch);
    Progress progress(options.quiet || (group && !group->leads()));
    try {
        Start start = find_start(options, progress);
        if (group) check_agreement(start, *group);
        if (group && options.device == Device::cuda) cuda::choose_gpu(*group);
        Run run(std::move(start), progress, group.get());
        return run.go();
    } catch (const ConnectionError& e) {
        // Whose end it was the watching thread may know better.
        if (group) group->await_verdict();
        if (group) group->fail(e.what());
        throw;
    } catch (const std::exception& e) {
        if (group) group->fail(e.what());
        throw;
    }
}

nlohmann::ordered_json describe(const TrainOptions& o) {
    const int64_t rows = largest_pass(o.batch_size * o.accumulate, o.batch_size, o.launch.size);
    const MemoryPlan memory = plan_memory(o.model, {.max_rows = rows * o.row_length(), .recompute = o.recompute, .gradients = o.gradients,
                                                    .device = o.device, .precision = o.precision, .moments = o.moments, .processes = o.launch.size});
    nlohmann::ordered_json out{{"architecture", to_string(o.model.architecture)},
                               {"device", to_string(o.device)},
                               {"precision", to_string(o.precision)},
                               {"moments", to_string(o.moments)},
                               {"gradients", to_string(o.gradients)},
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
