#include "verify/case.hpp"

#include <algorithm>
#include <cstdio>

namespace strobe::verify {
namespace {

std::string number(double x) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", x);
    return text;
}

/// Lengths from the longest down to nothing; queries and keys take turns at being empty.
std::vector<int64_t> ragged(int batch, int64_t longest, int phase) {
    std::vector<int64_t> lengths(static_cast<size_t>(batch));
    for (int b = 0; b < batch; ++b) {
        const int kind = b == 0 ? 0 : 1 + (b - 1 + phase) % 4;
        const int64_t of_kind[] = {longest, 0, longest / 2 + 1, longest / 3, (longest + 3) / 4};
        lengths[b] = std::min(of_kind[kind], longest);
    }
    return lengths;
}

std::vector<int64_t> some_of(const std::vector<int64_t>& lengths, int phase) {
    std::vector<int64_t> used = lengths;
    for (size_t b = 0; b < used.size(); ++b) {
        const int64_t n = lengths[b];
        const int64_t choices[] = {n - n / 3, n, 0, n / 2};
        used[b] = choices[(b + phase) % 4];
    }
    return used;
}

bool glob(std::string_view text, std::string_view pattern) {
    if (pattern.empty()) return text.empty();
    if (pattern[0] == '*') {
        return glob(text, pattern.substr(1)) || (!text.empty() && glob(text.substr(1), pattern));
    }
    return !text.empty() && (pattern[0] == '?' || pattern[0] == text[0]) && glob(text.substr(1), pattern.substr(1));
}

}  // namespace

std::string_view dtype_name(DType dtype) {
    switch (dtype) {
        case DType::f32: return "f32";
        case DType::bf16: return "bf16";
        case DType::f16: return "f16";
        case DType::i32: return "i32";
        case DType::u8: return "u8";
    }
    return "?";
}

std::string Case::name() const {
    std::string n(dtype_name(dtype));
    const auto add = [&](bool given, const std::string& text) {
        if (given) n += "-" + text;
    };
    add(true, "d" + std::to_string(head_dim) + (dim_v() != head_dim ? "v" + std::to_string(dim_v()) : ""));
    add(true, "b" + std::to_string(batch));
    add(true, "h" + std::to_string(num_heads) + (num_heads_k != num_heads ? "k" + std::to_string(num_heads_k) : ""));
    add(true, "s" + std::to_string(seqlen_q) + "x" + std::to_string(seqlen_k));

    const bool causal = window_left < 0 && window_right == 0;
    add(window_left < 0 && window_right < 0, "full");
    add(causal, "causal");
    add(!causal && (window_left >= 0 || window_right >= 0),
        "window" + (window_left < 0 ? "_" : std::to_string(window_left)) + ":" +
            (window_right < 0 ? "_" : std::to_string(window_right)));
    add(positions, "positions" + std::to_string(q_position) + ":" + std::to_string(k_position));

    add(softmax_scale != 0, "scale" + number(softmax_scale));
    add(softcap != 0, "softcap" + number(softcap));
    add(alibi == Alibi::per_head, "alibi");
    add(alibi == Alibi::per_batch_and_head, "alibi_bh");
    const char* const bias_names[] = {"", "full", "heads", "shared", "keys", "queries", "scalar"};
    add(bias != BiasShape::none, "bias_" + std::string(bias_names[static_cast<int>(bias)]) +
                                     (bias_in_dtype ? "_16" : "") + (bias_least ? "_min" : bias_hides ? "_inf" : ""));
    add(dbias, "dbias");
    add(dropout_p != 0, "dropout" + number(dropout_p));

    add(varlen_q && varlen_k, "varlen");
    add(varlen_q && !varlen_k, "varlen_q");
    add(varlen_k && !varlen_q, "varlen_k");
    add(seqused_q, "seqused_q");
    add(seqused_k, "seqused_k");

    const char* const layout_names[] = {"bshd", "bhsd", "padded", "packed"};
    add(layout != Layout::bshd, layout_names[static_cast<int>(layout)]);
    add(out_f32, "out_f32");
    add(grad_f32, "grad_f32");
    add(accumulate, "accumulate");
    add(dlse, "dlse");
    add(global_out, "global_out");
    add(deterministic, "deterministic");
    add(loud, "loud");
    return n;
}

bool Case::consistent() const {
    if (num_heads % num_heads_k != 0) return false;
    if (layout == Layout::packed && (dim_v() != head_dim || seqlen_q != seqlen_k || lengths_q() != lengths_k())) {
        return false;
    }
    if (accumulate && grad_dtype() != DType::f32) return false;
    if ((dbias || bias_in_dtype || bias_hides) && bias == BiasShape::none) return false;
    if (bias_least && !bias_hides) return false;
    return true;
}

std::vector<int64_t> Case::lengths_q() const {
    return varlen_q ? ragged(batch, seqlen_q, 0) : std::vector<int64_t>(static_cast<size_t>(batch), seqlen_q);
}

std::vector<int64_t> Case::lengths_k() const {
    // A packed tensor has one length for both; otherwise the empty sequences of q and k fall on different places.
    return varlen_k ? ragged(batch, seqlen_k, layout == Layout::packed ? 0 : 1)
                    : std::vector<int64_t>(static_cast<size_t>(batch), seqlen_k);
}

std::vector<int64_t> Case::used_q() const { return seqused_q ? some_of(lengths_q(), 0) : lengths_q(); }
std::vector<int64_t> Case::used_k() const { return seqused_k ? some_of(lengths_k(), 3) : lengths_k(); }

double Case::forward_flops() const {
    const std::vector<int64_t> rows = used_q();
    const std::vector<int64_t> keys = used_k();
    double visible = 0;
    for (size_t b = 0; b < rows.size(); ++b) {
        const int64_t diagonal = positions ? q_position - k_position : keys[b] - rows[b];
        const BandMask mask{window_left, window_right, diagonal, rows[b], keys[b]};
        for (int64_t i = 0; i < rows[b]; ++i) visible += static_cast<double>(mask.key_range(i, i + 1).size());
    }
    return 2.0 * visible * num_heads * (head_dim + dim_v());
}

bool matches(std::string_view name, std::string_view filter) {
    bool any_positive = false;
    bool hit = false;
    for (size_t begin = 0; begin <= filter.size();) {
        const size_t end = std::min(filter.find(',', begin), filter.size());
        std::string_view term = filter.substr(begin, end - begin);
        begin = end + 1;
        const bool negative = !term.empty() && term[0] == '!';
        if (negative) term.remove_prefix(1);
        if (term.empty()) continue;
        const bool found = glob(name, std::string("*").append(term).append("*"));
        if (negative && found) return false;
        if (!negative) {
            any_positive = true;
            hit = hit || found;
        }
    }
    return hit || !any_positive;
}

std::vector<Case> filtered(std::vector<Case> cases, std::string_view filter) {
    std::erase_if(cases, [&](const Case& c) { return !matches(c.name(), filter); });
    return cases;
}

}  // namespace strobe::verify
