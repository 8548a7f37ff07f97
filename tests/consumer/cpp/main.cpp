// Attention where every key is the same: each output row is the mean of the values it sees.
#include <strobe/strobe.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
    const int64_t batch = 2, seqlen = 33, heads = 4, heads_k = 2, dim = 24;
    std::vector<float> q(batch * seqlen * heads * dim, 0.25f), k(batch * seqlen * heads_k * dim, 0.5f);
    std::vector<float> v(k.size()), out(q.size(), NAN), lse(batch * heads * seqlen, NAN);
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i / static_cast<size_t>(heads_k * dim) % seqlen);

    strobe::Attention attention{.q = {q.data(), {batch, seqlen, heads, dim}},
                                .k = {k.data(), {batch, seqlen, heads_k, dim}},
                                .v = {v.data(), {batch, seqlen, heads_k, dim}}};
    attention.causal = true;
    strobe::forward(attention, {.out = {out.data(), {batch, seqlen, heads, dim}}, .lse = {lse.data(), {batch, heads, seqlen}}});

    for (int64_t i = 0; i < seqlen; ++i) {
        const float mean = 0.5f * static_cast<float>(i), got = out[static_cast<size_t>((i * heads + 1) * dim + 3)];
        if (!(std::fabs(got - mean) < 1e-4f)) {
            std::printf("row %lld: %g instead of %g\n", static_cast<long long>(i), got, mean);
            return 1;
        }
    }
    try {
        attention.softcap = -1;
        strobe::forward(attention, {.out = {out.data(), {batch, seqlen, heads, dim}}});
        std::printf("a negative softcap was accepted\n");
        return 1;
    } catch (const strobe::Error& e) {
        std::printf("strobe %s: %s\n", strobe::version().c_str(), e.what());
    }
    return 0;
}
