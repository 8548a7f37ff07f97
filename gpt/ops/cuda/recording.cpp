#include "gpt/ops/cuda/recording.hpp"

#include <cuda_runtime.h>

#include "cuda/device.hpp"

namespace strobe::gpt::cuda {

namespace {

using strobe::cuda::check;

struct GraphDeleter {
    void operator()(cudaGraph_t g) const { cudaGraphDestroy(g); }
};
using Graph = std::unique_ptr<CUgraph_st, GraphDeleter>;

class GraphRecording final : public Recording {
public:
    GraphRecording(const Graph& graph, cudaStream_t stream) : stream_(stream) {
        // Of work on several streams: those that went first go first.
        check(cudaGraphInstantiate(&executable_, graph.get(), cudaGraphInstantiateFlagUseNodePriority), "cudaGraphInstantiate");
        check(cudaGraphUpload(executable_, stream), "cudaGraphUpload");
    }
    ~GraphRecording() override {
        cudaStreamSynchronize(stream_);
        cudaGraphExecDestroy(executable_);
    }
    GraphRecording(const GraphRecording&) = delete;
    GraphRecording& operator=(const GraphRecording&) = delete;

    void replay() override { check(cudaGraphLaunch(executable_, stream_), "cudaGraphLaunch"); }

private:
    cudaGraphExec_t executable_ = nullptr;
    cudaStream_t stream_;
};

}  // namespace

std::unique_ptr<Recording> record(void* stream, const std::function<void()>& enqueue) {
    const auto s = static_cast<cudaStream_t>(stream);
    check(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    cudaGraph_t captured = nullptr;
    try {
        enqueue();
    } catch (...) {
        // The capture must end whatever happened; its own error would hide the first.
        cudaStreamEndCapture(s, &captured);
        if (captured) cudaGraphDestroy(captured);
        cudaGetLastError();
        throw;
    }
    check(cudaStreamEndCapture(s, &captured), "cudaStreamEndCapture");
    return std::make_unique<GraphRecording>(Graph(captured), s);
}

}  // namespace strobe::gpt::cuda
