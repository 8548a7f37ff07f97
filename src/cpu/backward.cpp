// Attention backward, in two or three passes over the workspace. First, per query row: delta and -lse. Then the main pass, one task per
// block of keys of a key head: dK and dV stay with the task, and each query block's share of dQ is added in ascending key
// order, so that the result does not depend on timing. With a bias gradient, a third pass sums dS over the broadcast axes.
#include <sched.h>

#include "core/params.hpp"
#include "cpu/backward_bias.hpp"
#include "cpu/backward_tile.hpp"
#include "cpu/kernels.hpp"
#include "cpu/thread_pool.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {
namespace {

struct Call {
    const BackwardParams& params;
    const BackwardPlan& plan;
    int64_t tasks = 0;
    int64_t next_task = 0;

    template <class U>
    U* shared(size_t offset) const {
        return reinterpret_cast<U*>(static_cast<char*>(params.workspace) + offset);
    }
    float* scratch(int worker) const {
        return shared<float>(plan.scratch) + static_cast<size_t>(worker) * plan.floats_per_thread;
    }
    /// The next task, or a negative number.
    int64_t take() {
        const int64_t task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED);
        return task < tasks ? task : -1;
    }
    /// Sequences share no counter: each begins at the block of its first row among all rows, and one further on than the
    /// sequence before, which has at most that many blocks.
    int32_t* turn(const Sequence& s, int64_t batch, int64_t head, int64_t block_q) const {
        const int64_t first = row_index(params, s, batch, 0, 0) / plan.block_q + batch;
        return shared<int32_t>(plan.turns) + head * plan.turns_per_head + first + block_q;
    }
};

/// Runs Pass::run(call, worker) on the plan's threads, with tasks counted from 0.
template <class Pass>
void run_pass(const BackwardParams& p, const BackwardPlan& plan, int64_t tasks) {
    Call call{p, plan, tasks};
    run_on_threads(static_cast<int>(lesser<int64_t>(plan.threads, tasks)),
                   [](void* context, int worker) { Pass::run(*static_cast<Call*>(context), worker); }, &call);
}

/// Writes delta and -lse, and the zero rows of dQ that the main pass never visits; resets the turns.
template <class T>
class RowPass {
public:
    static void run(Call& call, int worker) {
        RowPass pass(call, call.scratch(worker));
        for (int64_t task; (task = call.take()) >= 0;) pass.block(task);
    }

private:
    RowPass(Call& call, float* scratch) : call_(call), p_(call.params), plan_(call.plan), panels_(scratch + call.plan.v_panels) {}

    void block(int64_t task) {
        const int64_t block = task % plan_.blocks_q;
        batch_ = task / plan_.blocks_q / p_.size.num_heads;
        head_ = task / plan_.blocks_q % p_.size.num_heads;
        sequence_ = sequence_of(p_, static_cast<int>(batch_));
        const IndexRange rows{block * plan_.block_q, lesser((block + 1) * plan_.block_q, sequence_.rows_q)};
        if (rows.empty()) return;
        *call_.turn(sequence_, batch_, head_, block) = 0;
        const int64_t end = lesser(rows.end, sequence_.seqlen_q);
        for (int64_t i = rows.begin; i < end; i += kPanel) {
            const IndexRange panel{i, lesser(i + kPanel, end)};
            if (p_.out_dtype == p_.dtype) {
                deltas<T>(panel);
            } else {
                deltas<float>(panel);
            }
            negate_lse(panel);
        }
        const bool visited = !sequence_.mask(p_.mask).key_range(rows.begin, rows.end).empty();
        if (p_.accumulate) return;
        for (int64_t i = visited ? greater(end, rows.begin) : rows.begin; i < rows.end; ++i) {
            with_type(p_.grad_dtype, [&]<class G>(G*) {
                zero_row(row_of<G>(p_.dq, batch_, sequence_.q_row + i, head_), p_.size.head_dim);
            });
        }
    }

    /// rowsum(dout * out) - dlse, one row per lane, summed in exactly the order in which the tiles sum dout * v: a row that sees one key
    /// has out = v, and its dS = dP - delta must come out as 0.
    template <class O>
    void deltas(IndexRange rows) const {
        constexpr bool kSameWords = __is_same(T, O);
        constexpr bool kPairs = kSameWords && kPairsOf<T>;
        const T* dout_row[kPanel];
        const O* out_row[kPanel];
        for (int64_t lane = 0; lane < kPanel; ++lane) {
            const int64_t i = rows.begin + lane;
            const bool exists = i < rows.end;
            dout_row[lane] = exists ? row_of<const T>(p_.dout, batch_, sequence_.q_row + i, head_) : nullptr;
            out_row[lane] = exists ? row_of<const O>(p_.out, batch_, sequence_.q_row + i, head_) : nullptr;
        }
        const int64_t columns = p_.size.head_dim_v, steps = kPairs ? words<T>(columns) : columns;
        float* const dout = panels_;
        float* const out = panels_ + columns * kPanel;
        pack_panel<T, !kPairs>(dout_row, columns, dout);
        pack_panel<O, !kPairs>(out_row, columns, out);
        alignas(64) float delta[kPanel];
        for (int lane = 0; lane < kPanel; lane += kWidth) {
            Vec total = zero();
            for (int64_t first = 0; first < steps; first += kScoreSteps) {
                Vec sum = zero();
                for (int64_t c = first; c < lesser(first + kScoreSteps, steps); ++c) {
                    sum = accumulate<kPairs>(load(dout + c * kPanel + lane), load(out + c * kPanel + lane), sum);
                }
                total = first == 0 ? sum : total + sum;
            }
            store(delta + lane, total);
        }
        float* const to = call_.shared<float>(plan_.delta) + row_index(p_, sequence_, batch_, head_, rows.begin);
        for (int64_t r = 0; r < rows.size(); ++r) to[r] = delta[r] - (p_.dlse ? value(p_.dlse, rows.begin + r) : 0.0f);
    }

    void negate_lse(IndexRange rows) const {
        float* const to = call_.shared<float>(plan_.neg_lse) + row_index(p_, sequence_, batch_, head_, rows.begin);
        for (int64_t r = 0; r < rows.size(); ++r) to[r] = -value(p_.lse, rows.begin + r);
    }

    float value(const RowRef& ref, int64_t i) const {
        return ref.data[batch_ * ref.batch_stride + head_ * ref.head_stride + sequence_.q_row + i];
    }

    Call& call_;
    const BackwardParams& p_;
    const BackwardPlan& plan_;
    float* const panels_;  // two of [head_dim_v][kPanel]
    int64_t batch_ = 0, head_ = 0;
    Sequence sequence_;
};

template <class T>
class MainPass {
public:
    static void run(Call& call, int worker) {
        MainPass pass(call, call.scratch(worker));
        for (int64_t task; (task = call.take()) >= 0;) pass.key_block(task);
    }

private:
    MainPass(Call& call, float* scratch)
        : call_(call), p_(call.params), plan_(call.plan), scratch_(scratch), tile_(call.params, call.plan, scratch) {}

    float* area(size_t offset) const { return scratch_ + offset; }

    void key_block(int64_t task) {
        // Heads run fastest: the tasks that other threads hold meanwhile belong to other rows of dQ where they can.
        const int64_t heads = static_cast<int64_t>(p_.size.batch) * p_.size.num_heads_k;
        block_k_ = task / heads;
        batch_ = task % heads / p_.size.num_heads_k;
        head_k_ = task % heads % p_.size.num_heads_k;
        const IndexRange keys = tile_.enter_keys(batch_, head_k_, block_k_);
        if (!keys.empty()) {
            enter_key_rows(keys);
            for (int64_t head = head_k_ * plan_.group; head < (head_k_ + 1) * plan_.group; ++head) {
                const IndexRange rows = tile_.mask().query_range(keys.begin, keys.end);
                for (int64_t block = rows.begin / plan_.block_q; !rows.empty() && block * plan_.block_q < rows.end; ++block) {
                    if (tile_.enter_queries(head, block)) query_block(head, block);
                }
            }
        }
        const Sequence& s = tile_.sequence();
        const int64_t end = lesser((block_k_ + 1) * plan_.block_k, s.rows_k);
        for (int64_t j = block_k_ * plan_.block_k; j < end; ++j) {
            const int64_t r = j - block_k_ * plan_.block_k;
            const bool counts = j < s.seqlen_k;
            write_gradient(p_.dk, s.k_row + j, p_.size.head_dim, counts ? area(plan_.dk) + r * plan_.padded_dim : nullptr,
                           p_.score.softmax_scale);
            write_gradient(p_.dv, s.k_row + j, p_.size.head_dim_v, counts ? area(plan_.dv) + r * plan_.padded_dim_v : nullptr, 1.0f);
        }
    }

    void write_gradient(const TensorRef& tensor, int64_t row, int64_t columns, const float* sum, float factor) const {
        with_type(p_.grad_dtype, [&]<class G>(G*) {
            G* const dst = row_of<G>(tensor, batch_, row, head_k_);
            if (sum) {
                write_row(sum, factor, columns, dst, p_.accumulate);
            } else if (!p_.accumulate) {
                zero_row(dst, columns);
            }
        });
    }

    void enter_key_rows(IndexRange keys) {
        k_ = read_rows_down(row_of<const T>(p_.k, batch_, tile_.sequence().k_row + keys.begin, head_k_), p_.k.row_stride, keys.size(),
                            p_.size.head_dim, plan_.padded_dim, area(plan_.k_rows));
        keys_known_finite_ = false;
        for (int64_t x = 0; x < keys.size() * plan_.padded_dim; x += kWidth) store(area(plan_.dk) + x, zero());
        for (int64_t x = 0; x < keys.size() * plan_.padded_dim_v; x += kWidth) store(area(plan_.dv) + x, zero());
    }

    void query_block(int64_t head, int64_t block) {
        if (tile_.masked() && !finite()) {
            multiply_visible();
        } else {
            for (int64_t panel = 0; panel < tile_.panels(); ++panel) key_gradients(panel);
            query_gradients();
        }
        add_query_gradients(head, block);
    }

    /// Hidden elements enter the products as zeros, which NaN and inf would defeat.
    bool finite() {
        const int64_t d = p_.size.head_dim, dv = p_.size.head_dim_v, rows = words<T>(tile_.queries().size());
        if (!keys_known_finite_) keys_known_finite_ = all_finite<T>(k_, words<T>(tile_.keys().size()), d);
        return keys_known_finite_ && all_finite<T>(tile_.q_down(), rows, d) && all_finite<T>(tile_.dout_down(), rows, dv);
    }

    /// dV += P^T dO and dK += dS^T Q for the keys of a panel.
    void key_gradients(int64_t panel) {
        const IndexRange rows = tile_.rows(panel);
        if (rows.empty()) return;
        const int64_t keys = lesser<int64_t>(kPanel, tile_.keys().size() - panel * kPanel);
        const int64_t at = rows.begin * plan_.score_stride + panel * kPanel;
        const auto multiply = [&](const float* a, Rows b, int64_t columns, float* sums, int64_t stride) {
            multiply_columns<Layout::columns, Result::add, kPairsOf<T>>(
                {.rows = keys, .steps = words<T>(rows.size()), .a = a + at, .a_stride = kPerWord<T> * plan_.score_stride,
                 .b = b.data + rows.begin / kPerWord<T> * b.stride, .b_stride = b.stride, .c = sums + panel * kPanel * stride,
                 .c_stride = stride},
                round_up(columns, kWidth));
        };
        multiply(tile_.p(), tile_.dout_down(), p_.size.head_dim_v, area(plan_.dv), plan_.padded_dim_v);
        multiply(tile_.ds(), tile_.q_down(), p_.size.head_dim, area(plan_.dk), plan_.padded_dim);
    }

    /// The tile's dQ = dS K, over the panels that hold the scores of a group of rows; neighbouring groups with the same
    /// panels go together.
    void query_gradients() {
        const int64_t rows = tile_.queries().size();
        for (int64_t begin = 0, end; begin < rows; begin = end) {
            const IndexRange keys = group_keys(begin);
            end = begin + kRowGroup;
            while (end < rows && group_keys(end).begin == keys.begin && group_keys(end).end == keys.end) end += kRowGroup;
            end = lesser(end, rows);
            const Rows ds = tile_.ds_rows();
            multiply_columns<Layout::rows, Result::set, kPairsOf<T>>(
                {.rows = end - begin, .steps = words<T>(keys.size()), .a = ds.data + begin * ds.stride + keys.begin / kPerWord<T>,
                 .a_stride = ds.stride, .b = k_.data + keys.begin / kPerWord<T> * k_.stride, .b_stride = k_.stride,
                 .c = area(plan_.dq_tile) + begin * plan_.padded_dim, .c_stride = plan_.padded_dim},
                round_up(p_.size.head_dim, kWidth));
        }
    }

    /// Keys, counted from the block's first, of the panels that computed the row group which starts at `row`.
    IndexRange group_keys(int64_t row) const {
        IndexRange keys{0, 0};
        for (int64_t panel = 0; panel < tile_.panels(); ++panel) {
            const IndexRange rows = tile_.rows(panel);
            if (row < rows.begin || row >= rows.end) continue;
            if (keys.empty()) keys.begin = panel * kPanel;
            keys.end = lesser((panel + 1) * kPanel, tile_.keys().size());
        }
        return keys;
    }

    /// All three products element by element, over visible elements only.
    void multiply_visible() {
        const IndexRange queries = tile_.queries(), keys = tile_.keys();
        const int64_t d = p_.size.head_dim, dv = p_.size.head_dim_v;
        for (int64_t x = 0; x < queries.size() * plan_.padded_dim; ++x) area(plan_.dq_tile)[x] = 0.0f;
        for (int64_t r = 0; r < queries.size(); ++r) {
            const IndexRange seen = intersection(keys, tile_.seen_keys(r));
            for (int64_t j = seen.begin; j < seen.end; ++j) {
                const int64_t key = j - keys.begin;
                const int64_t at = r / kPerWord<T> * kPerWord<T> * plan_.score_stride + key;
                const float prob = item<T>(tile_.p() + at, r), ds = item<T>(tile_.ds() + at, r);
                add_scaled(tile_.dout_down(), r, prob, dv, area(plan_.dv) + key * plan_.padded_dim_v);
                add_scaled(tile_.q_down(), r, ds, d, area(plan_.dk) + key * plan_.padded_dim);
                add_scaled(k_, key, ds, d, area(plan_.dq_tile) + r * plan_.padded_dim);
            }
        }
    }

    static void add_scaled(Rows rows, int64_t row, float factor, int64_t count, float* dst) {
        const float* const src = rows.data + row / kPerWord<T> * rows.stride;
        for (int64_t c = 0; c < count; ++c) dst[c] = fma(factor, item<T>(src + c, row), dst[c]);
    }

    /// Adds the tile to its block of dQ when all key blocks before this one have. They belong to tasks that were started
    /// earlier, so the wait ends. The first overwrites unless the caller wants the sum with what was there; the last
    /// converts where the sums are not kept in dq itself.
    void add_query_gradients(int64_t head, int64_t block) {
        const IndexRange queries = tile_.queries();
        const IndexRange keys = tile_.mask().key_range(queries.begin, queries.end);
        const int64_t turn = block_k_ - keys.begin / plan_.block_k;
        const bool last = block_k_ == (keys.end - 1) / plan_.block_k;
        const Sequence& s = tile_.sequence();
        int32_t* const counter = call_.turn(s, batch_, head, block);
        for (int spin = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != turn; ++spin) {
            if (spin < 200) {
                pause();
            } else {
                sched_yield();
            }
        }
        for (int64_t r = 0; r < queries.size(); ++r) {
            const int64_t i = queries.begin + r;
            float* const sum = plan_.dq_in_place ? row_of<float>(p_.dq, batch_, s.q_row + i, head)
                                                 : call_.shared<float>(plan_.dq) + row_index(p_, s, batch_, head, i) * p_.size.head_dim;
            write_row(area(plan_.dq_tile) + r * plan_.padded_dim, p_.score.softmax_scale, p_.size.head_dim, sum,
                      turn > 0 || p_.accumulate);
            if (!last || plan_.dq_in_place) continue;
            with_type(p_.grad_dtype, [&]<class G>(G*) {
                write_row(sum, 1.0f, p_.size.head_dim, row_of<G>(p_.dq, batch_, s.q_row + i, head), false);
            });
        }
        __atomic_store_n(counter, static_cast<int32_t>(turn + 1), __ATOMIC_RELEASE);
    }

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    Call& call_;
    const BackwardParams& p_;
    const BackwardPlan& plan_;
    float* const scratch_;
    BackwardTile<T> tile_;
    int64_t block_k_ = 0, batch_ = 0, head_k_ = 0;
    Rows k_;
    bool keys_known_finite_ = false;
};

template <class T>
struct BiasPass {
    static void run(Call& call, int worker) {
        BiasGradient<T> gradient(call.params, call.plan, call.scratch(worker));
        for (int64_t task; (task = call.take()) >= 0;) gradient.run(task);
    }
};

}  // namespace

void backward(const BackwardParams& p, const BackwardPlan& plan) {
    const int64_t batch = p.size.batch;
    with_type(p.dtype, [&]<class T>(T*) {
        run_pass<RowPass<T>>(p, plan, batch * p.size.num_heads * plan.blocks_q);
        run_pass<MainPass<T>>(p, plan, batch * p.size.num_heads_k * plan.blocks_k);
        if (p.dbias) run_pass<BiasPass<T>>(p, plan, bias_tasks(p, plan));
    });
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
