// Forward, backward and an error through strobe.hpp, with nothing but the installed package.
#include <strobe/strobe.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
    constexpr int64_t kBatch = 1, kSeqlen = 3, kHeads = 1, kDim = 2;
    std::vector<float> q(kSeqlen * kDim, 0.0f), k(q), v{1, 10, 2, 20, 6, 60}, out(q), dout(q.size(), 1.0f), dq(q), dk(q), dv(q);
    std::vector<float> lse(kSeqlen);
    const auto tokens = [](std::vector<float>& x) { return strobe::Tensor(x.data(), {kBatch, kSeqlen, kHeads, kDim}); };
    const strobe::Tensor rows(lse.data(), {kBatch, kHeads, kSeqlen});

    strobe::Attention attention{.q = tokens(q), .k = tokens(k), .v = tokens(v)};
    attention.causal = true;
    strobe::forward(attention, {.out = tokens(out), .lse = rows});
    strobe::backward(attention, {.out = tokens(out), .lse = rows, .dout = tokens(dout), .dq = tokens(dq), .dk = tokens(dk), .dv = tokens(dv)});

    // With scores of zero, row i is the mean of the values up to i, and value j gets 1 / (i + 1) from each row i >= j.
    const float expected_out[] = {1, 10, 1.5f, 15, 3, 30}, expected_dv[] = {11.0f / 6, 5.0f / 6, 1.0f / 3};
    bool good = true;
    for (size_t n = 0; n < out.size(); ++n) good = good && std::abs(out[n] - expected_out[n]) < 1e-5f * std::abs(expected_out[n]);
    for (size_t n = 0; n < dv.size(); ++n) good = good && std::abs(dv[n] - expected_dv[n / 2]) < 1e-5f;
    for (size_t i = 0; i < lse.size(); ++i) good = good && std::abs(lse[i] - std::log(static_cast<float>(i + 1))) < 1e-6f;

    bool refused = false;
    try {
        attention.softcap = -1;
        strobe::forward(attention, {.out = tokens(out)});
    } catch (const strobe::Error& e) {
        refused = e.status() == strobe::Status::invalid_argument;
    }
    std::printf("strobe %s: %s\n", strobe::version().c_str(), good && refused ? "good" : "WRONG");
    return good && refused ? 0 : 1;
}
