// What an implementation must keep to beyond the right numbers: repeatable results, rows that do not touch each other, a
// dropout mask that can be told in advance, gradients of a broadcast bias, calls from many threads.
#include <gtest/gtest.h>

#include <cmath>
#include <thread>

#include "owned_call.hpp"
#include "sanitized.hpp"
#include "verify/verify.hpp"

namespace strobe {
namespace {

using verify::Case;
using verify::CaseResult;
using verify::LibrarySubject;
using verify::Outcome;

void expect_passed(const CaseResult& r) { EXPECT_EQ(r.outcome, Outcome::passed) << r.name << ": " << r.message; }

// ---- repeatability ------------------------------------------------------------------------------------------------------

/// Chance shows in results now and then; a sanitizer sees every access of every run.
constexpr int kRepeats = kSanitized ? 25 : 250;

TEST(Repeatability, OutLseDkDvHaveTheSameBitsInEveryRun) {
    LibrarySubject subject("", 4);
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        Case c{.dtype = dtype, .batch = 2, .num_heads = 4, .num_heads_k = 2, .seqlen_q = 130, .seqlen_k = 150};
        c.window_right = 0;
        c.dropout_p = 0.1;
        expect_passed(verify_case(c, subject, {.repeats = kRepeats}));
    }
    Case one_head{.batch = 1, .num_heads = 1, .num_heads_k = 1, .seqlen_q = 300, .seqlen_k = 280};
    expect_passed(verify_case(one_head, subject, {.repeats = kRepeats}));
}

TEST(Repeatability, DeterministicGivesTheSameDqToo) {
    LibrarySubject subject("", 4);
    for (int head_dim : {1, 40, 64, 128, 256, 512}) {
        Case c{.dtype = DType::bf16, .num_heads = 4, .num_heads_k = 2, .seqlen_q = 90, .seqlen_k = 110, .head_dim = head_dim};
        c.deterministic = true;
        c.window_right = 0;
        expect_passed(verify_case(c, subject, {.repeats = kRepeats / 5}));
    }
    for (Case c : verify::option_cases({.seqlen_q = 70, .seqlen_k = 90, .head_dim = 32})) {
        if (c.name().size() % 8 != 0) continue;  // a sample of the pairs
        c.deterministic = true;
        expect_passed(verify_case(c, subject, {.repeats = 5}));
    }
}

class NumberOfThreads : public testing::TestWithParam<int> {};

TEST_P(NumberOfThreads, Serves) {
    LibrarySubject subject("", GetParam());
    constexpr const char* kCases = "d111-b5*varlen,d128-b1-h1-s113x203,f32-d64-b2-h1-s1x,s640x128";
    for (const Case& c : verify::filtered(verify::verify_cases(), kCases)) expect_passed(verify_case(c, subject));
}

INSTANTIATE_TEST_SUITE_P(Threads, NumberOfThreads, testing::Values(1, 2, 3, 7, 16));

TEST(Repeatability, AFewQueriesGetTheSameBitsFromAnyNumberOfThreads) {
    OwnedCall one({DType::f32, 2, 1, 2000, 6, 2, 64});
    one.forward.lse = {};
    one.attention.num_threads = 1;
    one.run_forward();
    for (int threads : {2, 3, 8}) {
        OwnedCall many(one.shape);
        many.forward.lse = {};
        many.attention.num_threads = threads;
        many.run_forward();
        EXPECT_EQ(OwnedCall::bits(one.forward.out), OwnedCall::bits(many.forward.out)) << threads;
    }
}

// ---- decoding: a few queries without log-sum-exp have a kernel of their own -------------------------------------------------

class Decoding : public testing::TestWithParam<DType> {
protected:
    /// The same call with and without log-sum-exp; `change` alters both alike.
    template <class Change>
    void compare(const char* what, Change&& change, int64_t queries = 2, int64_t keys = 600, int64_t head_dim = 59) {
        OwnedCall with({GetParam(), 3, queries, keys, 4, 2, head_dim, head_dim + 3, DType::f32}), without(with.shape);
        without.forward.lse = {};
        for (OwnedCall* call : {&with, &without}) {
            change(*call);
            call->run_forward();
        }
        const std::vector<float> expected = OwnedCall::values(with.forward.out), out = OwnedCall::values(without.forward.out);
        // Where bfloat16 pairs are multiplied, the general kernel rounds probabilities to bfloat16.
        const float tolerance = GetParam() == DType::bf16 ? 1e-2f : 2e-5f;
        for (size_t n = 0; n < out.size(); ++n) ASSERT_NEAR(out[n], expected[n], tolerance) << what << " " << n;
    }
};

TEST_P(Decoding, GivesWhatTheGeneralKernelGives) {
    compare("full", [](OwnedCall&) {});
    for (int64_t keys : {0, 1, 63, 64, 65, 256, 257, 1000}) compare("keys", [](OwnedCall&) {}, 1, keys, 64);
    for (int64_t head_dim : {1, 7, 8, 128, 200}) compare("head_dim", [](OwnedCall&) {}, 1, 300, head_dim);
    compare("causal", [](OwnedCall& c) { c.attention.causal = true; });
    compare("window", [](OwnedCall& c) { c.attention.window_left = 300, c.attention.window_right = 5; });
    compare("hidden from all", [](OwnedCall& c) { c.attention.causal = true; c.attention.positions = Attention::Positions{0, 1000}; });
    compare("positions", [](OwnedCall& c) { c.attention.causal = true; c.attention.positions = Attention::Positions{300, 10}; });
    compare("softcap", [](OwnedCall& c) { c.attention.softcap = 1.5; });
    compare("negative scale", [](OwnedCall& c) { c.attention.softmax_scale = -0.3; });
    compare("alibi", [](OwnedCall& c) { c.attention.causal = true; c.attention.alibi_slopes = c.random(DType::f32, {4}, 0.1f); });
    compare("alibi, batch", [](OwnedCall& c) { c.attention.alibi_slopes = c.random(DType::f32, {3, 4}, 0.1f); c.attention.softcap = 3.0; });
    compare("heads outside", [](OwnedCall& c) {
        for (Tensor* t : {&c.attention.k, &c.attention.v}) {
            std::swap(t->strides[1], t->strides[2]);
            t->strides[1] = t->shape[3];
            t->strides[2] = t->shape[1] * t->shape[3];
        }
    });
    compare("seqused", [](OwnedCall& c) {
        static constexpr int32_t kUsed[] = {600, 0, 130}, kQueries[] = {2, 1, 0};
        c.attention.seqused_k = Tensor(kUsed, {3});
        c.attention.seqused_q = Tensor(kQueries, {3});
        c.attention.causal = true;
    });
}

INSTANTIATE_TEST_SUITE_P(Types, Decoding, testing::Values(DType::f32, DType::bf16, DType::f16));

// ---- rows keep to themselves --------------------------------------------------------------------------------------------

constexpr int64_t kRows = 100, kHeads = 2, kDim = 40, kPoisoned = 50;

/// Elements of two (1, S, H, D) or (1, H, S) tensors that differ in their bits, by row.
std::vector<bool> rows_that_differ(const Tensor& a, const Tensor& b) {
    std::vector<bool> differ(kRows);
    for (int64_t n = 0; n < OwnedCall::count(a); ++n) {
        const float x = OwnedCall::get(a, n), y = OwnedCall::get(b, n);
        if (std::memcmp(&x, &y, sizeof x) == 0) continue;
        differ[a.ndim == 4 ? n / (kHeads * kDim) : n % kRows] = true;
    }
    return differ;
}

/// Rows in which every element of head 0 is NaN, and head 1 is untouched.
void expect_poisoned(const Tensor& clean, const Tensor& seen, const char* what, bool (*expected)(int64_t)) {
    const std::vector<bool> differ = rows_that_differ(clean, seen);
    for (int64_t row = 0; row < kRows; ++row) {
        EXPECT_EQ(differ[row], expected(row)) << what << " row " << row;
    }
}

class Isolation : public testing::TestWithParam<std::tuple<DType, float>> {
protected:
    Isolation() {
        for (OwnedCall* call : {&clean_, &seen_}) {
            call->attention.causal = true;
            call->attention.deterministic = true;
        }
        clean_.run();
    }

    void poison(const Tensor& t, int64_t row) {  // head 0 of one row
        for (int64_t d = 0; d < kDim; d += 3) OwnedCall::set(t, row * kHeads * kDim + d, std::get<1>(GetParam()));
    }

    OwnedShape shape_{std::get<0>(GetParam()), 1, kRows, kRows, kHeads, kHeads, kDim};
    OwnedCall clean_{shape_}, seen_{shape_};
};

bool only_poisoned(int64_t row) { return row == kPoisoned; }
bool from_poisoned_on(int64_t row) { return row >= kPoisoned; }
bool up_to_poisoned(int64_t row) { return row <= kPoisoned; }
bool none(int64_t) { return false; }

TEST_P(Isolation, AQueryRowStaysAlone) {
    poison(seen_.attention.q, kPoisoned);
    seen_.run();
    expect_poisoned(clean_.forward.out, seen_.forward.out, "out", only_poisoned);
    expect_poisoned(clean_.forward.lse, seen_.forward.lse, "lse", only_poisoned);
    expect_poisoned(clean_.backward.dq, seen_.backward.dq, "dq", only_poisoned);
    expect_poisoned(clean_.backward.dk, seen_.backward.dk, "dk", up_to_poisoned);
    expect_poisoned(clean_.backward.dv, seen_.backward.dv, "dv", up_to_poisoned);
}

TEST_P(Isolation, AKeyRowReachesOnlyTheQueriesThatSeeIt) {
    poison(seen_.attention.k, kPoisoned);
    seen_.run_forward();
    expect_poisoned(clean_.forward.out, seen_.forward.out, "out", from_poisoned_on);
    expect_poisoned(clean_.forward.lse, seen_.forward.lse, "lse", from_poisoned_on);
    seen_.run_backward();
    expect_poisoned(clean_.backward.dq, seen_.backward.dq, "dq", from_poisoned_on);
}

TEST_P(Isolation, AValueRowReachesOnlyTheQueriesThatSeeIt) {
    poison(seen_.attention.v, kPoisoned);
    seen_.run();
    expect_poisoned(clean_.forward.out, seen_.forward.out, "out", from_poisoned_on);
    expect_poisoned(clean_.forward.lse, seen_.forward.lse, "lse", none);
    expect_poisoned(clean_.backward.dq, seen_.backward.dq, "dq", from_poisoned_on);
}

TEST_P(Isolation, AnOutputGradientRowReachesItsQueryAndTheKeysItSees) {
    seen_.run_forward();
    poison(seen_.backward.dout, kPoisoned);
    seen_.run_backward();
    expect_poisoned(clean_.backward.dq, seen_.backward.dq, "dq", only_poisoned);
    expect_poisoned(clean_.backward.dk, seen_.backward.dk, "dk", up_to_poisoned);
    expect_poisoned(clean_.backward.dv, seen_.backward.dv, "dv", up_to_poisoned);
}

INSTANTIATE_TEST_SUITE_P(NaNAndInfinity, Isolation,
                         testing::Combine(testing::Values(DType::f32, DType::bf16, DType::f16), testing::Values(NAN, INFINITY)));

/// Two queries, of which only the second sees the last key.
TEST(Isolation, TheLastKeyOfADecodedTextReachesItsOwnQueryOnly) {
    for (const float poison : {NAN, INFINITY}) {
        for (const int64_t keys : {63, 257, 700}) {
            OwnedCall clean({DType::f32, 1, 2, keys, 2, 2, 40}), seen(clean.shape);
            for (OwnedCall* call : {&clean, &seen}) {
                call->attention.causal = true;
                call->forward.lse = {};
            }
            for (int64_t c = 0; c < 2 * 40; ++c) {
                OwnedCall::set(seen.attention.k, (keys - 1) * 2 * 40 + c, poison);
                OwnedCall::set(seen.attention.v, (keys - 1) * 2 * 40 + c, poison);
            }
            clean.run_forward();
            seen.run_forward();
            for (int64_t n = 0; n < OwnedCall::count(clean.forward.out); ++n) {
                const float x = OwnedCall::get(seen.forward.out, n);
                if (n < 2 * 40)
                    ASSERT_EQ(x, OwnedCall::get(clean.forward.out, n)) << keys;
                else
                    ASSERT_TRUE(std::isnan(x) || std::isinf(x)) << keys;
            }
        }
    }
}

// ---- dropout ------------------------------------------------------------------------------------------------------------

TEST(DropoutMask, IsTheOneThatForwardAndBackwardUse) {
    // With v = 1 on the diagonal, out is the dropped probabilities; with dout = 1 on the diagonal, dv is their transpose.
    constexpr int64_t kBatch = 2, kNumHeads = 3, kQ = 37, kK = 37;
    for (bool positions : {false, true}) {
        OwnedCall c({DType::f32, kBatch, kQ, kK, kNumHeads, kNumHeads, 16, kK});
        if (positions) c.attention.positions = Attention::Positions{1000, 123456};
        c.attention.dropout_p = 0.3;
        c.attention.dropout_seed = 0x123456789ABCDEFull;
        c.attention.dropout_offset = 42;
        for (const Tensor& t : {c.attention.v, c.backward.dout}) {
            for (int64_t n = 0; n < OwnedCall::count(t); ++n) {
                const int64_t row = n / (kNumHeads * kK) % kK, d = n % kK;
                OwnedCall::set(t, n, row == d ? 1.0f : 0.0f);
            }
        }
        c.run();
        std::vector<uint8_t> keep(kBatch * kNumHeads * kQ * kK, 7);
        dropout_mask(c.attention, Tensor(keep.data(), DType::u8, {kBatch, kNumHeads, kQ, kK}));
        int64_t kept = 0;
        for (int64_t b = 0; b < kBatch; ++b) {
            for (int64_t h = 0; h < kNumHeads; ++h) {
                for (int64_t i = 0; i < kQ; ++i) {
                    for (int64_t j = 0; j < kK; ++j) {
                        const uint8_t k = keep[((b * kNumHeads + h) * kQ + i) * kK + j];
                        ASSERT_LE(k, 1);
                        kept += k;
                        const float p = OwnedCall::get(c.forward.out, ((b * kQ + i) * kNumHeads + h) * kK + j);
                        const float transposed = OwnedCall::get(c.backward.dv, ((b * kK + j) * kNumHeads + h) * kK + i);
                        ASSERT_EQ(p != 0, k == 1) << b << " " << h << " " << i << " " << j;
                        ASSERT_EQ(transposed != 0, k == 1) << b << " " << h << " " << i << " " << j;
                    }
                }
            }
        }
        const double n = static_cast<double>(keep.size());
        EXPECT_NEAR(static_cast<double>(kept), 0.7 * n, 5 * std::sqrt(n * 0.21));
    }
}

TEST(DropoutMask, RowsSumToOneInExpectation) {
    // The mean of out over many seeds approaches out without dropout.
    OwnedShape shape{DType::f32, 1, 8, 24, 1, 1, 16};
    OwnedCall plain(shape), dropped(shape);
    plain.run_forward();
    dropped.attention.dropout_p = 0.4;
    constexpr int kSeeds = 2000;
    std::vector<double> mean(static_cast<size_t>(OwnedCall::count(plain.forward.out)));
    for (int seed = 0; seed < kSeeds; ++seed) {
        dropped.attention.dropout_seed = static_cast<uint64_t>(seed);
        dropped.run_forward();
        for (size_t n = 0; n < mean.size(); ++n) mean[n] += OwnedCall::get(dropped.forward.out, static_cast<int64_t>(n)) / kSeeds;
    }
    for (size_t n = 0; n < mean.size(); ++n) EXPECT_NEAR(mean[n], OwnedCall::get(plain.forward.out, static_cast<int64_t>(n)), 0.06);
}

// ---- bias ---------------------------------------------------------------------------------------------------------------

TEST(Bias, GradientOfABroadcastBiasIsTheSumOverTheBroadcastAxes) {
    constexpr int64_t kB = 3, kH = 4, kQ = 21, kK = 35;
    for (int broadcast = 0; broadcast < 16; ++broadcast) {  // a bit per axis
        OwnedShape shape{DType::f32, kB, kQ, kK, kH, 2, 24};
        OwnedCall narrow(shape), wide(shape);
        const std::vector<int64_t> extents = {broadcast & 1 ? 1 : kB, broadcast & 2 ? 1 : kH, broadcast & 4 ? 1 : kQ, broadcast & 8 ? 1 : kK};
        narrow.attention.bias = narrow.random(DType::f32, extents);
        narrow.backward.dbias = narrow.zeros(DType::f32, extents);
        wide.attention.bias = wide.zeros(DType::f32, {kB, kH, kQ, kK});
        wide.backward.dbias = wide.zeros(DType::f32, {kB, kH, kQ, kK});
        const auto narrow_index = [&](int64_t n) {
            const int64_t j = n % kK, i = n / kK % kQ, h = n / (kK * kQ) % kH, b = n / (kK * kQ * kH);
            return ((b % extents[0] * extents[1] + h % extents[1]) * extents[2] + i % extents[2]) * extents[3] + j % extents[3];
        };
        for (int64_t n = 0; n < kB * kH * kQ * kK; ++n) {
            OwnedCall::set(wide.attention.bias, n, OwnedCall::get(narrow.attention.bias, narrow_index(n)));
        }
        for (OwnedCall* call : {&narrow, &wide}) {
            call->attention.causal = true;
            call->backward.dlse = call->random(DType::f32, {kB, kH, kQ});
        }
        std::memcpy(narrow.backward.dlse.data, wide.backward.dlse.data, kB * kH * kQ * sizeof(float));
        narrow.run();
        wide.run();
        EXPECT_LE(largest_difference(narrow.forward.out, wide.forward.out), 1e-6) << broadcast;
        std::vector<double> sum(static_cast<size_t>(OwnedCall::count(narrow.backward.dbias))), size(sum.size());
        for (int64_t n = 0; n < kB * kH * kQ * kK; ++n) {
            const double x = OwnedCall::get(wide.backward.dbias, n);
            sum[static_cast<size_t>(narrow_index(n))] += x;
            size[static_cast<size_t>(narrow_index(n))] += std::abs(x);
        }
        for (size_t n = 0; n < sum.size(); ++n) {
            EXPECT_NEAR(OwnedCall::get(narrow.backward.dbias, static_cast<int64_t>(n)), sum[n], 4e-6 * (1 + size[n])) << broadcast << " element " << n;
        }
    }
}

TEST(Bias, AnExpandedViewOfABiasServes) {
    // A (1, 1, Sq, Sk) bias handed over as (B, H, Sq, Sk) with strides of 0, and one with strided columns.
    OwnedShape shape{DType::f32, 2, 9, 13, 2, 2, 16};
    OwnedCall a(shape), b(shape), c(shape);
    a.attention.bias = a.random(DType::f32, {1, 1, 9, 13});
    const int64_t full[] = {2, 2, 9, 13}, expanded[] = {0, 0, 13, 1};
    b.attention.bias = Tensor(a.attention.bias.data, DType::f32, full, expanded);
    const Tensor transposed = c.zeros(DType::f32, {13, 9});
    for (int64_t i = 0; i < 9; ++i) {
        for (int64_t j = 0; j < 13; ++j) OwnedCall::set(transposed, j * 9 + i, OwnedCall::get(a.attention.bias, i * 13 + j));
    }
    const int64_t columns[] = {0, 0, 1, 9};
    c.attention.bias = Tensor(transposed.data, DType::f32, full, columns);
    for (OwnedCall* call : {&a, &b, &c}) call->run();
    for (OwnedCall* call : {&b, &c}) {
        EXPECT_LE(largest_difference(a.forward.out, call->forward.out), 1e-6);
        EXPECT_LE(largest_difference(a.backward.dq, call->backward.dq), 2e-6);
        EXPECT_LE(largest_difference(a.backward.dk, call->backward.dk), 2e-6);
    }
}

// ---- callers ------------------------------------------------------------------------------------------------------------

TEST(Callers, ManyThreadsCallAtOnce) {
    OwnedShape shape{DType::bf16, 2, 60, 70, 4, 2, 32};
    OwnedCall expected(shape, 5);
    expected.attention.causal = true;
    expected.attention.deterministic = true;
    expected.run();
    std::vector<std::thread> threads;
    std::vector<int> mismatches(4);
    for (size_t t = 0; t < mismatches.size(); ++t) {
        threads.emplace_back([&, t] {
            OwnedCall mine(shape, 5);
            mine.attention.causal = true;
            mine.attention.deterministic = true;
            for (int n = 0; n < 20; ++n) {
                mine.attention.num_threads = 1 + (n + static_cast<int>(t)) % 3;
                mine.run();
                mismatches[t] += OwnedCall::bits(mine.forward.out) != OwnedCall::bits(expected.forward.out);
                mismatches[t] += OwnedCall::bits(mine.backward.dk) != OwnedCall::bits(expected.backward.dk);
                Attention wrong = mine.attention;
                wrong.num_threads = -static_cast<int>(t) - 1;
                try {
                    forward(wrong, mine.forward);
                    ++mismatches[t];
                } catch (const Error& e) {
                    mismatches[t] += std::string(e.what()).find("is " + std::to_string(-static_cast<int>(t) - 1)) == std::string::npos;
                }
            }
        });
    }
    for (std::thread& t : threads) t.join();
    for (size_t t = 0; t < mismatches.size(); ++t) EXPECT_EQ(mismatches[t], 0) << t;
}

TEST(Callers, TheWorkspaceAskedForIsEnoughAndLessIsRefused) {
    for (int64_t head_dim : {64, 512}) {
        OwnedCall c({DType::bf16, 2, 200, 220, 4, 2, head_dim});
        const size_t forward_bytes = plan(c.attention, c.forward).workspace_bytes;
        const size_t backward_bytes = plan(c.attention, c.backward).workspace_bytes;
        std::vector<std::byte> memory(std::max(forward_bytes, backward_bytes) + 1);
        for (size_t shift : {0, 1}) {  // at any address
            c.forward.workspace = {memory.data() + shift, forward_bytes};
            c.backward.workspace = {memory.data() + shift, backward_bytes};
            EXPECT_NO_THROW(c.run());
        }
        const auto expect_refused = [](auto&& call, size_t bytes) {
            if (bytes == 0) return;
            try {
                call();
                ADD_FAILURE() << "a workspace of too few bytes was accepted";
            } catch (const Error& e) {
                EXPECT_EQ(e.status(), Status::invalid_argument);
                EXPECT_NE(std::string(e.what()).find("workspace: 1 bytes are given, "), std::string::npos) << e.what();
                EXPECT_NE(std::string(e.what()).find(std::to_string(bytes) + " are needed"), std::string::npos) << e.what();
            }
        };
        c.forward.workspace = {memory.data(), 1};
        c.backward.workspace = {memory.data(), 1};
        expect_refused([&] { c.run_forward(); }, forward_bytes);
        expect_refused([&] { c.run_backward(); }, backward_bytes);
    }
}

/// The products read some tensors in place, in words that may hold two elements.
TEST(Callers, TensorsMayStartAtAnyElement) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        OwnedCall aligned({dtype, 2, 70, 90, 4, 2, 64}), shifted(aligned.shape);
        aligned.run();
        for (Tensor* t : {&shifted.attention.q, &shifted.attention.k, &shifted.attention.v, &shifted.backward.dout}) {
            const std::vector<std::byte> content = OwnedCall::bits(*t);
            t->data = static_cast<std::byte*>(t->data) + size_of(dtype);  // OwnedCall leaves room behind each tensor
            std::memcpy(t->data, content.data(), content.size());
        }
        for (Tensor* t : {&shifted.forward.out, &shifted.backward.dq, &shifted.backward.dk, &shifted.backward.dv}) {
            t->data = static_cast<std::byte*>(t->data) + size_of(dtype);
        }
        shifted.backward.out = shifted.forward.out;
        shifted.run();
        EXPECT_EQ(OwnedCall::bits(aligned.forward.out), OwnedCall::bits(shifted.forward.out)) << size_of(dtype);
        EXPECT_EQ(OwnedCall::bits(aligned.backward.dq), OwnedCall::bits(shifted.backward.dq)) << size_of(dtype);
        EXPECT_EQ(OwnedCall::bits(aligned.backward.dk), OwnedCall::bits(shifted.backward.dk)) << size_of(dtype);
        EXPECT_EQ(OwnedCall::bits(aligned.backward.dv), OwnedCall::bits(shifted.backward.dv)) << size_of(dtype);
    }
}

TEST(Callers, TheLseMayBeLeftOut) {
    OwnedShape shape{DType::f32, 1, 30, 40, 2, 1, 16};
    OwnedCall with(shape), without(shape);
    without.forward.lse = {};
    with.run_forward();
    without.run_forward();
    EXPECT_EQ(OwnedCall::bits(with.forward.out), OwnedCall::bits(without.forward.out));
}

TEST(Callers, PlansNameTheImplementation) {
    OwnedCall c({DType::f32, 1, 30, 40, 2, 1, 16});
    const Plan p = plan(c.attention, c.forward);
    EXPECT_FALSE(p.implementation.empty());
    EXPECT_NE(p.explanation.find(p.implementation + ": "), std::string::npos) << p.explanation;
    c.attention.implementation = "reference";
    EXPECT_EQ(plan(c.attention, c.forward).implementation, "reference");
    EXPECT_EQ(plan(c.attention, c.backward).implementation, "reference");
    EXPECT_EQ(strobe_implementation(-1), nullptr);
    std::vector<std::string> names;
    for (int32_t n = 0; const char* name = strobe_implementation(n); ++n) names.push_back(name);
    ASSERT_FALSE(names.empty());
    EXPECT_EQ(names.back(), "reference");
    EXPECT_FALSE(version().empty());
    const int before = num_threads();
    set_num_threads(3);
    EXPECT_EQ(num_threads(), 3);
    set_num_threads(before);
}

}  // namespace
}  // namespace strobe
