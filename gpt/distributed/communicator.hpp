// Collective work of a run's processes on numbers that lie where their operators run.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "gpt/backend.hpp"
#include "gpt/distributed/process_group.hpp"

namespace strobe::gpt {

/// How much of the device a collective may take. calm: operators go on beside it for long, and keep most of the device; swift:
/// operators wait for it.
enum class Pace { calm, swift };

/// Calls return at once. What they ask for is done in their order, begins when all that operators were asked to do before is
/// done, and goes on beside what operators are asked to do then, up to join(). All processes make the same calls.
class Communicator {
public:
    virtual ~Communicator() = default;

    /// `data` is as many pieces of `piece` numbers as there are processes. A process's own piece becomes the sum of all
    /// processes' numbers there; the others are undefined.
    virtual void reduce_scatter(float* data, int64_t piece, Pace pace) = 0;
    /// Each process's own piece comes to all the others.
    virtual void all_gather(Buffer data, int64_t piece) = 0;
    /// Each number becomes the sum over the processes, the same bits on all.
    virtual void all_reduce(double* data, int64_t count) = 0;

    /// What `calls` asks of this object is started at once: many small collectives cost no more than a large one.
    virtual void as_one(const std::function<void()>& calls) { calls(); }

    /// What operators are asked to do from here on begins behind everything asked of this object. Throws ConnectionError.
    virtual void join() = 0;

    virtual std::string name() const = 0;
};

/// Over connections between all pairs of processes, in a thread of its own: for the CPU's memory.
std::unique_ptr<Communicator> make_socket_communicator(ProcessGroup& group);

namespace cuda {

/// Which GPU the backend that is made next will use: one per process of a machine. Throws std::invalid_argument where there
/// are too few, or where two processes would share one.
void choose_gpu(ProcessGroup& group);

/// Over NCCL, whose library is looked for now. Throws std::invalid_argument where it is not found.
std::unique_ptr<Communicator> make_nccl_communicator(ProcessGroup& group, Exec& exec);

}  // namespace cuda

/// That of the backend's device.
std::unique_ptr<Communicator> make_communicator(ProcessGroup& group, Backend& backend);

}  // namespace strobe::gpt
