// Attention forward. A task takes a block of query rows, cut into panels of kPanel rows, one row per SIMD lane, over all
// the keys they see, tile by tile: S = K q^T, online softmax down the lanes, O = O * correction + V^T P. With one row per
// lane the softmax needs no horizontal operation, and no lane ever sees another's values.
#include "core/params.hpp"
#include "cpu/kernels.hpp"
#include "cpu/micro_kernel.hpp"
#include "cpu/operands.hpp"
#include "cpu/score.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/tile_io.hpp"
#include "cpu/vec_math.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

/// In forward_few_rows.cpp.
void forward_few_rows(const ForwardParams& params, const ForwardPlan& plan);

namespace {

/// The keys that the lanes of a panel see: some lane sees those in `some`, every lane those in `all`.
struct PanelRange {
    IndexRange some;
    IndexRange all;
};

template <class T>
class ForwardTask {
public:
    ForwardTask(const ForwardParams& p, const ForwardPlan& plan, float* scratch)
        : p_(p), plan_(plan), scratch_(scratch), score_(p.score) {}

    void run(int64_t task) {
        // The blocks of a head follow one another, so that they find its keys and values in the last-level cache. Later
        // query blocks see more keys under a causal mask: they are started first.
        const int64_t block = plan_.blocks - 1 - task % plan_.blocks, head = task / plan_.blocks;
        batch_ = head / p_.size.num_heads_k;
        head_k_ = head % p_.size.num_heads_k;
        sequence_ = sequence_of(p_, static_cast<int>(batch_));
        first_row_ = block * plan_.block_q;
        num_rows_ = lesser(plan_.group * sequence_.rows_q - first_row_, plan_.block_q);
        if (num_rows_ <= 0) return;
        panels_ = (num_rows_ + kPanel - 1) / kPanel;

        const IndexRange keys = place_lanes();
        if (!keys.empty()) {
            pack_queries();
            for (int64_t k0 = keys.begin - keys.begin % plan_.block_k; k0 < keys.end; k0 += plan_.block_k) {
                tile(IndexRange{greater(k0, keys.begin), lesser(k0 + plan_.block_k, keys.end)});
            }
        }
        finish();
    }

private:
    int64_t query_of(int64_t lane) const { return (first_row_ + lane) / plan_.group; }
    int64_t head_of(int64_t lane) const { return head_k_ * plan_.group + (first_row_ + lane) % plan_.group; }
    bool counts(int64_t lane) const { return lane < num_rows_ && query_of(lane) < sequence_.seqlen_q; }
    float* panel_q(int64_t panel) const { return scratch_ + plan_.q + panel * kPanel * p_.size.head_dim; }
    float* panel_o(int64_t panel) const { return scratch_ + plan_.o + panel * kPanel * p_.size.head_dim_v; }

    /// Finds what every lane sees; returns what some lane sees. Lanes beyond the last row take part in the arithmetic as
    /// copies of the last one, so that they call for no masking of their own.
    IndexRange place_lanes() {
        const BandMask mask = sequence_.mask(p_.mask);
        IndexRange block{sequence_.seqlen_k, 0};
        for (int64_t panel = 0; panel < panels_; ++panel) {
            PanelRange range{{sequence_.seqlen_k, 0}, {0, sequence_.seqlen_k}};
            for (int64_t lane = panel * kPanel; lane < (panel + 1) * kPanel; ++lane) {
                const int64_t i = query_of(lesser(lane, num_rows_ - 1));
                const IndexRange keys = i < sequence_.seqlen_q ? mask.key_range(i, i + 1) : IndexRange{};
                begin_[lane] = keys.begin;
                end_[lane] = greater(keys.end, keys.begin);
                row_max_[lane] = -kInfinity;
                row_sum_[lane] = 0.0f;
                if (i >= sequence_.seqlen_q) continue;
                range.all = {greater(range.all.begin, keys.begin), lesser(range.all.end, keys.end)};
                if (keys.empty()) continue;
                range.some = {lesser(range.some.begin, keys.begin), greater(range.some.end, keys.end)};
            }
            ranges_[panel] = range;
            if (range.some.empty()) continue;
            block = {lesser(block.begin, range.some.begin), greater(block.end, range.some.end)};
        }
        return block;
    }

    void pack_queries() {
        for (int64_t panel = 0; panel < panels_; ++panel) {
            const T* rows[kPanel];
            for (int64_t lane = 0; lane < kPanel; ++lane) {
                const int64_t at = panel * kPanel + lane;
                rows[lane] = counts(at) ? row_of<const T>(p_.q, batch_, sequence_.q_row + query_of(at), head_of(at)) : nullptr;
            }
            pack_panel(rows, p_.size.head_dim, panel_q(panel));
            float* const o = panel_o(panel);
            for (int64_t c = 0; c < p_.size.head_dim_v * kPanel; c += kWidth) store(o + c, zero());
        }
    }

    void tile(IndexRange keys) {
        const int64_t row = sequence_.k_row + keys.begin;
        const int64_t dv = p_.size.head_dim_v, pitch = words<T>(keys.size());
        const Rows k = read_rows(row_of<const T>(p_.k, batch_, row, head_k_), p_.k.row_stride, keys.size(), p_.size.head_dim,
                                 scratch_ + plan_.k);
        float* const v = scratch_ + plan_.v;
        pack_column_blocks(row_of<const T>(p_.v, batch_, row, head_k_), p_.v.row_stride, keys.size(), dv, v);
        bool known_finite = false;
        for (int64_t panel = 0; panel < panels_; ++panel) {
            const PanelRange& range = ranges_[panel];
            IndexRange seen{greater(keys.begin, range.some.begin), lesser(keys.end, range.some.end)};
            if (seen.empty()) continue;
            seen.begin -= (seen.begin - keys.begin) % kPerWord<T>;
            const bool masked = seen.begin < range.all.begin || seen.end > range.all.end;
            // Hidden values enter the product times zero, which NaN and inf would defeat.
            const bool hidden = masked || seen.size() % kPerWord<T> != 0;
            if (hidden && !known_finite) known_finite = all_finite<T>(v, pitch * dv);
            const int64_t first = (seen.begin - keys.begin) / kPerWord<T>;
            scores(panel, seen, {k.data + (seen.begin - keys.begin) * k.stride, k.stride}, masked);
            const Product product{.rows = dv, .steps = words<T>(seen.size()), .a = v, .a_stride = pitch, .a_first = first,
                                  .b = scratch_ + plan_.scores, .b_stride = kPerWord<T> * kPanel, .c = panel_o(panel),
                                  .c_stride = kPanel, .factor = correction_};
            if constexpr (kPairsOf<T>) pair_scores(seen.size());
            if (hidden && !known_finite) {
                multiply_visible(panel, seen, product);
            } else {
                multiply_strip<2, Layout::packed, Result::scale, kPairsOf<T>>(product);
            }
        }
    }

    /// Leaves the exponentials of a panel against the keys in the score tile.
    void scores(int64_t panel, IndexRange keys, Rows k, bool masked) {
        float* const s = scratch_ + plan_.scores;
        multiply_scores<kPairsOf<T>>(
            {.rows = keys.size(), .steps = words<T>(p_.size.head_dim), .a = k.data, .a_stride = k.stride, .b = panel_q(panel),
             .b_stride = kPanel, .c = s, .c_stride = kPanel});
        if (!score_.plain) transform_scores(panel, keys, s);
        if (masked) mask_scores(panel, keys, s);
        softmax(panel, keys.size(), s);
        if (p_.dropout.enabled()) drop(panel, keys, s);
    }

    /// Rows 2t and 2t + 1 of the score tile become the words of row 2t.
    void pair_scores(int64_t count) const {
        float* const s = scratch_ + plan_.scores;
        for (int64_t t = 0; t < count; t += 2) {
            for (int lane = 0; lane < kPanel; lane += kWidth) {
                float* const at = s + t * kPanel + lane;
                store(at, bfloat_pairs(load(at), t + 1 < count ? load(at + kPanel) : zero()));
            }
        }
    }

    /// Lane offsets of the keys a lane sees, counted from the first key of the tile.
    void visible_span(int64_t panel, int lane, IndexRange keys, IVec& begin, IVec& end) const {
        alignas(64) int32_t b[kWidth], e[kWidth];
        for (int x = 0; x < kWidth; ++x) {
            b[x] = saturate(begin_[panel * kPanel + lane + x] - keys.begin);
            e[x] = saturate(end_[panel * kPanel + lane + x] - keys.begin);
        }
        begin = load(b);
        end = load(e);
    }

    void mask_scores(int64_t panel, IndexRange keys, float* s) const {
        for (int lane = 0; lane < kPanel; lane += kWidth) {
            IVec begin, end;
            visible_span(panel, lane, keys, begin, end);
            for (int64_t t = 0; t < keys.size(); ++t) {
                const IVec key = splat(static_cast<int32_t>(t));
                float* const at = s + t * kPanel + lane;
                store(at, select((key >= begin) & (key < end), load(at), splat(-kInfinity)));
            }
        }
    }

    /// Softcap, bias and ALiBi: scores become final, in natural units.
    void transform_scores(int64_t panel, IndexRange keys, float* s) const {
        float* const bias = p_.score.bias ? scratch_ + plan_.extra : nullptr;
        if (bias) read_bias(panel, keys, bias);
        for (int lane = 0; lane < kPanel; lane += kWidth) {
            alignas(64) float slopes[kWidth] = {};
            alignas(64) int32_t positions[kWidth] = {};
            for (int x = 0; p_.score.alibi_slopes && x < kWidth; ++x) {
                const int64_t at = panel * kPanel + lane + x;
                if (!counts(at)) continue;
                slopes[x] = p_.score.alibi_slopes[batch_ * p_.score.alibi_batch_stride + head_of(at)];
                positions[x] = saturate(query_of(at) + sequence_.diagonal - keys.begin);
            }
            const Vec slope = load(slopes);
            const IVec position = load(positions);
            for (int64_t t = 0; t < keys.size(); ++t) {
                float* const at = s + t * kPanel + lane;
                const Vec product = load(at);
                Vec x = score_.capped(product, score_.cap_tanh(product));
                if (bias) x += load(bias + t * kPanel + lane);
                if (p_.score.alibi_slopes) x += alibi(slope, position - static_cast<int32_t>(t));
                store(at, x);
            }
        }
    }

    void read_bias(int64_t panel, IndexRange keys, float* bias) const {
        const BiasRef& ref = p_.score.bias;
        with_type(p_.bias_dtype, [&]<class B>(B*) {
            const B* rows[kPanel];
            for (int64_t lane = 0; lane < kPanel; ++lane) {
                const int64_t at = panel * kPanel + lane;
                rows[lane] = counts(at) ? bias_row<B>(ref, batch_, head_of(at), query_of(at)) + keys.begin * ref.col_stride : nullptr;
            }
            if (ref.col_stride == 1) {
                pack_panel<B, true>(rows, keys.size(), bias);
                return;
            }
            for (int64_t t = 0; t < keys.size(); ++t) {
                for (int lane = 0; lane < kPanel; ++lane) {
                    bias[t * kPanel + lane] = rows[lane] ? to_scalar(rows[lane][t * ref.col_stride]) : 0.0f;
                }
            }
        });
    }

    /// Scores become exponentials relative to the new row maximum; correction_ is what the sums so far must be multiplied
    /// by. A row that has seen no key yet keeps the maximum -inf, and its exponentials are taken relative to 0: all are 0.
    void softmax(int64_t panel, int64_t count, float* s) {
        float* const row_max = row_max_ + panel * kPanel;
        float* const row_sum = row_sum_ + panel * kPanel;
        const Vec scale = splat(score_.final_scale * kLog2E);
        Vec max0 = load(row_max), max1 = load(row_max + kWidth);
        {
            Vec other0 = max0, other1 = max1;
            int64_t t = 0;
            for (; t + 2 <= count; t += 2) {
                max0 = max(load(s + t * kPanel), max0);
                max1 = max(load(s + t * kPanel + kWidth), max1);
                other0 = max(load(s + (t + 1) * kPanel), other0);
                other1 = max(load(s + (t + 1) * kPanel + kWidth), other1);
            }
            for (; t < count; ++t) {
                max0 = max(load(s + t * kPanel), max0);
                max1 = max(load(s + t * kPanel + kWidth), max1);
            }
            max0 = max(other0, max0);
            max1 = max(other1, max1);
        }
        const Vec none = splat(-kInfinity);
        const Vec base0 = select(max0 == none, zero(), max0);
        const Vec base1 = select(max1 == none, zero(), max1);
        // The difference is scaled, not the other way round: the largest exponential is exactly 1.
        const Vec correction0 = exp2((load(row_max) - base0) * scale);
        const Vec correction1 = exp2((load(row_max + kWidth) - base1) * scale);
        Vec sum0 = zero(), sum1 = zero();
        for (int64_t t = 0; t < count; ++t) {
            const Vec p0 = exp2((load(s + t * kPanel) - base0) * scale);
            const Vec p1 = exp2((load(s + t * kPanel + kWidth) - base1) * scale);
            sum0 += p0;
            sum1 += p1;
            store(s + t * kPanel, p0);
            store(s + t * kPanel + kWidth, p1);
        }
        store(row_max, max0);
        store(row_max + kWidth, max1);
        store(row_sum, fma(load(row_sum), correction0, sum0));
        store(row_sum + kWidth, fma(load(row_sum + kWidth), correction1, sum1));
        store(correction_, correction0);
        store(correction_ + kWidth, correction1);
    }

    void drop(int64_t panel, IndexRange keys, float* s) const {
        uint32_t heads[kPanel], rows[kPanel];
        for (int lane = 0; lane < kPanel; ++lane) {
            const int64_t at = panel * kPanel + lane;
            heads[lane] = static_cast<uint32_t>(batch_ * p_.size.num_heads + head_of(at));
            rows[lane] = static_cast<uint32_t>(q_position() + query_of(at));
        }
        float* const factors = scratch_ + plan_.extra;
        dropout_factors_by_query(p_.dropout, heads, rows, static_cast<uint32_t>(k_position() + keys.begin), keys.size(), factors);
        for (int64_t x = 0; x < keys.size() * kPanel; x += kWidth) store(s + x, load(s + x) * load(factors + x));
    }

    int64_t q_position() const { return p_.mask.has_positions ? p_.mask.q_position : 0; }
    int64_t k_position() const { return p_.mask.has_positions ? p_.mask.k_position : 0; }

    /// The product with a value tile that holds NaN or inf: hidden values become 0 first, lane by lane. A lane that sees none of
    /// them gets the same bits as by the other product.
    void multiply_visible(int64_t panel, IndexRange keys, const Product& product) const {
        constexpr int64_t kItems = kPerWord<T>;
        constexpr uint32_t kItemBits[] = {kItems == 2 ? 0x0000FFFFu : 0xFFFFFFFFu, 0xFFFF0000u};
        const EvenBlocks blocks(product.rows);
        for (int lane = 0; lane < kPanel; lane += kWidth) {
            IVec begin, end;
            visible_span(panel, lane, keys, begin, end);
            for (int64_t block = 0, first = 0; block < blocks.count; first += blocks.size(block++)) {
                const int64_t size = blocks.size(block);
                for (int64_t c = 0; c < size; ++c) {
                    float* const at = product.c + (first + c) * kPanel + lane;
                    Vec sum = load(at) * load(product.factor + lane);
                    for (int64_t w = 0; w < product.steps; ++w) {
                        UVec visible{};
                        for (int64_t i = 0; i < kItems; ++i) {
                            const IVec key = splat(static_cast<int32_t>(w * kItems + i));
                            visible |= reinterpret_cast<UVec>((key >= begin) & (key < end)) & kItemBits[i];
                        }
                        const float word = product.a[first * product.a_stride + (product.a_first + w) * size + c];
                        const Vec value = reinterpret_cast<Vec>(reinterpret_cast<UVec>(splat(word)) & visible);
                        const Vec next = accumulate<kPairsOf<T>>(value, load(product.b + w * product.b_stride + lane), sum);
                        sum = select(reinterpret_cast<IVec>(visible != 0), next, sum);
                    }
                    store(at, sum);
                }
            }
        }
    }

    void finish() {
        for (int64_t panel = 0; panel < panels_; ++panel) {
            alignas(64) float inverse[kPanel];
            for (int lane = 0; lane < kPanel; ++lane) {
                const int64_t at = panel * kPanel + lane;
                const float sum = row_sum_[at];
                const bool empty = sum == 0.0f || !counts(at);
                inverse[lane] = empty ? 0.0f : 1.0f / sum;
                if (at < num_rows_ && p_.lse) lse(at) = empty ? -kInfinity : log_sum(row_max_[at], sum);
            }
            write_output(panel, inverse);
        }
    }

    float& lse(int64_t lane) const {
        return p_.lse.data[batch_ * p_.lse.batch_stride + head_of(lane) * p_.lse.head_stride + sequence_.q_row + query_of(lane)];
    }

    float log_sum(float max, float sum) const {
        return static_cast<float>(static_cast<double>(max) * static_cast<double>(score_.final_scale) + __builtin_log(static_cast<double>(sum)));
    }

    void write_output(int64_t panel, const float* inverse) {
        with_type(p_.out_dtype, [&]<class O>(O*) {
            O* rows[kPanel];
            for (int64_t lane = 0; lane < kPanel; ++lane) {
                const int64_t at = panel * kPanel + lane;
                rows[lane] = at < num_rows_ ? row_of<O>(p_.out, batch_, sequence_.q_row + query_of(at), head_of(at)) : nullptr;
                if (rows[lane] && inverse[lane] == 0.0f) {
                    zero_row(rows[lane], p_.size.head_dim_v);
                    rows[lane] = nullptr;
                }
            }
            float* const o = panel_o(panel);
            for (int64_t c = 0; c < p_.size.head_dim_v; ++c) {
                for (int lane = 0; lane < kPanel; lane += kWidth) {
                    float* const at = o + c * kPanel + lane;
                    store(at, load(at) * load(inverse + lane));
                }
            }
            unpack_panel(o, p_.size.head_dim_v, rows);
        });
    }

    const ForwardParams& p_;
    const ForwardPlan& plan_;
    float* const scratch_;
    const ScoreFunction score_;

    int64_t batch_ = 0, head_k_ = 0;
    Sequence sequence_;
    int64_t first_row_ = 0, num_rows_ = 0, panels_ = 0;
    PanelRange ranges_[kMaxBlockQ / kMinPanel];
    int64_t begin_[kMaxBlockQ], end_[kMaxBlockQ];
    alignas(64) float row_max_[kMaxBlockQ];
    alignas(64) float row_sum_[kMaxBlockQ];
    alignas(64) float correction_[kPanel];
};

struct Call {
    const ForwardParams& params;
    const ForwardPlan& plan;
    int64_t next_task = 0;
};

template <class T>
void work(void* context, int worker) {
    Call& call = *static_cast<Call*>(context);
    float* const scratch = static_cast<float*>(call.params.workspace) + static_cast<size_t>(worker) * call.plan.floats_per_thread;
    ForwardTask<T> task(call.params, call.plan, scratch);
    for (;;) {
        const int64_t index = __atomic_fetch_add(&call.next_task, 1, __ATOMIC_RELAXED);
        if (index >= call.plan.tasks) return;
        task.run(index);
    }
}

}  // namespace

void forward(const ForwardParams& params, const ForwardPlan& plan) {
    if (plan.few_rows) return forward_few_rows(params, plan);
    Call call{params, plan};
    with_type(params.dtype, [&]<class T>(T*) { run_on_threads(plan.threads, work<T>, &call); });
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
