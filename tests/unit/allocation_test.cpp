// A call with a workspace allocates nothing: every operator new of the process is counted.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "dense_call.hpp"

namespace {
std::atomic<int64_t> allocations{0};
}

void* operator new(std::size_t bytes) {
    ++allocations;
    if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace strobe {
namespace {

/// Allocations of one forward and one backward, after a first call that may start the pool's threads.
int64_t allocations_of(const DenseCall& c) {
    int64_t count = 0;
    for (int round = 0; round < 2; ++round) {
        const int64_t before = allocations;
        EXPECT_EQ(strobe_attention_forward(&c.attention, &c.forward, nullptr), STROBE_OK) << strobe_last_error();
        EXPECT_EQ(strobe_attention_backward(&c.attention, &c.backward, nullptr), STROBE_OK) << strobe_last_error();
        count = allocations - before;
    }
    return count;
}

TEST(Allocation, ACallWithAWorkspaceAllocatesNothing) {
    for (int threads : {1, 2}) {
        DenseCall plain;
        plain.attention.num_threads = threads;
        EXPECT_EQ(allocations_of(plain), 0);

        DenseCall options;
        options.attention.num_threads = threads;
        options.attention.causal = 1;
        options.attention.dropout_p = 0.25;
        options.attention.softcap = 3;
        options.attention.alibi_slopes = options.tensor({DenseCall::kHeads});
        options.attention.bias = options.tensor({1, DenseCall::kHeads, DenseCall::kSeqlenQ, DenseCall::kSeqlenK});
        options.backward.dbias = options.tensor({1, DenseCall::kHeads, DenseCall::kSeqlenQ, DenseCall::kSeqlenK});
        EXPECT_EQ(allocations_of(options), 0);

        DenseCall varlen;
        varlen.attention.num_threads = threads;
        varlen.make_varlen();
        EXPECT_EQ(allocations_of(varlen), 0);
    }
}

TEST(Allocation, TheCountIsReal) {
    DenseCall c;
    c.attention.num_threads = -1;
    const int64_t before = allocations;
    EXPECT_NE(strobe_attention_forward(&c.attention, &c.forward, nullptr), STROBE_OK);  // the text of the refusal
    EXPECT_GT(allocations, before);
}

}  // namespace
}  // namespace strobe
