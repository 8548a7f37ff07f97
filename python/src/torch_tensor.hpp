// Tensors of torch as owned handles, and as the views that strobe's C ABI takes.
#pragma once

#include <array>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "strobe/strobe.h"
#include "torch_abi.h"

namespace strobe::torch_ops {

/// Python sees std::invalid_argument as ValueError, std::runtime_error as RuntimeError.
inline void check_torch(AOTITorchError error, const char* what) {
    if (error != 0) throw std::runtime_error(std::string("torch refused: ") + what);
}

inline void check_strobe(strobe_status status) {
    if (status == STROBE_OK) return;
    if (status == STROBE_INVALID_ARGUMENT) throw std::invalid_argument(strobe_last_error());
    throw std::runtime_error(strobe_last_error());
}

struct Device {
    int32_t type = 0;   // torch's number
    int32_t index = 0;  // torch's number: -1 on the CPU
    bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
};

/// Owns one reference; empty where an optional argument was not given.
class Tensor {
public:
    Tensor() = default;
    explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
    Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_) aoti_torch_delete_tensor_object(handle_);
    }

    explicit operator bool() const { return handle_ != nullptr; }
    AtenTensorHandle get() const { return handle_; }
    AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

    Device device() const;
    int32_t dtype() const;  // torch's number
    void* data() const;
    std::span<const int64_t> shape() const;
    std::span<const int64_t> strides() const;

private:
    AtenTensorHandle handle_ = nullptr;
};

/// A new dense row-major tensor; `dtype` is torch's number.
Tensor empty(std::span<const int64_t> shape, int32_t dtype, Device device);
Tensor empty_strided(std::span<const int64_t> shape, std::span<const int64_t> strides, int32_t dtype, Device device);

/// `tensor` itself if its last stride is 1, else a dense copy. Gradients arrive expanded or transposed.
Tensor with_unit_stride(Tensor tensor);

/// The view of a tensor; not given where it is empty. Refuses dtypes and dimensions that strobe has no name for.
strobe_tensor view(const char* name, const Tensor& tensor);

}  // namespace strobe::torch_ops
