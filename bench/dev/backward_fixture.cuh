// One problem of the development driver: the row of src/variants.def that serves it, its tensors in device memory, and a launch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "backward_reference.cuh"
#include "core/variant.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/sm90/backward_workspace.hpp"

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

namespace strobe::backward_dev {

struct Row {
    Variant variant;
    cudaError_t (*launch)(const BackwardParams&, const cuda::LaunchContext&);
};

inline constexpr Keys few = Keys::few;
inline const Row kRows[] = {
#define STROBE_VARIANT(A, DIR, T, D, MASK, F, M, N, S, ...)                                                                 \
    {Variant{Arch::A, Direction::DIR, DType::T, D, MaskClass::MASK, Features::F, M, N, S, __VA_ARGS__},                            \
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
inline const Row* find(const Case& c) {
    const bool band = c.left >= 0 || c.right >= 0;
    int64_t keys = c.seqlen_k;
    for (int n : c.lens_k) keys = std::max<int64_t>(keys, n);
    int64_t queries = c.seqlen_q;
    for (int n : c.lens_q) queries = std::max<int64_t>(queries, n);
    const auto fits = [&](const Variant& v) {
        const bool whole = v.keys == Keys::few && sm90::may_take_whole_heads(v), brief = v.keys == Keys::few && !whole;
        if (keys <= (band || (c.deterministic && v.head_dim == 64) ? 512 : 256)) return whole;
        return !c.deterministic && queries < 2048 ? brief : v.keys == Keys::any;
    };
    const Row* best = nullptr;
    for (const Row& r : kRows) {
        if (r.variant.dtype != c.dtype || (r.variant.mask == MaskClass::band) != band || c.dim > r.variant.head_dim) continue;
        if (best && r.variant.head_dim != best->variant.head_dim) break;
        if (!best || fits(r.variant)) best = &r;
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

inline int num_sms() {
    int n = 0;
    CHECK_CUDA(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
    return n;
}

__global__ void add_kernel(float* p, int64_t n, float x) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) p[i] += x;
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
    void add_to_lse(double x) { add_kernel<<<512, 256>>>(p.lse.data, rows_q * c.heads, static_cast<float>(x)); }
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

}  // namespace strobe::backward_dev
