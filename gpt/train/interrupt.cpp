#include "gpt/train/interrupt.hpp"

#include <csignal>

namespace strobe::gpt {

namespace {

volatile std::sig_atomic_t g_requested = 0;
struct sigaction g_old_interrupt, g_old_terminate;

void on_signal(int) { g_requested = 1; }

}  // namespace

InterruptGuard::InterruptGuard() {
    g_requested = 0;
    struct sigaction action {};
    action.sa_handler = on_signal;
    // Reset on delivery: the second signal has its default effect.
    action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
    sigaction(SIGINT, &action, &g_old_interrupt);
    sigaction(SIGTERM, &action, &g_old_terminate);
}

InterruptGuard::~InterruptGuard() {
    sigaction(SIGINT, &g_old_interrupt, nullptr);
    sigaction(SIGTERM, &g_old_terminate, nullptr);
}

bool InterruptGuard::requested() { return g_requested != 0; }

}  // namespace strobe::gpt
