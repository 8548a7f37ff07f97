// Ctrl-C as a request: the loop ends the step at hand, saves and leaves. A second one ends the process at once.
#pragma once

namespace strobe::gpt {

/// Takes SIGINT and SIGTERM while it lives. One at a time.
class InterruptGuard {
public:
    InterruptGuard();
    ~InterruptGuard();
    InterruptGuard(const InterruptGuard&) = delete;
    InterruptGuard& operator=(const InterruptGuard&) = delete;

    /// True once a signal has come.
    static bool requested();
};

}  // namespace strobe::gpt
