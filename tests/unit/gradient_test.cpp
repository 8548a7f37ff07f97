// The specification's gradients against central differences of its own forward, in doubles: every option, every pair of
// options. The loss is sum(dout * out) + sum(dlse * lse).
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "reference/reference.hpp"
#include "verify/case_data.hpp"

namespace strobe::verify {
namespace {

using reference::Precision;

/// A case on doubles, whose inputs can be nudged.
class Differentiable {
public:
    explicit Differentiable(const Case& c) : data(c) {
        placement_.doubles = true;
        for (const Buffer& buffer : data.buffers) images_.push_back(encode(buffer, true));
        for (auto& image : images_) placement_.buffers.push_back(image.data());
    }

    double& at(const View& view, int64_t index) {
        return reinterpret_cast<double*>(images_[view.buffer].data())[index];
    }

    void forward() {
        reference::forward(forward_params(data, placement_), Precision::fp64_on_doubles);
        if (data.spec.global_out) merge_other_keys();
    }
    void backward() { reference::backward(backward_params(data, placement_), Precision::fp64_on_doubles); }

    double loss() {
        forward();
        double sum = 0;
        std::vector<int64_t> out_at, lse_at;
        data.out.for_each([&](int64_t n) { out_at.push_back(n); });
        // Rows behind seqused have no dout; their out is zero and so is their share.
        size_t n = 0;
        data.dout.for_each([&](int64_t index) {
            const double dout = at(data.dout, index);
            if (!std::isnan(dout)) sum += dout * at(data.out, out_at[n]);
            ++n;
        });
        if (data.dlse.given()) {
            data.lse.for_each([&](int64_t index) { lse_at.push_back(index); });
            n = 0;
            data.dlse.for_each([&](int64_t index) {
                const double lse = at(data.lse, lse_at[n++]);
                if (std::isfinite(lse)) sum += at(data.dlse, index) * lse;
            });
        }
        return sum;
    }

    CaseData data;

private:
    /// Out and lse become those of these keys and some others, whose own out and lse are constants.
    void merge_other_keys() {
        std::vector<int64_t> lse_at;
        data.lse.for_each([&](int64_t n) { lse_at.push_back(n); });
        // out is (..., row, head, dim), lse (..., head, row): walk out and find the row's lse.
        const View& o = data.out;
        const size_t axes = o.shape.size();
        const int64_t batches = axes == 4 ? o.shape[0] : 1, rows = o.shape[axes - 3], heads = o.shape[axes - 2];
        for (int64_t b = 0; b < batches; ++b) {
            for (int64_t h = 0; h < heads; ++h) {
                for (int64_t i = 0; i < rows; ++i) {
                    double& lse = at(data.lse, lse_at[(b * heads + h) * rows + i]);
                    const double other_lse = 0.5 + 0.1 * static_cast<double>(i % 3);
                    const double global = std::log(std::exp(lse) + std::exp(other_lse));
                    for (int64_t d = 0; d < o.shape[axes - 1]; ++d) {
                        double& out = at(o, o.offset + (axes == 4 ? b * o.strides[0] : 0) + i * o.strides[axes - 3] +
                                                h * o.strides[axes - 2] + d);
                        out = std::exp(lse - global) * out + std::exp(other_lse - global) * 0.1 * static_cast<double>(d - i);
                    }
                    lse = global;
                }
            }
        }
    }

    std::vector<std::vector<std::byte>> images_;
    Placement placement_;
};

/// "" when every gradient of the case is the slope of the loss, else the worst offender.
std::string disagreement(const Case& c) {
    Differentiable run(c);
    run.forward();
    run.backward();
    struct Pair {
        const char* name;
        const View *input, *gradient;
    };
    std::vector<Pair> pairs = {{"dq", &run.data.q, &run.data.dq}, {"dk", &run.data.k, &run.data.dk}, {"dv", &run.data.v, &run.data.dv}};
    if (run.data.dbias.given()) pairs.push_back({"dbias", &run.data.bias, &run.data.dbias});

    constexpr double kStep = 1e-5;
    for (const Pair& pair : pairs) {
        std::vector<double> initial, gradient;
        const std::vector<double>& first = run.data.buffers[pair.gradient->buffer].values;
        pair.gradient->for_each([&](int64_t n) {
            initial.push_back(c.accumulate ? first[n] : 0.0);
            gradient.push_back(run.at(*pair.gradient, n));
        });
        size_t n = 0;
        std::string found;
        pair.input->for_each([&](int64_t index) {
            const size_t element = n++;
            const double analytic = gradient[element] - (std::strcmp(pair.name, "dbias") ? initial[element] : 0.0);
            double& x = run.at(*pair.input, index);
            const double before = x;
            double slope = 0;  // of what nobody may look at, and of -inf
            if (std::isfinite(before)) {
                x = before + kStep;
                const double above = run.loss();
                x = before - kStep;
                slope = (above - run.loss()) / (2 * kStep);
                x = before;
            }
            if (!(std::abs(analytic - slope) <= 1e-6 * std::max(1.0, std::abs(slope))) && found.empty()) {
                found = std::string(pair.name) + " element " + std::to_string(element) + ": " + std::to_string(analytic) +
                        ", but the loss says " + std::to_string(slope);
            }
        });
        if (!found.empty()) return c.name() + ": " + found;
    }
    return "";
}

/// Checks the cases on all processors.
void expect_gradients(const std::vector<Case>& cases) {
    std::vector<std::string> messages(cases.size());
    std::atomic<size_t> next{0};
    const auto work = [&] {
        for (size_t n = next++; n < cases.size(); n = next++) messages[n] = disagreement(cases[n]);
    };
    std::vector<std::thread> threads;
    for (unsigned t = 1; t < std::max(1u, std::thread::hardware_concurrency()); ++t) threads.emplace_back(work);
    work();
    for (std::thread& t : threads) t.join();
    for (const std::string& m : messages) EXPECT_EQ(m, "");
}

constexpr Case kSmall{.batch = 2, .num_heads = 2, .num_heads_k = 2, .seqlen_q = 6, .seqlen_k = 9, .head_dim = 3};

TEST(Gradient, PlainAttention) {
    std::vector<Case> cases;
    for (auto [heads, heads_k] : {std::pair{1, 1}, {2, 2}, {4, 2}, {3, 1}}) {
        for (int64_t seqlen_q : {1, 4, 7}) {
            for (int64_t seqlen_k : {1, 5, 8}) {
                Case c = kSmall;
                c.num_heads = heads;
                c.num_heads_k = heads_k;
                c.seqlen_q = seqlen_q;
                c.seqlen_k = seqlen_k;
                c.head_dim_v = 2;
                c.dlse = true;
                cases.push_back(c);
            }
        }
    }
    expect_gradients(cases);
}

TEST(Gradient, EveryOptionAndEveryPairOfOptions) {
    std::vector<Case> cases = option_cases(kSmall);
    // Scores in the hundreds have curvature that central differences do not survive.
    std::erase_if(cases, [](const Case& c) { return c.loud; });
    for (Case& c : cases) c.dbias = c.bias != BiasShape::none;
    EXPECT_GT(cases.size(), 500u);
    expect_gradients(cases);
}

}  // namespace
}  // namespace strobe::verify
