// Development driver of the Hopper backward kernels: checks dq, dk, dv against an fp64 reference on the GPU by the rule
// "error <= 2 x error of the naive computation in the working precision", repeats runs to catch races, and times the grid
// of the FlashAttention papers. build_backward_sm90.sh builds it from rows of src/variants.def.
// Usage: backward_sm90 [check] [race] [time] [deterministic] [beyond] [once] [d64] [d96] ...
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/variant.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/sm90/backward_workspace.hpp"

using namespace strobe;

namespace strobe::sm90 {
template <Variant V>
cudaError_t launch(const BackwardParams&, const cuda::LaunchContext&);
}

#define CHECK_CUDA(call)                                                                            \
    do {                                                                                            \
        const cudaError_t status_ = (call);                                                         \
        if (status_ != cudaSuccess) {                                                               \
            std::printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(status_));             \
            std::fflush(stdout);                                                                    \
            std::exit(1);                                                                           \
        }                                                                                           \
    } while (0)

namespace {

struct Row {
    Variant variant;
    cudaError_t (*launch)(const BackwardParams&, const cuda::LaunchContext&);
};

constexpr Keys few = Keys::few;
const Row kRows[] = {
#define STROBE_VARIANT(A, DIR, T, D, MASK, F, M, N, S, ...)                                             \
    {Variant{Arch::A, Direction::DIR, DType::T, D, MaskClass::MASK, Features::F, M, N, S, __VA_ARGS__}, \
     &sm90::launch<Variant{Arch::A, Direction::DIR, DType::T, D, MaskClass::MASK, Features::F, M, N, S, __VA_ARGS__}>},
#include "backward_sm90_rows.inc"
#undef STROBE_VARIANT
};

struct Case {
    const char* name;
    int batch, heads, heads_k;
    int64_t seqlen_q, seqlen_k;
    int dim;
    DType dtype = DType::bf16;
    int64_t left = -1, right = -1;
    std::vector<int> lens_q, lens_k;   // varlen
    std::vector<int> used_q, used_k;   // seqused
    bool dlse = false, accumulate = false, deterministic = false, f32_out = false;
    bool positions = false;
    int64_t q_position = 0, k_position = 0;
    bool bhsd = false;  // memory order (batch, heads, seqlen, dim)
};

/// As cuda/select.cpp finds it.
const Row* find(const Case& c) {
    const bool band = c.left >= 0 || c.right >= 0;
    int64_t keys = c.seqlen_k;
    for (int n : c.lens_k) keys = std::max<int64_t>(keys, n);
    const Row* best = nullptr;
    for (const Row& r : kRows) {
        if (r.variant.dtype != c.dtype || (r.variant.mask == MaskClass::band) != band || c.dim > r.variant.head_dim) continue;
        if (best && r.variant.head_dim != best->variant.head_dim) break;
        if (!best || (r.variant.keys == Keys::few && keys <= (band ? 512 : 256))) best = &r;
    }
    return best;
}

struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    explicit Buffer(size_t n = 0) : bytes(n) {
        if (n) CHECK_CUDA(cudaMalloc(&data, n));
    }
    Buffer(Buffer&& o) noexcept : data(o.data), bytes(o.bytes) { o.data = nullptr; }
    ~Buffer() { cudaFree(data); }
    void poison() { CHECK_CUDA(cudaMemset(data, 0xFF, bytes)); }
};

__device__ float uniform(uint64_t seed, uint64_t i) {
    uint64_t z = seed * 0x9E3779B97F4A7C15ull + i * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return static_cast<float>((z ^ (z >> 31)) >> 40) / 16777216.0f;
}
__device__ float normal(uint64_t seed, uint64_t i) {
    return sqrtf(-2.0f * logf(uniform(seed, 2 * i) + 1e-7f)) * cospif(2.0f * uniform(seed, 2 * i + 1));
}

template <DType kType>
__device__ float load(const void* p, int64_t i) {
    if constexpr (kType == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    else if constexpr (kType == DType::f16) return __half2float(static_cast<const __half*>(p)[i]);
    else return static_cast<const float*>(p)[i];
}
template <DType kType>
__device__ void store(void* p, int64_t i, double x) {
    if constexpr (kType == DType::bf16) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(static_cast<float>(x));
    else if constexpr (kType == DType::f16) static_cast<__half*>(p)[i] = __float2half(static_cast<float>(x));
    else static_cast<float*>(p)[i] = static_cast<float>(x);
}
template <DType kType>
__device__ double round_to(double x) {
    if constexpr (kType == DType::bf16) return __bfloat162float(__float2bfloat16(static_cast<float>(x)));
    else return __half2float(__float2half(static_cast<float>(x)));
}

template <DType kType>
__global__ void fill(void* p, int64_t n, uint64_t seed, float scale) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) store<kType>(p, i, scale * normal(seed, i));
}

/// Reference tensors: fp64, (row, head, dim) contiguous over all rows of all sequences.
struct Reference {
    double *lse, *delta, *out, *dq, *dk, *dv;
};

__device__ int64_t offset(const BackwardParams& p, const TensorRef& t, bool keys, int b, int64_t row, int head) {
    const bool varlen = keys ? p.seqlens.cu_seqlens_k : p.seqlens.cu_seqlens_q;
    return (varlen ? 0 : b * t.batch_stride) + row * t.row_stride + head * t.head_stride;
}
__device__ int64_t flat_row(const BackwardParams& p, const Sequence& s, bool keys, int b, int64_t i) {
    if (keys) return (p.seqlens.cu_seqlens_k ? s.k_row : b * p.size.seqlen_k) + i;
    return (p.seqlens.cu_seqlens_q ? s.q_row : b * p.size.seqlen_q) + i;
}

__device__ double block_sum(double x) {
    __shared__ double part[8];
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    double s = 0;
    for (int i = 0; i < 4; ++i) s += part[i];
    return s;
}

template <DType kType>
__device__ double dot(const void* a, int64_t ia, const void* b, int64_t ib, int dim) {
    double s = 0;
    for (int d = 0; d < dim; ++d) s += double(load<kType>(a, ia + d)) * load<kType>(b, ib + d);
    return s;
}

/// One block per query row: lse, out, delta and dq. kRound: intermediate matrices in the working precision.
template <DType kType, bool kRound>
__global__ void reference_rows(BackwardParams p, Reference r) {
    extern __shared__ double scores[];
    const int head = blockIdx.y, b = blockIdx.z;
    const Sequence s = sequence_of(p, b);
    const int64_t i = blockIdx.x;
    if (i >= s.rows_q) return;
    const int hk = head / (p.size.num_heads / p.size.num_heads_k);
    const BandMask mask = s.mask(p.mask);
    const int dim = p.size.head_dim;
    const int64_t flat = flat_row(p, s, false, b, i);
    const int64_t row = flat * p.size.num_heads + head;
    const int64_t iq = offset(p, p.q, false, b, s.q_row + i, head), ig = offset(p, p.dout, false, b, s.q_row + i, head);
    const auto rounded = [](double x) { return kRound ? round_to<kType>(x) : x; };
    const bool live = i < s.seqlen_q;
    double top = -INFINITY;
    for (int64_t j = threadIdx.x; live && j < s.seqlen_k; j += 128) {
        const int64_t ik = offset(p, p.k, true, b, s.k_row + j, hk);
        scores[j] = mask.visible(i, j) ? rounded(dot<kType>(p.q.data, iq, p.k.data, ik, dim) * p.score.softmax_scale) : -INFINITY;
        top = fmax(top, scores[j]);
    }
    for (int d = 16; d; d /= 2) top = fmax(top, __shfl_xor_sync(~0u, top, d));
    __shared__ double tops[4];
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    top = fmax(fmax(tops[0], tops[1]), fmax(tops[2], tops[3]));
    const bool any = live && top != -INFINITY;
    double sum = 0;
    for (int64_t j = threadIdx.x; any && j < s.seqlen_k; j += 128) sum += exp(scores[j] - top);
    sum = block_sum(sum);
    const double lse = any ? top + log(sum) : -INFINITY;
    for (int64_t j = threadIdx.x; any && j < s.seqlen_k; j += 128) scores[j] = rounded(exp(scores[j] - lse));
    __syncthreads();
    double delta = 0;
    for (int d = threadIdx.x; d < dim; d += 128) {
        double o = 0;
        for (int64_t j = 0; any && j < s.seqlen_k; ++j) o += scores[j] * load<kType>(p.v.data, offset(p, p.v, true, b, s.k_row + j, hk) + d);
        r.out[row * dim + d] = o;
        delta += rounded(o) * load<kType>(p.dout.data, ig + d);
    }
    delta = block_sum(delta);
    if (p.dlse && live) delta -= p.dlse.data[offset(p, TensorRef{nullptr, p.dlse.batch_stride, 1, p.dlse.head_stride}, false, b, s.q_row + i, head)];
    if (threadIdx.x == 0) r.lse[row] = lse, r.delta[row] = any ? delta : 0;
    for (int64_t j = threadIdx.x; any && j < s.seqlen_k; j += 128) {
        const int64_t iv = offset(p, p.v, true, b, s.k_row + j, hk);
        const double dp = rounded(dot<kType>(p.dout.data, ig, p.v.data, iv, dim));
        scores[j] = rounded(scores[j] * (dp - delta));
    }
    __syncthreads();
    for (int d = threadIdx.x; d < dim; d += 128) {
        double g = 0;
        for (int64_t j = 0; any && j < s.seqlen_k; ++j) g += scores[j] * load<kType>(p.k.data, offset(p, p.k, true, b, s.k_row + j, hk) + d);
        r.dq[row * dim + d] = rounded(g * p.score.softmax_scale);
    }
}

/// One block per key row and key head: dk, dv.
template <DType kType, bool kRound>
__global__ void reference_columns(BackwardParams p, Reference r) {
    extern __shared__ double weights[];  // P, dS of this key
    const int hk = blockIdx.y, b = blockIdx.z;
    const Sequence s = sequence_of(p, b);
    const int64_t j = blockIdx.x;
    if (j >= s.rows_k) return;
    const int group = p.size.num_heads / p.size.num_heads_k;
    const BandMask mask = s.mask(p.mask);
    const int dim = p.size.head_dim;
    const int64_t ik = offset(p, p.k, true, b, s.k_row + j, hk), iv = offset(p, p.v, true, b, s.k_row + j, hk);
    const auto rounded = [](double x) { return kRound ? round_to<kType>(x) : x; };
    double dk[2] = {}, dv[2] = {};
    for (int g = 0; g < group; ++g) {
        const int head = hk * group + g;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < s.seqlen_q; i += 128) {
            const int64_t row = flat_row(p, s, false, b, i) * p.size.num_heads + head;
            double w = 0, ds = 0;
            if (mask.visible(i, j)) {
                const double score = rounded(dot<kType>(p.q.data, offset(p, p.q, false, b, s.q_row + i, head), p.k.data, ik, dim) * p.score.softmax_scale);
                const double dp = rounded(dot<kType>(p.dout.data, offset(p, p.dout, false, b, s.q_row + i, head), p.v.data, iv, dim));
                w = rounded(exp(score - r.lse[row]));
                ds = rounded(w * (dp - r.delta[row]));
            }
            weights[2 * i] = w;
            weights[2 * i + 1] = ds;
        }
        __syncthreads();
        for (int n = 0; n < 2; ++n) {
            const int d = threadIdx.x + 128 * n;
            for (int64_t i = 0; d < dim && i < s.seqlen_q; ++i) {
                if (!mask.visible(i, j)) continue;
                dv[n] += weights[2 * i] * load<kType>(p.dout.data, offset(p, p.dout, false, b, s.q_row + i, head) + d);
                dk[n] += weights[2 * i + 1] * load<kType>(p.q.data, offset(p, p.q, false, b, s.q_row + i, head) + d);
            }
        }
    }
    const int64_t row = flat_row(p, s, true, b, j) * p.size.num_heads_k + hk;
    for (int n = 0; n < 2; ++n) {
        const int d = threadIdx.x + 128 * n;
        if (d < dim) r.dv[row * dim + d] = rounded(dv[n]), r.dk[row * dim + d] = rounded(dk[n] * p.score.softmax_scale);
    }
}

/// Gives the kernel under test the out and lse of the exact forward.
template <DType kType>
__global__ void export_forward(BackwardParams p, Reference r) {
    const int head = blockIdx.y, b = blockIdx.z;
    const Sequence s = sequence_of(p, b);
    const int64_t i = blockIdx.x;
    if (i >= s.rows_q) return;
    const int64_t row = flat_row(p, s, false, b, i) * p.size.num_heads + head;
    for (int d = threadIdx.x; d < p.size.head_dim; d += 128) {
        const int64_t at = offset(p, p.out, false, b, s.q_row + i, head) + d;
        if (p.out_dtype == DType::f32) store<DType::f32>(p.out.data, at, r.out[row * p.size.head_dim + d]);
        else store<kType>(p.out.data, at, r.out[row * p.size.head_dim + d]);
    }
    if (threadIdx.x == 0) p.lse.data[offset(p, TensorRef{nullptr, p.lse.batch_stride, 1, p.lse.head_stride}, false, b, s.q_row + i, head)] = static_cast<float>(r.lse[row]);
}

/// max |got - exact|, max |naive - exact| and max |exact|; NaN counts as infinity.
template <DType kType>
__global__ void compare(BackwardParams p, TensorRef got, bool keys, const double* exact, const double* naive, float initial, double* result) {
    const int head = blockIdx.y, b = blockIdx.z;
    const int heads = keys ? p.size.num_heads_k : p.size.num_heads;
    const Sequence s = sequence_of(p, b);
    const int64_t i = blockIdx.x;
    if (i >= (keys ? s.rows_k : s.rows_q)) return;
    const int64_t row = flat_row(p, s, keys, b, i) * heads + head;
    double mine = 0, theirs = 0, size = 0;
    for (int d = threadIdx.x; d < p.size.head_dim; d += 128) {
        const double x = load<kType>(got.data, offset(p, got, keys, b, (keys ? s.k_row : s.q_row) + i, head) + d) - initial;
        const double e = exact[row * p.size.head_dim + d];
        const double error = fabs(x - e);
        mine = fmax(mine, isnan(error) ? INFINITY : error);
        theirs = fmax(theirs, fabs(naive[row * p.size.head_dim + d] - e));
        size = fmax(size, fabs(e));
    }
    const auto raise = [](double* at, double x) { atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(__double_as_longlong(x))); };
    raise(result, mine);
    raise(result + 1, theirs);
    raise(result + 2, size);
}

int num_sms() {
    int n = 0;
    CHECK_CUDA(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
    return n;
}

/// All tensors of one case.
struct Fixture {
    Case c;
    const Row* row;
    BackwardParams p;
    std::vector<Buffer> memory;
    int64_t rows_q, rows_k;

    void* take(size_t bytes) {
        memory.emplace_back(std::max<size_t>(bytes, 256));
        memory.back().poison();
        return memory.back().data;
    }
    TensorRef tensor(int64_t rows, int heads, int64_t seqlen, int element) {
        TensorRef t;
        t.data = take(rows * heads * c.dim * element);
        if (c.bhsd) {
            t.batch_stride = seqlen * heads * c.dim, t.head_stride = seqlen * c.dim, t.row_stride = c.dim;
        } else {
            t.batch_stride = seqlen * heads * c.dim, t.head_stride = c.dim, t.row_stride = int64_t(heads) * c.dim;
        }
        return t;
    }
    const int32_t* prefix(const std::vector<int>& lens, bool sum) {
        if (lens.empty()) return nullptr;
        std::vector<int32_t> v;
        int32_t total = 0;
        if (sum) v.push_back(0);
        for (int n : lens) v.push_back(sum ? total += n : n);
        void* d = take(v.size() * 4);
        CHECK_CUDA(cudaMemcpy(d, v.data(), v.size() * 4, cudaMemcpyHostToDevice));
        return static_cast<const int32_t*>(d);
    }

    explicit Fixture(const Case& c_) : c(c_), row(find(c_)) {
        if (!row) return;
        memory.reserve(64);
        p.size = {c.batch, c.heads, c.heads_k, c.dim, c.dim, c.seqlen_q, c.seqlen_k, c.batch * c.seqlen_q, c.batch * c.seqlen_k};
        const auto total = [](const std::vector<int>& v) { int64_t n = 0; for (int x : v) n += x; return n; };
        if (!c.lens_q.empty()) p.size.total_q = total(c.lens_q), p.size.seqlen_q = *std::max_element(c.lens_q.begin(), c.lens_q.end());
        if (!c.lens_k.empty()) p.size.total_k = total(c.lens_k), p.size.seqlen_k = *std::max_element(c.lens_k.begin(), c.lens_k.end());
        rows_q = p.size.total_q, rows_k = p.size.total_k;
        p.seqlens = {prefix(c.lens_q, true), prefix(c.lens_k, true), prefix(c.used_q, false), prefix(c.used_k, false)};
        p.mask = {c.left, c.right, c.positions, c.q_position, c.k_position};
        p.score.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
        p.dtype = c.dtype;
        p.out_dtype = c.f32_out ? DType::f32 : c.dtype;
        p.q = tensor(rows_q, c.heads, c.seqlen_q, 2);
        p.k = tensor(rows_k, c.heads_k, c.seqlen_k, 2);
        p.v = tensor(rows_k, c.heads_k, c.seqlen_k, 2);
        p.out = tensor(rows_q, c.heads, c.seqlen_q, c.f32_out ? 4 : 2);
        p.dout = tensor(rows_q, c.heads, c.seqlen_q, 2);
        p.grad_dtype = c.accumulate ? DType::f32 : c.dtype;
        p.accumulate = c.accumulate;
        p.deterministic = c.deterministic;
        const int element = c.accumulate ? 4 : 2;
        p.dq = tensor(rows_q, c.heads, c.seqlen_q, element);
        p.dk = tensor(rows_k, c.heads_k, c.seqlen_k, element);
        p.dv = tensor(rows_k, c.heads_k, c.seqlen_k, element);
        const bool varlen = !c.lens_q.empty();
        const int64_t lse_seqlen = varlen ? rows_q : c.seqlen_q;
        p.lse = {static_cast<float*>(take(rows_q * c.heads * 4)), varlen ? 0 : c.heads * lse_seqlen, lse_seqlen};
        fill_all();
        if (c.dlse) {
            p.dlse = p.lse;
            p.dlse.data = static_cast<float*>(take(rows_q * c.heads * 4));
            fill<DType::f32><<<512, 256>>>(p.dlse.data, rows_q * c.heads, 77, 1.0f);
        }
        const sm90::BackwardWorkspace w = sm90::backward_workspace(row->variant, p);
        p.workspace = take(w.bytes);
    }
    void fill_all() {
        static uint64_t seed = 1;
        const auto go = [&](const TensorRef& t, int64_t rows, int heads) {
            if (c.dtype == DType::bf16) fill<DType::bf16><<<1024, 256>>>(t.data, rows * heads * c.dim, ++seed, 1.0f);
            else fill<DType::f16><<<1024, 256>>>(t.data, rows * heads * c.dim, ++seed, 1.0f);
        };
        go(p.q, rows_q, c.heads);
        go(p.k, rows_k, c.heads_k);
        go(p.v, rows_k, c.heads_k);
        go(p.dout, rows_q, c.heads);
        if (!c.f32_out) go(p.out, rows_q, c.heads);  // timing: any finite values do; lse near its typical size keeps P < 1
        fill<DType::f32><<<512, 256>>>(p.lse.data, rows_q * c.heads, ++seed, 0.0f);
        add_to_lse(std::log(static_cast<double>(p.size.seqlen_k)) + 0.5);
    }
    void add_to_lse(double x);
    void poison_outputs() {
        const float one = 1.0f;
        for (const TensorRef* t : {&p.dq, &p.dk, &p.dv}) {
            const int64_t n = (t == &p.dq ? rows_q * c.heads : rows_k * c.heads_k) * c.dim;
            if (c.accumulate) {
                std::vector<float> ones(n, one);
                CHECK_CUDA(cudaMemcpy(t->data, ones.data(), n * 4, cudaMemcpyHostToDevice));
            } else {
                CHECK_CUDA(cudaMemset(t->data, 0xFF, n * 2));
            }
        }
    }
    void run(cudaStream_t stream = nullptr) {
        static const int sms = num_sms();
        CHECK_CUDA(row->launch(p, cuda::LaunchContext{stream, 0, sms}));
    }
};

__global__ void add_kernel(float* p, int64_t n, float x) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) p[i] += x;
}
void Fixture::add_to_lse(double x) { add_kernel<<<512, 256>>>(p.lse.data, rows_q * c.heads, static_cast<float>(x)); }

template <DType kType>
bool check_typed(const Case& c) {
    Fixture f(c);
    if (!f.row) return true;
    BackwardParams& p = f.p;
    const int64_t nq = f.rows_q * c.heads, nk = f.rows_k * c.heads_k;
    const auto reference = [&] {
        Reference r;
        r.lse = static_cast<double*>(f.take(nq * 8)), r.delta = static_cast<double*>(f.take(nq * 8));
        r.out = static_cast<double*>(f.take(nq * c.dim * 8)), r.dq = static_cast<double*>(f.take(nq * c.dim * 8));
        r.dk = static_cast<double*>(f.take(nk * c.dim * 8)), r.dv = static_cast<double*>(f.take(nk * c.dim * 8));
        return r;
    };
    const Reference exact = reference(), naive = reference();
    const dim3 grid_q(p.size.seqlen_q, c.heads, c.batch), grid_k(p.size.seqlen_k, c.heads_k, c.batch);
    const int smem_q = static_cast<int>(p.size.seqlen_k * 8), smem_k = static_cast<int>(p.size.seqlen_q * 16);
    reference_rows<kType, false><<<grid_q, 128, smem_q>>>(p, exact);
    reference_rows<kType, true><<<grid_q, 128, smem_q>>>(p, naive);
    reference_columns<kType, false><<<grid_k, 128, smem_k>>>(p, exact);
    reference_columns<kType, true><<<grid_k, 128, smem_k>>>(p, naive);
    export_forward<kType><<<grid_q, 128>>>(p, exact);
    CHECK_CUDA(cudaDeviceSynchronize());
    f.poison_outputs();
    f.run();
    CHECK_CUDA(cudaDeviceSynchronize());
    double* result = static_cast<double*>(f.take(9 * 8));
    CHECK_CUDA(cudaMemset(result, 0, 72));
    const float initial = c.accumulate ? 1.0f : 0.0f;
    const auto compare_one = [&](const TensorRef& t, bool keys, const double* e, const double* n, double* out) {
        const dim3 grid = keys ? grid_k : grid_q;
        if (c.accumulate) compare<DType::f32><<<grid, 128>>>(p, t, keys, e, n, initial, out);
        else compare<kType><<<grid, 128>>>(p, t, keys, e, n, initial, out);
    };
    compare_one(p.dq, false, exact.dq, naive.dq, result);
    compare_one(p.dk, true, exact.dk, naive.dk, result + 3);
    compare_one(p.dv, true, exact.dv, naive.dv, result + 6);
    double h[9];
    CHECK_CUDA(cudaMemcpy(h, result, 72, cudaMemcpyDeviceToHost));
    bool ok = true;
    std::string text;
    for (int i = 0; i < 3; ++i) {
        const double* x = h + 3 * i;
        const double atol = 1e-5 * std::max(1.0, x[2]);
        const bool good = x[0] <= 2 * x[1] + atol;
        ok = ok && good;
        char line[128];
        std::snprintf(line, sizeof line, "  %s %.2e/%.2e%s", i == 0 ? "dq" : i == 1 ? "dk" : "dv", x[0], x[1], good ? "" : " BAD");
        text += line;
    }
    std::printf("%-4s %-34s d%-3d%s\n", ok ? "ok" : "FAIL", c.name, c.dim, text.c_str());
    std::fflush(stdout);
    return ok;
}

bool check(const Case& c) { return c.dtype == DType::bf16 ? check_typed<DType::bf16>(c) : check_typed<DType::f16>(c); }

/// dk and dv (and dq in deterministic mode, and with whole heads) must come out bit-equal every time.
bool race(const Case& c, int repeats) {
    Fixture f(c);
    if (!f.row) return true;
    const auto grab = [&] {
        std::vector<std::vector<char>> r;
        for (const TensorRef* t : {&f.p.dk, &f.p.dv, &f.p.dq}) {
            if (t == &f.p.dq && !c.deterministic && !sm90::takes_whole_heads(f.row->variant, f.p)) continue;
            std::vector<char> v((t == &f.p.dq ? f.rows_q * c.heads : f.rows_k * c.heads_k) * c.dim * 2);
            CHECK_CUDA(cudaMemcpy(v.data(), t->data, v.size(), cudaMemcpyDeviceToHost));
            r.push_back(std::move(v));
        }
        return r;
    };
    f.run();
    const auto first = grab();
    int bad = 0;
    for (int i = 0; i < repeats; ++i) {
        f.poison_outputs();
        f.run();
        bad += grab() != first;
    }
    std::printf("%-4s race %-29s d%-3d %d of %d runs differ\n", bad ? "FAIL" : "ok", c.name, c.dim, bad, repeats);
    std::fflush(stdout);
    return bad == 0;
}

double visible_pairs(const Case& c) {
    const auto one = [&](int64_t sq, int64_t sk) {
        const BandMask mask{c.left, c.right, sk - sq, sq, sk};
        double n = 0;
        for (int64_t i = 0; i < sq; ++i) n += mask.key_range(i, i + 1).size();
        return n;
    };
    if (c.lens_q.empty()) {
        const bool causal = c.right == 0 && c.left < 0;
        return c.batch * (causal ? 0.5 * c.seqlen_q * c.seqlen_k : one(c.seqlen_q, c.seqlen_k));
    }
    double n = 0;
    for (size_t b = 0; b < c.lens_q.size(); ++b) n += one(c.lens_q[b], c.lens_k[b]);
    return n;
}

/// Median milliseconds, L2 flushed before every run.
double milliseconds(const Case& c, int runs) {
    Fixture f(c);
    if (!f.row) return 0;
    static Buffer flush(128 << 20);
    cudaEvent_t a, b;
    CHECK_CUDA(cudaEventCreate(&a));
    CHECK_CUDA(cudaEventCreate(&b));
    for (int i = 0; i < 3; ++i) f.run();
    std::vector<float> times;
    for (int i = 0; i < runs; ++i) {
        CHECK_CUDA(cudaMemsetAsync(flush.data, i, flush.bytes));
        CHECK_CUDA(cudaEventRecord(a));
        f.run();
        CHECK_CUDA(cudaEventRecord(b));
        CHECK_CUDA(cudaEventSynchronize(b));
        float ms;
        CHECK_CUDA(cudaEventElapsedTime(&ms, a, b));
        times.push_back(ms);
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

double tflops(const Case& c, double ms) { return 10.0 * visible_pairs(c) * c.heads * c.dim / (ms * 1e9); }

std::vector<Case> check_cases() {
    std::vector<Case> cases;
    for (DType t : {DType::bf16, DType::f16}) {
        for (int d : {64, 128, 96, 192, 256, 40, 80, 136, 200}) {
            const bool narrow = t == DType::f16;
            cases.push_back({"one tile", 1, 1, 1, 64, 128, d, t});
            cases.push_back({"whole heads full 256", 33, 8, 8, 256, 256, d, t});
            cases.push_back({"whole heads causal 203x250", 33, 8, 8, 203, 250, d, t, -1, 0});
            cases.push_back({"full 256", 2, 2, 2, 256, 256, d, t});
            cases.push_back({"causal 512", 1, 2, 2, 512, 512, d, t, -1, 0});
            if (narrow) continue;
            cases.push_back({"ragged 113x203", 2, 3, 3, 113, 203, d, t});
            cases.push_back({"causal 113x203", 2, 3, 3, 113, 203, d, t, -1, 0});
            cases.push_back({"causal 203x113 (empty rows)", 2, 3, 3, 203, 113, d, t, -1, 0});
            cases.push_back({"causal gqa 700x100 (unseen tiles)", 3, 4, 2, 700, 100, d, t, -1, 0});
            cases.push_back({"window (20, 5) gqa 300x250", 33, 16, 8, 300, 250, d, t, 20, 5});
            cases.push_back({"window (70, 30) 500x700", 1, 2, 2, 500, 700, d, t, 70, 30});
            cases.push_back({"gqa 6/2 causal 300", 2, 6, 2, 300, 300, d, t, -1, 0});
            cases.push_back({"mqa full 1023x1024 bhsd", 1, 4, 1, 1023, 1024, d, t});
            cases.back().bhsd = true;
            Case v{"varlen causal", 5, 2, 2, 0, 0, d, t, -1, 0};
            v.lens_q = {1, 300, 0, 129, 64}, v.lens_k = {17, 300, 33, 0, 200};
            cases.push_back(v);
            v.name = "varlen full seqused", v.right = -1;
            v.used_q = {1, 250, 0, 100, 0}, v.used_k = {10, 300, 33, 0, 129};
            cases.push_back(v);
            Case u{"seqused fixed length, dlse", 3, 2, 1, 200, 260, d, t};
            u.used_q = {200, 77, 0}, u.used_k = {131, 260, 64}, u.dlse = true;
            cases.push_back(u);
            Case g{"accumulate f32 out, dlse, causal", 2, 2, 2, 190, 320, d, t, -1, 0};
            g.accumulate = g.f32_out = g.dlse = true;
            cases.push_back(g);
            Case o{"positions (ring block)", 1, 2, 2, 256, 256, d, t, -1, 0};
            o.positions = true, o.q_position = 300, o.k_position = 200;
            cases.push_back(o);
            Case z{"deterministic causal 700", 2, 2, 2, 700, 700, d, t, -1, 0};
            z.deterministic = true;
            cases.push_back(z);
            z.name = "deterministic full 700", z.right = -1;
            cases.push_back(z);
            z.name = "deterministic window gqa", z.left = 200, z.right = 10, z.heads = 4;
            cases.push_back(z);
            if (d > 128) continue;
            // Work tiles that do not fill the machine are shared.
            cases.push_back({"shared, full 1000x1030", 1, 3, 3, 1000, 1030, d, t});
            cases.push_back({"shared, gqa 6/2 full 700x515", 1, 6, 2, 700, 515, d, t});
            cases.push_back({"shared by eight, 2048x257", 1, 1, 1, 2048, 257, d, t});
            cases.push_back({"shared, one key tile, 2050x77", 2, 4, 4, 2050, 77, d, t});
            Case h{"shared, accumulate f32 out", 1, 2, 2, 1100, 400, d, t};
            h.accumulate = h.f32_out = true;
            cases.push_back(h);
            // Sequences in the order of their lengths; at head dim 128, keys and heads enough for the main kernel to do the rows
            // of some heads itself.
            if (d != 64 && d != 128 && d != 80) continue;
            cases.push_back({"many heads, shared, full 2048", 2, 14, 14, 2048, 2048, d, t});
            cases.push_back({"many heads, full 2048", 2, 12, 12, 2048, 2048, d, t});
            cases.push_back({"many heads, causal 2081x2112 gqa", 2, 24, 12, 2081, 2112, d, t, -1, 0});
            Case m{"many heads, varlen causal", 10, 6, 6, 0, 0, d, t, -1, 0};
            m.lens_q = {2050, 0, 300, 64, 1, 700, 129, 2048, 33, 500}, m.lens_k = {2049, 40, 0, 290, 128, 513, 1, 2100, 400, 0};
            cases.push_back(m);
            m.name = "many heads, varlen seqused, dlse", m.right = -1, m.dlse = true;
            m.used_q = {2000, 0, 150, 64, 0, 690, 1, 2048, 32, 100}, m.used_k = {2049, 40, 0, 0, 128, 512, 1, 70, 333, 0};
            cases.push_back(m);
        }
    }
    return cases;
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<std::string> want(argv + 1, argv + argc);
    const auto wanted = [&](const char* name) { return std::find(want.begin(), want.end(), name) != want.end(); };
    const auto wants_dim = [&](int d) {
        bool any = false;
        for (const std::string& w : want) {
            if (w[0] != 'd') continue;
            any = true;
            if (w == "d" + std::to_string(d)) return true;
        }
        return !any;
    };
    bool ok = true;
    if (wanted("check")) {
        for (const Case& c : check_cases()) {
            if (wants_dim(c.dim)) ok = check(c) && ok;
        }
    }
    if (wanted("race")) {
        for (int d : {64, 128, 96, 192, 256}) {
            if (!wants_dim(d)) continue;
            ok = race({"whole heads full 128", 40, 8, 8, 128, 128, d}, 100) && ok;
            ok = race({"whole heads causal 256", 33, 8, 8, 256, 256, d, DType::bf16, -1, 0}, 100) && ok;
            ok = race({"full 1024", 2, 4, 4, 1024, 1024, d}, 100) && ok;
            ok = race({"causal 1024 gqa", 2, 4, 2, 1024, 1024, d, DType::bf16, -1, 0}, 100) && ok;
            ok = race({"causal 2048, 32 heads", 2, 16, 16, 2048, 2048, d, DType::bf16, -1, 0}, 50) && ok;
            Case z{"deterministic causal 1024", 2, 4, 2, 1024, 1024, d, DType::bf16, -1, 0};
            z.deterministic = true;
            ok = race(z, 50) && ok;
        }
    }
    if (wanted("time")) {
        for (int d : {64, 128, 96, 192, 256}) {
            if (!wants_dim(d)) continue;
            for (int64_t right : {-1, 0}) {
                std::printf("TFLOP/s d%-3d %-6s", d, right ? "full" : "causal");
                for (int64_t s : {512, 1024, 2048, 4096, 8192, 16384}) {
                    const int heads = d == 96 ? 21 : d == 192 ? 11 : 2048 / d;
                    const Case c{"", static_cast<int>(16384 / s), heads, heads, s, s, d, DType::bf16, -1, right};
                    std::printf(" %6.0f", tflops(c, milliseconds(c, s >= 8192 ? 7 : 15)));
                    std::fflush(stdout);
                }
                std::printf("\n");
            }
        }
    }
    if (wanted("deterministic")) {
        for (int d : {64, 128, 96, 192, 256}) {
            if (!wants_dim(d)) continue;
            for (int64_t right : {-1, 0}) {
                std::printf("deterministic d%-3d %-6s", d, right ? "full" : "causal");
                for (int64_t s : {512, 1024, 2048, 4096, 8192, 16384}) {
                    const int heads = d == 96 ? 21 : d == 192 ? 11 : 2048 / d;
                    Case c{"", static_cast<int>(16384 / s), heads, heads, s, s, d, DType::bf16, -1, right};
                    const int runs = s >= 8192 ? 5 : 9;
                    const double free = tflops(c, milliseconds(c, runs));
                    c.deterministic = true;
                    const double ordered = tflops(c, milliseconds(c, runs));
                    std::printf(" %4.0f (%.2f)", ordered, ordered / free);
                    std::fflush(stdout);
                }
                std::printf("\n");
            }
        }
    }
    if (wanted("once")) {  // one launch per head dim, for a profiler
        for (int d : {64, 128, 96, 192, 256}) {
            if (!wants_dim(d)) continue;
            Fixture f({"", 4, 2048 / d, 2048 / d, 4096, 4096, d});
            if (f.row) f.run();
        }
        CHECK_CUDA(cudaDeviceSynchronize());
    }
    if (wanted("beyond")) {
        for (int64_t right : {-1, 0}) {
            for (bool det : {false, true}) {
                std::printf("GQA 64/8 d128 %s%s", right ? "full" : "causal", det ? " deterministic" : "");
                for (int64_t s : {1024, 2048, 4096, 8192, 16384}) {
                    Case c{"", static_cast<int>(16384 / s), 64, 8, s, s, 128, DType::bf16, -1, right};
                    c.deterministic = det;
                    std::printf(" %6.0f", tflops(c, milliseconds(c, 5)));
                    std::fflush(stdout);
                }
                std::printf("\n");
            }
        }
        std::vector<int> lens;
        for (int i = 0, total = 0; total < 32768; ++i) {
            int n = static_cast<int>(std::exp(std::log(8.0) + (std::log(8192.0) - std::log(8.0)) * ((i * 37 % 64) + 0.5) / 64));
            n = std::min(n, 32768 - total);
            lens.push_back(n);
            total += n;
        }
        for (int64_t right : {-1, 0}) {
            Case c{"", static_cast<int>(lens.size()), 16, 16, 0, 0, 128, DType::bf16, -1, right};
            c.lens_q = c.lens_k = lens;
            std::printf("varlen %zu sequences %s %6.0f\n", lens.size(), right ? "full" : "causal", tflops(c, milliseconds(c, 9)));
        }
        for (int d : {64, 128}) {
            std::printf("cross attention, 77 keys, 2x8, 2x32 heads d%d, us:", d);
            for (int heads : {8, 32}) {
                for (int64_t rows : {1024, 4096}) std::printf(" %6.1f", 1e3 * milliseconds({"", 2, heads, heads, rows, 77, d}, 21));
            }
            std::printf("\n");
        }
        const Case w{"", 1, 16, 16, 16384, 16384, 128, DType::bf16, 1023, 0};
        std::printf("window 1024 causal 16k %6.0f\n", tflops(w, milliseconds(w, 9)));
    }
    std::printf(ok ? "ALL OK\n" : "SOME FAILED\n");
    return ok ? 0 : 1;
}
