#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kThreads = 128;

// A block per row.
template <class T, int N>
__global__ void forward_kernel(int64_t hidden, const int32_t* tokens, const int32_t* positions, const T* table,
                               const T* position_table, T* out) {
    using V = Vector<T, N>;
    const int64_t row = blockIdx.x;
    const T* token = table + tokens[row] * hidden;
    const T* position = position_table ? position_table + positions[row] * hidden : nullptr;
    for (int64_t c = threadIdx.x * N; c < hidden; c += kThreads * N) {
        V y = V::load(token + c);
        if (position) {
            const V p = V::load(position + c);
#pragma unroll
            for (int i = 0; i < N; ++i) y.set(i, y[i] + p[i]);
        }
        y.store(out + row * hidden + c);
    }
}

template <class G, int N>
__device__ void add(G* to, const float (&sum)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = from_float<G>(to_float(to[j]) + sum[j]);
}

// A block per piece and stretch of columns: the rows of a piece in order.
template <class T, class G, int N>
__global__ void pieces_kernel(int64_t hidden, RowGroups groups, const T* dout, G* dtable, float* partial) {
    using V = Vector<T, N>;
    if (static_cast<int>(blockIdx.x) >= groups.counts->pieces) return;
    const RowGroups::Piece piece = groups.pieces[blockIdx.x];
    const int64_t c = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * N;
    if (c >= hidden) return;
    float sum[N] = {};
#pragma unroll 4
    for (int32_t i = piece.begin; i < piece.end; ++i) {
        const V dy = V::load(dout + groups.order[i] * hidden + c);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += dy[j];
    }
    if (piece.target >= 0) {
        add(dtable + piece.target * hidden + c, sum);
        return;
    }
    float* out = partial + ~piece.target * hidden + c;
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = sum[j];
}

// A block per row of the table that has several pieces, and stretch of columns.
template <class G>
__global__ void merges_kernel(int64_t hidden, RowGroups groups, const float* partial, G* dtable) {
    if (static_cast<int>(blockIdx.x) >= groups.counts->merges) return;
    const RowGroups::Merge merge = groups.merges[blockIdx.x];
    const int64_t c = int64_t(blockIdx.y) * kThreads + threadIdx.x;
    if (c >= hidden) return;
    float sum[1] = {0.0f};
    for (int32_t slot = merge.begin; slot < merge.end; ++slot) sum[0] += partial[slot * hidden + c];
    add(dtable + merge.target * hidden + c, sum);
}

template <class T, class G, int N>
void add_groups(Exec& e, int64_t hidden, const RowGroups& groups, const T* dout, G* dtable) {
    auto* partial = static_cast<float*>(e.scratch);
    const dim3 grid(static_cast<unsigned>(groups.max_pieces), blocks_for(hidden, kThreads * N));
    pieces_kernel<T, G, N><<<grid, kThreads, 0, stream_of(e)>>>(hidden, groups, dout, dtable, partial);
    const dim3 merge_grid(static_cast<unsigned>(groups.max_merges), blocks_for(hidden, kThreads));
    merges_kernel<G><<<merge_grid, kThreads, 0, stream_of(e)>>>(hidden, groups, partial, dtable);
    check_launch("embedding_backward");
}

}  // namespace

void embedding_forward(Exec& e, const EmbeddingForward& a) {
    by_precision(a.out.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto launch = [&](auto kernel) {
            kernel<<<static_cast<unsigned>(a.rows), kThreads, 0, stream_of(e)>>>(
                a.hidden, a.tokens, a.positions, as<T>(a.table), as<T>(a.position_table), as<T>(a.out));
        };
        a.hidden % kVectorSize<T> == 0 ? launch(forward_kernel<T, kVectorSize<T>>) : launch(forward_kernel<T, 1>);
    });
    check_launch("embedding_forward");
}

void embedding_backward(Exec& e, const EmbeddingBackward& a) {
    by_precision(a.dout.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto add = [&](const RowGroups& groups, Buffer dtable) {
            by_precision(dtable.precision, [&](auto* gradient_type) {
                using G = std::remove_pointer_t<decltype(gradient_type)>;
                a.hidden % kVectorSize<T> == 0
                    ? add_groups<T, G, kVectorSize<T>>(e, a.hidden, groups, as<T>(a.dout), as<G>(dtable))
                    : add_groups<T, G, 1>(e, a.hidden, groups, as<T>(a.dout), as<G>(dtable));
            });
        };
        add(a.token_groups, a.dtable);
        if (a.dposition_table) add(a.position_groups, a.dposition_table);
    });
}

}  // namespace strobe::gpt::cuda
