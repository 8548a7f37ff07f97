#include "gpt/ops/cuda/gemm.hpp"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstdlib>
#include <stdexcept>

#include <fmt/core.h>

#include "gpt/data/dataset.hpp"
#include "gpt/ops/cuda/noise.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr int kCandidates = 16;
constexpr int kTimedRuns = 3;
// Who comes into a contest beside the usual one: so many, if they took no longer than so many times the fastest's.
constexpr size_t kContestants = 10;
constexpr float kContestMargin = 1.2f;

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(fmt::format("{}: {}", what, cudaGetErrorString(status)));
}

void check(cublasStatus_t status, const char* what) {
    if (status != CUBLAS_STATUS_SUCCESS)
        throw std::runtime_error(fmt::format("cublasLt: {} failed ({})", what, static_cast<int>(status)));
}

/// Where the library may lie: where the user says, where the loader looks, where CUDA's own installer puts it.
void* open_library() {
    const std::string soname = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
    std::vector<std::string> names;
    if (const char* named = std::getenv("STROBE_CUBLASLT")) names.push_back(named);
    names.push_back(soname);
    names.push_back(fmt::format("/usr/local/cuda-{}/lib64/{}", CUBLAS_VER_MAJOR, soname));
    names.push_back("/usr/local/cuda/lib64/" + soname);
    for (const std::string& name : names)
        if (void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    throw std::invalid_argument(
        fmt::format("device cuda: {} is not found; install cuBLAS {} or name its file in STROBE_CUBLASLT", soname,
                    CUBLAS_VER_MAJOR));
}

/// "cublaslt-nvidia-h100-80gb-hbm3-13.0.2.txt"
std::filesystem::path choices_file(std::string device, const std::string& version) {
    for (char& c : device) c = std::isalnum(static_cast<unsigned char>(c)) ? static_cast<char>(std::tolower(c)) : '-';
    return default_cache_folder() / fmt::format("cublaslt-{}-{}.txt", device, version);
}

cudaDataType_t type_of(Precision p) { return p == Precision::fp32 ? CUDA_R_32F : CUDA_R_16BF; }

cublasLtEpilogue_t epilogue_of(GemmCall::Epilogue e) {
    switch (e) {
        case GemmCall::Epilogue::none: return CUBLASLT_EPILOGUE_DEFAULT;
        case GemmCall::Epilogue::bias: return CUBLASLT_EPILOGUE_BIAS;
        case GemmCall::Epilogue::gelu_aux_bias: return CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
        case GemmCall::Epilogue::gelu_aux: return CUBLASLT_EPILOGUE_GELU_AUX;
        case GemmCall::Epilogue::dgelu: return CUBLASLT_EPILOGUE_DGELU;
        case GemmCall::Epilogue::sum_b: return CUBLASLT_EPILOGUE_BGRADB;
    }
    return CUBLASLT_EPILOGUE_DEFAULT;
}

std::array<uint64_t, 8> bits_of(const cublasLtMatmulAlgo_t& algo) {
    return std::bit_cast<std::array<uint64_t, 8>>(algo);
}

/// Device memory for the time of a measurement; null where there is no room.
class Temporary {
public:
    explicit Temporary(size_t bytes) {
        if (cudaMalloc(&data_, std::max<size_t>(bytes, 1)) != cudaSuccess) {
            cudaGetLastError();
            data_ = nullptr;
        }
    }
    ~Temporary() { cudaFree(data_); }
    Temporary(const Temporary&) = delete;
    Temporary& operator=(const Temporary&) = delete;
    void* data() const { return data_; }

private:
    void* data_ = nullptr;
};

}  // namespace

struct Gemm::Library {
    explicit Library(void* handle) : handle(handle) {
#define STROBE_GPT_LOAD(name)                                                    \
    name = reinterpret_cast<decltype(name)>(dlsym(handle, #name));               \
    if (!name) throw std::runtime_error("cublasLt: no function " #name " in the library")
        STROBE_GPT_LOAD(cublasLtCreate);
        STROBE_GPT_LOAD(cublasLtDestroy);
        STROBE_GPT_LOAD(cublasLtGetVersion);
        STROBE_GPT_LOAD(cublasLtMatmul);
        STROBE_GPT_LOAD(cublasLtMatmulAlgoCheck);
        STROBE_GPT_LOAD(cublasLtMatmulAlgoConfigGetAttribute);
        STROBE_GPT_LOAD(cublasLtMatmulAlgoGetHeuristic);
        STROBE_GPT_LOAD(cublasLtMatmulDescCreate);
        STROBE_GPT_LOAD(cublasLtMatmulDescDestroy);
        STROBE_GPT_LOAD(cublasLtMatmulDescSetAttribute);
        STROBE_GPT_LOAD(cublasLtMatmulPreferenceCreate);
        STROBE_GPT_LOAD(cublasLtMatmulPreferenceDestroy);
        STROBE_GPT_LOAD(cublasLtMatmulPreferenceSetAttribute);
        STROBE_GPT_LOAD(cublasLtMatrixLayoutCreate);
        STROBE_GPT_LOAD(cublasLtMatrixLayoutDestroy);
#undef STROBE_GPT_LOAD
    }
    // Never unloaded: its state belongs to the CUDA context.
    void* handle;
    decltype(&::cublasLtCreate) cublasLtCreate;
    decltype(&::cublasLtDestroy) cublasLtDestroy;
    decltype(&::cublasLtGetVersion) cublasLtGetVersion;
    decltype(&::cublasLtMatmul) cublasLtMatmul;
    decltype(&::cublasLtMatmulAlgoCheck) cublasLtMatmulAlgoCheck;
    decltype(&::cublasLtMatmulAlgoConfigGetAttribute) cublasLtMatmulAlgoConfigGetAttribute;
    decltype(&::cublasLtMatmulAlgoGetHeuristic) cublasLtMatmulAlgoGetHeuristic;
    decltype(&::cublasLtMatmulDescCreate) cublasLtMatmulDescCreate;
    decltype(&::cublasLtMatmulDescDestroy) cublasLtMatmulDescDestroy;
    decltype(&::cublasLtMatmulDescSetAttribute) cublasLtMatmulDescSetAttribute;
    decltype(&::cublasLtMatmulPreferenceCreate) cublasLtMatmulPreferenceCreate;
    decltype(&::cublasLtMatmulPreferenceDestroy) cublasLtMatmulPreferenceDestroy;
    decltype(&::cublasLtMatmulPreferenceSetAttribute) cublasLtMatmulPreferenceSetAttribute;
    decltype(&::cublasLtMatrixLayoutCreate) cublasLtMatrixLayoutCreate;
    decltype(&::cublasLtMatrixLayoutDestroy) cublasLtMatrixLayoutDestroy;
};

/// Descriptions of one shape, and the algorithm for it.
struct Gemm::Plan {
    explicit Plan(const Library& library) : lib(library) {}
    ~Plan() {
        for (cublasLtMatrixLayout_t layout : {a, b, d})
            if (layout) lib.cublasLtMatrixLayoutDestroy(layout);
        if (desc) lib.cublasLtMatmulDescDestroy(desc);
    }
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    template <class T>
    void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
        check(lib.cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value), "an attribute");
    }

    const Library& lib;
    GemmCall call;
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
    bool possible = false;
    cublasLtMatmulAlgo_t algo{};
    float milliseconds = 0.0f;

    // The usual one, then the fastest first; of a product that was measured in this process.
    std::vector<Contestant> contestants;
    bool called = false;                  // in a contest
};

Gemm::Gemm(void* stream, const std::string& device)
    : library_(std::make_unique<Library>(open_library())), stream_(stream), choices_(choices_file(device, version())) {
    check(library_->cublasLtCreate(&handle_), "cublasLtCreate");
    check(cudaMalloc(&workspace_, kWorkspaceBytes), "cuBLASLt's workspace");
}

Gemm::~Gemm() {
    plans_.clear();
    library_->cublasLtDestroy(handle_);
    cudaFree(workspace_);
}

std::string Gemm::version() const {
    const size_t v = library_->cublasLtGetVersion();
    return fmt::format("{}.{}.{}", v / 10000, v / 100 % 100, v % 100);
}

Gemm::Key Gemm::key_of(const GemmCall& c) {
    return {c.transpose_a, c.transpose_b, c.m,           c.n,           c.k,          c.lda,
            c.ldb,         c.ldd,         c.a.precision, c.d.precision, c.accumulate, static_cast<int>(c.epilogue)};
}

std::string Gemm::name_of(const GemmCall& c) {
    return fmt::format("{},{},{},{},{},{},{},{},{},{},{},{}", c.transpose_a ? 'T' : 'N', c.transpose_b ? 'T' : 'N', c.m,
                       c.n, c.k, c.lda, c.ldb, c.ldd, to_string(c.a.precision), to_string(c.d.precision),
                       int{c.accumulate}, static_cast<int>(c.epilogue));
}

Gemm::Plan& Gemm::plan(const GemmCall& c) {
    std::unique_ptr<Plan>& slot = plans_[key_of(c)];
    if (slot) return *slot;
    const Library& lib = *library_;
    auto p = std::make_unique<Plan>(lib);
    p->call = c;
    check(lib.cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    p->set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<int32_t>(c.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N));
    p->set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<int32_t>(c.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N));
    p->set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(epilogue_of(c.epilogue)));
    if (c.bias) {
        p->set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, c.bias);
        p->set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(type_of(c.d.precision)));
    }
    if (c.aux) {
        p->set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, c.aux);
        p->set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, c.ldd);
        p->set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, static_cast<int32_t>(type_of(c.d.precision)));
    }
    const auto layout = [&](cublasLtMatrixLayout_t& l, Precision precision, int64_t rows, int64_t columns, int64_t ld) {
        check(lib.cublasLtMatrixLayoutCreate(&l, type_of(precision), static_cast<uint64_t>(rows),
                                             static_cast<uint64_t>(columns), ld),
              "cublasLtMatrixLayoutCreate");
    };
    layout(p->a, c.a.precision, c.transpose_a ? c.k : c.m, c.transpose_a ? c.m : c.k, c.lda);
    layout(p->b, c.b.precision, c.transpose_b ? c.n : c.k, c.transpose_b ? c.k : c.n, c.ldb);
    layout(p->d, c.d.precision, c.m, c.n, c.ldd);

    const std::string product = name_of(c);
    if (!recall(*p, product)) choose(*p, c, product);
    else if (contest_) add_contestants(*p, c);
    slot = std::move(p);
    return *slot;
}

/// Takes the choice from the file, if the library says that it can do it.
bool Gemm::recall(Plan& p, const std::string& product) {
    static_assert(sizeof(GemmChoice::algorithm) == sizeof(cublasLtMatmulAlgo_t));
    const std::optional<GemmChoice> kept = choices_.find(product);
    if (!kept) return false;
    const auto algo = std::bit_cast<cublasLtMatmulAlgo_t>(kept->algorithm);
    cublasLtMatmulHeuristicResult_t checked{};
    const cublasStatus_t status =
        library_->cublasLtMatmulAlgoCheck(handle_, p.desc, p.a, p.b, p.d, p.d, &algo, &checked);
    if (status != CUBLAS_STATUS_SUCCESS || checked.workspaceSize > kWorkspaceBytes) return false;
    p.algo = algo;
    p.milliseconds = kept->milliseconds;
    p.possible = true;
    return true;
}

std::vector<cublasLtMatmulHeuristicResult_t> Gemm::proposals(const Plan& p) const {
    const Library& lib = *library_;
    cublasLtMatmulPreference_t preference = nullptr;
    check(lib.cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    check(lib.cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                   &kWorkspaceBytes, sizeof kWorkspaceBytes),
          "the workspace's size");
    std::vector<cublasLtMatmulHeuristicResult_t> out(kCandidates);
    int found = 0;
    const cublasStatus_t status = lib.cublasLtMatmulAlgoGetHeuristic(handle_, p.desc, p.a, p.b, p.d, p.d, preference,
                                                                     kCandidates, out.data(), &found);
    lib.cublasLtMatmulPreferenceDestroy(preference);
    out.resize(status == CUBLAS_STATUS_SUCCESS ? static_cast<size_t>(found) : 0);
    std::erase_if(out, [](const auto& r) { return r.state != CUBLAS_STATUS_SUCCESS; });
    return out;
}

void Gemm::choose(Plan& p, const GemmCall& c, const std::string& product) {
    const auto proposed = proposals(p);
    p.possible = !proposed.empty();
    if (!p.possible) return;
    p.algo = proposed.front().algo;
    std::vector<Contestant> measured = measure(p, c, proposed);
    // Not measured for lack of room: another process may have it.
    if (measured.empty()) return;
    p.algo = measured.front().algo;
    p.milliseconds = measured.front().alone;
    if (contest_) p.contestants = measured;
    const GemmChoice mine{bits_of(p.algo), p.milliseconds};
    if (choices_.settle(product, mine) == mine || recall(p, product)) return;
    choices_.replace(product, mine);
}

void Gemm::add_contestants(Plan& p, const GemmCall& c) {
    p.contestants = {{p.algo, p.milliseconds}};
    for (const Contestant& other : measure(p, c, proposals(p)))
        if (bits_of(other.algo) != bits_of(p.algo)) p.contestants.push_back(other);
}

cublasStatus_t Gemm::launch(Plan& p, const GemmCall& c, const cublasLtMatmulAlgo_t& algo) {
    const float alpha = 1.0f, beta = c.accumulate ? 1.0f : 0.0f;
    if (c.bias) p.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, c.bias);
    if (c.aux) p.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, c.aux);
    const void* added = c.c ? c.c.data : c.d.data;
    return library_->cublasLtMatmul(handle_, p.desc, &alpha, c.a.data, p.a, c.b.data, p.b, &beta, added, p.d, c.d.data,
                                     p.d, &algo, workspace_, kWorkspaceBytes, static_cast<cudaStream_t>(stream_));
}

// The fastest first. On noise in memory of its own: the call's outputs may be sums that must not be added to twice.
// Without room for that there are none.
std::vector<Gemm::Contestant> Gemm::measure(Plan& p, const GemmCall& c,
                                            const std::vector<cublasLtMatmulHeuristicResult_t>& candidates) {
    const auto stream = static_cast<cudaStream_t>(stream_);
    const size_t in = size_of(c.a.precision), out = size_of(c.d.precision);
    const auto elements = [](int64_t ld, int64_t columns) { return static_cast<size_t>(ld * columns); };
    const size_t a_count = elements(c.lda, c.transpose_a ? c.m : c.k),
                 b_count = elements(c.ldb, c.transpose_b ? c.k : c.n);
    const size_t d_count = elements(c.ldd, c.n);
    const Temporary a(a_count * in), b(b_count * in), d(d_count * out), aux(c.aux ? d_count * out : 1);
    const int64_t bias_count = std::max(c.m, c.n);
    const Temporary bias(static_cast<size_t>(bias_count) * out);
    if (!a.data() || !b.data() || !d.data() || !aux.data() || !bias.data()) return {};
    GemmCall trial = c;
    trial.a.data = a.data(), trial.b.data = b.data(), trial.d.data = d.data();
    trial.c = {};
    trial.bias = c.bias ? bias.data() : nullptr;
    trial.aux = c.aux ? aux.data() : nullptr;
    fill_noise(stream_, trial.a, static_cast<int64_t>(a_count), 1);
    fill_noise(stream_, trial.b, static_cast<int64_t>(b_count), 2);
    fill_noise(stream_, trial.d, static_cast<int64_t>(d_count), 3);
    fill_noise(stream_, {bias.data(), c.d.precision}, bias_count, 4);
    if (c.aux) fill_noise(stream_, {aux.data(), c.d.precision}, static_cast<int64_t>(d_count), 5);

    cudaEvent_t begin = nullptr, end = nullptr;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<Contestant> measured;
    for (const auto& candidate : candidates) {
        if (launch(p, trial, candidate.algo) != CUBLAS_STATUS_SUCCESS) continue;
        float fastest = 0.0f;
        for (int i = 0; i < kTimedRuns; ++i) {
            check(cudaEventRecord(begin, stream), "cudaEventRecord");
            launch(p, trial, candidate.algo);
            check(cudaEventRecord(end, stream), "cudaEventRecord");
            check(cudaEventSynchronize(end), "timing a matrix product");
            float milliseconds = 0.0f;
            check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
            if (i == 0 || milliseconds < fastest) fastest = milliseconds;
        }
        measured.push_back({candidate.algo, fastest});
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::ranges::stable_sort(measured, {}, &Contestant::alone);
    const float slowest = measured.empty() ? 0.0f : kContestMargin * measured.front().alone;
    std::erase_if(measured, [&](const auto& other) { return other.alone > slowest; });
    if (measured.size() > kContestants) measured.resize(kContestants);
    return measured;
}

void Gemm::run_timed(Plan& p, const GemmCall& call) {
    p.called = true;
    Bout bout{&p, nullptr, nullptr};
    const auto stream = static_cast<cudaStream_t>(stream_);
    check(cudaEventCreate(&bout.begin), "cudaEventCreate");
    check(cudaEventCreate(&bout.end), "cudaEventCreate");
    bouts_.push_back(bout);
    check(cudaEventRecord(bout.begin, stream), "cudaEventRecord");
    check(launch(p, call, p.algo), "cublasLtMatmul");
    check(cudaEventRecord(bout.end, stream), "cudaEventRecord");
}

void Gemm::forget_bouts() {
    for (const Bout& bout : bouts_) {
        cudaEventDestroy(bout.begin);
        cudaEventDestroy(bout.end);
    }
    bouts_.clear();
}

std::vector<Gemm::Plan*> Gemm::contested() const {
    std::vector<Plan*> out;
    for (const auto& [key, plan] : plans_)
        if (plan->called && !plan->contestants.empty()) out.push_back(plan.get());
    return out;
}

std::string Gemm::describe(const cublasLtMatmulAlgo_t& algo) const {
    const auto value = [&](cublasLtMatmulAlgoConfigAttributes_t attribute, auto v) {
        size_t written = 0;
        library_->cublasLtMatmulAlgoConfigGetAttribute(&algo, attribute, &v, sizeof v, &written);
        return v;
    };
    return fmt::format(
        "id {} tile {} stages {} cluster {} split {} swizzle {} custom {}", value(CUBLASLT_ALGO_CONFIG_ID, int32_t{}),
        value(CUBLASLT_ALGO_CONFIG_TILE_ID, uint32_t{}), value(CUBLASLT_ALGO_CONFIG_STAGES_ID, uint32_t{}),
        value(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, uint16_t{}), value(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, int32_t{}),
        value(CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, uint32_t{}), value(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, uint32_t{}));
}

std::vector<Gemm::Candidates> Gemm::candidates() const {
    std::vector<Candidates> out;
    for (const Plan* plan : contested()) {
        Candidates& mine = out.emplace_back(Candidates{name_of(plan->call), {}, {}});
        for (const Contestant& c : plan->contestants) {
            mine.alone.push_back(c.alone);
            mine.algorithms.push_back(describe(c.algo));
        }
    }
    return out;
}

void Gemm::play(std::span<const int> chosen) {
    forget_bouts();
    const std::vector<Plan*> plans = contested();
    for (size_t i = 0; i < plans.size(); ++i) {
        const Contestant& player = plans[i]->contestants.at(static_cast<size_t>(chosen[i]));
        plans[i]->algo = player.algo;
        plans[i]->milliseconds = player.alone;
    }
}

std::vector<double> Gemm::played() {
    check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream_)), "waiting for the device");
    const std::vector<Plan*> plans = contested();
    std::vector<double> out(plans.size(), 0.0);
    for (const Bout& bout : bouts_) {
        float milliseconds = 0.0f;
        check(cudaEventElapsedTime(&milliseconds, bout.begin, bout.end), "cudaEventElapsedTime");
        const auto found = std::ranges::find(plans, bout.plan);
        if (found != plans.end()) out[static_cast<size_t>(found - plans.begin())] += milliseconds;
    }
    return out;
}

void Gemm::end_contest() {
    contest_ = false;
    forget_bouts();
    for (Plan* plan : contested()) {
        choices_.replace(name_of(plan->call), {bits_of(plan->algo), plan->milliseconds});
        plan->contestants.clear();
    }
}

void Gemm::run(const GemmCall& call) {
    Plan& p = plan(call);
    if (!p.possible)
        throw std::runtime_error(
            fmt::format("cublasLt: no algorithm for a product of {} x {} x {}", call.m, call.n, call.k));
    if (contest_) return run_timed(p, call);
    check(launch(p, call, p.algo), "cublasLtMatmul");
}

std::vector<Gemm::Measured> Gemm::measured() const {
    std::vector<Measured> out;
    for (const auto& [key, plan] : plans_)
        if (plan->possible) out.push_back({plan->call, plan->milliseconds});
    return out;
}

float Gemm::milliseconds(const GemmCall& call) { return plan(call).milliseconds; }
bool Gemm::possible(const GemmCall& call) { return plan(call).possible; }

}  // namespace strobe::gpt::cuda
