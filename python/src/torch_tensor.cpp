#include "torch_tensor.hpp"

namespace strobe::torch_ops {
namespace {

struct DtypeName {
    int32_t torch;
    int32_t strobe;  // -1: none
    const char* name;
};

constexpr size_t kNumDtypes = 8;

const std::array<DtypeName, kNumDtypes>& dtypes() {
    static const std::array<DtypeName, kNumDtypes> table{{{aoti_torch_dtype_bfloat16(), STROBE_BF16, "bfloat16"},
                                                          {aoti_torch_dtype_float16(), STROBE_F16, "float16"},
                                                          {aoti_torch_dtype_float32(), STROBE_F32, "float32"},
                                                          {aoti_torch_dtype_int32(), STROBE_I32, "int32"},
                                                          {aoti_torch_dtype_uint8(), STROBE_U8, "uint8"},
                                                          {aoti_torch_dtype_float64(), -1, "float64"},
                                                          {aoti_torch_dtype_int64(), -1, "int64"},
                                                          {aoti_torch_dtype_bool(), -1, "bool"}}};
    return table;
}

int32_t strobe_dtype(const char* name, int32_t torch) {
    const char* given = "of another kind";
    for (const DtypeName& d : dtypes()) {
        if (d.torch != torch) continue;
        if (d.strobe >= 0) return d.strobe;
        given = d.name;
    }
    throw std::invalid_argument(std::string(name) + ": dtype is " + given +
                                "; strobe takes float32, bfloat16 and float16 for values and int32 for indices");
}

}  // namespace

Device Tensor::device() const {
    Device d;
    check_torch(aoti_torch_get_device_type(handle_, &d.type), "the device of a tensor");
    check_torch(aoti_torch_get_device_index(handle_, &d.index), "the device of a tensor");
    return d;
}

int32_t Tensor::dtype() const {
    int32_t dtype = 0;
    check_torch(aoti_torch_get_dtype(handle_, &dtype), "the dtype of a tensor");
    return dtype;
}

void* Tensor::data() const {
    void* data = nullptr;
    check_torch(aoti_torch_get_data_ptr(handle_, &data), "the memory of a tensor");
    return data;
}

std::span<const int64_t> Tensor::shape() const {
    int64_t dim = 0, *sizes = nullptr;
    check_torch(aoti_torch_get_dim(handle_, &dim), "the shape of a tensor");
    check_torch(aoti_torch_get_sizes(handle_, &sizes), "the shape of a tensor");
    return {sizes, static_cast<size_t>(dim)};
}

std::span<const int64_t> Tensor::strides() const {
    int64_t dim = 0, *strides = nullptr;
    check_torch(aoti_torch_get_dim(handle_, &dim), "the strides of a tensor");
    check_torch(aoti_torch_get_strides(handle_, &strides), "the strides of a tensor");
    return {strides, static_cast<size_t>(dim)};
}

Tensor empty(std::span<const int64_t> shape, int32_t dtype, Device device) {
    std::array<int64_t, STROBE_MAX_DIMS> strides{};
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= shape[i] > 0 ? shape[i] : 1;
    }
    return empty_strided(shape, strides, dtype, device);
}

Tensor empty_strided(std::span<const int64_t> shape, std::span<const int64_t> strides, int32_t dtype, Device device) {
    AtenTensorHandle handle = nullptr;
    check_torch(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, device.type,
                                         device.index, &handle),
                "to allocate a tensor");
    return Tensor(handle);
}

Tensor with_unit_stride(Tensor tensor) {
    const auto shape = tensor.shape(), strides = tensor.strides();
    if (shape.empty() || shape.size() > STROBE_MAX_DIMS || shape.back() <= 1 || strides.back() == 1) return tensor;
    Tensor copy = empty(shape, tensor.dtype(), tensor.device());
    check_torch(aoti_torch_copy_(copy.get(), tensor.get(), 1), "to copy a tensor");
    return copy;
}

strobe_tensor view(const char* name, const Tensor& tensor) {
    strobe_tensor v{};
    if (!tensor) return v;
    const auto shape = tensor.shape(), strides = tensor.strides();
    if (shape.empty() || shape.size() > STROBE_MAX_DIMS) {
        throw std::invalid_argument(std::string(name) + ": has " + std::to_string(shape.size()) +
                                    " dimensions; every tensor of a call has from 1 to " + std::to_string(STROBE_MAX_DIMS));
    }
    const Device device = tensor.device();
    const bool is_cuda = device.is_cuda();
    v.data = tensor.data();
    v.dtype = strobe_dtype(name, tensor.dtype());
    v.device_type = is_cuda ? STROBE_CUDA : STROBE_CPU;
    v.device_index = is_cuda ? device.index : 0;
    v.ndim = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) {
        v.shape[i] = shape[i];
        v.strides[i] = strides[i];
    }
    return v;
}

}  // namespace strobe::torch_ops
