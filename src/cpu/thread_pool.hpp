// Worker threads shared by all calls of the process. A call never waits for a worker to become free: it starts on its
// own thread at once, and idle workers join it while it runs. So calls from several threads at once, or with more
// threads than cores, cannot block one another.
#pragma once

namespace strobe::cpu {

/// Runs body(context, worker) on the calling thread (worker 0) and on up to threads - 1 others (workers 1, 2, ...), each
/// at most once, and returns when all that started have returned. How many start is not defined: the bodies share their
/// work through a counter in the context.
void run_on_threads(int threads, void (*body)(void* context, int worker), void* context);

}  // namespace strobe::cpu
