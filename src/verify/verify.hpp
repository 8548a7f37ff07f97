// Runs one case on an implementation and holds every result against the specification.
//
// Three runs of one case: the truth (fp64, nothing rounded), the naive run (an eager implementation in the working
// dtype: fp32 arithmetic, sums in chains of up to 256 terms, everything that it would store rounded to the dtype) and
// the subject. A result passes when, over all elements of a tensor,
//     max |subject - truth| <= factor max |naive - truth| + r 2^-24 max(1, max |truth|).
// factor is 2. r, roundings of fp32 whatever the dtype, is 8 for out and lse and 16 for dq, dk and dv, whose floor is
// at most
// 1e-5; dbias has 1e-5, because its sums cancel. Gradients from CUDA have 3 and 1e-5: see GradientBound. Where the
// truth is infinite or NaN the subject is the same, and no byte outside the outputs has changed. Outputs start as NaN,
// so does the workspace, and so do all input elements that nobody may look at.
#pragma once

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "strobe/strobe.hpp"
#include "verify/case.hpp"
#include "verify/case_data.hpp"

namespace strobe::verify {

/// Where a subject's buffers live. Copies are complete on return.
class Memory {
public:
    virtual ~Memory() = default;
    virtual void* allocate(size_t bytes) = 0;
    virtual void release(void* data) = 0;
    virtual void upload(void* to, const void* from, size_t bytes) = 0;
    virtual void download(void* to, const void* from, size_t bytes) = 0;
};

Memory& host_memory();

/// What a gradient may be off.
struct GradientBound {
    double naive_errors = 2;
    double roundings = 16;  // of fp32, where the naive run is exact; never more than 1e-5 altogether

    /// Tensor core kernels round P and dS to 16 bits and take delta from the rounded output, as every FlashAttention
    /// does: its authors allow 2 to 3. dP and delta are sums in different orders there, and a single key leaves their
    /// difference, of up to some eighty roundings, where the naive run has 0: only the 1e-5 applies.
    static constexpr GradientBound cuda() { return {.naive_errors = 3, .roundings = 1e9}; }
};

/// What is being tested. Both calls have finished their work when they return; they throw Unsupported when the
/// implementation says that it does not serve the case, and anything else when it fails.
class Subject {
public:
    virtual ~Subject() = default;
    virtual Memory& memory() = 0;
    virtual void forward(const CaseData& data, const Placement& placement) = 0;
    virtual void backward(const CaseData& data, const Placement& placement) = 0;

    virtual GradientBound gradient_bound() const { return {}; }
};

struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// A case as arguments of the public interface; workspaces are left to the caller.
struct PublicCall {
    Attention attention;
    Forward forward;
    Backward backward;
};
PublicCall public_call(const CaseData& data, const Placement& placement, Device device);

/// The library itself through its public interface, on buffers in `memory` of the given device.
class LibrarySubject : public Subject {
public:
    /// The CPU. Empty `implementation`: the first that serves the case; `num_threads` 0: the library's default.
    explicit LibrarySubject(std::string implementation = {}, int num_threads = 0);
    LibrarySubject(Memory& memory, int device_type, int device_index, std::string implementation, void* stream);

    Memory& memory() override { return memory_; }
    void forward(const CaseData& data, const Placement& placement) override;
    void backward(const CaseData& data, const Placement& placement) override;
    GradientBound gradient_bound() const override { return device_type_ == STROBE_CUDA ? GradientBound::cuda() : GradientBound{}; }

private:
    PublicCall call(const CaseData& data, const Placement& placement) const;

    Memory& memory_;
    int device_type_;
    int device_index_;
    std::string implementation_;
    int num_threads_ = 0;
    void* stream_ = nullptr;
};

/// A workspace between guard bands, filled with NaN patterns.
class GuardedWorkspace {
public:
    GuardedWorkspace(Memory& memory, size_t bytes);
    ~GuardedWorkspace();
    GuardedWorkspace(const GuardedWorkspace&) = delete;
    GuardedWorkspace& operator=(const GuardedWorkspace&) = delete;

    void* data() const;
    /// Throws when a byte outside has changed.
    void check() const;

private:
    static constexpr size_t kGuardBytes = 256;
    Memory& memory_;
    size_t bytes_;
    std::byte* block_;
};

struct TensorError {
    std::string tensor;
    double error = 0;  // of the subject
    double naive = 0;
    double bound = 0;

    bool passed() const { return error <= bound; }  // false for NaN
};

enum class Outcome { passed, failed, unsupported };

struct CaseResult {
    std::string name;
    Outcome outcome = Outcome::passed;
    std::vector<TensorError> errors;
    std::string message;  // why it failed or is not supported

    /// The largest error / bound.
    double worst() const;
};

struct VerifyOptions {
    bool backward = true;
    int repeats = 0;  // further runs, whose out, lse, dk, dv must have the same bits (and dq, if deterministic)
};

CaseResult verify_case(const Case& c, Subject& subject, const VerifyOptions& options = {});

/// Verifies every case on `workers` threads, each with a subject of its own: the reference is what takes the time.
/// `done` is called with one result after another, never twice at once. Rethrows what no case can go on after, as a
/// device that has stopped.
void verify_list(const std::vector<Case>& cases, int workers, const std::function<std::unique_ptr<Subject>()>& make_subject,
                 const VerifyOptions& options, const std::function<void(size_t index, const CaseResult&)>& done);

}  // namespace strobe::verify
