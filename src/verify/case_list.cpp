// The lists themselves: a full grid of the main axes, every option alone, every pair of options, head dimensions that
// differ, ragged tile edges, the shapes on which published test suites of attention libraries agree, rows in plenty
// that see no key, batches of long sequences, and what of the table of CUDA kernels all this leaves out.
#include <array>
#include <iterator>
#include <set>
#include <utility>

#include "verify/case.hpp"

namespace strobe::verify {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr int kHeadDims[] = {1, 8, 16, 32, 40, 59, 64, 72, 80, 96, 111, 128, 160, 192, 224, 256, 512};
constexpr std::pair<int, int> kHeads[] = {{2, 2}, {4, 2}, {3, 1}};

struct Window {
    int64_t left, right;
};
constexpr Window kFull{-1, -1};
constexpr Window kCausal{-1, 0};

/// One deviation from the default case.
struct Option {
    const char* axis;  // two options of one axis exclude each other
    void (*apply)(Case&);
};

constexpr Option kOptions[] = {
    {"mask", [](Case& c) { c.window_right = 0; }},
    {"mask", [](Case& c) { c.window_left = c.seqlen_k / 5, c.window_right = (c.seqlen_k + 7) / 11; }},
    {"mask", [](Case& c) { c.window_left = 2, c.window_right = 0; }},
    {"mask", [](Case& c) { c.window_left = c.seqlen_k / 4 + 1; }},
    {"mask", [](Case& c) { c.window_right = c.seqlen_k / 6; }},
    {"heads", [](Case& c) { c.num_heads = 4; }},
    {"heads", [](Case& c) { c.num_heads = 3, c.num_heads_k = 1; }},
    {"scale", [](Case& c) { c.softmax_scale = 0.3; }},
    {"softcap", [](Case& c) { c.softcap = 1.5; }},
    {"alibi", [](Case& c) { c.alibi = Alibi::per_head; }},
    {"alibi", [](Case& c) { c.alibi = Alibi::per_batch_and_head; }},
    {"bias", [](Case& c) { c.bias = BiasShape::full, c.dbias = true; }},
    {"bias", [](Case& c) { c.bias = BiasShape::heads, c.dbias = true; }},
    {"bias", [](Case& c) { c.bias = BiasShape::shared, c.bias_in_dtype = true, c.dbias = true; }},
    {"bias", [](Case& c) { c.bias = BiasShape::keys, c.dbias = true; }},
    {"bias", [](Case& c) { c.bias = BiasShape::queries, c.dbias = true; }},
    // One number tells too little about the naive error to bound another by it: no dbias here.
    {"bias", [](Case& c) { c.bias = BiasShape::scalar; }},
    {"bias", [](Case& c) { c.bias = BiasShape::full, c.bias_hides = true; }},
    {"dropout", [](Case& c) { c.dropout_p = 0.17; }},
    {"lengths", [](Case& c) { c.batch = 5, c.varlen_q = c.varlen_k = true; }},
    {"lengths", [](Case& c) { c.batch = 3, c.varlen_k = true; }},
    {"lengths", [](Case& c) { c.batch = 3, c.varlen_q = true; }},
    {"used", [](Case& c) { c.batch = c.batch < 4 ? 4 : c.batch, c.seqused_k = true; }},
    {"used", [](Case& c) { c.batch = c.batch < 4 ? 4 : c.batch, c.seqused_q = c.seqused_k = true; }},
    {"layout", [](Case& c) { c.layout = Layout::bhsd; }},
    {"layout", [](Case& c) { c.layout = Layout::padded; }},
    {"layout", [](Case& c) { c.layout = Layout::packed, c.seqlen_k = c.seqlen_q; }},
    {"positions", [](Case& c) { c.positions = true, c.q_position = c.seqlen_k - 5, c.k_position = c.seqlen_k / 2 + 1; }},
    {"out", [](Case& c) { c.out_f32 = true; }},
    {"grad", [](Case& c) { c.grad_f32 = true; }},
    {"grad", [](Case& c) { c.grad_f32 = c.accumulate = true; }},
    {"dlse", [](Case& c) { c.dlse = true; }},
    {"global_out", [](Case& c) { c.global_out = true; }},
    {"deterministic", [](Case& c) { c.deterministic = true; }},
    {"loud", [](Case& c) { c.loud = true; }},
    {"head_dim_v", [](Case& c) { c.head_dim_v = c.head_dim / 2 + 3; }},
};

class List {
public:
    void add(const Case& c) {
        if (c.consistent() && names_.insert(c.name()).second) cases_.push_back(c);
    }
    std::vector<Case> take() { return std::move(cases_); }

private:
    std::vector<Case> cases_;
    std::set<std::string> names_;
};

void add_grid(List& list) {
    constexpr Window kWindows[] = {kFull, kCausal, {11, 5}, {16, 0}};
    for (DType dtype : kDTypes) {
        for (int head_dim : kHeadDims) {
            for (Window window : kWindows) {
                for (auto [heads, heads_k] : kHeads) {
                    for (bool varlen : {false, true}) {
                        Case c{.dtype = dtype, .num_heads = heads, .num_heads_k = heads_k, .head_dim = head_dim};
                        c.window_left = window.left;
                        c.window_right = window.right;
                        c.batch = varlen ? 5 : 2;
                        c.varlen_q = c.varlen_k = varlen;
                        list.add(c);
                    }
                }
            }
        }
    }
}

/// Calls f with each option alone (second = null) and with each pair of options that go together.
template <class F>
void for_each_option_pair(F&& f) {
    for (const Option* first = kOptions; first != std::end(kOptions); ++first) {
        f(*first, static_cast<const Option*>(nullptr));
        for (const Option* second = first + 1; second != std::end(kOptions); ++second) {
            if (std::string_view(first->axis) != second->axis) f(*first, second);
        }
    }
}

Case with_options(Case c, const Option& first, const Option* second) {
    first.apply(c);
    if (second) second->apply(c);
    return c;
}

void add_options(List& list) {
    constexpr int kSingleDims[] = {59, 64, 128};
    constexpr int kPairDims[] = {40, 64, 32, 111, 64, 16, 128, 80};
    for (DType dtype : kDTypes) {
        size_t turn = 0;
        for_each_option_pair([&](const Option& first, const Option* second) {
            if (second) {
                list.add(with_options({.dtype = dtype, .head_dim = kPairDims[turn++ % std::size(kPairDims)]}, first, second));
                return;
            }
            for (int head_dim : kSingleDims) {
                list.add(with_options({.dtype = dtype, .head_dim = head_dim}, first, nullptr));
            }
        });
    }
}

void add_head_dims(List& list) {
    constexpr std::pair<int, int> kPairs[] = {{192, 128}, {512, 256}, {64, 128}, {128, 64}, {1, 17},    {17, 1},   {40, 59},
                                              {96, 32},   {72, 256},  {3, 5},    {512, 8},  {256, 512}, {65, 127}, {2, 2}};
    for (DType dtype : kDTypes) {
        for (auto [head_dim, head_dim_v] : kPairs) {
            for (Window window : {kFull, kCausal}) {
                Case c{.dtype = dtype, .num_heads = 4, .head_dim = head_dim, .head_dim_v = head_dim_v};
                c.window_right = window.right;
                list.add(c);
            }
        }
    }
}

void add_edges(List& list) {
    constexpr int64_t kLengths[] = {1, 2, 15, 17, 31, 64, 65, 130};
    size_t turn = 0;
    constexpr int kDims[] = {64, 32, 128, 48};
    for (DType dtype : kDTypes) {
        for (int64_t seqlen_q : kLengths) {
            for (int64_t seqlen_k : kLengths) {
                Case c{.dtype = dtype, .seqlen_q = seqlen_q, .seqlen_k = seqlen_k};
                c.head_dim = kDims[turn++ % std::size(kDims)];
                const Window windows[] = {kFull, kCausal, {0, 0}};
                c.window_left = windows[turn % 3].left;
                c.window_right = windows[turn % 3].right;
                list.add(c);
            }
        }
    }
}

void add_published_shapes(List& list) {
    constexpr std::pair<int64_t, int64_t> kShapes[] = {{1, 239},   {3, 799},   {113, 203}, {127, 512}, {128, 217}, {113, 211},
                                                       {108, 256}, {256, 512}, {384, 256}, {512, 256}, {640, 128}};
    for (DType dtype : kDTypes) {
        for (auto [seqlen_q, seqlen_k] : kShapes) {
            for (int head_dim : {64, 128}) {
                for (Window window : {kFull, kCausal, Window{64, 16}}) {
                    Case c{.dtype = dtype, .batch = 1, .num_heads = 1, .num_heads_k = 1};
                    c.seqlen_q = seqlen_q;
                    c.seqlen_k = seqlen_k;
                    c.head_dim = head_dim;
                    c.window_left = window.left;
                    c.window_right = window.right;
                    list.add(c);
                }
            }
        }
        Case near_square{.dtype = dtype, .batch = 1, .num_heads = 1, .num_heads_k = 1, .seqlen_q = 1023, .seqlen_k = 1024};
        near_square.window_right = 0;
        list.add(near_square);
        Case decoding{.dtype = dtype, .batch = 1, .num_heads = 4, .num_heads_k = 1, .seqlen_q = 1, .seqlen_k = 100'000};
        if (dtype != DType::bf16) decoding.seqlen_k = 20'000;
        list.add(decoding);
    }
    Case tall{.dtype = DType::bf16, .batch = 1, .num_heads = 1, .num_heads_k = 1, .seqlen_q = 1024, .seqlen_k = 1023};
    tall.window_right = 0;
    list.add(tall);
    Case square{.dtype = DType::bf16, .batch = 1, .num_heads = 1, .num_heads_k = 1, .seqlen_q = 2048, .seqlen_k = 2048};
    square.window_right = 0;
    list.add(square);
}

/// Every option alone where many heads make backends take their largest tiles: more than one of 256 keys, and a ragged
/// last one.
void add_many_heads(List& list) {
    for (DType dtype : {DType::f32, DType::bf16}) {
        Case base{.dtype = dtype, .batch = 4, .num_heads = 8, .num_heads_k = 8, .seqlen_q = 130, .seqlen_k = 300, .head_dim = 24};
        list.add(base);
        for (const Option& option : kOptions) list.add(with_options(base, option, nullptr));
        for (int head_dim : {64, 128}) {
            for (Window window : {kFull, kCausal, Window{70, 30}}) {
                Case c = base;
                c.num_heads = 16;
                c.seqlen_q = 300;
                c.seqlen_k = 270;
                c.head_dim = head_dim;
                c.window_left = window.left;
                c.window_right = window.right;
                list.add(c);
            }
        }
    }
}

/// Softcaps as models have them, and one so far out that it bends nothing: from half the softcap on scores are bent by
/// another formula.
void add_softcaps(List& list) {
    for (DType dtype : kDTypes) {
        for (double softcap : {20.0, 50.0, 1000.0}) {
            for (Window window : {kFull, kCausal, Window{70, 30}}) {
                for (bool loud : {false, true}) {
                    for (int head_dim : {64, 128}) {
                        Case c{.dtype = dtype, .batch = 1, .num_heads = 2, .num_heads_k = 2, .seqlen_q = 130, .seqlen_k = 300};
                        c.head_dim = head_dim;
                        c.softcap = softcap;
                        c.window_left = window.left;
                        c.window_right = window.right;
                        c.loud = loud;
                        list.add(c);
                    }
                }
            }
        }
    }
}

/// So many causal rows that see no key that every worker of a large GPU gets a run of such tiles behind one with keys:
/// dense, and in a varlen batch that uses a part of its rows. Few cases: they are the largest of the list.
void add_rows_without_keys(List& list) {
    Case c{.dtype = DType::bf16, .batch = 40, .num_heads = 4, .num_heads_k = 1, .seqlen_q = 799, .seqlen_k = 3, .head_dim = 72};
    c.window_right = 0;
    list.add(c);
    c.head_dim = 136;
    list.add(c);
    c.dtype = DType::f16;
    c.batch = 80;
    c.seqlen_k = 40;
    c.varlen_q = c.varlen_k = c.seqused_q = c.seqused_k = true;
    list.add(c);
}

/// More key heads, of 2048 queries and keys at most, than a large GPU works on when it begins and when it ends: the
/// sm90 backward does the rows of those between itself (inner_rows_pay). Most of the sequences are short, or use a part
/// of their rows: the specification has to be through with them, too.
void add_long_batches(List& list) {
    Case window{.dtype = DType::bf16, .batch = 32, .num_heads = 2, .num_heads_k = 1, .seqlen_q = 2048, .seqlen_k = 2048, .head_dim = 104};
    window.window_left = 1100;
    window.window_right = 0;
    window.varlen_q = window.varlen_k = window.dlse = true;
    list.add(window);
    Case full{.dtype = DType::f16, .batch = 36, .num_heads = 1, .num_heads_k = 1, .seqlen_q = 2048, .seqlen_k = 2048, .head_dim = 128,
              .head_dim_v = 64};
    full.varlen_q = full.varlen_k = full.seqused_q = true;
    list.add(full);
    Case dense{.dtype = DType::bf16, .batch = 18, .num_heads = 1, .num_heads_k = 1, .seqlen_q = 2048, .seqlen_k = 2048, .head_dim = 128};
    dense.window_right = 0;
    dense.seqused_q = dense.seqused_k = true;
    dense.layout = Layout::bhsd;
    list.add(dense);
    dense.head_dim = 64;
    list.add(dense);
    // Fewer key tiles than a large GPU has room for: its CTAs share them.
    list.add({.dtype = DType::bf16, .batch = 1, .num_heads = 2, .num_heads_k = 2, .seqlen_q = 1100, .seqlen_k = 400, .head_dim = 64});
    for (int head_dim : {64, 96, 128}) {
        list.add({.dtype = DType::bf16, .batch = 1, .num_heads = 2, .num_heads_k = 2, .seqlen_q = 1100, .seqlen_k = 77, .head_dim = head_dim});
    }
}

/// Rows of variants.def that nothing above asks for: options at the largest head dimensions, a bias that can be copied
/// by tiles, and the tiles for many keys. tests/unit/cuda_plan_test.cpp holds the list to reach every row.
void add_kernel_rows(List& list) {
    for (DType dtype : {DType::bf16, DType::f16}) {
        const Case base{.dtype = dtype, .batch = 2, .num_heads = 2, .num_heads_k = 1, .seqlen_q = 133, .seqlen_k = 264};
        // The sm90 backward's rows for a few key tiles, and those for many, with as few keys as they are chosen for.
        for (int head_dim : {64, 128}) {
            for (int queries : {540, 2050}) {
                Case c{.dtype = dtype, .batch = 1, .num_heads = 2, .num_heads_k = 2, .seqlen_q = queries, .seqlen_k = 290, .head_dim = head_dim};
                list.add(c);
                c.seqlen_k = 530;
                c.window_right = 0;
                list.add(c);
            }
            Case c{.dtype = dtype, .batch = 66, .num_heads = 2, .num_heads_k = 2, .seqlen_q = 300, .seqlen_k = 500, .head_dim = head_dim};
            c.deterministic = true;  // several work tiles for each CTA
            list.add(c);
        }
        for (int head_dim : {192, 256}) {
            for (Window window : {kFull, kCausal}) {
                Case c = base;
                c.head_dim = head_dim;
                c.window_left = window.left, c.window_right = window.right;
                const auto add = [&](auto... set) {
                    Case with = c;
                    (set(with), ...);
                    list.add(with);
                };
                add([](Case& x) { x.deterministic = true; });
                add([](Case& x) { x.softcap = 1.5; });
                add([](Case& x) { x.dropout_p = 0.17; });
                add([](Case& x) { x.bias = BiasShape::full, x.dbias = true; });
                add([](Case& x) { x.bias = BiasShape::heads, x.bias_in_dtype = true; }, [](Case& x) { x.dropout_p = 0.17; });
                add([](Case& x) { x.softcap = 1.5; }, [](Case& x) { x.deterministic = true; });
                add([](Case& x) { x.dropout_p = 0.17; }, [](Case& x) { x.deterministic = true; });
            }
        }
        // Rows of 264 numbers of 16 bits begin on 16 bytes.
        for (int head_dim : {40, 64, 128, 256}) {
            for (Window window : {kFull, kCausal}) {
                for (BiasShape bias : {BiasShape::full, BiasShape::heads, BiasShape::keys}) {
                    Case c = base;
                    c.head_dim = head_dim;
                    c.window_left = window.left, c.window_right = window.right;
                    c.bias = bias, c.bias_in_dtype = true;
                    list.add(c);
                    c.bias_hides = bias == BiasShape::full;
                    list.add(c);
                }
            }
            Case ragged = base;
            ragged.head_dim = head_dim;
            ragged.batch = 5;
            ragged.bias = BiasShape::full, ragged.bias_in_dtype = true;
            ragged.varlen_q = ragged.varlen_k = true;
            list.add(ragged);
            ragged.varlen_q = ragged.varlen_k = false;
            ragged.seqused_q = ragged.seqused_k = true;
            list.add(ragged);
        }
        for (int head_dim : {64, 256}) {
            for (Window window : {kFull, kCausal}) {
                Case c{.dtype = dtype, .batch = 1, .num_heads = 1, .num_heads_k = 1, .seqlen_q = 140, .seqlen_k = 2090, .head_dim = head_dim};
                c.window_left = window.left, c.window_right = window.right;
                list.add(c);
            }
        }
    }
}

/// Two tiles of 128 keys, and heads that go round a large GPU twice: the sm90 backward gives each CTA whole ones, which
/// then adds up dq by itself (takes_whole_heads). With one tile, as in most of this list, it does so anyway.
void add_short_sequences(List& list) {
    for (int head_dim : {64, 96, 128, 256}) {
        Case c{.dtype = DType::bf16, .batch = 33, .num_heads = 8, .num_heads_k = 8, .seqlen_q = 70, .seqlen_k = 150, .head_dim = head_dim};
        list.add(c);
        c.window_right = 0;
        list.add(c);
        c.seqlen_q = 140, c.window_left = 20, c.window_right = 5;  // the last keys are out of the first queries' reach
        list.add(c);
        c.batch = 66, c.num_heads_k = 4, c.seqlen_q = 66, c.seqlen_k = 200, c.window_left = -1, c.window_right = 0;
        c.varlen_q = c.varlen_k = c.seqused_q = c.seqused_k = c.dlse = true;
        list.add(c);
    }
    Case c{.dtype = DType::f16, .batch = 33, .num_heads = 8, .num_heads_k = 8, .seqlen_q = 130, .seqlen_k = 140, .head_dim = 64};
    c.deterministic = true;
    list.add(c);
    c.grad_f32 = c.accumulate = c.out_f32 = true;
    list.add(c);
    // One tile in more heads than such a GPU has room for, and more query tiles of a head than a CTA's ring has slots:
    // at head dims 64 and 96 it makes their row statistics itself, and clears dq of queries that see nothing.
    for (int head_dim : {64, 96, 128}) {
        Case one{.dtype = DType::bf16, .batch = 67, .num_heads = 12, .num_heads_k = 2, .seqlen_q = 260, .seqlen_k = 9, .head_dim = head_dim};
        one.window_right = 0;
        one.dlse = true;
        if (head_dim < 128) list.add(one);
        one.window_right = -1;
        one.varlen_q = one.varlen_k = one.seqused_q = one.seqused_k = true;
        list.add(one);
        one.seqlen_q = 33, one.seqlen_k = 100, one.num_heads = 10, one.window_right = 0;
        list.add(one);
    }
    Case grouped{.dtype = DType::bf16, .batch = 66, .num_heads = 20, .num_heads_k = 4, .seqlen_q = 66, .seqlen_k = 140, .head_dim = 64};
    grouped.window_right = 0;
    list.add(grouped);
}

/// Masks as frameworks hand them over, the least finite number of the dtype added to a score: an eager implementation
/// averages all values where all keys are hidden so. At scale 1, and times the inverse of any other, such a number
/// leaves the range of fp32.
void add_masking_biases(List& list) {
    for (DType dtype : kDTypes) {
        for (int head_dim : {64, 128}) {
            for (double scale : {0.0, 1.0}) {
                for (BiasShape bias : {BiasShape::full, BiasShape::keys}) {
                    Case c{.dtype = dtype, .batch = 3, .num_heads = 2, .num_heads_k = 1, .seqlen_q = 133, .seqlen_k = 264, .head_dim = head_dim};
                    c.softmax_scale = scale;
                    c.bias = bias, c.bias_hides = c.bias_least = true;
                    list.add(c);
                    c.bias_in_dtype = dtype != DType::f32;
                    list.add(c);
                }
            }
        }
        Case c{.dtype = dtype, .batch = 3, .num_heads = 2, .num_heads_k = 2, .seqlen_q = 70, .seqlen_k = 200, .head_dim = 64};
        c.softmax_scale = 1.0;
        c.bias = BiasShape::keys, c.bias_hides = true;
        list.add(c);
        c.bias_least = true;
        const auto add = [&](auto set) {
            Case with = c;
            set(with);
            list.add(with);
        };
        add([](Case& x) { x.window_right = 0; });
        add([](Case& x) { x.softcap = 1.5; });
        add([](Case& x) { x.alibi = Alibi::per_head; });
        add([](Case& x) { x.dropout_p = 0.17; });
        add([](Case& x) { x.bias = BiasShape::full, x.dbias = true; });
        add([](Case& x) { x.bias_in_dtype = x.dtype != DType::f32, x.deterministic = true; });
    }
}

}  // namespace

std::vector<Case> verify_cases() {
    List list;
    add_grid(list);
    add_options(list);
    add_head_dims(list);
    add_edges(list);
    add_published_shapes(list);
    add_many_heads(list);
    add_softcaps(list);
    add_rows_without_keys(list);
    add_long_batches(list);
    add_kernel_rows(list);
    add_short_sequences(list);
    add_masking_biases(list);
    return list.take();
}

std::vector<Case> option_cases(const Case& base) {
    List list;
    for_each_option_pair([&](const Option& first, const Option* second) { list.add(with_options(base, first, second)); });
    return list.take();
}

std::vector<Case> bench_cases() {
    List list;
    for (DType dtype : {DType::f32, DType::bf16}) {
        for (int head_dim : {64, 128}) {
            for (Window window : {kFull, kCausal}) {
                for (int64_t seqlen : {512, 2048, 8192}) {
                    for (int heads : {8, 1}) {
                        Case c{.dtype = dtype, .batch = 1, .num_heads = heads, .num_heads_k = heads};
                        c.seqlen_q = c.seqlen_k = seqlen;
                        c.head_dim = head_dim;
                        c.window_right = window.right;
                        list.add(c);
                    }
                }
            }
        }
    }
    return list.take();
}

std::vector<Case> device_bench_cases() {
    constexpr int64_t kTokens = 16384;
    constexpr int kHidden = 2048;
    List list;
    for (int head_dim : {64, 128, 256}) {
        for (Window window : {kFull, kCausal}) {
            for (int64_t seqlen = 512; seqlen <= kTokens; seqlen *= 2) {
                Case c{.dtype = DType::bf16, .batch = static_cast<int>(kTokens / seqlen)};
                c.num_heads = c.num_heads_k = kHidden / head_dim;
                c.seqlen_q = c.seqlen_k = seqlen;
                c.head_dim = head_dim;
                c.window_right = window.right;
                list.add(c);
            }
        }
    }
    return list.take();
}

}  // namespace strobe::verify
