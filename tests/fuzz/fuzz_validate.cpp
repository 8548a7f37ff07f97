// Calls of the C ABI that start sound and are then bent: extents, strides, types, devices, options, lengths. Whatever
// validation accepts must run without touching a byte that is not the caller's; whatever it refuses must be refused with a
// text. Each tensor has memory of its own, of exactly its first size, so that the address sanitizer sees every step aside.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "strobe/strobe.h"

namespace {

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "%s: %s\n", what, strobe_last_error());
    std::abort();
}

class Input {
public:
    Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

    bool empty() const { return size_ == 0; }
    uint8_t byte() {
        if (size_ == 0) return 0;
        --size_;
        return *data_++;
    }
    int64_t upto(int64_t limit) { return byte() % (limit + 1); }

    /// Small numbers, and those at which arithmetic breaks.
    int64_t number() {
        static constexpr int64_t kEdges[] = {0, 1, -1, -2, int64_t{1} << 31, (int64_t{1} << 31) - 1, int64_t{1} << 32, int64_t{1} << 61,
                                             std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min(),
                                             std::numeric_limits<int32_t>::min(), 512, 513};
        const uint8_t kind = byte();
        if (kind < 13) return kEdges[kind];
        return kind % 2 ? upto(20) : static_cast<int8_t>(byte());
    }
    double real() {
        static constexpr double kEdges[] = {0, -1, 1, 0.5, 1e300, -1e300, 1e-300, std::numeric_limits<double>::infinity(),
                                            std::numeric_limits<double>::quiet_NaN(), 0.9999999, 1e-9, 30, 65535.0 / 65536};
        const uint8_t kind = byte();
        return kind < 13 ? kEdges[kind] : static_cast<int8_t>(byte()) / 16.0;
    }

private:
    const uint8_t* data_;
    size_t size_;
};

size_t bytes_of(int32_t dtype) { return dtype == STROBE_U8 ? 1 : dtype == STROBE_BF16 || dtype == STROBE_F16 ? 2 : 4; }

struct Block {
    std::unique_ptr<uint8_t[]> data;
    size_t bytes = 0;
};

/// One call, with memory for each of its tensors.
class Call {
public:
    explicit Call(Input& in) : in_(in) {
        strobe_attention_init(&attention_);
        strobe_forward_init(&forward_);
        strobe_backward_init(&backward_);
        const int64_t b = in.upto(3), sq = in.upto(9), sk = in.upto(9), hk = 1 + in.upto(2), h = hk * (1 + in.upto(2));
        const int64_t d = 1 + in.upto(20), dv = 1 + in.upto(20);
        const auto dtype = static_cast<strobe_dtype>(in.upto(2));
        const uint8_t has = in.byte();
        const strobe_dtype grad = has & 1 ? STROBE_F32 : dtype;
        const bool varlen_q = has & 2, varlen_k = has & 4;
        const auto tokens = [&](strobe_tensor& t, strobe_dtype type, bool varlen, int64_t rows, int64_t heads, int64_t dim) {
            if (varlen) {
                give(t, type, {b * rows, heads, dim});
            } else {
                give(t, type, {b, rows, heads, dim});
            }
        };
        tokens(attention_.q, dtype, varlen_q, sq, h, d);
        tokens(attention_.k, dtype, varlen_k, sk, hk, d);
        tokens(attention_.v, dtype, varlen_k, sk, hk, dv);
        tokens(forward_.out, dtype, varlen_q, sq, h, dv);
        tokens(backward_.out, dtype, varlen_q, sq, h, dv);
        tokens(backward_.dout, dtype, varlen_q, sq, h, dv);
        tokens(backward_.dq, grad, varlen_q, sq, h, d);
        tokens(backward_.dk, grad, varlen_k, sk, hk, d);
        tokens(backward_.dv, grad, varlen_k, sk, hk, dv);
        for (strobe_tensor* t : {&forward_.lse, &backward_.lse, &backward_.dlse}) {
            if (t == &backward_.dlse && !(has & 8)) continue;
            if (varlen_q) {
                give(*t, STROBE_F32, {h, b * sq});
            } else {
                give(*t, STROBE_F32, {b, h, sq});
            }
        }
        if (varlen_q) lengths(attention_.cu_seqlens_q, attention_.max_seqlen_q, b, sq);
        if (varlen_k) lengths(attention_.cu_seqlens_k, attention_.max_seqlen_k, b, sk);
        if (has & 16) counts(attention_.seqused_q, b, sq);
        if (has & 32) counts(attention_.seqused_k, b, sk);
        if (has & 64) give(attention_.alibi_slopes, STROBE_F32, {h});
        if (has & 128) {
            give(attention_.bias, STROBE_F32, {in.upto(1) ? b : 1, in.upto(1) ? h : 1, in.upto(1) ? sq : 1, in.upto(1) ? sk : 1});
            if (in.upto(1)) {
                const int64_t* s = attention_.bias.shape;
                give(backward_.dbias, STROBE_F32, {s[0], s[1], s[2], s[3]});
            }
        }
        const uint8_t options = in.byte();
        if (options & 1) attention_.causal = 1;
        if (options & 2) attention_.window_left = in.upto(9), attention_.window_right = attention_.causal ? 0 : in.upto(9);
        if (options & 4) attention_.has_positions = 1, attention_.q_position = in.upto(30), attention_.k_position = in.upto(30);
        if (options & 8) attention_.softcap = 1.5;
        if (options & 16) attention_.dropout_p = 0.3;
        if (options & 32) backward_.accumulate = 1;
        attention_.implementation = options & 64 ? "reference" : nullptr;
        attention_.num_threads = 1;
        while (!in.empty()) bend();
    }

    void run() {
        strobe_plan plan{};
        plan.struct_size = sizeof plan;
        const bool inside = all_inside();
        if (accepted(strobe_attention_forward_plan(&attention_, &forward_, &plan)) && inside && small()) {
            provide(plan.workspace_bytes, forward_.workspace, forward_.workspace_bytes);
            accepted(strobe_attention_forward(&attention_, &forward_, nullptr));
        }
        if (accepted(strobe_attention_backward_plan(&attention_, &backward_, &plan)) && inside && small()) {
            provide(plan.workspace_bytes, backward_.workspace, backward_.workspace_bytes);
            accepted(strobe_attention_backward(&attention_, &backward_, nullptr));
        }
    }

private:
    void give(strobe_tensor& t, strobe_dtype dtype, std::vector<int64_t> shape) {
        size_t bytes = bytes_of(dtype);
        for (int64_t extent : shape) bytes *= static_cast<size_t>(extent);
        blocks_.push_back({std::make_unique<uint8_t[]>(bytes), bytes});
        t = strobe_tensor_dense(blocks_.back().data.get(), dtype, STROBE_CPU, static_cast<int32_t>(shape.size()), shape.data());
        tensors_.push_back({&t, blocks_.size() - 1});
    }

    void lengths(strobe_tensor& t, int64_t& longest, int64_t batch, int64_t rows) {
        give(t, STROBE_I32, {batch + 1});
        auto* sums = static_cast<int32_t*>(t.data);
        for (int64_t b = 0; b < batch; ++b) sums[b + 1] = sums[b] + static_cast<int32_t>(in_.upto(rows));
        longest = rows;
    }

    void counts(strobe_tensor& t, int64_t batch, int64_t rows) {
        give(t, STROBE_I32, {batch});
        for (int64_t b = 0; b < batch; ++b) static_cast<int32_t*>(t.data)[b] = static_cast<int32_t>(in_.upto(rows));
    }

    /// Changes one thing.
    void bend() {
        const uint8_t what = in_.byte();
        if (what < 160) {
            strobe_tensor& t = *tensors_[what % tensors_.size()].first;
            switch (in_.upto(8)) {
                case 0: t.dtype = static_cast<int32_t>(in_.number()); break;
                case 1: t.device_type = static_cast<int32_t>(in_.upto(2)); break;
                case 2: t.device_index = static_cast<int32_t>(in_.number()); break;
                case 3: t.ndim = static_cast<int32_t>(in_.number()); break;
                case 4:
                case 5: t.shape[in_.upto(4)] = in_.number(); break;
                case 6: t.strides[in_.upto(4)] = in_.number(); break;
                case 7: t = *tensors_[in_.byte() % tensors_.size()].first; break;
                default:
                    if (t.dtype == STROBE_I32 && blocks_[block_of(t)].bytes >= 4) {
                        auto* values = reinterpret_cast<int32_t*>(blocks_[block_of(t)].data.get());
                        values[static_cast<size_t>(in_.byte()) % (blocks_[block_of(t)].bytes / 4)] = static_cast<int32_t>(in_.number());
                    }
            }
            return;
        }
        switch (what % 16) {
            case 0: attention_.num_threads = static_cast<int32_t>(in_.upto(3)); break;
            case 1: attention_.max_seqlen_q = in_.number(); break;
            case 2: attention_.max_seqlen_k = in_.number(); break;
            case 3: attention_.causal = static_cast<int32_t>(in_.number()); break;
            case 4: attention_.window_left = in_.number(); break;
            case 5: attention_.window_right = in_.number(); break;
            case 6: attention_.has_positions = static_cast<int32_t>(in_.upto(1)); break;
            case 7: attention_.q_position = in_.number(); break;
            case 8: attention_.k_position = in_.number(); break;
            case 9: attention_.has_softmax_scale = 1, attention_.softmax_scale = in_.real(); break;
            case 10: attention_.softcap = in_.real(); break;
            case 11: attention_.dropout_p = in_.real(); break;
            case 12: attention_.deterministic = 1; break;
            case 13: backward_.accumulate = static_cast<int32_t>(in_.upto(1)); break;
            case 14: attention_.struct_size = static_cast<uint32_t>(in_.upto(255) * sizeof attention_ / 255); break;
            default: attention_.implementation = "cpu"; break;
        }
    }

    /// The block that a tensor's pointer starts.
    size_t block_of(const strobe_tensor& t) const {
        for (size_t n = 0; n < blocks_.size(); ++n) {
            if (blocks_[n].data.get() == t.data) return n;
        }
        std::abort();
    }

    /// Every view lies in its block: what the interface asks of a caller and cannot check itself.
    bool all_inside() const {
        for (const auto& entry : tensors_) {
            const strobe_tensor& t = *entry.first;
            if (t.ndim < 0 || t.ndim > STROBE_MAX_DIMS) return false;
            __int128 last = 0;
            bool none = t.ndim == 0;
            for (int i = 0; i < t.ndim; ++i) {
                if (t.shape[i] < 0 || t.strides[i] < 0) return false;
                none = none || t.shape[i] == 0;
                last += static_cast<__int128>(t.shape[i] - 1) * t.strides[i];
            }
            if (!none && (last + 1) * static_cast<__int128>(bytes_of(t.dtype)) > static_cast<__int128>(blocks_[block_of(t)].bytes)) return false;
        }
        return true;
    }

    /// Little enough work for a fuzzer. Broadcast views (stride 0) and empty ones can be of any extent.
    bool small() const {
        for (const auto& entry : tensors_) {
            for (int i = 0; i < entry.first->ndim; ++i) {
                if (entry.first->shape[i] > 600) return false;
            }
        }
        return attention_.max_seqlen_q <= 600 && attention_.max_seqlen_k <= 600;
    }

    void provide(size_t bytes, void*& workspace, size_t& workspace_bytes) {
        if (bytes > size_t{1} << 30) fail("a small call asks for a gigabyte of workspace");
        blocks_.push_back({std::make_unique<uint8_t[]>(bytes), bytes});
        workspace = blocks_.back().data.get();
        workspace_bytes = bytes;
    }

    static bool accepted(strobe_status status) {
        if (status == STROBE_OK) return true;
        if (status != STROBE_INVALID_ARGUMENT && status != STROBE_UNSUPPORTED) fail("neither run nor refused");
        if (std::strlen(strobe_last_error()) < 10) fail("a refusal without words");
        return false;
    }

    Input& in_;
    strobe_attention attention_;
    strobe_forward forward_;
    strobe_backward backward_;
    std::vector<Block> blocks_;
    std::vector<std::pair<strobe_tensor*, size_t>> tensors_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input(data, size);
    Call(input).run();
    return 0;
}
