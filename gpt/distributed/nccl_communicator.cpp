#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <fmt/core.h>

#include "cuda/device.hpp"
#include "gpt/distributed/communicator.hpp"
#include "gpt/distributed/nccl_api.hpp"

namespace strobe::gpt::cuda {

namespace {

using strobe::cuda::check;

// Multiprocessors that collectives take beside the backward. NCCL's own choice takes many more for a shorter while,
// which cost products more time: those that fill all multiprocessors wait for a whole round more.
constexpr int kCalmCtas = 8;

class NcclCommunicator final : public Communicator {
public:
    NcclCommunicator(ProcessGroup& group, cudaStream_t operators) : rank_(group.rank()), operators_(operators) {
        // Its kernels are few and others wait for them: they go first where both want a multiprocessor.
        int least = 0, greatest = 0;
        check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
        check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
        for (cudaEvent_t* event : {&asked_, &done_}) {
            check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreate");
        }
        NcclId id{};
        if (group.leads()) nccl_.check(nccl_.ncclGetUniqueId(&id), "ncclGetUniqueId");
        const std::string shared = group.from_leader({id.bytes, sizeof id.bytes});
        if (shared.size() != sizeof id.bytes) throw std::logic_error("rank 0 sent no NCCL id");
        std::memcpy(id.bytes, shared.data(), sizeof id.bytes);
        nccl_.check(nccl_.ncclCommInitRank(&comm_, group.size(), id, group.rank()), "ncclCommInitRank");
        NcclConfig calm;
        calm.max_ctas = kCalmCtas;
        nccl_.check(nccl_.ncclCommSplit(comm_, 0, group.rank(), &calm_, &calm), "ncclCommSplit", comm_);
    }
    // Behind an error the others may not answer any more.
    ~NcclCommunicator() override {
        for (const NcclComm comm : {calm_, comm_}) {
            std::uncaught_exceptions() > 0 ? nccl_.ncclCommAbort(comm) : nccl_.ncclCommDestroy(comm);
        }
        cudaEventDestroy(asked_);
        cudaEventDestroy(done_);
        cudaStreamDestroy(stream_);
    }

    void reduce_scatter(float* data, int64_t piece, Pace pace) override {
        follow_operators();
        const NcclComm comm = pace == Pace::calm ? calm_ : comm_;
        nccl_.check(nccl_.ncclReduceScatter(data, data + rank_ * piece, static_cast<size_t>(piece), NcclType::float32, NcclOp::sum, comm, stream_),
                    "ncclReduceScatter", comm);
    }
    void all_gather(Buffer data, int64_t piece) override {
        follow_operators();
        const NcclType type = data.precision == Precision::fp32 ? NcclType::float32 : NcclType::bfloat16;
        nccl_.check(nccl_.ncclAllGather(data.offset(rank_ * piece).data, data.data, static_cast<size_t>(piece), type, comm_, stream_),
                    "ncclAllGather", comm_);
    }
    void all_reduce(double* data, int64_t count) override {
        follow_operators();
        nccl_.check(nccl_.ncclAllReduce(data, data, static_cast<size_t>(count), NcclType::float64, NcclOp::sum, comm_, stream_),
                    "ncclAllReduce", comm_);
    }
    void as_one(const std::function<void()>& calls) override {
        nccl_.check(nccl_.ncclGroupStart(), "ncclGroupStart");
        try {
            calls();
        } catch (...) {
            nccl_.ncclGroupEnd();  // in an open group ncclCommAbort would wait for its end
            throw;
        }
        nccl_.check(nccl_.ncclGroupEnd(), "ncclGroupEnd", comm_);
    }
    void join() override {
        check(cudaEventRecord(done_, stream_), "cudaEventRecord");
        check(cudaStreamWaitEvent(operators_, done_), "cudaStreamWaitEvent");
    }
    std::string name() const override { return "NCCL " + nccl_.version(); }

private:
    void follow_operators() {
        check(cudaEventRecord(asked_, operators_), "cudaEventRecord");
        check(cudaStreamWaitEvent(stream_, asked_), "cudaStreamWaitEvent");
    }

    NcclLibrary nccl_;
    int rank_;
    cudaStream_t operators_, stream_ = nullptr;
    cudaEvent_t asked_ = nullptr, done_ = nullptr;
    NcclComm comm_ = nullptr, calm_ = nullptr;  // of the same processes; calls of both come one after the other, in one stream
};

}  // namespace

void choose_gpu(ProcessGroup& group) {
    std::string reason;
    const int count = strobe::cuda::device_count(&reason);
    if (count == 0) throw std::invalid_argument("device cuda: " + reason);
    // A launcher may show each process a GPU of its own alone.
    const int local_rank = group.launch().local_rank, index = count == 1 ? 0 : local_rank;
    if (index >= count)
        throw std::invalid_argument(fmt::format("device cuda: {} processes on this machine, each with a GPU of its own, but there are {} GPUs",
                                                group.launch().local_size, count));
    check(cudaSetDevice(index), "cudaSetDevice");
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    const std::vector<std::string> all = group.exchange({properties.uuid.bytes, sizeof properties.uuid.bytes});
    for (size_t a = 0; a < all.size(); ++a)
        for (size_t b = a + 1; b < all.size(); ++b)
            if (all[a] == all[b])
                throw std::invalid_argument(fmt::format("device cuda: ranks {} and {} have the same GPU; start one process per GPU", a, b));
}

std::unique_ptr<Communicator> make_nccl_communicator(ProcessGroup& group, Exec& exec) {
    return std::make_unique<NcclCommunicator>(group, static_cast<cudaStream_t>(exec.stream));
}

}  // namespace strobe::gpt::cuda
