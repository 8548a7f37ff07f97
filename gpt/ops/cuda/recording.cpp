#include "gpt/ops/cuda/recording.hpp"

#include "gpt/ops/cuda/handles.hpp"

namespace strobe::gpt::cuda {

namespace {

using Graph = std::unique_ptr<CUgraph_st, Destroyer<cudaGraphDestroy>>;
using ExecutableGraph = std::unique_ptr<CUgraphExec_st, Destroyer<cudaGraphExecDestroy>>;

ExecutableGraph executable(const Graph& graph) {
    cudaGraphExec_t executable = nullptr;
    // Of work on several streams: those that went first go first.
    check(cudaGraphInstantiate(&executable, graph.get(), cudaGraphInstantiateFlagUseNodePriority),
          "cudaGraphInstantiate");
    return ExecutableGraph(executable);
}

class GraphRecording final : public Recording {
public:
    GraphRecording(const Graph& graph, cudaStream_t stream) : executable_(executable(graph)), stream_(stream) {
        check(cudaGraphUpload(executable_.get(), stream), "cudaGraphUpload");
    }
    ~GraphRecording() override { cudaStreamSynchronize(stream_); }
    GraphRecording(const GraphRecording&) = delete;
    GraphRecording& operator=(const GraphRecording&) = delete;

    void replay() override { check(cudaGraphLaunch(executable_.get(), stream_), "cudaGraphLaunch"); }

private:
    ExecutableGraph executable_;
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
