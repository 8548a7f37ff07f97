// TMA tensor maps of (batch, rows, heads, dim) tensors. A map is encoded on the host for every launch and travels to
// the kernel by value as a __grid_constant__ parameter. The encoder comes from the driver at run time, so that nothing
// links against libcuda and a binary still starts on a machine without a driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/params.hpp"

namespace strobe::cuda {

/// Bytes of one row of a box in shared memory, which is also the swizzle span: 128-byte rows conflict least.
enum class Swizzle : int { b32 = 32, b64 = 64, b128 = 128 };

/// A box of a (dim, rows, heads, batch) tensor: `rows` x `cols` elements of one head of one batch entry.
/// cols * element size must equal the swizzle span; rows <= 256.
struct TensorBox {
    int rows = 0;
    int cols = 0;
    Swizzle swizzle = Swizzle::b128;
};

namespace detail {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(entry)
                                                                             : nullptr;
    }();
    return function;
}

inline CUtensorMapDataType data_type(DType dtype) {
    switch (dtype) {
        case DType::bf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case DType::f16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        default: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    }
}

inline CUtensorMapSwizzle swizzle_mode(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::b32: return CU_TENSOR_MAP_SWIZZLE_32B;
        case Swizzle::b64: return CU_TENSOR_MAP_SWIZZLE_64B;
        default: return CU_TENSOR_MAP_SWIZZLE_128B;
    }
}

}  // namespace detail

/// Encodes `tensor`, of `batch` x `rows` x `heads` x `dim` elements, with coordinates (dim, row, head, batch). Varlen
/// tensors have batch = 1 and rows = total. Reads outside the tensor give zero, so a box may overhang `rows` and `dim`;
/// stores outside it are dropped. TMA's own conditions: 16-byte aligned address and strides.
inline cudaError_t make_tensor_map(CUtensorMap& map, const TensorRef& tensor, DType dtype, int64_t batch, int64_t rows,
                                   int64_t heads, int64_t dim, const TensorBox& box) {
    const detail::EncodeTiled encode = detail::encode_tiled();
    if (!encode) return cudaErrorSymbolNotFound;
    const int64_t element = dtype == DType::f32 ? 4 : 2;

    // A dimension of one element is never stepped along; give it a stride that TMA accepts.
    const auto stride_bytes = [&](int64_t stride, int64_t extent) {
        return static_cast<cuuint64_t>(extent > 1 ? stride * element : 16);
    };
    const auto extent = [](int64_t n) { return static_cast<cuuint64_t>(n > 0 ? n : 1); };
    const cuuint64_t sizes[4] = {extent(dim), extent(rows), extent(heads), extent(batch)};
    const cuuint64_t strides[3] = {stride_bytes(tensor.row_stride, rows), stride_bytes(tensor.head_stride, heads),
                                   stride_bytes(tensor.batch_stride, batch)};
    const cuuint32_t box_size[4] = {static_cast<cuuint32_t>(box.cols), static_cast<cuuint32_t>(box.rows), 1, 1};
    const cuuint32_t element_strides[4] = {1, 1, 1, 1};
    const CUresult result =
        encode(&map, detail::data_type(dtype), 4, tensor.data, sizes, strides, box_size, element_strides,
               CU_TENSOR_MAP_INTERLEAVE_NONE, detail::swizzle_mode(box.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace strobe::cuda
