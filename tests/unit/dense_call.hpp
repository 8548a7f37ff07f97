// A small dense call of the C ABI with memory of its own, sound until a test changes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "strobe/strobe.h"

namespace strobe {

struct DenseCall {
    static constexpr int64_t kBatch = 2, kSeqlenQ = 5, kSeqlenK = 7, kHeads = 4, kHeadsK = 2, kDim = 8, kDimV = 6;

    DenseCall() {
        strobe_attention_init(&attention);
        strobe_forward_init(&forward);
        strobe_backward_init(&backward);
        attention.q = tensor({kBatch, kSeqlenQ, kHeads, kDim});
        attention.k = tensor({kBatch, kSeqlenK, kHeadsK, kDim});
        attention.v = tensor({kBatch, kSeqlenK, kHeadsK, kDimV});
        forward.out = backward.out = tensor({kBatch, kSeqlenQ, kHeads, kDimV});
        forward.lse = backward.lse = tensor({kBatch, kHeads, kSeqlenQ});
        backward.dout = tensor({kBatch, kSeqlenQ, kHeads, kDimV});
        backward.dq = tensor({kBatch, kSeqlenQ, kHeads, kDim});
        backward.dk = tensor({kBatch, kSeqlenK, kHeadsK, kDim});
        backward.dv = tensor({kBatch, kSeqlenK, kHeadsK, kDimV});
        provide_workspace();
    }
    DenseCall(const DenseCall&) = delete;
    DenseCall& operator=(const DenseCall&) = delete;

    /// Enough for whatever this call can be changed into.
    void provide_workspace() {
        workspace_.resize(1 << 22);
        forward.workspace = backward.workspace = workspace_.data();
        forward.workspace_bytes = backward.workspace_bytes = workspace_.size();
    }

    strobe_tensor tensor(std::vector<int64_t> shape, strobe_dtype dtype = STROBE_F32) {
        int64_t count = 1;
        for (int64_t extent : shape) count *= extent;
        memory_.push_back(std::vector<float>(static_cast<size_t>(count) + 16, 0.25f));
        return strobe_tensor_dense(memory_.back().data(), dtype, STROBE_CPU, static_cast<int32_t>(shape.size()), shape.data());
    }

    strobe_tensor integers(std::vector<int32_t> values) {
        integers_.push_back(std::move(values));
        const int64_t count = static_cast<int64_t>(integers_.back().size());
        return strobe_tensor_dense(integers_.back().data(), STROBE_I32, STROBE_CPU, 1, &count);
    }

    /// The same numbers as sequences of 2 and 8 query rows, 7 and 7 keys.
    void make_varlen() {
        const auto flatten = [](strobe_tensor& t) {
            const int64_t shape[] = {t.shape[0] * t.shape[1], t.shape[2], t.shape[3]};
            t = strobe_tensor_dense(t.data, static_cast<strobe_dtype>(t.dtype), STROBE_CPU, 3, shape);
        };
        for (strobe_tensor* t : {&attention.q, &attention.k, &attention.v, &forward.out, &backward.out, &backward.dout, &backward.dq,
                                 &backward.dk, &backward.dv}) {
            flatten(*t);
        }
        const int64_t rows[] = {kHeads, kBatch * kSeqlenQ};
        forward.lse = backward.lse = strobe_tensor_dense(forward.lse.data, STROBE_F32, STROBE_CPU, 2, rows);
        attention.cu_seqlens_q = integers({0, 2, 10});
        attention.cu_seqlens_k = integers({0, 7, 14});
        attention.max_seqlen_q = 8;
        attention.max_seqlen_k = 7;
    }

    strobe_attention attention;
    strobe_forward forward;
    strobe_backward backward;

private:
    std::vector<std::vector<float>> memory_;
    std::vector<std::vector<int32_t>> integers_;
    std::vector<unsigned char> workspace_;
};

}  // namespace strobe
