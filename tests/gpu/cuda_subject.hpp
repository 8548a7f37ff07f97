// One implementation of the registry on a CUDA device, as the checker's subject.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/device.hpp"
#include "registry.hpp"
#include "verify/verify.hpp"

namespace strobe::gpu_tests {

/// Device memory. Poisoning, guard bands and comparison are the checker's.
class DeviceMemory : public verify::Memory {
public:
    void* allocate(size_t bytes) override {
        void* data = nullptr;
        cuda::check(cudaMalloc(&data, bytes), "cudaMalloc");
        return data;
    }
    void release(void* data) override { cudaFree(data); }
    void upload(void* to, const void* from, size_t bytes) override {
        cuda::check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "upload");
    }
    void download(void* to, const void* from, size_t bytes) override {
        cuda::check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "download");
    }
};

inline const Implementation& implementation_named(const std::string& name) {
    for (const Implementation& i : implementations()) {
        if (i.device_type == STROBE_CUDA && name == i.name) return i;
    }
    throw std::runtime_error("this build has no CUDA implementation named " + name);
}

class CudaSubject : public verify::Subject {
public:
    explicit CudaSubject(const Implementation& implementation) : implementation_(implementation) {
        cuda::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    }
    ~CudaSubject() override { cudaStreamDestroy(stream_); }
    CudaSubject(const CudaSubject&) = delete;
    CudaSubject& operator=(const CudaSubject&) = delete;

    verify::Memory& memory() override { return memory_; }

    void forward(const verify::CaseData& data, const verify::Placement& placement) override {
        ForwardParams p = verify::forward_params(data, placement);
        const Execution e = execution();
        if (const std::string why = implementation_.forward_refusal(p, e); !why.empty()) throw verify::Unsupported(why);
        run(p, implementation_.forward_workspace(p, e), implementation_.forward);
    }
    void backward(const verify::CaseData& data, const verify::Placement& placement) override {
        BackwardParams p = verify::backward_params(data, placement);
        const Execution e = execution();
        if (const std::string why = implementation_.backward_refusal(p, e); !why.empty()) throw verify::Unsupported(why);
        run(p, implementation_.backward_workspace(p, e), implementation_.backward);
    }

private:
    Execution execution() const { return {.stream = stream_, .device_index = 0}; }

    template <class Params>
    void run(Params& p, size_t workspace_bytes, void (*launch)(const Params&, const Execution&)) {
        verify::GuardedWorkspace workspace(memory_, workspace_bytes);
        p.workspace = workspace.data();
        launch(p, execution());
        cuda::check(cudaStreamSynchronize(stream_), "run");
        workspace.check();
    }

    const Implementation& implementation_;
    DeviceMemory memory_;
    cudaStream_t stream_ = nullptr;
};

}  // namespace strobe::gpu_tests
