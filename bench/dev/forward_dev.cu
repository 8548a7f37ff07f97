// Development driver of the forward kernels: checks every registered kernel against an fp64 reference on the GPU, then
// prints TFLOP/s on the grid of the FlashAttention papers beside the recorded numbers of FlashAttention-3.
//   forward_dev [verify] [bench] [only=PIECE,...] [rounds=N] [seqlens=512,1024,...] [heads=64,8: grouped queries]
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "forward_dev.hpp"

using namespace strobe;

#define CHECK(call)                                                                              \
    do {                                                                                         \
        const cudaError_t status_ = (call);                                                      \
        if (status_ != cudaSuccess) {                                                            \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status_));         \
            std::exit(1);                                                                        \
        }                                                                                        \
    } while (0)

namespace {

// ---------------------------------------------------------------------------------------------------------- reference

__device__ double load(const void* data, int64_t i, DType dtype) {
    if (dtype == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    if (dtype == DType::f16) return __half2float(static_cast<const __half*>(data)[i]);
    return static_cast<const float*>(data)[i];
}

__device__ double round_to(double x, DType dtype) {
    if (dtype == DType::bf16) return __bfloat162float(__float2bfloat16(static_cast<float>(x)));
    return __half2float(__float2half(static_cast<float>(x)));
}

/// One block per (row, head, sequence). `naive` rounds scores, weights and output to the working precision, as plain
/// framework code would.
__global__ void reference_kernel(AttentionParams p, bool naive, float* out, double* lse) {
    extern __shared__ double weights[];
    __shared__ double reduced[128];
    const int row = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const Sequence s = sequence_of(p, batch);
    if (row >= s.rows_q) return;
    const BandMask mask = s.mask(p.mask);
    const int kv_head = head / (p.size.num_heads / p.size.num_heads_k);
    const int64_t q = batch * p.q.batch_stride + (s.q_row + row) * p.q.row_stride + head * p.q.head_stride;
    const auto reduce = [&](double x, bool maximum) {
        reduced[threadIdx.x] = x;
        __syncthreads();
        for (int step = 64; step > 0; step /= 2) {
            if (threadIdx.x < step) {
                const double other = reduced[threadIdx.x + step];
                reduced[threadIdx.x] = maximum ? fmax(reduced[threadIdx.x], other) : reduced[threadIdx.x] + other;
            }
            __syncthreads();
        }
        const double result = reduced[0];
        __syncthreads();
        return result;
    };
    double top = -INFINITY;
    for (int j = threadIdx.x; j < s.seqlen_k; j += 128) {
        double dot = -INFINITY;
        if (row < s.seqlen_q && mask.visible(row, j)) {
            const int64_t k = batch * p.k.batch_stride + (s.k_row + j) * p.k.row_stride + kv_head * p.k.head_stride;
            dot = 0;
            for (int d = 0; d < p.size.head_dim; ++d) dot += load(p.q.data, q + d, p.dtype) * load(p.k.data, k + d, p.dtype);
            dot *= p.score.softmax_scale;
            if (naive) dot = round_to(dot, p.dtype);
        }
        weights[j] = dot;
        top = fmax(top, dot);
    }
    top = reduce(top, true);
    double sum = 0;
    for (int j = threadIdx.x; j < s.seqlen_k; j += 128) {
        weights[j] = weights[j] == -INFINITY ? 0 : exp(weights[j] - top);
        sum += weights[j];
    }
    sum = reduce(sum, false);
    const int64_t out_row = (int64_t{batch} * p.size.num_heads + head) * p.size.seqlen_q + row;
    if (threadIdx.x == 0) lse[out_row] = sum == 0 ? -INFINITY : top + log(sum);
    for (int d = threadIdx.x; d < p.size.head_dim_v; d += 128) {
        double acc = 0;
        for (int j = 0; j < s.seqlen_k; ++j) {
            if (weights[j] == 0) continue;
            double w = weights[j] / sum;
            if (naive) w = round_to(w, p.dtype);
            acc += w * load(p.v.data, batch * p.v.batch_stride + (s.k_row + j) * p.v.row_stride +
                                          kv_head * p.v.head_stride + d, p.dtype);
        }
        out[out_row * p.size.head_dim_v + d] = static_cast<float>(naive ? round_to(acc, p.dtype) : acc);
    }
}

/// Normal numbers from a counter; `scale` widens the spread so that the softmax is not flat.
__global__ void fill_kernel(void* data, int64_t count, DType dtype, uint64_t seed, float scale) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
        const Philox4x32 r = philox4x32_10({{static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), 0, 0}},
                                           static_cast<uint32_t>(seed), 77u);
        const float u = (r.word[0] + 1.0f) * 2.3283064e-10f, w = r.word[1] * 2.3283064e-10f;
        const float x = scale * sqrtf(-2.0f * logf(fminf(u, 1.0f))) * cospif(2.0f * w);
        if (dtype == DType::bf16) static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(x);
        else static_cast<__half*>(data)[i] = __float2half(x);
    }
}

struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    explicit Buffer(int64_t n) : bytes(std::max<int64_t>(n, 16)) { CHECK(cudaMalloc(&data, bytes)); }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cudaFree(data); }
    void fill(DType dtype, uint64_t seed, float scale = 1.0f) { fill_kernel<<<1024, 256>>>(data, bytes / 2, dtype, seed, scale); }
    void poison() { CHECK(cudaMemset(data, 0xFF, bytes)); }
};

// -------------------------------------------------------------------------------------------------------------- cases

struct Case {
    std::string name;
    int batch, heads, heads_k, seqlen_q, seqlen_k, head_dim;
    int64_t left = -1, right = -1;
    std::vector<int> lens_q = {}, lens_k = {}, used_q = {}, used_k = {};  // lens_*: varlen
    int head_dim_v = 0;
    bool heads_outer = false;  // (B, H, S, D) layout
    bool out_f32 = false;
    bool nan_tails = false;    // memory behind the counted keys holds NaN
    int64_t position_shift = 0;
    float spread = 1.0f;
};

TensorRef view(void* data, int64_t seqlen, int64_t heads, int64_t dim, bool varlen, bool heads_outer) {
    TensorRef t;
    t.data = data;
    t.batch_stride = varlen ? 0 : seqlen * heads * dim;
    t.row_stride = heads_outer ? dim : heads * dim;
    t.head_stride = heads_outer ? seqlen * dim : dim;
    return t;
}

const int32_t* upload(const std::vector<int>& host, bool prefix_sums, std::vector<Buffer*>& owned) {
    if (host.empty()) return nullptr;
    std::vector<int32_t> data;
    if (prefix_sums) data.push_back(0);
    for (int n : host) data.push_back(prefix_sums ? data.back() + n : n);
    Buffer* b = new Buffer(static_cast<int64_t>(data.size()) * 4);
    owned.push_back(b);
    CHECK(cudaMemcpy(b->data, data.data(), data.size() * 4, cudaMemcpyHostToDevice));
    return static_cast<const int32_t*>(b->data);
}

int sum_of(const std::vector<int>& v) {
    int sum = 0;
    for (int x : v) sum += x;
    return sum;
}

template <typename T>
std::vector<T> download(const void* data, int64_t count) {
    std::vector<T> host(count);
    CHECK(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}

float to_float(uint16_t bits, DType dtype) {
    if (dtype == DType::f16) return __half2float(__ushort_as_half(bits));
    return __bfloat162float(__ushort_as_bfloat16(bits));
}

bool verify(const dev::Kernel& kernel, const Case& c, const cuda::LaunchContext& context, bool print) {
    const DType dtype = kernel.variant.dtype;
    const bool varlen_q = !c.lens_q.empty(), varlen_k = !c.lens_k.empty();
    const int dv = c.head_dim_v ? c.head_dim_v : c.head_dim;
    const int64_t total_q = varlen_q ? sum_of(c.lens_q) : int64_t{c.batch} * c.seqlen_q;
    const int64_t total_k = varlen_k ? sum_of(c.lens_k) : int64_t{c.batch} * c.seqlen_k;
    constexpr int64_t kGuard = 4096;
    Buffer q(total_q * c.heads * c.head_dim * 2), k(total_k * c.heads_k * c.head_dim * 2), v(total_k * c.heads_k * dv * 2);
    Buffer out(total_q * c.heads * dv * (c.out_f32 ? 4 : 2) + kGuard), lse(total_q * c.heads * 4 + kGuard), workspace(16);
    q.fill(dtype, 1, c.spread);
    k.fill(dtype, 2);
    v.fill(dtype, 3);
    out.poison();
    lse.poison();
    workspace.poison();
    std::vector<Buffer*> owned;
    ForwardParams p;
    p.size = {c.batch, c.heads, c.heads_k, c.head_dim, dv, c.seqlen_q, c.seqlen_k, total_q, total_k};
    p.seqlens = {upload(c.lens_q, true, owned), upload(c.lens_k, true, owned), upload(c.used_q, false, owned),
                 upload(c.used_k, false, owned)};
    p.mask.window_left = c.left;
    p.mask.window_right = c.right;
    p.mask.has_positions = c.position_shift != 0;
    p.mask.q_position = c.position_shift;
    p.score.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    p.workspace = workspace.data;
    p.dtype = dtype;
    p.out_dtype = c.out_f32 ? DType::f32 : dtype;
    p.q = view(q.data, c.seqlen_q, c.heads, c.head_dim, varlen_q, c.heads_outer);
    p.k = view(k.data, c.seqlen_k, c.heads_k, c.head_dim, varlen_k, c.heads_outer);
    p.v = view(v.data, c.seqlen_k, c.heads_k, dv, varlen_k, c.heads_outer);
    p.out = view(out.data, c.seqlen_q, c.heads, dv, varlen_q, c.heads_outer);
    p.lse.data = static_cast<float*>(lse.data);
    p.lse.batch_stride = varlen_q ? 0 : int64_t{c.heads} * c.seqlen_q;
    p.lse.head_stride = varlen_q ? total_q : c.seqlen_q;
    if (c.nan_tails) {
        for (int b = 0, row = 0; b < c.batch; ++b) {
            const int len = varlen_k ? c.lens_k[b] : c.seqlen_k;
            const int64_t first = (int64_t{row} + c.used_k[b]) * c.heads_k;
            const int64_t count = int64_t{len - c.used_k[b]} * c.heads_k;
            CHECK(cudaMemset(static_cast<char*>(k.data) + first * c.head_dim * 2, 0xFF, count * c.head_dim * 2));
            CHECK(cudaMemset(static_cast<char*>(v.data) + first * dv * 2, 0xFF, count * dv * 2));
            row += len;
        }
    }
    const int64_t cells = int64_t{c.batch} * c.heads * c.seqlen_q;
    Buffer ref(cells * dv * 4), naive(cells * dv * 4), ref_lse(cells * 8), scratch_lse(cells * 8);
    const dim3 grid(c.seqlen_q, c.heads, c.batch);
    const int smem = c.seqlen_k * 8 + 8;
    CHECK(cudaFuncSetAttribute(reference_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024));
    reference_kernel<<<grid, 128, smem>>>(p, false, static_cast<float*>(ref.data), static_cast<double*>(ref_lse.data));
    reference_kernel<<<grid, 128, smem>>>(p, true, static_cast<float*>(naive.data), static_cast<double*>(scratch_lse.data));
    CHECK(cudaGetLastError());
    CHECK(kernel.launch(p, context));
    CHECK(cudaDeviceSynchronize());

    const auto h_ref = download<float>(ref.data, cells * dv), h_naive = download<float>(naive.data, cells * dv);
    const auto h_ref_lse = download<double>(ref_lse.data, cells);
    const auto h_out = download<uint8_t>(out.data, out.bytes);
    const auto h_lse = download<float>(lse.data, lse.bytes / 4);
    double error = 0, naive_error = 0, lse_error = 0;
    bool ok = true;
    for (int b = 0, first_row = 0; b < c.batch; ++b) {
        const int rows = varlen_q ? c.lens_q[b] : c.seqlen_q;
        for (int h = 0; h < c.heads; ++h) {
            for (int i = 0; i < rows; ++i) {
                const int64_t cell = (int64_t{b} * c.heads + h) * c.seqlen_q + i;
                const int64_t row = varlen_q ? first_row + i : i;
                const double got_lse = h_lse[b * p.lse.batch_stride + h * p.lse.head_stride + row];
                if (std::isinf(h_ref_lse[cell]) ? got_lse != h_ref_lse[cell] : !(std::abs(got_lse - h_ref_lse[cell]) < 1e300)) {
                    ok = false;
                } else if (!std::isinf(h_ref_lse[cell])) {
                    lse_error = std::max(lse_error, std::abs(got_lse - h_ref_lse[cell]));
                }
                for (int d = 0; d < dv; ++d) {
                    const int64_t at = b * p.out.batch_stride + row * p.out.row_stride + h * p.out.head_stride + d;
                    float got;
                    if (c.out_f32) {
                        std::memcpy(&got, &h_out[at * 4], 4);
                    } else {
                        uint16_t bits;
                        std::memcpy(&bits, &h_out[at * 2], 2);
                        got = to_float(bits, dtype);
                    }
                    const double want = h_ref[cell * dv + d];
                    if (!(std::abs(got) < 1e30)) ok = false;
                    if (std::isinf(h_ref_lse[cell]) && got != 0.0f) ok = false;
                    error = std::max(error, std::abs(got - want));
                    naive_error = std::max(naive_error, std::abs(h_naive[cell * dv + d] - want));
                }
            }
        }
        first_row += rows;
    }
    for (int64_t i = out.bytes - kGuard; i < out.bytes; ++i) ok = ok && h_out[i] == 0xFF;
    for (int64_t i = lse.bytes / 4 - kGuard / 4; i < lse.bytes / 4; ++i) ok = ok && std::isnan(h_lse[i]);
    ok = ok && error <= 2 * naive_error + 1e-5 && lse_error < 1e-4;
    if (print || !ok) {
        std::printf("%-4s %-28s %-34s out %.2e (naive %.2e)  lse %.1e\n", ok ? "ok" : "FAIL", kernel.name.c_str(),
                    c.name.c_str(), error, naive_error, lse_error);
    }
    for (Buffer* b : owned) delete b;
    return ok;
}

/// Lengths of which every eighth is not 0.
std::vector<int> eighth_of(int count, int length) {
    std::vector<int> lengths(count, 0);
    for (int i = 0; i < count; i += 8) lengths[i] = length;
    return lengths;
}

std::vector<Case> cases(int head_dim, MaskClass mask) {
    const int d = head_dim;
    std::vector<Case> all;
    if (mask == MaskClass::full) {
        all.push_back({"full 512", 2, 2, 2, 512, 512, d});
        all.push_back({"full 1 x 239", 2, 2, 2, 1, 239, d});
        all.push_back({"full 3 x 799", 1, 3, 3, 3, 799, d});
        all.push_back({"full 113 x 203 gqa", 2, 6, 2, 113, 203, d});
        all.push_back({"full 1023 x 1024", 2, 2, 2, 1023, 1024, d});
        all.push_back({"full 1024 x 1023", 1, 2, 1, 1024, 1023, d});
        all.push_back({"full 640 x 128 wide", 2, 4, 4, 640, 128, d, -1, -1, {}, {}, {}, {}, 0, false, false, false, 0, 6.0f});
        all.push_back({"full bhsd f32 out", 2, 3, 3, 300, 411, d, -1, -1, {}, {}, {}, {}, 0, true, true});
        all.push_back({"full narrow dim", 2, 3, 3, 300, 411, d - 24, -1, -1, {}, {}, {}, {}, d - 16});
        all.push_back({"full many tiles", 4, 16, 4, 1100, 700, d});
        all.push_back({"full no keys", 2, 2, 2, 100, 0, d});
        all.push_back({"full varlen", 5, 2, 2, 400, 500, d, -1, -1, {1, 0, 400, 129, 70}, {64, 300, 0, 500, 1}});
        all.push_back({"full varlen used nan", 4, 4, 2, 333, 500, d, -1, -1, {100, 333, 20, 128}, {64, 300, 500, 128},
                       {100, 200, 0, 1}, {33, 300, 177, 0}, 0, false, false, true});
        all.push_back({"full, most without keys", 300, 4, 4, 130, 64, d, -1, -1, {}, {}, {}, eighth_of(300, 64)});
        all.push_back({"full seqused nan", 3, 2, 2, 333, 500, d, -1, -1, {}, {}, {100, 333, 0}, {33, 500, 177}, 0, false, false, true});
    } else {
        all.push_back({"causal 512", 2, 2, 2, 512, 512, d, -1, 0});
        all.push_back({"causal 113 x 203", 2, 6, 2, 113, 203, d, -1, 0});
        all.push_back({"causal 203 x 113", 2, 6, 2, 203, 113, d, -1, 0});
        all.push_back({"causal 640 x 128", 2, 2, 2, 640, 128, d, -1, 0});
        all.push_back({"causal 1023 x 1024", 1, 4, 1, 1023, 1024, d, -1, 0});
        all.push_back({"causal 2048", 1, 2, 2, 2048, 2048, d, -1, 0});
        all.push_back({"causal many tiles wide", 4, 16, 4, 1100, 1100, d, -1, 0, {}, {}, {}, {}, 0, false, false, false, 0, 6.0f});
        all.push_back({"window 100, 0", 2, 2, 2, 700, 900, d, 100, 0});
        all.push_back({"window 64, 200", 2, 2, 2, 900, 700, d, 64, 200});
        all.push_back({"window 0, -1", 2, 2, 2, 500, 600, d, 0, -1});
        all.push_back({"window 3, 5 narrow dim", 2, 2, 2, 300, 300, d - 8, 3, 5});
        all.push_back({"causal positions", 2, 2, 2, 300, 300, d, -1, 0, {}, {}, {}, {}, 0, false, true, false, 150});
        all.push_back({"causal positions unseen", 2, 2, 2, 300, 300, d, -1, 0, {}, {}, {}, {}, 0, false, false, false, -200});
        all.push_back({"causal 799 x 3, most unseen", 60, 4, 4, 799, 3, d, -1, 0});
        all.push_back({"causal 5000 x 16, most unseen", 1, 24, 24, 5000, 16, d, -1, 0});
        all.push_back({"causal, most without keys", 300, 4, 4, 130, 64, d, -1, 0, {}, {}, {}, eighth_of(300, 64)});
        all.push_back({"causal varlen", 5, 2, 2, 400, 500, d, -1, 0, {1, 0, 400, 129, 70}, {64, 300, 0, 500, 1}});
        all.push_back({"causal varlen used nan", 4, 4, 2, 333, 500, d, -1, 0, {100, 333, 20, 128}, {64, 300, 500, 128},
                       {100, 200, 0, 1}, {33, 300, 177, 0}, 0, false, false, true});
        all.push_back({"window varlen", 4, 4, 2, 333, 500, d, 70, 31, {100, 333, 20, 128}, {64, 300, 500, 128}});
    }
    return all;
}

// -------------------------------------------------------------------------------------------------------------- speed

/// FlashAttention-3, forward, bf16, TFLOP/s on one H100 SXM; seqlens 512 ... 16384.
const std::map<std::pair<int, bool>, std::vector<double>> kFlashAttention3 = {
    {{64, false}, {328, 373, 452, 466, 505, 512}},  {{64, true}, {210, 285, 396, 434, 474, 509}},
    {{128, false}, {490, 583, 618, 627, 648, 675}}, {{128, true}, {265, 429, 521, 575, 625, 641}},
    {{256, false}, {395, 613, 632, 692, 711, 706}}, {{256, true}, {232, 451, 565, 598, 669, 691}},
};

struct Heads {
    int q = 0, k = 0;  // 0: hidden size 2048
};

void bench(const std::vector<dev::Kernel>& kernels, const std::vector<int>& seqlens, Heads grouped, int rounds,
           const cuda::LaunchContext& context) {
    constexpr int kTokens = 16384, kHidden = 2048, kLargestDim = 256;
    const int64_t elements = int64_t{kTokens} * std::max(kHidden, grouped.q * kLargestDim);
    constexpr int64_t kRoom = 1 << 20;
    Buffer q(elements * 2 + kRoom), k(elements * 2 + kRoom), v(elements * 2 + kRoom), out(elements * 2 + kRoom);
    Buffer lse(int64_t{kTokens} * 64 * 4), flush(128 << 20), workspace(16);
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    std::vector<std::tuple<int, MaskClass, DType>> groups;
    for (const auto& kernel : kernels) {
        const std::tuple group{kernel.variant.head_dim, kernel.variant.mask, kernel.variant.dtype};
        if (std::find(groups.begin(), groups.end(), group) == groups.end()) groups.push_back(group);
    }
    for (const auto& [head_dim, mask, dtype] : groups) {
        const bool causal = mask == MaskClass::band;
        const int heads = grouped.q ? grouped.q : kHidden / head_dim, heads_k = grouped.k ? grouped.k : heads;
        const double hidden = heads * head_dim;
        std::vector<const dev::Kernel*> rows;
        for (const auto& kernel : kernels) {
            if (std::tuple(kernel.variant.head_dim, kernel.variant.mask, kernel.variant.dtype) == std::tuple(head_dim, mask, dtype)) rows.push_back(&kernel);
        }
        std::vector<std::vector<double>> table(rows.size());
        for (int seqlen : seqlens) {
            const int batch = kTokens / seqlen;
            std::vector<std::vector<float>> times(rows.size());
            for (int round = -1; round < rounds; ++round) {
                for (size_t i = 0; i < rows.size(); ++i) {
                    if (round == -1) {
                        q.fill(rows[i]->variant.dtype, 1);
                        k.fill(rows[i]->variant.dtype, 2);
                        v.fill(rows[i]->variant.dtype, 3);
                    }
                    ForwardParams p;
                    p.size = {batch, heads, heads_k, head_dim, head_dim, seqlen, seqlen, kTokens, kTokens};
                    p.mask.window_right = causal ? 0 : -1;
                    p.score.softmax_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
                    p.workspace = workspace.data;
                    p.dtype = p.out_dtype = rows[i]->variant.dtype;
                    p.q = view(q.data, seqlen, heads, head_dim, false, false);
                    p.k = view(k.data, seqlen, heads_k, head_dim, false, false);
                    p.v = view(v.data, seqlen, heads_k, head_dim, false, false);
                    p.out = view(out.data, seqlen, heads, head_dim, false, false);
                    p.lse.data = static_cast<float*>(lse.data);
                    p.lse.batch_stride = int64_t{heads} * seqlen;
                    p.lse.head_stride = seqlen;
                    CHECK(cudaMemsetAsync(flush.data, round & 0xFF, flush.bytes));
                    CHECK(cudaEventRecord(start));
                    CHECK(rows[i]->launch(p, context));
                    CHECK(cudaEventRecord(stop));
                    CHECK(cudaEventSynchronize(stop));
                    float ms = 0;
                    CHECK(cudaEventElapsedTime(&ms, start, stop));
                    if (round >= 0) times[i].push_back(ms);
                }
            }
            const double flops = 4.0 * kTokens * seqlen * hidden / (causal ? 2 : 1);
            for (size_t i = 0; i < rows.size(); ++i) {
                std::nth_element(times[i].begin(), times[i].begin() + times[i].size() / 2, times[i].end());
                table[i].push_back(flops / times[i][times[i].size() / 2] * 1e-9);
            }
        }
        std::printf("\nhd%d %s %s, TFLOP/s %9s", head_dim, causal ? "causal" : "full", dtype == DType::bf16 ? "bf16" : "f16", "");
        for (int seqlen : seqlens) std::printf("%7d", seqlen);
        if (const auto peer = kFlashAttention3.find({head_dim, causal}); peer != kFlashAttention3.end() && !grouped.q) {
            std::printf("\n%-36s", "  FlashAttention-3 (recorded)");
            for (int seqlen : seqlens) {
                std::printf("%7.0f", seqlen < 512 ? NAN : peer->second[static_cast<size_t>(std::log2(seqlen / 512))]);
            }
        }
        for (size_t i = 0; i < rows.size(); ++i) {
            std::printf("\n%-36s", rows[i]->name.c_str());
            for (double x : table[i]) std::printf("%7.0f", x);
        }
        std::printf("\n");
    }
}

}  // namespace

int main(int argc, char** argv) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    bool want_verify = false, want_bench = false, verbose = false;
    int rounds = 15;
    Heads grouped;
    std::string only;
    std::vector<int> seqlens = {512, 1024, 2048, 4096, 8192, 16384};
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "verify") want_verify = true;
        else if (arg == "bench") want_bench = true;
        else if (arg == "verbose") verbose = true;
        else if (arg.rfind("only=", 0) == 0) only = arg.substr(5);
        else if (arg.rfind("rounds=", 0) == 0) rounds = std::stoi(arg.substr(7));
        else if (arg.rfind("heads=", 0) == 0) {
            if (std::sscanf(arg.c_str(), "heads=%d,%d", &grouped.q, &grouped.k) != 2) return 2;
        } else if (arg.rfind("seqlens=", 0) == 0) {
            seqlens.clear();
            std::stringstream list(arg.substr(8));
            for (std::string item; std::getline(list, item, ',');) seqlens.push_back(std::stoi(item));
        } else {
            std::printf("unknown argument %s\n", arg.c_str());
            return 2;
        }
    }
    cuda::LaunchContext context;
    CHECK(cudaGetDevice(&context.device));
    CHECK(cudaDeviceGetAttribute(&context.num_sms, cudaDevAttrMultiProcessorCount, context.device));
    std::vector<dev::Kernel> selected;
    for (const auto& kernel : dev::kernels()) {
        std::stringstream list(only);
        bool wanted = only.empty();
        for (std::string piece; std::getline(list, piece, ',');) wanted = wanted || kernel.name.find(piece) != std::string::npos;
        if (wanted) selected.push_back(kernel);
    }
    std::sort(selected.begin(), selected.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    int failures = 0, checks = 0;
    if (want_verify) {
        for (const auto& kernel : selected) {
            int failed = 0;
            for (const Case& c : cases(kernel.variant.head_dim, kernel.variant.mask)) {
                ++checks;
                failed += !verify(kernel, c, context, verbose);
            }
            std::printf("%-36s %s\n", kernel.name.c_str(), failed ? "FAILED" : "verified");
            std::fflush(stdout);
            failures += failed;
        }
        std::printf("%d checks, %d failures\n", checks, failures);
    }
    if (want_bench) bench(selected, seqlens, grouped, rounds, context);
    return failures ? 1 : 0;
}
