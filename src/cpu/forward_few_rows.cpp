// Attention forward of a few query rows against many keys, as when a text is decoded with a cache: bound by reading every
// key and value once. A task takes a stretch of the keys of one sequence for all its heads, since in a cache the heads of a
// key lie side by side; lanes run along the head's dimension. The stretches' results are merged in their order, so that
// the outcome does not depend on the number of threads. For inference only: without log-sum-exp, bias and dropout.
#include "core/params.hpp"
#include "cpu/kernels.hpp"
#include "cpu/score.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/tile_io.hpp"
#include "cpu/vec_math.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {
namespace {

template <class T>
STROBE_CPU_INLINE float dot(const float* q, const T* k, int64_t count) {
    Vec sums = zero();
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) sums = fma(load(q + c), load_as_float(k + c), sums);
    float sum = sum_of_lanes(sums);
    for (; c < count; ++c) sum += q[c] * to_scalar(k[c]);
    return sum;
}

/// o += p[0] v[0] + p[1] v[1] + ...
template <int kRows, class T>
STROBE_CPU_INLINE void add_rows(float* o, const float* p, const T* v, int64_t v_stride, int64_t count) {
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) {
        Vec sum = load(o + c);
        for (int r = 0; r < kRows; ++r) sum = fma(splat(p[r]), load_as_float(v + r * v_stride + c), sum);
        store(o + c, sum);
    }
    for (; c < count; ++c) {
        for (int r = 0; r < kRows; ++r) o[c] += p[r] * to_scalar(v[r * v_stride + c]);
    }
}

STROBE_CPU_INLINE float exp2_of(float x) { return exp2(splat(x))[0]; }

/// What a stretch of keys leaves of one row: the sums of exponentials relative to `max`, without and with the values.
struct Partial {
    float* max;
    float* sum;
    float* out;  // (head_dim_v)
};

/// Rows are numbered head by head: row h * seqlen_q + i is query i of head h.
struct Areas {
    const ForwardParams& p;
    const ForwardPlan& plan;

    int64_t rows() const { return int64_t{p.size.num_heads} * p.size.seqlen_q; }
    float* shared() const { return static_cast<float*>(p.workspace); }

    Partial partial(int64_t task, int64_t row) const {
        const int64_t at = task * rows() + row;
        return {shared() + plan.partial_max + at, shared() + plan.partial_sum + at, shared() + plan.partial_out + at * p.size.head_dim_v};
    }
    float* scratch(int worker) const { return shared() + plan.scratch + static_cast<size_t>(worker) * plan.floats_per_thread; }
};

template <class T>
class StretchTask {
public:
    StretchTask(const Areas& areas, int worker)
        : areas_(areas), p_(areas.p), plan_(areas.plan), scratch_(areas.scratch(worker)), score_(areas.p.score) {}

    void run(int64_t task) {
        task_ = task;
        batch_ = task / plan_.blocks;
        sequence_ = sequence_of(p_, static_cast<int>(batch_));
        const int64_t begin = task % plan_.blocks * plan_.block_k;
        const IndexRange stretch{begin, lesser(begin + plan_.block_k, sequence_.seqlen_k)};
        if (stretch.empty()) return;
        begin_rows();
        for (int64_t k0 = stretch.begin; k0 < stretch.end; k0 += kFewRowsTile) {
            tile({k0, lesser(k0 + kFewRowsTile, stretch.end)});
        }
    }

private:
    int64_t row_of_head(int64_t head, int64_t i) const { return head * p_.size.seqlen_q + i; }
    float* query(int64_t row) const { return scratch_ + plan_.q + row * p_.size.head_dim; }
    float* scores(int64_t row) const { return scratch_ + plan_.scores + row * kFewRowsTile; }
    bool sees(int64_t i, int64_t t) const { return t >= seen_[i].begin && t < seen_[i].end; }

    void begin_rows() {
        for (int64_t head = 0; head < p_.size.num_heads; ++head) {
            for (int64_t i = 0; i < p_.size.seqlen_q; ++i) {
                const int64_t row = row_of_head(head, i);
                const Partial partial = areas_.partial(task_, row);
                *partial.max = -kInfinity;
                *partial.sum = 0.0f;
                for (int64_t c = 0; c < p_.size.head_dim_v; ++c) partial.out[c] = 0.0f;
                if (i >= sequence_.seqlen_q) continue;
                read_row(row_of<const T>(p_.q, batch_, sequence_.q_row + i, head), p_.size.head_dim, query(row), p_.size.head_dim);
            }
        }
    }

    void tile(IndexRange keys) {
        const BandMask mask = sequence_.mask(p_.mask);
        IndexRange some{kFewRowsTile, 0};
        for (int64_t i = 0; i < p_.size.seqlen_q; ++i) {
            const IndexRange range = i < sequence_.seqlen_q ? mask.key_range(i, i + 1) : IndexRange{};
            seen_[i] = {greater(range.begin, keys.begin) - keys.begin, lesser(range.end, keys.end) - keys.begin};
            if (seen_[i].empty()) continue;
            some = {lesser(some.begin, seen_[i].begin), greater(some.end, seen_[i].end)};
        }
        if (some.empty()) return;

        in_memory_order(p_.k, some, 1, [&](int64_t t, int64_t, int64_t head_k) {
            const T* const k = row_of<const T>(p_.k, batch_, sequence_.k_row + keys.begin + t, head_k);
            each_row_of(head_k, [&](int64_t, int64_t, int64_t row) { scores(row)[t] = dot(query(row), k, p_.size.head_dim); });
        });
        for (int64_t head = 0; head < p_.size.num_heads; ++head) {
            for (int64_t i = 0; i < sequence_.seqlen_q; ++i) {
                if (!seen_[i].empty()) softmax(head, i, keys.begin);
            }
        }
        constexpr int kTogether = 4;
        in_memory_order(p_.v, some, kTogether, [&](int64_t t, int64_t count, int64_t head_k) {
            const T* const v = row_of<const T>(p_.v, batch_, sequence_.k_row + keys.begin + t, head_k);
            each_row_of(head_k, [&](int64_t, int64_t i, int64_t row) {
                const float* const weight = scores(row) + t;
                float* const out = areas_.partial(task_, row).out;
                // Hidden values may be NaN or infinite: they are left out, not multiplied by 0.
                if (count == kTogether && sees(i, t) && sees(i, t + kTogether - 1)) {
                    add_rows<kTogether>(out, weight, v, p_.v.row_stride, p_.size.head_dim_v);
                    return;
                }
                for (int64_t x = 0; x < count; ++x) {
                    if (sees(i, t + x)) add_rows<1>(out, weight + x, v + x * p_.v.row_stride, 0, p_.size.head_dim_v);
                }
            });
        });
    }

    /// Calls visit(t, count, head_k) for groups of up to `step` keys and every key head, in the order in which they lie.
    template <class Visit>
    STROBE_CPU_INLINE void in_memory_order(const TensorRef& tensor, IndexRange keys, int64_t step, Visit&& visit) const {
        const int64_t heads = p_.size.num_heads_k;
        if (tensor.head_stride < tensor.row_stride) {
            for (int64_t t = keys.begin; t < keys.end; t += step) {
                for (int64_t head = 0; head < heads; ++head) visit(t, lesser(step, keys.end - t), head);
            }
        } else {
            for (int64_t head = 0; head < heads; ++head) {
                for (int64_t t = keys.begin; t < keys.end; t += step) visit(t, lesser(step, keys.end - t), head);
            }
        }
    }

    template <class Visit>
    STROBE_CPU_INLINE void each_row_of(int64_t head_k, Visit&& visit) const {
        for (int64_t head = head_k * plan_.group; head < (head_k + 1) * plan_.group; ++head) {
            for (int64_t i = 0; i < sequence_.seqlen_q; ++i) visit(head, i, row_of_head(head, i));
        }
    }

    /// Softcap and ALiBi: scores become final, in natural units.
    void transform(int64_t head, int64_t i, int64_t first_key, float* s) const {
        const float* const slopes = p_.score.alibi_slopes;
        const Vec slope = splat(slopes ? slopes[batch_ * p_.score.alibi_batch_stride + head] : 0.0f);
        const int32_t position = saturate(i + sequence_.diagonal - first_key);
        alignas(64) int32_t lanes[kWidth];
        for (int x = 0; x < kWidth; ++x) lanes[x] = x;
        for (int64_t t = 0; t < kFewRowsTile; t += kWidth) {
            const Vec product = load(s + t);
            Vec x = score_.capped(product, score_.cap_tanh(product));
            if (slopes) x += alibi(slope, splat(position - static_cast<int32_t>(t)) - load(lanes));
            store(s + t, x);
        }
    }

    /// The scores of a row become exponentials relative to its new maximum; what it has summed so far is rescaled. A row
    /// that has seen no key keeps the maximum -inf, and its exponentials are taken relative to 0: all are 0.
    void softmax(int64_t head, int64_t i, int64_t first_key) const {
        const int64_t row = row_of_head(head, i);
        float* const s = scores(row);
        if (!score_.plain) transform(head, i, first_key, s);
        // Outside of what the row sees the tile holds whatever was there.
        for (int64_t t = 0; t < seen_[i].begin; ++t) s[t] = -kInfinity;
        for (int64_t t = seen_[i].end; t < kFewRowsTile; ++t) s[t] = -kInfinity;
        const Partial partial = areas_.partial(task_, row);
        Vec maxima = splat(*partial.max);
        for (int64_t t = 0; t < kFewRowsTile; t += kWidth) maxima = max(load(s + t), maxima);
        float new_max = *partial.max;
        for (int x = 0; x < kWidth; ++x) new_max = greater(new_max, maxima[x]);
        const float base = new_max == -kInfinity ? 0.0f : new_max;
        const Vec scale = splat(score_.final_scale * kLog2E);
        Vec sums = zero();
        for (int64_t t = 0; t < kFewRowsTile; t += kWidth) {
            const Vec exponential = exp2((load(s + t) - splat(base)) * scale);
            store(s + t, exponential);
            sums += exponential;
        }
        const float correction = exp2_of((*partial.max - base) * score_.final_scale * kLog2E);
        *partial.sum = *partial.sum * correction + sum_of_lanes(sums);
        *partial.max = new_max;
        if (correction == 1.0f) return;
        for (int64_t c = 0; c < p_.size.head_dim_v; ++c) partial.out[c] *= correction;
    }

    const Areas& areas_;
    const ForwardParams& p_;
    const ForwardPlan& plan_;
    float* const scratch_;
    const ScoreFunction score_;

    int64_t task_ = 0, batch_ = 0;
    Sequence sequence_;
    IndexRange seen_[kFewRows];  // by query, counted from the first key of the tile
};

/// One sequence's rows from what its stretches left: their first parts take the sums.
class MergeTask {
public:
    MergeTask(const Areas& areas, int64_t batch)
        : areas_(areas), p_(areas.p), batch_(batch), sequence_(sequence_of(p_, static_cast<int>(batch))),
          stretches_((sequence_.seqlen_k + areas.plan.block_k - 1) / areas.plan.block_k), final_scale_(ScoreFunction(p_.score).final_scale) {}

    void run() const {
        for (int64_t head = 0; head < p_.size.num_heads; ++head) {
            for (int64_t i = 0; i < sequence_.rows_q; ++i) write(head, i);
        }
    }

private:
    Partial partial(int64_t stretch, int64_t row) const { return areas_.partial(batch_ * areas_.plan.blocks + stretch, row); }

    void write(int64_t head, int64_t i) const {
        const int64_t row = head * p_.size.seqlen_q + i;
        const bool counts = i < sequence_.seqlen_q && stretches_ > 0;
        float max = -kInfinity, sum = 0.0f;
        for (int64_t s = 0; counts && s < stretches_; ++s) max = greater(max, *partial(s, row).max);
        const float base = max == -kInfinity ? 0.0f : max;
        for (int64_t s = 0; counts && s < stretches_; ++s) {
            const Partial part = partial(s, row);
            const float weight = exp2_of((*part.max - base) * final_scale_ * kLog2E);
            sum += *part.sum * weight;
            float* const total = partial(0, row).out;
            for (int64_t c = 0; c < p_.size.head_dim_v; ++c) total[c] = (s ? total[c] : 0.0f) + part.out[c] * weight;
        }
        const bool empty = !counts || sum == 0.0f;
        with_type(p_.out_dtype, [&]<class O>(O*) {
            O* const out = row_of<O>(p_.out, batch_, sequence_.q_row + i, head);
            if (empty)
                zero_row(out, p_.size.head_dim_v);
            else
                write_row(partial(0, row).out, 1.0f / sum, p_.size.head_dim_v, out, false);
        });
    }

    const Areas& areas_;
    const ForwardParams& p_;
    const int64_t batch_;
    const Sequence sequence_;
    const int64_t stretches_;
    const float final_scale_;
};

struct Call {
    Areas areas;
    int64_t next_task = 0;
    int64_t next_merge = 0;
};

template <class T>
void work(void* context, int worker) {
    Call& call = *static_cast<Call*>(context);
    StretchTask<T> task(call.areas, worker);
    for (;;) {
        const int64_t index = __atomic_fetch_add(&call.next_task, 1, __ATOMIC_RELAXED);
        if (index >= call.areas.plan.tasks) return;
        task.run(index);
    }
}

void merge(void* context, int) {
    Call& call = *static_cast<Call*>(context);
    for (;;) {
        const int64_t batch = __atomic_fetch_add(&call.next_merge, 1, __ATOMIC_RELAXED);
        if (batch >= call.areas.p.size.batch) return;
        MergeTask(call.areas, batch).run();
    }
}

}  // namespace

void forward_few_rows(const ForwardParams& params, const ForwardPlan& plan) {
    Call call{{params, plan}};
    with_type(params.dtype, [&]<class T>(T*) { run_on_threads(plan.threads, work<T>, &call); });
    run_on_threads(static_cast<int>(lesser<int64_t>(plan.threads, params.size.batch)), merge, &call);
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
