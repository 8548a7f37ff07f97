#include "workspace.hpp"

#include <cstddef>
#include <cstring>
#include <memory>

namespace strobe::torch_ops {
namespace {

strobe_status plan_call(const strobe_attention* a, const strobe_forward* f, strobe_plan* p) {
    return strobe_attention_forward_plan(a, f, p);
}
strobe_status plan_call(const strobe_attention* a, const strobe_backward* b, strobe_plan* p) {
    return strobe_attention_backward_plan(a, b, p);
}

/// Of an address, a plan may depend on the alignment alone.
void keep_alignment(strobe_tensor& t) {
    t.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t.data) & 15u);
}

template <class Direction>
struct Question {
    strobe_attention attention;
    Direction direction;

    Question() = default;

    Question(const strobe_attention& a, const Direction& d) {
        static_assert(sizeof(Question) == sizeof a + sizeof d, "every byte is compared");
        std::memcpy(&attention, &a, sizeof a);
        std::memcpy(&direction, &d, sizeof d);
        for (strobe_tensor* t : {&attention.q, &attention.k, &attention.v, &attention.cu_seqlens_q, &attention.cu_seqlens_k,
                                 &attention.seqused_q, &attention.seqused_k, &attention.alibi_slopes, &attention.bias}) {
            keep_alignment(*t);
        }
        attention.dropout_seed = attention.dropout_offset = 0;
        forget_addresses(direction);
    }

    bool operator==(const Question& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }

private:
    static void forget_addresses(strobe_forward& f) {
        for (strobe_tensor* t : {&f.out, &f.lse}) keep_alignment(*t);
    }
    static void forget_addresses(strobe_backward& b) {
        for (strobe_tensor* t : {&b.out, &b.lse, &b.dout, &b.dlse, &b.dq, &b.dk, &b.dv, &b.dbias}) keep_alignment(*t);
    }
};

/// The last few answers of this thread.
template <class Direction>
class Answers {
public:
    size_t workspace_bytes(const strobe_attention& a, const Direction& d) {
        const Question<Direction> question(a, d);
        for (size_t i = 0; i < count_; ++i) {
            if (entries_[i].question == question) return entries_[i].bytes;
        }
        strobe_plan plan;
        plan.struct_size = sizeof plan;
        check_strobe(plan_call(&a, &d, &plan));
        entries_[next_] = {question, plan.workspace_bytes};
        next_ = (next_ + 1) % kEntries;
        count_ = count_ < kEntries ? count_ + 1 : kEntries;
        return plan.workspace_bytes;
    }

private:
    static constexpr size_t kEntries = 8;
    struct Entry {
        Question<Direction> question;
        size_t bytes = 0;
    };
    std::array<Entry, kEntries> entries_;
    size_t next_ = 0, count_ = 0;
};

}  // namespace

size_t workspace_bytes(const strobe_attention& attention, const strobe_forward& forward) {
    thread_local Answers<strobe_forward> answers;
    return answers.workspace_bytes(attention, forward);
}

size_t workspace_bytes(const strobe_attention& attention, const strobe_backward& backward) {
    thread_local Answers<strobe_backward> answers;
    return answers.workspace_bytes(attention, backward);
}

Workspace::Workspace(size_t bytes, Device device) : bytes_(bytes) {
    if (bytes == 0) return;
    constexpr size_t kKept = 256 << 10;
    if (!device.is_cuda() && bytes <= kKept) {
        thread_local std::unique_ptr<std::byte[]> kept;
        if (!kept) kept.reset(new std::byte[kKept]);
        data_ = kept.get();
        return;
    }
    const int64_t size = static_cast<int64_t>(bytes);
    tensor_ = empty({&size, 1}, aoti_torch_dtype_uint8(), device);
    data_ = tensor_.data();
}

}  // namespace strobe::torch_ops
