#include "cpu/plan.hpp"

#include <algorithm>

namespace strobe::cpu {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

/// Floats between rows that are read column by column: whole vectors, and an odd number of cache lines, or the rows would
/// crowd a few sets of the first-level cache.
constexpr int64_t padded_row(int64_t columns) { return (round_up(columns, 16) / 16 | 1) * 16; }

/// Hands out consecutive areas on cache-line boundaries.
class Layout {
public:
    explicit Layout(size_t element) : element_(element) {}

    size_t take(int64_t count) {
        const size_t at = size_;
        const size_t line = 64 / element_;
        size_ += (static_cast<size_t>(count) + line - 1) / line * line;
        return at;
    }
    size_t size() const { return size_; }

private:
    size_t element_;
    size_t size_ = 0;
};

/// A stretch of keys is long enough to be worth a task and short enough to give every thread some.
constexpr int64_t kFewRowsKeys = 256;

/// With more rows than these the general kernel is faster, although most of its lanes idle.
constexpr int64_t kFewRowsPay = 4;
static_assert(kFewRowsPay <= kFewRows);

/// Where a log-sum-exp is wanted, a backward may follow: it computes the scores again in the general kernel's order of
/// summation, and with scores in the hundreds another rounding of them would be felt.
bool wants_few_rows(const ForwardParams& p, int64_t rows) {
    return rows >= 1 && rows <= kFewRowsPay && !p.lse && !p.score.bias && !p.dropout.enabled();
}

void plan_few_rows(const ForwardParams& p, ForwardPlan& plan) {
    const ProblemSize& s = p.size;
    const int64_t rows = s.num_heads * s.seqlen_q;
    plan.few_rows = true;
    plan.block_q = plan.group * s.seqlen_q;
    plan.block_k = kFewRowsKeys;
    // A caller's bound on the lengths may be far beyond any of them.
    plan.blocks = ceil_div(std::min(s.seqlen_k, s.total_k), plan.block_k);
    plan.tasks = plan.blocks * s.batch;
    plan.threads = static_cast<int>(std::clamp<int64_t>(plan.threads, 1, std::max<int64_t>(plan.tasks, 1)));

    Layout shared(sizeof(float));
    plan.partial_max = shared.take(plan.tasks * rows);
    plan.partial_sum = shared.take(plan.tasks * rows);
    plan.partial_out = shared.take(plan.tasks * rows * s.head_dim_v);
    plan.scratch = shared.size();
    Layout floats(sizeof(float));
    plan.q = floats.take(rows * s.head_dim);
    plan.scores = floats.take(rows * kFewRowsTile);
    plan.floats_per_thread = floats.size();
}

}  // namespace

ForwardPlan plan_forward(const ForwardParams& p, int num_threads) {
    const ProblemSize& s = p.size;
    ForwardPlan plan;
    plan.threads = std::max(num_threads, 1);
    plan.group = s.num_heads_k > 0 ? s.num_heads / s.num_heads_k : 1;
    const int64_t rows = plan.group * s.seqlen_q;
    if (wants_few_rows(p, rows)) {
        plan_few_rows(p, plan);
        return plan;
    }
    const int64_t heads = static_cast<int64_t>(s.batch) * s.num_heads_k;
    const int dim = std::max(s.head_dim, s.head_dim_v);

    // One tile of keys and values stays in the second-level cache while the block's queries and outputs stream past it, panel
    // by panel. Large blocks spread the cost of packing the tile - high where its rows are those of one head among many, a
    // page apart - and small ones the work over the threads.
    plan.block_q = dim <= 128 ? kMaxBlockQ : dim <= 256 ? kMaxBlockQ / 2 : kMaxBlockQ / 4;
    plan.block_k = dim <= 128 ? 128 : 64;
    const auto too_few = [&] {
        const int64_t per_thread = plan.block_q > 256 ? 8 : plan.block_q > 64 ? 4 : 2;
        return heads * ceil_div(rows, plan.block_q) < per_thread * plan.threads;
    };
    while (plan.block_q > kMaxPanel && too_few()) plan.block_q /= 2;
    plan.blocks = ceil_div(rows, plan.block_q);
    plan.tasks = plan.blocks * heads;
    plan.threads = static_cast<int>(std::clamp<int64_t>(plan.threads, 1, std::max<int64_t>(plan.tasks, 1)));

    Layout floats(sizeof(float));
    plan.q = floats.take(plan.block_q * s.head_dim);
    plan.o = floats.take(plan.block_q * s.head_dim_v);
    plan.k = floats.take(plan.block_k * s.head_dim);
    plan.v = floats.take(plan.block_k * s.head_dim_v);
    plan.scores = floats.take(plan.block_k * kMaxPanel);
    plan.extra = floats.take(p.score.bias || p.dropout.enabled() ? plan.block_k * kMaxPanel : 0);
    plan.floats_per_thread = floats.size();
    return plan;
}

BackwardPlan plan_backward(const BackwardParams& p, int num_threads) {
    const ProblemSize& s = p.size;
    BackwardPlan plan;
    plan.threads = std::max(num_threads, 1);
    plan.group = s.num_heads_k > 0 ? s.num_heads / s.num_heads_k : 1;
    const int dim = std::max(s.head_dim, s.head_dim_v);
    plan.block_q = 64;
    // Every block of keys reads all queries and output gradients and adds to all of dQ, rows that lie a page apart where there are
    // many heads: large blocks do so less often, small ones leave enough tasks. Never a matter of the threads, because sums
    // over different blocks differ in rounding.
    const int64_t heads = static_cast<int64_t>(s.batch) * s.num_heads_k;
    const auto enough = [&](int64_t block_k) { return heads * ceil_div(s.seqlen_k, block_k) >= 32; };
    plan.block_k = dim > 128 ? 64 : enough(256) ? 256 : enough(128) || s.seqlen_k > 1024 ? 128 : 64;
    plan.blocks_q = ceil_div(s.seqlen_q, plan.block_q);
    plan.blocks_k = ceil_div(s.seqlen_k, plan.block_k);
    plan.padded_dim = padded_row(s.head_dim);
    plan.padded_dim_v = padded_row(s.head_dim_v);
    plan.score_stride = padded_row(plan.block_k);
    plan.dq_in_place = p.grad_dtype == DType::f32;

    Layout bytes(1);
    const int64_t rows = s.num_heads * s.total_q;
    plan.delta = bytes.take(rows * 4);
    plan.neg_lse = bytes.take(rows * 4);
    plan.turns_per_head = s.total_q / plan.block_q + s.batch;
    plan.turns = bytes.take(s.num_heads * plan.turns_per_head * 4);
    plan.dq = bytes.take(plan.dq_in_place ? 0 : rows * s.head_dim * 4);
    plan.scratch = bytes.size();

    Layout floats(sizeof(float));
    plan.k_panels = floats.take(plan.block_k * s.head_dim);
    plan.v_panels = floats.take(plan.block_k * s.head_dim_v);
    plan.k_rows = floats.take(plan.block_k * plan.padded_dim);
    plan.dk = floats.take(plan.block_k * plan.padded_dim);
    plan.dv = floats.take(plan.block_k * plan.padded_dim_v);
    plan.q_rows = floats.take(plan.block_q * s.head_dim);
    plan.dout_rows = floats.take(plan.block_q * s.head_dim_v);
    plan.q_down = floats.take(plan.block_q * plan.padded_dim);
    plan.dout_down = floats.take(plan.block_q * plan.padded_dim_v);
    plan.dq_tile = floats.take(plan.block_q * plan.padded_dim);
    plan.p = floats.take(plan.block_q * plan.score_stride);
    plan.ds = floats.take(plan.block_q * plan.score_stride);
    plan.ds_rows = floats.take(p.dtype == DType::bf16 ? plan.block_q * plan.score_stride : 0);
    plan.dbias = floats.take(p.dbias ? plan.block_q * plan.score_stride : 0);
    plan.bias_sums = floats.take(p.dbias ? plan.block_q * plan.block_k : 0);
    plan.factors = floats.take(p.dropout.enabled() ? plan.block_q * kMaxPanel : 0);
    plan.floats_per_thread = floats.size();
    return plan;
}

}  // namespace strobe::cpu
