#include "emulation.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly"
#endif

// Saves what the calling convention keeps on the current stack, stores that stack's place, and goes on on another one.
extern "C" void strobe_switch_stack(void** from, void* to);
asm(R"(
.text
.globl strobe_switch_stack
.type strobe_switch_stack, @function
strobe_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size strobe_switch_stack, .-strobe_switch_stack
)");

namespace emulation {

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kWarp = 32, kBarriers = 16;

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
    std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
    void* place = nullptr;
    State state = State::ready;
    unsigned barrier = 0, expected = 0;  // where it waits, with how many; all of the block at barrier 0
    dim3 thread;
    uint64_t values[2] = {};  // of this shuffle and the one before it
    unsigned turn = 0;
};

std::vector<Fiber> fibers;
Fiber* current = nullptr;
void* scheduler = nullptr;
const std::function<void()>* body = nullptr;
std::vector<std::max_align_t> shared;

void give_way(State state) {
    current->state = state;
    strobe_switch_stack(&current->place, scheduler);
}

void enter() {
    (*body)();
    give_way(State::done);
    std::abort();
}

void prepare(Fiber& fiber) {
    // The stack as strobe_switch_stack leaves it: six registers, the return address; 16-byte alignment as behind a
    // call.
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
    auto* words = reinterpret_cast<void**>(top) - 2;
    *words = reinterpret_cast<void*>(enter);
    words -= 6;
    for (int i = 0; i < 6; ++i) words[i] = nullptr;
    fiber.place = words;
    fiber.state = State::ready;
    fiber.turn = 0;
}

void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.thread;
    strobe_switch_stack(&scheduler, fiber.place);
}

/// Lets a warp go on until its threads are done or wait for other warps.
void run_warp(Fiber* first, unsigned lanes) {
    for (;;) {
        bool shuffles = false, waits = false;
        for (unsigned i = 0; i < lanes; ++i) {
            if (first[i].state == State::ready) resume(first[i]);
            shuffles |= first[i].state == State::at_shuffle;
            waits |= first[i].state == State::at_barrier;
        }
        if (!shuffles) return;
        bool all = true;
        for (unsigned i = 0; i < lanes; ++i) all &= first[i].state == State::at_shuffle;
        if (!all || waits) throw std::logic_error("emulation: a shuffle that not the whole warp reaches");
        for (unsigned i = 0; i < lanes; ++i) first[i].state = State::ready;
    }
}

void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) prepare(fibers[t]);
    for (;;) {
        for (unsigned t = 0; t < threads; t += kWarp) run_warp(&fibers[t], std::min(kWarp, threads - t));
        unsigned waiting[kBarriers] = {}, done = 0;
        for (unsigned t = 0; t < threads; ++t) {
            if (fibers[t].state == State::at_barrier) ++waiting[fibers[t].barrier];
            done += fibers[t].state == State::done;
        }
        if (done == threads) return;
        bool some = false;
        for (unsigned t = 0; t < threads; ++t) {
            Fiber& fiber = fibers[t];
            const unsigned expected = fiber.barrier == 0 ? threads - done : fiber.expected;
            if (fiber.state != State::at_barrier || waiting[fiber.barrier] != expected) continue;
            fiber.state = State::ready;
            some = true;
        }
        if (!some) throw std::logic_error("emulation: threads that can never go on");
    }
}

}  // namespace

void barrier() { barrier(0, 0); }

void barrier(unsigned number, unsigned threads) {
    if (number >= kBarriers) throw std::logic_error("emulation: a block has 16 barriers");
    current->barrier = number;
    current->expected = threads;
    give_way(State::at_barrier);
}

uint64_t shuffle_xor(uint64_t value, int mask) {
    // When a lane goes on, all have written; it writes the other slot next, so nobody's is overwritten before it is
    // read.
    Fiber& mine = *current;
    const unsigned turn = mine.turn;
    mine.values[turn] = value;
    mine.turn ^= 1;
    give_way(State::at_shuffle);
    const auto index = static_cast<unsigned>(&mine - fibers.data());
    return fibers[index / kWarp * kWarp + ((index % kWarp) ^ static_cast<unsigned>(mask))].values[turn];
}

void* dynamic_shared() { return shared.data(); }

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
    const unsigned threads = block.x * block.y * block.z;
    if (block.y != 1 || block.z != 1 || threads > 1024) {
        throw std::logic_error("emulation: blocks are rows of at most 1024 threads");
    }
    while (fibers.size() < threads) fibers.emplace_back();
    for (unsigned t = 0; t < threads; ++t) fibers[t].thread = dim3(t);
    shared.assign(shared_bytes / sizeof(std::max_align_t) + 1, {});
    body = &thread;
    blockDim = block;
    gridDim = grid;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
}

}  // namespace emulation
