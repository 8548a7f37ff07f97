// strobe train: a GPT from text.
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "commands.hpp"
#include "gpt/distributed/spawn.hpp"
#include "gpt/train/describe.hpp"
#include "gpt/train/trainer.hpp"
#include "gpt_commands.hpp"

namespace strobe::gpt {

namespace {

constexpr int kExitInterrupted = 128 + SIGINT;

struct Arguments {
    TrainOptions options;
    std::string architecture = "llama";
    std::string recompute = "none";
    std::string device = "cpu", precision, moments = "fp32", gradients = "fp32", masters = "fp32";
    int64_t num_heads_k = 0, head_dim = 0, ffn_size = 0;
    int processes = 0;
    bool across_documents = false, untied = false, nondeterministic = false, no_graph = false;
    bool plan = false, json = false;
};

/// Fills what follows from other options.
TrainOptions complete(const Arguments& a) {
    TrainOptions o = a.options;
    ModelConfig& m = o.model;
    const ModelConfig asked = m;
    m = architecture_from_string(a.architecture) == Architecture::gpt2
            ? gpt2_config(asked.num_layers, asked.hidden_size, asked.num_heads, asked.context_length, asked.vocab_size)
            : llama_config(asked.num_layers, asked.hidden_size, asked.num_heads,
                           a.num_heads_k > 0 ? a.num_heads_k : asked.num_heads, asked.context_length, asked.vocab_size);
    if (a.num_heads_k > 0) m.num_heads_k = a.num_heads_k;
    if (a.head_dim > 0) m.head_dim = a.head_dim;
    if (a.ffn_size > 0) m.ffn_size = a.ffn_size;
    m.rope_theta = asked.rope_theta;
    m.init_std = asked.init_std;
    m.tied_head = !a.untied;
    o.recompute = recompute_from_string(a.recompute);
    o.split_documents = !a.across_documents;
    o.device = device_from_string(a.device);
    o.precision = precision_for(o.device, a.precision);
    o.moments = precision_from_string(a.moments);
    o.gradients = precision_from_string(a.gradients);
    o.masters = precision_from_string(a.masters);
    o.deterministic = !a.nondeterministic;
    o.graph = !a.no_graph;
    return o;
}

nlohmann::ordered_json to_json(const TrainResult& r) {
    nlohmann::ordered_json out{{"steps", r.steps},
                               {"interrupted", r.interrupted},
                               {"parameters", r.parameters},
                               {"seconds", r.seconds},
                               {"tokens_per_second", r.tokens_per_second},
                               {"flops_per_second", r.flops_per_second},
                               {"peak_flops_per_second", r.peak_flops_per_second}};
    if (r.held_out_loss) out["held_out_loss"] = *r.held_out_loss;
    if (r.held_out_loss_per_byte) out["held_out_loss_per_byte"] = *r.held_out_loss_per_byte;
    out["checkpoint"] = r.checkpoint.string();
    out["log"] = r.log.string();
    out["loss_curve"] = r.plot.string();
    out["operators"] = r.operators;
    return out;
}

void print_summary(const TrainResult& r) {
    fmt::print("{} after {} steps; {:.1f} s in steps, {:.0f} tokens/s, {:.1f} GFLOP/s, {:.0f} % of the peak\n",
               r.interrupted ? "stopped" : "done", r.steps, r.seconds, r.tokens_per_second, r.flops_per_second * 1e-9,
               100.0 * r.flops_per_second / r.peak_flops_per_second);
    for (const auto& [name, row] : r.operators.items()) {
        fmt::print("  {:<14} {:5.1f} %", name, 100.0 * row["share"].get<double>());
        if (row.contains("flops_per_second"))
            fmt::print("  {:8.1f} GFLOP/s", row["flops_per_second"].get<double>() * 1e-9);
        fmt::print("\n");
    }
    if (r.held_out_loss) fmt::print("held-out loss  {:.4f} nats per token", *r.held_out_loss);
    if (r.held_out_loss_per_byte) fmt::print(", {:.4f} nats per byte", *r.held_out_loss_per_byte);
    if (r.held_out_loss) fmt::print("\n");
    fmt::print("checkpoint     {}\nlog            {}\nloss curve     {}\n", r.checkpoint.string(), r.log.string(),
               r.plot.string());
    if (r.interrupted) fmt::print("go on with     strobe train --resume --out {}\n", r.checkpoint.parent_path().string());
}

/// A launcher's processes, or those that --processes asks for. False: this process is none of them but has started them.
bool take_place(const Arguments& a, TrainOptions& options) {
    options.launch = read_launch();
    const int launched = options.launch.size;
    if (a.processes == 0 || a.processes == launched) return true;
    if (launched > 1)
        throw std::invalid_argument(
            fmt::format("processes is {}, but a launcher has started {}: leave --processes out", a.processes, launched));
    options.launch.size = a.processes;
    if (a.plan) return true;
    if (const int status = run_as_processes(a.processes); status != 0) throw cli::Exit{status, ""};
    return false;
}

void run_train(const Arguments& a) {
    TrainOptions options = complete(a);
    if (!take_place(a, options)) return;
    if (a.plan) {
        options.validate();
        fmt::print("{}\n", describe(options).dump(2));
        return;
    }
    options.quiet |= a.json;
    const TrainResult result = train(options);
    if (options.launch.rank == 0) {
        if (a.json)
            fmt::print("{}\n", to_json(result).dump(2));
        else
            print_summary(result);
    }
    std::fflush(stdout);
    if (result.interrupted) throw cli::Exit{kExitInterrupted, ""};
}

void add_model_options(CLI::App& command, Arguments& a) {
    ModelConfig& m = a.options.model;
    command.option_defaults()->group("Model");
    command.add_option("--arch", a.architecture, "gpt2 or llama")
        ->check(CLI::IsMember({"gpt2", "llama"}))->capture_default_str();
    command.add_option("--layers", m.num_layers, "Transformer blocks")->capture_default_str();
    command.add_option("--hidden", m.hidden_size, "Width of the residual stream")->capture_default_str();
    command.add_option("--heads", m.num_heads, "Query heads")->capture_default_str();
    command.add_option("--kv-heads", a.num_heads_k, "llama: key and value heads (default: as many as heads)");
    command.add_option("--head-dim", a.head_dim, "llama: default hidden / heads");
    command.add_option("--ffn", a.ffn_size, "Default: 4 hidden (gpt2), 8/3 hidden (llama)");
    command.add_option("--context", m.context_length, "Longest sequence")->capture_default_str();
    command.add_option("--rope-theta", m.rope_theta, "llama: base of the rotary frequencies")->capture_default_str();
    command.add_option("--init-std", m.init_std, "Of fresh weights")->capture_default_str();
    command.add_flag("--untied", a.untied, "llama: the head has a weight of its own");
    command.add_option("--init", a.options.init, "Start from this checkpoint's weights (and its model, and tokenizer)");
}

void add_step_options(CLI::App& command, Arguments& a) {
    TrainOptions& o = a.options;
    OptimizerOptions& p = o.optimizer;
    command.option_defaults()->group("Training");
    command.add_option("--steps", o.steps, "Optimizer steps")->capture_default_str();
    command.add_option("--batch", o.batch_size, "Rows in one pass")->capture_default_str();
    command.add_option("--seqlen", o.seqlen, "Tokens of a row (default: the context)");
    command.add_option("--accumulate", o.accumulate, "Passes per step")->capture_default_str();
    command.add_option("--lr", p.learning_rate, "Peak learning rate")->capture_default_str();
    command.add_option("--final-lr", p.final_fraction, "At the end, as a fraction of the peak")->capture_default_str();
    command.add_option("--warmup", p.warmup_steps, "Steps")->capture_default_str();
    command.add_option("--weight-decay", p.weight_decay, "AdamW's, of matrices")->capture_default_str();
    command.add_option("--beta1", p.beta1, "AdamW's")->capture_default_str();
    command.add_option("--beta2", p.beta2, "AdamW's")->capture_default_str();
    command.add_option("--clip", p.clip_norm, "Largest gradient norm; 0: no limit")->capture_default_str();
    command.add_option("--seed", o.seed, "Of fresh weights and of the order of rows")->capture_default_str();
    command.add_option("--recompute", a.recompute,
                       "What the backward computes again to save memory: none, norms, pointwise (norms and the MLP's "
                       "nonlinearity) or block (all but a block's input)")
        ->check(CLI::IsMember({"none", "norms", "pointwise", "block"}))->capture_default_str();
}

void add_data_options(CLI::App& command, Arguments& a) {
    TrainOptions& o = a.options;
    command.option_defaults()->group("Data");
    command.add_option("--data", o.data, "A text file, a folder of text files, or token shards");
    command.add_option("--tokenizer", o.tokenizer, "bytes, or a vocabulary (folder, vocab.json, tokenizer.json, .tiktoken)")
        ->capture_default_str();
    command.add_option("--held-out", o.held_out, "Share of the text for evaluation")->capture_default_str();
    command.add_flag("--across-documents", a.across_documents, "Let attention cross document borders");
}

void add_run_options(CLI::App& command, Arguments& a) {
    TrainOptions& o = a.options;
    command.add_option("--out", o.out, "Folder of checkpoints, log and loss curve")->capture_default_str();
    command.add_flag("--resume", o.resume,
                     "Go on from the newest checkpoint in --out, with the options it was started with; start if there is "
                     "none");
    command.add_flag("--overwrite", o.overwrite, "Start anew although --out holds a run");
    command.add_option("--eval-every", o.eval_every, "Steps; 0: only at the end")->capture_default_str();
    command.add_option("--eval-rows", o.eval_rows, "Rows of an evaluation on the way; the last takes all")
        ->capture_default_str();
    command.add_option("--save-every", o.save_every, "Steps; 0: only at the end")->capture_default_str();
    command.add_option("--device", a.device, "cpu or cuda")
        ->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
    command.add_option("--precision", a.precision, "bf16 or fp32 (default: bf16 on cuda, fp32 on the cpu)")
        ->check(CLI::IsMember({"bf16", "fp32"}));
    command.add_option("--moments", a.moments,
                       "Element type of AdamW's moments; bf16 takes half the memory and is rounded stochastically")
        ->check(CLI::IsMember({"bf16", "fp32"}))->capture_default_str();
    command.add_option("--gradients", a.gradients,
                       "cuda: element type of the gradients of matrices; bf16 takes half the memory, where a step is one "
                       "pass of one process")
        ->check(CLI::IsMember({"bf16", "fp32"}))->capture_default_str();
    command.add_option("--masters", a.masters,
                       "cuda: element type of the weights of matrices that AdamW updates; bf16 are those that products read, "
                       "half the memory, rounded stochastically")
        ->check(CLI::IsMember({"bf16", "fp32"}))->capture_default_str();
    command.add_flag("--non-deterministic", a.nondeterministic,
                     "cuda: attention's backward may differ by rounding between runs, and is faster");
    command.add_flag("--no-graph", a.no_graph,
                     "cuda: ask for a step's operators one by one instead of replaying them as one CUDA graph");
    command.add_option("--processes", a.processes,
                       "Share each step's rows among so many processes, which this one starts; on cuda each takes a GPU "
                       "(torchrun, mpirun and srun do without this option)")
        ->check(CLI::Range(1, 1024));
    command.add_option("--threads", o.threads, "0: as many as the process may use")->capture_default_str();
    command.add_flag("--plan", a.plan, "Print sizes and memory of the run, and leave");
    command.add_flag("--json", a.json, "One JSON object on standard output instead of progress and summary");
    command.add_flag("--quiet", o.quiet, "No progress");
}

}  // namespace

void add_train_command(CLI::App& app) {
    CLI::App* command = app.add_subcommand("train", "Train a GPT on text");
    command->option_defaults()->take_last();
    const auto arguments = std::make_shared<Arguments>();
    add_run_options(*command, *arguments);
    add_data_options(*command, *arguments);
    add_model_options(*command, *arguments);
    add_step_options(*command, *arguments);
    command->callback([arguments] { run_train(*arguments); });
}

}  // namespace strobe::gpt
