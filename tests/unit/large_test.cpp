// Tensors past 2^31 elements, and memory that grows with the sequence and not with its square.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "owned_call.hpp"

namespace strobe {
namespace {

constexpr int64_t kTwo31 = int64_t{1} << 31;

/// Zeroed pages that cost memory only where they are touched.
class Pages {
public:
    explicit Pages(size_t bytes) : bytes_(bytes) {
        data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    ~Pages() {
        if (mapped()) munmap(data_, bytes_);
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    bool mapped() const { return data_ != MAP_FAILED; }
    void* data() const { return data_; }

private:
    size_t bytes_;
    void* data_;
};

/// A field of /proc/... in kB, such as "VmHWM:".
int64_t proc_kilobytes(const char* file, const std::string& field) {
    std::ifstream stream(file);
    for (std::string line; std::getline(stream, line);) {
        std::istringstream words(line);
        std::string name;
        int64_t value = 0;
        if (words >> name >> value && name == field) return value;
    }
    return 0;
}

bool enough_memory(double gigabytes) {
    return static_cast<double>(proc_kilobytes("/proc/meminfo", "MemAvailable:")) * 1024 >= gigabytes * 1e9;
}

// ---- offsets past 2^31 --------------------------------------------------------------------------------------------------

int64_t offset(const Tensor& t, int64_t n) {
    int64_t at = 0;
    for (int axis = t.ndim - 1; axis >= 0; --axis) {
        at += n % t.shape[axis] * t.strides[axis];
        n /= t.shape[axis];
    }
    return at;
}

enum class FarAxis { batch, row, head };

class FarStrides : public testing::TestWithParam<std::tuple<FarAxis, DType>> {};

TEST_P(FarStrides, ElementsPast2To31AreFound) {
    const auto [axis, dtype] = GetParam();
    // One axis steps so far that its last index lies past 2^31 elements; the others are dense.
    OwnedShape shape{dtype, 3, 9, 12, 4, 2, 40};
    if (axis == FarAxis::row) shape.seqlen_q = 70, shape.seqlen_k = 70;
    OwnedCall near(shape), far(shape);
    std::vector<std::unique_ptr<Pages>> pages;
    const auto stretch = [&](Tensor& t) {
        const int which = axis == FarAxis::batch ? 0 : axis == FarAxis::row ? 1 : 2;
        const Tensor dense = t;
        t.strides[which] = (kTwo31 + 1000) / (t.shape[which] - 1) + 1;
        if (axis == FarAxis::row) t.strides[0] = t.strides[1] / 4, t.strides[2] = 64;  // between the far rows
        if (axis == FarAxis::head) t.strides[0] = t.strides[2] / 4, t.strides[1] = 64;
        int64_t span = 1;
        for (int i = 0; i < 4; ++i) span += (t.shape[i] - 1) * t.strides[i];
        ASSERT_GT(span, kTwo31);
        pages.push_back(std::make_unique<Pages>(static_cast<size_t>(span) * size_of(static_cast<DType>(t.dtype))));
        if (!pages.back()->mapped()) GTEST_SKIP() << "no address space for " << span << " elements";
        t.data = pages.back()->data();
        for (int64_t n = 0; n < OwnedCall::count(dense); ++n) OwnedCall::set(t, offset(t, n), OwnedCall::get(dense, n));
    };
    for (Tensor* t : {&far.attention.q, &far.attention.k, &far.attention.v, &far.forward.out, &far.backward.dout, &far.backward.dq,
                      &far.backward.dk, &far.backward.dv}) {
        stretch(*t);
        if (IsSkipped() || HasFatalFailure()) return;
    }
    far.backward.out = far.forward.out;
    for (OwnedCall* call : {&near, &far}) {
        call->attention.causal = true;
        call->attention.deterministic = true;
        call->run();
    }
    const std::pair<Tensor, Tensor> results[] = {{near.forward.out, far.forward.out},
                                                 {near.backward.dq, far.backward.dq},
                                                 {near.backward.dk, far.backward.dk},
                                                 {near.backward.dv, far.backward.dv}};
    for (const auto& [dense, strided] : results) {
        for (int64_t n = 0; n < OwnedCall::count(dense); ++n) {
            ASSERT_EQ(OwnedCall::get(dense, n), OwnedCall::get(strided, offset(strided, n))) << n;
        }
    }
    EXPECT_EQ(OwnedCall::bits(near.forward.lse), OwnedCall::bits(far.forward.lse));
}

INSTANTIATE_TEST_SUITE_P(Large, FarStrides, testing::Combine(testing::Values(FarAxis::batch, FarAxis::row, FarAxis::head),
                                                             testing::Values(DType::bf16, DType::f32)));

constexpr int64_t kBatch = 32'800, kSeqlen = 16, kHeads = 32, kDim = 128;
constexpr int64_t kElements = kBatch * kSeqlen * kHeads * kDim;
static_assert(kElements > kTwo31);

/// (B, S, H, D) of more than 2^31 elements.
Tensor whole(const Pages& pages) { return {pages.data(), DType::bf16, {kBatch, kSeqlen, kHeads, kDim}}; }

/// A pattern whose period divides nothing here, so that no two batches are alike.
void fill(const Tensor& t, OwnedCall& c) {
    constexpr int64_t kPeriod = 1'000'003;
    const Tensor pattern = c.random(DType::bf16, {kPeriod});
    auto* const to = static_cast<uint16_t*>(t.data);
    for (int64_t n = 0; n < kElements; n += kPeriod) {
        std::memcpy(to + n, pattern.data, static_cast<size_t>(std::min(kPeriod, kElements - n)) * 2);
    }
}

/// Calls check(b, one, batch): `one` is an OwnedCall that runs batch b alone by the specification, batch(t) is t's part of it.
/// Batches at both ends, in the middle, and on both sides of element 2^31.
template <class Check>
void for_some_batches(OwnedCall& c, int64_t dim_v, Check check) {
    constexpr int64_t kBorder = kTwo31 / (kSeqlen * kHeads * kDim);
    for (int64_t b : {int64_t{0}, int64_t{1}, kBatch / 2, kBorder - 1, kBorder, kBatch - 1}) {
        OwnedCall one({DType::bf16, 1, kSeqlen, kSeqlen, kHeads, 1, kDim, dim_v});
        const auto batch = [&](Tensor t) {
            t.data = static_cast<std::byte*>(t.data) + b * t.strides[0] * static_cast<int64_t>(size_of(static_cast<DType>(t.dtype)));
            t.shape[0] = 1;
            return t;
        };
        one.attention.q = batch(c.attention.q);
        one.attention.k = batch(c.attention.k);
        one.attention.v = batch(c.attention.v);
        one.attention.implementation = "reference";
        check(b, one, batch);
    }
}

TEST(LargeTensor, ForwardOfMoreThan2To31Elements) {
    if (!enough_memory(10)) GTEST_SKIP() << "needs 10 GB of free memory";
    const Pages q(kElements * 2), out(kElements * 2);
    ASSERT_TRUE(q.mapped() && out.mapped());
    OwnedCall c({DType::bf16, kBatch, kSeqlen, kSeqlen, 1, 1, kDim});  // k and v: one head
    c.attention.q = whole(q);
    fill(c.attention.q, c);
    c.forward.out = whole(out);
    c.forward.lse = c.zeros(DType::f32, {kBatch, kHeads, kSeqlen});
    c.run_forward();
    for_some_batches(c, kDim, [&](int64_t b, OwnedCall& one, auto batch) {
        one.run_forward();
        EXPECT_LE(largest_difference(one.forward.out, batch(c.forward.out)), 0.02) << b;
        EXPECT_LE(largest_difference(one.forward.lse, batch(c.forward.lse)), 1e-3) << b;
    });
}

TEST(LargeTensor, BackwardOfMoreThan2To31Elements) {
    // q, dq and the fp32 sums of dq in the workspace; values are narrow to leave room for them.
    if (!enough_memory(19.5)) GTEST_SKIP() << "needs 19.5 GB of free memory";
    constexpr int64_t kDimV = 8;
    const Pages q(kElements * 2), dq(kElements * 2);
    ASSERT_TRUE(q.mapped() && dq.mapped());
    OwnedCall c({DType::bf16, kBatch, kSeqlen, kSeqlen, 1, 1, kDim, kDimV});
    c.attention.q = whole(q);
    fill(c.attention.q, c);
    c.forward.out = c.backward.out = c.zeros(DType::bf16, {kBatch, kSeqlen, kHeads, kDimV});
    c.backward.dout = c.random(DType::bf16, {kBatch, kSeqlen, kHeads, kDimV});
    c.backward.dq = whole(dq);
    c.forward.lse = c.backward.lse = c.zeros(DType::f32, {kBatch, kHeads, kSeqlen});
    c.run();
    for_some_batches(c, kDimV, [&](int64_t b, OwnedCall& one, auto batch) {
        one.backward.dout = batch(c.backward.dout);
        one.run();
        EXPECT_LE(largest_difference(one.backward.dq, batch(c.backward.dq)), 0.02) << b;
        EXPECT_LE(largest_difference(one.backward.dk, batch(c.backward.dk)), 0.1) << b;
        EXPECT_LE(largest_difference(one.backward.dv, batch(c.backward.dv)), 0.1) << b;
    });
}

// ---- memory -------------------------------------------------------------------------------------------------------------

/// Peak resident memory of `work` beyond what was resident before, in bytes.
template <class Work>
int64_t peak_beyond(Work work) {
    std::ofstream("/proc/self/clear_refs") << "5";  // the high-water mark starts anew
    const int64_t before = proc_kilobytes("/proc/self/status", "VmRSS:");
    work();
    return 1024 * (proc_kilobytes("/proc/self/status", "VmHWM:") - before);
}

void expect_small_memory(int64_t seqlen) {
    OwnedCall c({DType::f32, 1, seqlen, seqlen, 1, 1, 64});
    c.attention.causal = true;
    const int64_t forward_bytes = peak_beyond([&] { c.run_forward(); });
    const int64_t backward_bytes = peak_beyond([&] { c.run_backward(); });
    std::printf("S = %ld: %.1f MB forward, %.1f MB backward beyond the tensors\n", static_cast<long>(seqlen),
                static_cast<double>(forward_bytes) / 1e6, static_cast<double>(backward_bytes) / 1e6);
    EXPECT_LT(forward_bytes, 64'000'000);
    EXPECT_LT(backward_bytes, 64'000'000);
    // The last query sees every key: its lse is near log(S) + 1/2, the value for scores of unit variance.
    EXPECT_NEAR(OwnedCall::get(c.forward.lse, seqlen - 1), std::log(static_cast<double>(seqlen)) + 0.5, 1.5);
    EXPECT_FALSE(std::isnan(OwnedCall::get(c.backward.dq, seqlen * 64 - 1)));
}

TEST(Memory, ASequenceOf8192NeedsNoMatrixOfScores) { expect_small_memory(8192); }

TEST(LargeMemory, ASequenceOf131072FitsIn64MegabytesBeyondItsTensors) { expect_small_memory(131'072); }

TEST(Memory, WorkspaceGrowsWithTheSequenceAndNotWithItsSquare) {
    const auto bytes = [](int64_t seqlen) {
        const Tensor rows(nullptr, DType::bf16, {1, seqlen, 4, 64}), lse(nullptr, DType::f32, {1, 4, seqlen});
        Attention a{.q = rows, .k = rows, .v = rows};
        Backward b;
        b.out = b.dout = b.dq = b.dk = b.dv = rows;
        b.lse = lse;
        return std::pair{static_cast<double>(plan(a, Forward{.out = rows, .lse = lse}).workspace_bytes),
                         static_cast<double>(plan(a, b).workspace_bytes)};
    };
    const auto [forward_short, backward_short] = bytes(1 << 14);
    const auto [forward_long, backward_long] = bytes(1 << 17);
    EXPECT_LE(forward_long, 8.5 * forward_short + 1e6);
    EXPECT_LE(backward_long, 8.5 * backward_short + 1e6);
}

TEST(Memory, WorkspaceDoesNotGrowWithAnOverstatedLongestSequence) {
    const auto bytes = [](int64_t max_seqlen) {
        const Tensor rows(nullptr, DType::bf16, {4096, 4, 64}), lse(nullptr, DType::f32, {4, 4096});
        Attention a{.q = rows, .k = rows, .v = rows};
        a.cu_seqlens_q = a.cu_seqlens_k = Tensor(static_cast<const int32_t*>(nullptr), {1025});
        a.max_seqlen_q = a.max_seqlen_k = max_seqlen;
        Backward b;
        b.out = b.dout = b.dq = b.dk = b.dv = rows;
        b.lse = lse;
        return plan(a, b).workspace_bytes;
    };
    EXPECT_LE(bytes(1 << 20), 2 * bytes(2048));
}

}  // namespace
}  // namespace strobe
