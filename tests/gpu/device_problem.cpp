#include "device_problem.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "cuda/device.hpp"

namespace strobe::gpu_tests {

using cuda::check;

DeviceBuffer::DeviceBuffer(size_t bytes) : bytes_(bytes) { check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)), "cudaMalloc"); }
DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }
DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Stream::Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
Stream::~Stream() { cudaStreamDestroy(stream_); }
void Stream::wait() const { check(cudaStreamSynchronize(stream_), "waiting for a stream"); }

namespace {

std::vector<DeviceBuffer> upload(const verify::CaseData& data) {
    std::vector<DeviceBuffer> buffers;
    for (const verify::Buffer& b : data.buffers) {
        const std::vector<std::byte> image = verify::encode(b, false);
        buffers.emplace_back(image.size());
        check(cudaMemcpy(buffers.back().data(), image.data(), image.size(), cudaMemcpyHostToDevice), "copy to the device");
    }
    // A copy from pageable memory may return before it has landed, and streams that do not block are not ordered behind it.
    check(cudaStreamSynchronize(cudaStreamLegacy), "copy to the device");
    return buffers;
}

verify::Placement placement_of(const std::vector<DeviceBuffer>& buffers) {
    verify::Placement placement;
    for (const DeviceBuffer& b : buffers) placement.buffers.push_back(b.data());
    return placement;
}

verify::PublicCall call_on_device(const verify::CaseData& data, const verify::Placement& placement, const std::string& wanted) {
    verify::PublicCall call = verify::public_call(data, placement, {DeviceType::cuda, 0});
    call.attention.implementation = wanted.empty() ? nullptr : wanted.c_str();
    return call;
}

}  // namespace

DeviceProblem::DeviceProblem(const verify::Case& c, const std::string& implementation)
    : data_(c),
      wanted_(implementation),
      buffers_(upload(data_)),
      placement_(placement_of(buffers_)),
      call_(call_on_device(data_, placement_, wanted_)),
      forward_workspace_(plan(call_.attention, call_.forward).workspace_bytes),
      backward_workspace_(plan(call_.attention, call_.backward).workspace_bytes) {
    implementation_ = plan(call_.attention, call_.forward).implementation + " / " + plan(call_.attention, call_.backward).implementation;
    call_.forward.workspace = {forward_workspace_.data(), forward_workspace_.bytes()};
    call_.backward.workspace = {backward_workspace_.data(), backward_workspace_.bytes()};
}

void DeviceProblem::run(cudaStream_t stream) const {
    forward(call_.attention, call_.forward, stream);
    backward(call_.attention, call_.backward, stream);
}

void DeviceProblem::poison(cudaStream_t stream) const {
    for (const verify::View* view : {&data_.out, &data_.lse, &data_.dq, &data_.dk, &data_.dv}) {
        check(cudaMemsetAsync(buffer(*view).data(), 0xFF, buffer(*view).bytes(), stream), "poison");
    }
    for (const DeviceBuffer* workspace : {&forward_workspace_, &backward_workspace_}) {
        if (workspace->bytes() > 0) check(cudaMemsetAsync(workspace->data(), 0xFF, workspace->bytes(), stream), "poison");
    }
}

DeviceProblem::Snapshot DeviceProblem::snapshot(cudaStream_t stream) const {
    check(cudaStreamSynchronize(stream), "waiting for a stream");
    Snapshot s;
    std::vector<std::pair<const char*, const verify::View*>> outputs{
        {"out", &data_.out}, {"lse", &data_.lse}, {"dk", &data_.dk}, {"dv", &data_.dv}};
    if (data_.spec.deterministic) outputs.emplace_back("dq", &data_.dq);
    for (const auto& [name, view] : outputs) {
        std::vector<std::byte> bytes(buffer(*view).bytes());
        check(cudaMemcpyAsync(bytes.data(), buffer(*view).data(), bytes.size(), cudaMemcpyDeviceToHost, stream), "copy from the device");
        s.outputs.emplace_back(name, std::move(bytes));
    }
    check(cudaStreamSynchronize(stream), "waiting for a stream");
    return s;
}

std::string difference(const DeviceProblem::Snapshot& a, const DeviceProblem::Snapshot& b) {
    std::string names;
    for (size_t n = 0; n < a.outputs.size(); ++n) {
        const auto& [name, before] = a.outputs[n];
        const std::vector<std::byte>& now = b.outputs[n].second;
        size_t different = 0, first = 0;
        for (size_t i = before.size(); i-- > 0;) {
            if (before[i] != now[i]) ++different, first = i;
        }
        if (different == 0) continue;
        names += fmt::format("{}{} ({} of {} bytes, the first is {})", names.empty() ? "" : ", ", name, different, before.size(), first);
    }
    return names;
}

}  // namespace strobe::gpu_tests
