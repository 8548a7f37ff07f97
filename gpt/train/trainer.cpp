#include "gpt/train/trainer.hpp"

#include <unistd.h>

#include <algorithm>
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
#include "gpt/train/start.hpp"

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
    /// And what is known behind it.
    struct Made {
        double loss;
        float learning_rate;
        double gradient_norm;  // before clipping
        StepTotals totals;
        double seconds;
    };

    void fill_weights();
    void take_up(const TrainingState& state);
    Ahead prepare();
    void step(int64_t number);
    void report(const Made& made);
    std::optional<double> evaluate(uint64_t max_rows);
    void save(int64_t number);
    void draw();
    void announce();
    void conclude();
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
    std::optional<Optimizer> optimizer_;      // of a single process
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
      data_(load_data(start_, progress, group)),
      rows_(data_.train, rows_of(options_, group)),
      backend_(options_.device, threads_of(options_, group)),
      weights_(options_.model, backend_.memory(), options_.precision, num_processes(), options_.masters),
      model_(weights_, backend_,
             {.max_rows = rows_.largest_pass() * options_.row_length(),
              .recompute = options_.recompute,
              .gradients = options_.gradients}),
      graphs_(backend_) {
    if (group)
        parallel_ = std::make_unique<DataParallel>(*group, backend_, weights_, model_.gradients(), options_.optimizer,
                                                   options_.moments);
    else
        optimizer_.emplace(weights_.layout, options_.optimizer, backend_.memory(), options_.moments);
    if (leads()) log_.emplace(options_.out / "log.jsonl", start_.state ? start_.state->step : 0);
    backend_.exec().deterministic = options_.deterministic;
    fill_weights();
    if (start_.state) take_up(*start_.state);
    start_.checkpoint.reset();
    position_ = rows_.position();
    result_.parameters = options_.model.num_parameters();
    result_.log = options_.out / "log.jsonl";
    result_.plot = options_.out / "loss.svg";
    result_.peak_flops_per_second = backend_.peak(options_.precision);
    if (group_) group_->sum({&result_.peak_flops_per_second, 1});
}

void Run::fill_weights() {
    fill_by_host(weights_, [&](const ParameterArena& values) {
        if (start_.checkpoint)
            start_.checkpoint->read_values(weights_.layout, values);
        else
            initialize(weights_.layout, options_.model, options_.seed, values);
    });
}

/// Goes on where the checkpoint was: the optimizer's moments and the place in the data.
void Run::take_up(const TrainingState& state) {
    if (parallel_) {
        const ParameterArena first(weights_.layout), second(weights_.layout);
        start_.checkpoint->read_moments(weights_.layout, first, second);
        parallel_->set_moments(first, second);
    } else {
        fill_by_host(weights_.layout, optimizer_->first_moments(), [&](const ParameterArena& first) {
            fill_by_host(weights_.layout, optimizer_->second_moments(), [&](const ParameterArena& second) {
                start_.checkpoint->read_moments(weights_.layout, first, second);
            });
        });
    }
    rows_.seek(state.data_position);
    result_.steps = state.step;
    const auto warn_of_other = [&](const char* things, int now, int before) {
        if (now == before) return;
        progress_.message(
            fmt::format("resuming on {} {} a run of {}: sums are ordered differently from here on", now, things, before));
    };
    warn_of_other("processes", num_processes(), state.trainer.value("processes", 1));
    if (backend_.device() == Device::cpu)
        warn_of_other("threads", backend_.team().size(), state.trainer.value("threads", 0));
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
    // A GPU's marks around each operator cost time: there the clock looks at every 16th step, once all shapes have been
    // met.
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
        throw std::runtime_error(
            fmt::format("the loss is {} at step {}: lower the learning rate or raise the warm-up; the last checkpoint is as "
                        "it was", loss, number));
    result_.steps = number;
    report({.loss = loss,
            .learning_rate = rate,
            .gradient_norm = norm,
            .totals = totals,
            .seconds = seconds_since(begin)});
}

/// Into the log and before a person's eyes: the step that result_.steps counts last.
void Run::report(const Made& made) {
    const double seconds = made.seconds;
    const auto tokens = static_cast<double>(made.totals.tokens);
    const double flops = flops_of(options_.model, made.totals);
    smooth_step_seconds_ = smooth_step_seconds_ == 0.0 ? seconds : 0.95 * smooth_step_seconds_ + 0.05 * seconds;
    const double smooth_flops = flops / smooth_step_seconds_;
    result_.seconds += seconds;
    tokens_done_ += made.totals.tokens;
    step_flops_sum_ += flops;
    log({{"step", result_.steps},
         {"loss", made.loss},
         {"learning_rate", made.learning_rate},
         {"gradient_norm", made.gradient_norm},
         {"tokens", made.totals.tokens},
         {"seconds", seconds},
         {"tokens_per_second", tokens / seconds},
         {"flops_per_second", flops / seconds},
         {"mfu", flops / seconds / result_.peak_flops_per_second}});
    progress_.show({.step = result_.steps,
                    .total_steps = options_.steps,
                    .loss = made.loss,
                    .held_out_loss = last_held_out_,
                    .tokens_per_second = tokens / smooth_step_seconds_,
                    .flops_per_second = smooth_flops,
                    .utilisation = smooth_flops / result_.peak_flops_per_second,
                    .seconds_left = smooth_step_seconds_ * static_cast<double>(options_.steps - result_.steps)});
}

/// Mean loss per held-out token; nothing without held-out text, or when a signal came meanwhile. 0: all rows.
std::optional<double> Run::evaluate(uint64_t max_rows) {
    if (data_.held_out.num_tokens() < 2) return std::nullopt;
    const RowOptions row{.seqlen = options_.row_length(), .split_documents = options_.split_documents};
    SequentialBatches batches(data_.held_out, row, rows_.largest_pass(), max_rows);
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
    ParameterArena gathered_first, gathered_second;
    if (parallel_) {
        parallel_->gather_values();
        // The second one is put together where the first one was.
        const auto keep = [&](const ParameterArena& whole, ParameterArena& copy) {
            if (!leads()) return;
            copy = ParameterArena(weights_.layout);
            copy.copy_from(whole);
        };
        keep(parallel_->gather_first_moments(), gathered_first);
        keep(parallel_->gather_second_moments(), gathered_second);
    }
    if (!leads()) return;
    const HostView values(weights_);
    const HostView first(weights_.layout, parallel_ ? gathered_first : optimizer_->first_moments());
    const HostView second(weights_.layout, parallel_ ? gathered_second : optimizer_->second_moments());
    result_.checkpoint = store_->save({.config = &weights_.config, .layout = &weights_.layout, .values = values.get(),
                                      .first_moment = first.get(), .second_moment = second.get(),
                                      .tokenizer = &start_.tokenizer, .state = &state});
}

void Run::draw() {
    const std::string title = fmt::format("{}, {:.2f} M parameters", to_string(options_.model.architecture),
                                          static_cast<double>(result_.parameters) * 1e-6);
    const std::string svg = draw_svg({.title = title,
                                      .unit = "loss, nats per token",
                                      .training = log_->training(),
                                      .held_out = log_->held_out()});
    write_file_atomically(result_.plot, [&](DurableFile& file) { file.write(svg); });
}

void Run::announce() {
    std::string where =
        backend_.device() == Device::cpu
            ? fmt::format("{} threads, measured peak", backend_.team().size())
            : fmt::format("{} in {}, stated peak", backend_.runtime().name(), to_string(options_.precision));
    if (parallel_)
        where = fmt::format("{} processes over {}, each {}, together", num_processes(),
                            parallel_->communicator().name(), where);
    progress_.message(fmt::format("{} parameters, {} tokens per step, {} steps, {} {:.1f} GFLOP/s", result_.parameters,
                                  options_.tokens_per_step(), options_.steps, where,
                                  result_.peak_flops_per_second * 1e-9));
    if (result_.steps > 0) progress_.message(fmt::format("resumed behind step {}", result_.steps));
}

/// The result over the whole held-out part, and the averages of the run.
void Run::conclude() {
    result_.interrupted = result_.steps < options_.steps;
    if (!result_.interrupted) result_.held_out_loss = evaluate(0);
    if (result_.held_out_loss) {
        log({{"step", result_.steps}, {"held_out_loss", *result_.held_out_loss}, {"rows", "all"}});
        const auto tokens = static_cast<double>(data_.held_out.num_tokens());
        const auto bytes = static_cast<double>(data_.held_out.num_text_bytes());
        if (bytes > 0) result_.held_out_loss_per_byte = *result_.held_out_loss * tokens / bytes;
    }
    result_.operators = operator_times(backend_.times());
    if (result_.seconds > 0.0) {
        result_.tokens_per_second = static_cast<double>(tokens_done_) / result_.seconds;
        result_.flops_per_second = step_flops_sum_ / result_.seconds;
        log({{"step", result_.steps}, {"operators", result_.operators}});
    }
    if (leads()) draw();
}

TrainResult Run::go() {
    const InterruptGuard guard;
    announce();
    int64_t saved = start_.state ? start_.state->step : -1;
    while (result_.steps < options_.steps && !shall_stop()) {
        const int64_t number = result_.steps + 1;
        step(number);
        if (number == options_.steps) break;
        if (options_.eval_every > 0 && number % options_.eval_every == 0) {
            last_held_out_ = evaluate(static_cast<uint64_t>(options_.eval_rows));
            if (last_held_out_)
                log({{"step", number}, {"held_out_loss", *last_held_out_}, {"rows", options_.eval_rows}});
        }
        if (options_.save_every > 0 && number % options_.save_every == 0) save(saved = number);
    }
    if (saved != result_.steps)
        save(result_.steps);
    else if (leads())
        result_.checkpoint = list_checkpoints(options_.out).front();
    conclude();
    return result_;
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

}  // namespace strobe::gpt
