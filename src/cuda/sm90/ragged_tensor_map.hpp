// Tensor maps that end exactly where a sequence ends, wherever it lies in memory: rows past the end read as zero.
//
// The row axis appears twice. Axis 1 has `limit` rows (an upper bound on any sequence) and axis 3 shifts
// by whole rows; the base address is moved back by `limit` rows. A sequence of `length` rows that starts
// at row `first` is addressed with axis 1 = limit - length + row and axis 3 = first + length: the rows
// add up to first + row, and the hardware's bounds check on axis 1 ends the sequence. One map serves
// fixed length, seqused and cu_seqlens; NaN in a neighbour is never loaded.
//
// A box must hold at least one element of the tensor. For one that lies outside
// altogether the copy engine looks at an address near the base, which is moved back and
// may be nobody's memory: an illegal address now and then, depending on the neighbours.
#pragma once

#include "cuda/common/tensor_map.hpp"

namespace strobe::cuda {

struct RaggedExtents {
    int64_t dim = 0;
    int64_t limit = 0;  // rows of the longest sequence
    int64_t heads = 0;
    int64_t total = 0;  // rows from the first sequence's start to the last one's end, within one batch entry
    int64_t batch = 0;  // 1 with cu_seqlens
};

inline cudaError_t make_ragged_tensor_map(CUtensorMap& map, const TensorRef& tensor, DType dtype,
                                          const RaggedExtents& e, int box_rows) {
    const detail::EncodeTiled encode = detail::encode_tiled();
    if (!encode) return cudaErrorSymbolNotFound;
    constexpr int64_t kElement = 2;
    constexpr cuuint32_t kBoxCols = 64;
    const auto extent = [](int64_t n) { return static_cast<cuuint64_t>(n > 0 ? n : 1); };
    const auto stride = [](int64_t elements, int64_t n) {
        return static_cast<cuuint64_t>(n > 1 ? elements * kElement : 16);
    };
    const cuuint64_t sizes[5] = {extent(e.dim), extent(e.limit), extent(e.heads), extent(e.total + 1), extent(e.batch)};
    // A single row is never stepped from; its stride need not be one that TMA accepts.
    const int64_t row_stride = e.limit > 1 || e.total > 1 ? tensor.row_stride : 16 / kElement;
    const cuuint64_t row_bytes = static_cast<cuuint64_t>(row_stride * kElement);
    const cuuint64_t strides[4] = {row_bytes, stride(tensor.head_stride, e.heads), row_bytes,
                                   stride(tensor.batch_stride, e.batch)};
    const cuuint32_t box[5] = {kBoxCols, static_cast<cuuint32_t>(box_rows), 1, 1, 1};
    const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
    char* const base = static_cast<char*>(tensor.data) - e.limit * row_stride * kElement;
    const CUresult result = encode(&map, detail::data_type(dtype), 5, base, sizes, strides, box, element_strides,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace strobe::cuda
