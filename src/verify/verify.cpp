#include "verify/verify.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <optional>
#include <thread>

#include "core/numeric.hpp"
#include "reference/reference.hpp"

namespace strobe::verify {
namespace {

// The bound allows some naive errors, and a little on top for where the naive run happens to be exact (one key, a
// probability of one half): a result in another order of operations still differs in its last bits. Those are counted
// in roundings of fp32, whatever the dtype; gradients are differences of larger numbers, dP - delta, and dbias sums
// them over the broadcast axes, where without dlse they cancel to nothing.
constexpr double kRoundings = 8;
constexpr double kGradientFloor = 1e-5;  // the most for dq, dk and dv, and that for dbias

class HostMemory : public Memory {
public:
    void* allocate(size_t bytes) override {
        void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
        if (!data) throw std::bad_alloc();
        return data;
    }
    void release(void* data) override { std::free(data); }
    void upload(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
    void download(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

private:
    static constexpr size_t kAlignment = 128;
};

/// A case's data placed in some memory, and the images of it that have been seen last.
class Trial {
public:
    Trial(const CaseData& data, Memory& memory, bool doubles) : data_(data), memory_(memory) {
        placement_.doubles = doubles;
        for (const Buffer& buffer : data.buffers) {
            images_.push_back(encode(buffer, doubles));
            placement_.buffers.push_back(memory.allocate(images_.back().size()));
        }
        first_ = images_;
        upload();
    }
    ~Trial() {
        for (void* data : placement_.buffers) memory_.release(data);
    }
    Trial(const Trial&) = delete;
    Trial& operator=(const Trial&) = delete;

    const Placement& placement() const { return placement_; }

    /// Reads everything back. Throws when a byte has changed that belongs to none of `outputs`.
    void refresh(const std::vector<const View*>& outputs) {
        for (size_t n = 0; n < images_.size(); ++n) {
            const Buffer& buffer = data_.buffers[n];
            const size_t bytes = element_bytes(buffer, placement_.doubles);
            std::vector<std::byte> seen(images_[n].size());
            memory_.download(seen.data(), placement_.buffers[n], seen.size());
            for (const View* output : outputs) {
                if (output->buffer != static_cast<int>(n)) continue;
                output->for_each_run([&](int64_t first, int64_t count) {
                    std::memcpy(&images_[n][first * bytes], &seen[first * bytes], count * bytes);
                });
            }
            // In one piece first: byte by byte takes long under a sanitizer.
            if (std::memcmp(seen.data(), images_[n].data(), seen.size()) != 0) {
                const auto changed = std::mismatch(seen.begin(), seen.end(), images_[n].begin()).first;
                const auto element = static_cast<size_t>(changed - seen.begin()) / bytes;
                throw std::runtime_error("element " + std::to_string(element) + " of buffer " + buffer.name +
                                         " has changed, which is no element of an output of this call");
            }
        }
    }

    double at(const View& view, int64_t index) const {
        return decode(data_.buffers[view.buffer], placement_.doubles, images_[view.buffer].data(), index);
    }

    void set(const View& view, int64_t index, double value) {
        encode_element(data_.buffers[view.buffer], placement_.doubles, images_[view.buffer].data(), index, value);
    }

    void upload() {
        for (size_t n = 0; n < images_.size(); ++n) {
            memory_.upload(placement_.buffers[n], images_[n].data(), images_[n].size());
        }
    }

    void start_over() {
        images_ = first_;
        upload();
    }

    /// The bits of one output, for comparing runs.
    std::vector<std::byte> bits(const View& view) const {
        const size_t bytes = element_bytes(data_.buffers[view.buffer], placement_.doubles);
        std::vector<std::byte> b;
        view.for_each_run([&](int64_t first, int64_t count) {
            const std::byte* elements = &images_[view.buffer][first * bytes];
            b.insert(b.end(), elements, elements + count * bytes);
        });
        return b;
    }

private:
    const CaseData& data_;
    Memory& memory_;
    Placement placement_;
    std::vector<std::vector<std::byte>> images_, first_;
};

double element_error(double x, double truth) {
    if (std::isnan(truth)) return std::isnan(x) ? 0 : INFINITY;
    if (std::isinf(truth)) return x == truth ? 0 : INFINITY;
    return std::isnan(x) ? INFINITY : std::abs(x - truth);
}

enum class Kind { forward, gradient, bias_gradient };

/// What a tensor whose largest element is `largest`, or 1 if that is less, may be off.
struct Bound {
    double naive_errors;
    double floor;  // where the naive run is exact
};

Bound bound_of(Kind kind, const GradientBound& gradient, double largest) {
    constexpr double kRounding = 0x1p-24;
    if (kind == Kind::forward) return {2, kRoundings * kRounding * largest};
    if (kind == Kind::bias_gradient) return {gradient.naive_errors, kGradientFloor};
    return {gradient.naive_errors, std::min(kGradientFloor, gradient.roundings * kRounding * largest)};
}

TensorError compare(const char* name, Kind kind, const GradientBound& gradient, const View& view, const Trial& subject,
                    const Trial& naive, const Trial& truth) {
    TensorError e{.tensor = name};
    double largest = 1;
    view.for_each([&](int64_t at) {
        const double t = truth.at(view, at);
        e.error = std::max(e.error, element_error(subject.at(view, at), t));
        const double naive_error = element_error(naive.at(view, at), t);
        // A naive run that overflows sets no bound for those that do not.
        if (std::isfinite(naive_error)) e.naive = std::max(e.naive, naive_error);
        if (std::isfinite(t)) largest = std::max(largest, std::abs(t));
    });
    const Bound bound = bound_of(kind, gradient, largest);
    e.bound = bound.naive_errors * e.naive + bound.floor;
    return e;
}

/// Makes the trials' out and lse those of a longer sequence: each row is merged with a part over other keys, the same
/// for all and taken from the truth, rounded as each trial stores it.
void extend_beyond_these_keys(const CaseData& data, const Trial& truth, const std::vector<Trial*>& trials) {
    const bool varlen = data.spec.varlen_q;
    const int64_t batches = varlen ? 1 : data.spec.batch;
    const int64_t heads = data.spec.num_heads;
    const int64_t rows = data.lse.shape.back();
    const auto stride = [&](const View& v, size_t from_back) { return v.strides[v.strides.size() - from_back]; };
    struct Edit {
        const View* view;
        int64_t at;
        double value;
    };
    std::vector<Edit> edits;
    uint64_t noise = 1;
    const auto random = [&] {  // within +-1
        noise = noise * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<double>(static_cast<int64_t>(noise)) * 0x1p-63;
    };
    for (int64_t b = 0; b < batches; ++b) {
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t lse_at = data.lse.offset + (varlen ? 0 : b * data.lse.strides[0]) +
                                       h * stride(data.lse, 2) + i * stride(data.lse, 1);
                const int64_t out_at = data.out.offset + (varlen ? 0 : b * data.out.strides[0]) +
                                       i * stride(data.out, 3) + h * stride(data.out, 2);
                const double lse = truth.at(data.lse, lse_at);
                const double other_lse = 2.0 + random();
                const double global = std::max(lse, other_lse) + std::log1p(std::exp(-std::abs(lse - other_lse)));
                edits.push_back({&data.lse, lse_at, global});
                for (int64_t d = 0; d < data.spec.dim_v(); ++d) {
                    const double mixed = std::exp(lse - global) * truth.at(data.out, out_at + d) +
                                         std::exp(other_lse - global) * random();
                    edits.push_back({&data.out, out_at + d, mixed});
                }
            }
        }
    }
    for (Trial* trial : trials) {
        for (const Edit& edit : edits) trial->set(*edit.view, edit.at, edit.value);
        trial->upload();
    }
}

/// Where each run stands: one of the three columns of the comparison.
struct Runs {
    Trial truth, naive, subject;

    Runs(const CaseData& data, Memory& memory)
        : truth(data, host_memory(), true), naive(data, host_memory(), false), subject(data, memory, false) {}
};

struct Output {
    const char* name;
    const View* view;
    bool repeatable;  // the same bits in every run
    Kind kind;
};

class Verification {
public:
    Verification(const Case& c, Subject& subject, const VerifyOptions& options)
        : data_(c), subject_(subject), options_(options), runs_(data_, subject.memory()) {
        result_.name = c.name();
        forward_outputs_ = {{"out", &data_.out, true, Kind::forward}, {"lse", &data_.lse, true, Kind::forward}};
        backward_outputs_ = {{"dq", &data_.dq, c.deterministic, Kind::gradient},
                             {"dk", &data_.dk, true, Kind::gradient},
                             {"dv", &data_.dv, true, Kind::gradient}};
        if (data_.dbias.given()) {
            backward_outputs_.push_back({"dbias", &data_.dbias, c.deterministic, Kind::bias_gradient});
        }
    }

    CaseResult run() {
        try {
            run_all();
        } catch (const Unsupported& e) {
            result_.outcome = Outcome::unsupported;
            result_.message = e.what();
            return result_;
        } catch (const std::exception& e) {
            fail(e.what());
        }
        return result_;
    }

private:
    void run_all() {
        reference::forward(forward_params(data_, runs_.truth.placement()), reference::Precision::fp64_on_doubles);
        reference::forward(forward_params(data_, runs_.naive.placement()), reference::Precision::naive);
        runs_.truth.refresh(views(forward_outputs_));
        runs_.naive.refresh(views(forward_outputs_));
        std::vector<std::vector<std::byte>> first = run_subject();

        if (options_.backward) {
            reference::backward(backward_params(data_, runs_.truth.placement()), reference::Precision::fp64_on_doubles);
            reference::backward(backward_params(data_, runs_.naive.placement()), reference::Precision::naive);
            runs_.truth.refresh(views(backward_outputs_));
            runs_.naive.refresh(views(backward_outputs_));
            judge(backward_outputs_);
        }

        const int repeats = std::max(options_.repeats, data_.spec.deterministic ? 1 : 0);
        for (int n = 0; n < repeats; ++n) {
            runs_.subject.start_over();
            repeating_ = true;
            compare_bits(first, run_subject());
        }
    }

    /// Forward, judged, and backward; the bits of all outputs.
    std::vector<std::vector<std::byte>> run_subject() {
        std::vector<std::vector<std::byte>> bits;
        subject_.forward(data_, runs_.subject.placement());
        runs_.subject.refresh(views(forward_outputs_));
        for (const Output& o : forward_outputs_) bits.push_back(runs_.subject.bits(*o.view));
        if (!repeating_) judge(forward_outputs_);
        if (!options_.backward) return bits;

        if (data_.spec.global_out) {
            if (repeating_) {
                extend_beyond_these_keys(data_, forward_truth_.value(), {&runs_.subject});
            } else {
                forward_truth_.emplace(data_, host_memory(), true);
                for (const Output& o : forward_outputs_) {
                    o.view->for_each([&](int64_t at) { forward_truth_->set(*o.view, at, runs_.truth.at(*o.view, at)); });
                }
                extend_beyond_these_keys(data_, forward_truth_.value(), {&runs_.truth, &runs_.naive, &runs_.subject});
            }
        }
        subject_.backward(data_, runs_.subject.placement());
        runs_.subject.refresh(views(backward_outputs_));
        for (const Output& o : backward_outputs_) bits.push_back(runs_.subject.bits(*o.view));
        return bits;
    }

    void judge(const std::vector<Output>& outputs) {
        for (const Output& o : outputs) {
            const TensorError e =
                compare(o.name, o.kind, subject_.gradient_bound(), *o.view, runs_.subject, runs_.naive, runs_.truth);
            if (!e.passed()) {
                char text[160];
                std::snprintf(text, sizeof text, "%s: error %.3g is beyond %.3g (naive error %.3g)", o.name, e.error, e.bound,
                              e.naive);
                fail(text);
            }
            result_.errors.push_back(e);
        }
    }

    void compare_bits(const std::vector<std::vector<std::byte>>& first, const std::vector<std::vector<std::byte>>& again) {
        std::vector<Output> outputs = forward_outputs_;
        if (options_.backward) outputs.insert(outputs.end(), backward_outputs_.begin(), backward_outputs_.end());
        for (size_t n = 0; n < outputs.size(); ++n) {
            if (outputs[n].repeatable && first[n] != again[n]) {
                fail(std::string(outputs[n].name) + ": a second run gave other bits");
            }
        }
    }

    void fail(const std::string& why) {
        result_.outcome = Outcome::failed;
        if (!result_.message.empty()) result_.message += "; ";
        result_.message += why;
    }

    static std::vector<const View*> views(const std::vector<Output>& outputs) {
        std::vector<const View*> v;
        for (const Output& o : outputs) v.push_back(o.view);
        return v;
    }

    CaseData data_;
    Subject& subject_;
    VerifyOptions options_;
    Runs runs_;
    std::vector<Output> forward_outputs_, backward_outputs_;
    std::optional<Trial> forward_truth_;
    bool repeating_ = false;
    CaseResult result_;
};

}  // namespace

Memory& host_memory() {
    static HostMemory memory;
    return memory;
}

GuardedWorkspace::GuardedWorkspace(Memory& memory, size_t bytes)
    : memory_(memory), bytes_(bytes), block_(static_cast<std::byte*>(memory.allocate(bytes + 2 * kGuardBytes))) {
    const std::vector<std::byte> poison(bytes + 2 * kGuardBytes, std::byte{0xFF});
    memory_.upload(block_, poison.data(), poison.size());
}

GuardedWorkspace::~GuardedWorkspace() { memory_.release(block_); }

void* GuardedWorkspace::data() const { return block_ + kGuardBytes; }

void GuardedWorkspace::check() const {
    std::byte guard[kGuardBytes];
    for (size_t at : {size_t{0}, kGuardBytes + bytes_}) {
        memory_.download(guard, block_ + at, kGuardBytes);
        if (!std::all_of(guard, guard + kGuardBytes, [](std::byte b) { return b == std::byte{0xFF}; })) {
            throw std::runtime_error(at == 0 ? "bytes in front of the workspace have changed"
                                             : "bytes behind the workspace have changed");
        }
    }
}

double CaseResult::worst() const {
    double worst = 0;
    for (const TensorError& e : errors) worst = std::max(worst, e.error / e.bound);
    return worst;
}

CaseResult verify_case(const Case& c, Subject& subject, const VerifyOptions& options) {
    return Verification(c, subject, options).run();
}

void verify_list(const std::vector<Case>& cases, int workers, const std::function<std::unique_ptr<Subject>()>& make_subject,
                 const VerifyOptions& options, const std::function<void(size_t index, const CaseResult&)>& done) {
    std::atomic<size_t> next{0};
    std::mutex mutex;
    std::exception_ptr broken;
    const auto work = [&] {
        try {
            const std::unique_ptr<Subject> subject = make_subject();
            for (size_t i = next++; i < cases.size(); i = next++) {
                const CaseResult result = verify_case(cases[i], *subject, options);
                const std::lock_guard lock(mutex);
                done(i, result);
            }
        } catch (...) {
            next = cases.size();
            const std::lock_guard lock(mutex);
            if (!broken) broken = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < workers; ++i) threads.emplace_back(work);
    work();
    for (std::thread& t : threads) t.join();
    if (broken) std::rethrow_exception(broken);
}

}  // namespace strobe::verify
