// Matrix products by cuBLASLt. The library is looked for when the first backend for a GPU is made, not when the program
// starts. For each shape the candidates that cuBLASLt proposes are timed once, on noise, and the fastest is kept, in a
// file too.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "gpt/device.hpp"
#include "gpt/ops/gemm_choices.hpp"

namespace strobe::gpt::cuda {

/// D = epilogue(op(A) op(B) (+ C)), all column-major as cuBLAS has it.
struct GemmCall {
    bool transpose_a = false, transpose_b = false;
    int64_t m = 0, n = 0, k = 0;
    int64_t lda = 0, ldb = 0, ldd = 0;
    Buffer a, b, d;           // a and b of one precision; d of that or fp32
    bool accumulate = false;  // there is a C: D itself, unless
    Buffer c{};               // this is given, of d's shape and precision
    /// sum_b: `bias` gets the sums of op(B)'s columns over k, beside the product.
    enum class Epilogue { none, bias, gelu_aux_bias, gelu_aux, dgelu, sum_b } epilogue = Epilogue::none;
    void* bias = nullptr;        // (m), of sum_b (n), in d's precision
    void* aux = nullptr;         // (m, n) at ldd, in d's precision: gelu's input, written forward, read backward
};

class Gemm {
public:
    /// Throws std::invalid_argument where the library is not found.
    /// `device` is the GPU's name: choices are kept per GPU and version of the library.
    Gemm(void* stream, const std::string& device);
    ~Gemm();
    Gemm(const Gemm&) = delete;
    Gemm& operator=(const Gemm&) = delete;

    void run(const GemmCall& call);
    /// Milliseconds of the call's best candidate when it was timed; tunes now if it was not. 0: could not be timed.
    float milliseconds(const GemmCall& call);
    /// Whether there is an algorithm for the call.
    bool possible(const GemmCall& call);

    /// Several algorithms for a product that is called: the one that would be used without a contest, then the fastest
    /// others. Which is the best where it stands, on the operators' own data, in the cache and at the clock that these
    /// leave, a contest tells: from its beginning on products that are met first keep their candidates, calls are
    /// timed, and play() says who does them.
    struct Candidates {
        std::string product;
        std::vector<float> alone;             // milliseconds of each when it was measured
        std::vector<std::string> algorithms;  // as the library describes them
    };
    void begin_contest() { contest_ = true; }
    /// Of the products that were called since, in a fixed order; those below are in the same.
    std::vector<Candidates> candidates() const;
    /// Who does the calls from here on. The device is done with those before.
    void play(std::span<const int> chosen);
    /// Milliseconds of each product's calls since the last play(). Waits for the device.
    std::vector<double> played();
    /// Who plays now is kept.
    void end_contest();
    std::string version() const;

    /// A product that was met, and what its algorithm took when it was measured.
    struct Measured {
        GemmCall call;
        float milliseconds;
    };
    std::vector<Measured> measured() const;

private:
    struct Library;
    struct Plan;
    struct Contestant {
        cublasLtMatmulAlgo_t algo;
        float alone;  // milliseconds
    };
    /// A call in a contest.
    struct Bout {
        const Plan* plan;
        cudaEvent_t begin, end;
    };
    using Key = std::tuple<bool, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, Precision, Precision, bool,
                           int>;

    Plan& plan(const GemmCall& call);
    bool recall(Plan& plan, const std::string& product);
    void choose(Plan& plan, const GemmCall& call, const std::string& product);
    void add_contestants(Plan& plan, const GemmCall& call);
    std::vector<cublasLtMatmulHeuristicResult_t> proposals(const Plan& plan) const;
    std::vector<Contestant> measure(Plan& plan, const GemmCall& call,
                                    const std::vector<cublasLtMatmulHeuristicResult_t>& candidates);
    void run_timed(Plan& plan, const GemmCall& call);
    void forget_bouts();
    std::vector<Plan*> contested() const;
    std::string describe(const cublasLtMatmulAlgo_t& algo) const;
    cublasStatus_t launch(Plan& plan, const GemmCall& call, const cublasLtMatmulAlgo_t& algo);
    static Key key_of(const GemmCall& call);
    static std::string name_of(const GemmCall& call);

    std::unique_ptr<Library> library_;
    void* stream_;
    cublasLtHandle_t handle_ = nullptr;
    void* workspace_ = nullptr;
    std::map<Key, std::unique_ptr<Plan>> plans_;
    GemmChoices choices_;
    bool contest_ = false;
    std::vector<Bout> bouts_;
};

}  // namespace strobe::gpt::cuda
