// A call with a workspace allocates nothing: every allocation of the process is counted, by operator new and, where no
// sanitizer has its own, in malloc and its relatives below it.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <utility>

#include "dense_call.hpp"
#include "sanitized.hpp"

namespace {
std::atomic<int64_t> allocations{0};
}

#if defined(__GLIBC__) && !STROBE_SANITIZED
constexpr bool kCountsMalloc = true;
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t bytes) {
    ++allocations;
    return __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
    ++allocations;
    return __libc_calloc(count, bytes);
}
void* realloc(void* memory, size_t bytes) {
    ++allocations;
    return __libc_realloc(memory, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
    ++allocations;
    return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** memory, size_t alignment, size_t bytes) {
    *memory = memalign(alignment, bytes);
    return *memory ? 0 : ENOMEM;
}
}
#else
constexpr bool kCountsMalloc = false;
#endif

// Not inline: the compiler would warn of a free of what only this program's operator new has made.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
    allocations += !kCountsMalloc;
    if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t alignment) {
    allocations += !kCountsMalloc;
    const auto unit = static_cast<size_t>(alignment);
    if (void* memory = std::aligned_alloc(unit, (bytes + unit) / unit * unit)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

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
    const auto counted = [](auto&& allocate) {
        const int64_t before = allocations;
        void* volatile memory = allocate();
        const bool seen = allocations > before;
        return std::pair(seen, memory);
    };
    const auto [plain, a] = counted([] { return ::operator new(8); });
    const auto [aligned, b] = counted([] { return ::operator new(64, std::align_val_t{64}); });
    const auto [low, c] = counted([] { return std::malloc(8); });
    const auto [low_aligned, d] = counted([] { return std::aligned_alloc(64, 64); });
    ::operator delete(a);
    ::operator delete(b, std::align_val_t{64});
    std::free(c);
    std::free(d);
    EXPECT_TRUE(plain && aligned);
    EXPECT_EQ(low && low_aligned, kCountsMalloc);
}

TEST(Allocation, ARefusalIsCounted) {
    DenseCall c;
    c.attention.num_threads = -1;
    const int64_t before = allocations;
    EXPECT_NE(strobe_attention_forward(&c.attention, &c.forward, nullptr), STROBE_OK);  // the text of the refusal
    EXPECT_GT(allocations, before);
}

}  // namespace
}  // namespace strobe
