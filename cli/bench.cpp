// strobe bench: seconds and FLOP/s of the benchmark cases, by itself or in turn with a peer on the same inputs.
#include <fcntl.h>
#include <fmt/core.h>
#include <sys/mman.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "commands.hpp"
#include "core/numeric.hpp"
#include "cpu/cpu_backend.hpp"
#include "device.hpp"
#include "peer.hpp"
#include "progress.hpp"
#include "record.hpp"
#include "strobe/strobe.hpp"
#include "tensor.hpp"
#include "verify/case.hpp"

namespace strobe::cli {
namespace {

using verify::Case;

struct BenchOptions : CommonOptions {
    std::string vs;
    std::string python = "python3";
    std::string implementation;
    double seconds = 1.0;  // per cell and direction
    int min_repeats = 3;
};

/// A file in memory that a peer can map: q, k, v, dout behind one another.
class SharedFile {
public:
    explicit SharedFile(size_t bytes) : bytes_(std::max<size_t>(bytes, 1)) {
        fd_ = memfd_create("strobe-bench", 0);
        if (fd_ < 0 || ftruncate(fd_, static_cast<off_t>(bytes_)) != 0) {
            throw Exit{kExitDevice, fmt::format("cannot make a memory file of {} bytes", bytes_)};
        }
        data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
        if (data_ == MAP_FAILED) throw Exit{kExitDevice, fmt::format("cannot map {} bytes", bytes_)};
    }
    ~SharedFile() {
        munmap(data_, bytes_);
        close(fd_);
    }
    SharedFile(const SharedFile&) = delete;
    SharedFile& operator=(const SharedFile&) = delete;

    std::byte* data() const { return static_cast<std::byte*>(data_); }
    std::string path() const { return fmt::format("/proc/{}/fd/{}", getpid(), fd_); }

private:
    size_t bytes_;
    int fd_ = -1;
    void* data_ = nullptr;
};

/// Standard normal numbers: a table of them, drawn from at random.
void fill_normal(void* data, DType dtype, int64_t count, uint64_t seed) {
    std::mt19937_64 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float> table(1 << 16);
    for (float& x : table) x = normal(engine);
    for (int64_t i = 0; i < count; i += 4) {
        uint64_t bits = engine();
        for (int64_t j = i; j < std::min(count, i + 4); ++j, bits >>= 16) store_element(data, dtype, j, table[bits & 0xFFFF]);
    }
}

/// Memory on the device that is being timed.
class DeviceBuffer {
public:
    DeviceBuffer(verify::Memory& memory, size_t bytes) : memory_(memory), data_(memory.allocate(bytes)) {}
    ~DeviceBuffer() { memory_.release(data_); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;

    std::byte* data() const { return static_cast<std::byte*>(data_); }

private:
    verify::Memory& memory_;
    void* data_;
};

/// One dense case on a device, ready to run again and again.
class BenchProblem {
public:
    BenchProblem(const Case& c, const BenchOptions& options, const Device& device)
        : memory_(device_memory(device)),
          elements_q_(c.batch * c.seqlen_q * c.num_heads * c.head_dim),
          elements_k_(c.batch * c.seqlen_k * c.num_heads_k * c.head_dim),
          bytes_(dtype_bytes(static_cast<int32_t>(c.dtype))),
          tensor_bytes_(static_cast<size_t>(2 * elements_q_ + 2 * elements_k_) * bytes_),
          shared_(tensor_bytes_),
          inputs_(memory_, tensor_bytes_),
          outputs_(memory_, tensor_bytes_),
          lse_(memory_, static_cast<size_t>(c.batch * c.num_heads * c.seqlen_q) * sizeof(float)) {
        fill_normal(shared_.data(), c.dtype, 2 * elements_q_ + 2 * elements_k_, 1);
        memory_.upload(inputs_.data(), shared_.data(), tensor_bytes_);
        std::byte* in = inputs_.data();
        std::byte* out = outputs_.data();
        const auto view = [&](std::byte*& at, int64_t seqlen, int heads) {
            const Tensor t(at, c.dtype, {c.batch, seqlen, heads, c.head_dim}, device);
            at += static_cast<size_t>(num_elements(t)) * bytes_;
            return t;
        };
        attention_.q = view(in, c.seqlen_q, c.num_heads);
        attention_.k = view(in, c.seqlen_k, c.num_heads_k);
        attention_.v = view(in, c.seqlen_k, c.num_heads_k);
        attention_.window_left = c.window_left;
        attention_.window_right = c.window_right;
        attention_.softcap = c.softcap;
        attention_.dropout_p = c.dropout_p;
        attention_.deterministic = c.deterministic;
        attention_.num_threads = options.threads;
        if (!options.implementation.empty()) attention_.implementation = options.implementation.c_str();
        backward_.dout = view(in, c.seqlen_q, c.num_heads);
        forward_.out = backward_.out = view(out, c.seqlen_q, c.num_heads);
        forward_.lse = backward_.lse =
            Tensor(lse_.data(), DType::f32, {c.batch, c.num_heads, c.seqlen_q}, device);
        backward_.dq = view(out, c.seqlen_q, c.num_heads);
        backward_.dk = view(out, c.seqlen_k, c.num_heads_k);
        backward_.dv = view(out, c.seqlen_k, c.num_heads_k);

        const Plan forward_plan = plan(attention_, forward_), backward_plan = plan(attention_, backward_);
        implementation_ = forward_plan.implementation;
        workspace_bytes_ = std::max(forward_plan.workspace_bytes, backward_plan.workspace_bytes);
        workspace_ = std::make_unique<DeviceBuffer>(memory_, workspace_bytes_);
        forward_.workspace = backward_.workspace = {workspace_->data(), workspace_bytes_};
    }

    void run_forward() { forward(attention_, forward_); }
    void run_backward() { backward(attention_, backward_); }
    const std::string& implementation() const { return implementation_; }
    size_t workspace_bytes() const { return workspace_bytes_; }
    /// The inputs on the host, as a file that another process can map.
    std::string input_path() const { return shared_.path(); }

private:
    verify::Memory& memory_;
    int64_t elements_q_, elements_k_;
    size_t bytes_, tensor_bytes_;
    SharedFile shared_;
    DeviceBuffer inputs_, outputs_, lse_;
    size_t workspace_bytes_ = 0;
    std::unique_ptr<DeviceBuffer> workspace_;
    Attention attention_;
    Forward forward_;
    Backward backward_;
    std::string implementation_;
};

double seconds_of(const std::function<void()>& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t n = values.size();
    return n % 2 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

struct Timing {
    double seconds = 0;       // median
    double peer_seconds = 0;  // median; 0 without a peer
    size_t repeats = 0;

    double ratio() const { return peer_seconds / seconds; }
};

/// Runs `mine` and, if there is a peer, `theirs` in turn, after one uncounted round, until the time for the cell is used.
/// Where a round takes long beside the cell's time, its noise is small and one counted round is enough. In short cells a turn
/// begins with uncounted runs: caches and threads are warm for both.
Timing measure_on_cpu(const BenchOptions& options, const std::function<void()>& mine, const std::function<double()>& theirs) {
    constexpr double kTakeover = 0.02, kShort = 0.2;
    const double round = seconds_of(mine) + (theirs ? theirs() : 0);
    const int least = round > 5 * options.seconds ? 1 : options.min_repeats;
    const size_t most = theirs ? 30 : 1000;
    const auto take_over = [&](const std::function<void()>& work) {
        if (!theirs || round > kShort) return;
        for (double spent = 0; spent < kTakeover;) spent += seconds_of(work);
    };
    std::vector<double> own, peer;
    double spent = 0;
    while (static_cast<int>(own.size()) < least || (spent < options.seconds && own.size() < most)) {
        take_over(mine);
        own.push_back(seconds_of(mine));
        spent += own.back();
        if (!theirs) continue;
        take_over([&] { theirs(); });
        peer.push_back(theirs());
    }
    return {median(own), peer.empty() ? 0 : median(peer), own.size()};
}

Timing measure_on_device(const BenchOptions& options, const Device& device, const std::function<void()>& work) {
    const double once = median(time_on_device(device, 3, work));
    const int repeats = std::clamp(static_cast<int>(options.seconds / std::max(once, 1e-6)), options.min_repeats, 200);
    const std::vector<double> seconds = time_on_device(device, repeats, work);
    return {median(seconds), 0, seconds.size()};
}

nlohmann::json load_request(const Case& c, const BenchProblem& problem, int threads) {
    return {{"op", "load"},       {"path", problem.input_path()},    {"dtype", verify::dtype_name(c.dtype)},
            {"batch", c.batch},   {"seqlen_q", c.seqlen_q},          {"seqlen_k", c.seqlen_k},
            {"num_heads", c.num_heads}, {"num_heads_k", c.num_heads_k}, {"head_dim", c.head_dim},
            {"causal", c.window_right == 0}, {"threads", threads}};
}

struct Direction {
    const char* name;
    double flops;
    Timing timing;
};

class Report {
public:
    Report(const BenchOptions& options, const Device& device, int threads)
        : vs_(options.vs), on_cpu_(device.type == DeviceType::cpu), record_(record_header("bench")) {
        if (!vs_.empty()) record_["vs"] = vs_;
        if (on_cpu_) {
            const double core = cpu::measured_fma_peak();
            peak_ = core * threads;
            record_["threads"] = threads;
            record_["fma_peak_gflops_per_core"] = core / 1e9;
            std::printf("%d threads, f32 FMA peak %.1f GFLOP/s per core, measured\n", threads, core / 1e9);
        } else {
            record_["device"] = device_json(device);
            std::printf("%s\n", record_["device"]["name"].get<std::string>().c_str());
        }
        record_["cells"] = nlohmann::ordered_json::array();
        std::printf("%-44s %8s %12s %10s %8s", "case", "", "seconds", on_cpu_ ? "GFLOP/s" : "TFLOP/s", on_cpu_ ? "of peak" : "");
        std::printf(vs_.empty() ? "\n" : "   %s GFLOP/s   ratio\n", vs_.c_str());
    }

    void add(const Case& c, const BenchProblem& problem, const Direction& d) {
        const double rate = d.flops / d.timing.seconds, unit = on_cpu_ ? 1e9 : 1e12;
        std::printf("%-44s %8s %12.6f %10.1f", c.name().c_str(), d.name, d.timing.seconds, rate / unit);
        nlohmann::ordered_json cell{{"case", c.name()}, {"direction", d.name}, {"implementation", problem.implementation()},
                                    {"seconds", d.timing.seconds}, {"repeats", d.timing.repeats}, {"flops_per_second", rate},
                                    {"workspace_bytes", problem.workspace_bytes()}};
        if (peak_ > 0) {
            std::printf(" %7.0f%%", 100 * rate / peak_);
            cell["fraction_of_fma_peak"] = rate / peak_;
        }
        if (d.timing.peer_seconds > 0) {
            const double ratio = d.timing.ratio();
            std::printf(" %15.1f %7.2f", d.flops / d.timing.peer_seconds / unit, ratio);
            cell["peer_seconds"] = d.timing.peer_seconds;
            cell["ratio"] = ratio;
            ratios_[d.name].push_back(ratio);
        }
        std::printf("\n");
        std::fflush(stdout);
        record_["cells"].push_back(cell);
    }

    void finish(const std::string& json) {
        for (const auto& [direction, ratios] : ratios_) {
            double log_sum = 0;
            for (const double r : ratios) log_sum += std::log(r);
            const double mean = std::exp(log_sum / static_cast<double>(ratios.size()));
            const double least = *std::min_element(ratios.begin(), ratios.end());
            std::printf("%s: geometric mean of strobe / %s %.2f, least %.2f, %zu cells\n", direction.c_str(), vs_.c_str(), mean,
                        least, ratios.size());
            record_["summary"][direction] = {{"geometric_mean_ratio", mean}, {"least_ratio", least}, {"cells", ratios.size()}};
        }
        if (!json.empty()) write_json(json, record_);
    }

private:
    std::string vs_;
    bool on_cpu_;
    double peak_ = 0;
    nlohmann::ordered_json record_;
    std::map<std::string, std::vector<double>> ratios_;
};

void bench(const BenchOptions& options) {
    const Device device = parse_device(options.device);
    const bool on_cpu = device.type == DeviceType::cpu;
    if (!on_cpu && !options.vs.empty()) {
        throw Exit{kExitUsage, fmt::format("--vs: a peer runs beside --device cpu only, not {}", options.device)};
    }
    const std::vector<Case> all = on_cpu ? verify::bench_cases() : verify::device_bench_cases();
    const std::vector<Case> cases = verify::filtered(all, options.filter);
    if (cases.empty()) throw Exit{kExitUsage, fmt::format("--filter: no benchmark case matches \"{}\"", options.filter)};
    if (std::isnan(options.seconds)) throw Exit{kExitUsage, "--seconds: is not a number"};
    check_implementation(options.implementation, device);
    check_writable(options.json);
    if (options.threads > 0) set_num_threads(options.threads);
    const int threads = num_threads();

    std::unique_ptr<Peer> peer;
    if (!options.vs.empty()) peer = std::make_unique<Peer>(options.python);

    Report report(options, device, threads);
    Progress progress(static_cast<int64_t>(cases.size()));
    for (const Case& c : cases) {
        BenchProblem problem(c, options, device);
        if (peer) peer->ask(load_request(c, problem, threads));
        const auto measure = [&](const char* name, double flops, const std::function<void()>& work) {
            std::function<double()> theirs;
            if (peer) theirs = [&] { return peer->ask({{"op", name}}).at("seconds").get<double>(); };
            return Direction{name, flops, on_cpu ? measure_on_cpu(options, work, theirs)
                                                 : measure_on_device(options, device, work)};
        };
        const Direction forward = measure("forward", c.forward_flops(), [&] { problem.run_forward(); });
        const Direction backward = measure("backward", c.backward_flops(), [&] { problem.run_backward(); });
        progress.clear();
        report.add(c, problem, forward);
        report.add(c, problem, backward);
        progress.step(c.name());
    }
    progress.clear();
    report.finish(options.json);
}

}  // namespace

void add_bench_command(CLI::App& app) {
    static BenchOptions options;
    CLI::App* command = app.add_subcommand("bench", "Time the benchmark cases, forward and backward");
    add_common_options(*command, options);
    command->add_option("--vs", options.vs, "run a peer in turn on the same inputs")->check(CLI::IsMember({"torch"}));
    command->add_option("--python", options.python, "the interpreter that has the peer")->capture_default_str();
    command->add_option("--implementation", options.implementation,
                        "the implementation to time (default: the first that serves)");
    command->add_option("--seconds", options.seconds, "time to spend on each cell and direction")
        ->capture_default_str()->check(CLI::Range(1e-3, 3600.0));
    command->callback([] { bench(options); });
}

}  // namespace strobe::cli
