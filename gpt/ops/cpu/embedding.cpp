#include "gpt/ops/cpu/kernels.hpp"

namespace strobe::gpt::cpu::STROBE_GPT_ISA {

void embedding_forward(Exec& e, const EmbeddingForward& a) {
    const float* table = a.table.f32();
    const float* position_table = a.position_table ? a.position_table.f32() : nullptr;
    float* out = a.out.f32();
    e.team->ranges(a.rows, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const float* token = table + a.tokens[r] * a.hidden;
            float* y = out + r * a.hidden;
            if (position_table) {
                const float* position = position_table + a.positions[r] * a.hidden;
                for (int64_t c = 0; c < a.hidden; ++c) y[c] = token[c] + position[c];
            } else {
                for (int64_t c = 0; c < a.hidden; ++c) y[c] = token[c];
            }
        }
    });
}

void embedding_backward(Exec& e, const EmbeddingBackward& a) {
    const float* dout = a.dout.f32();
    float* dtable = a.dtable.f32();
    float* dposition_table = a.dposition_table.f32();
    e.team->ranges(a.hidden, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = 0; r < a.rows; ++r) {
            const float* dy = dout + r * a.hidden;
            float* dtoken = dtable + a.tokens[r] * a.hidden;
            for (int64_t c = begin; c < end; ++c) dtoken[c] += dy[c];
            if (!dposition_table) continue;
            float* dposition = dposition_table + a.positions[r] * a.hidden;
            for (int64_t c = begin; c < end; ++c) dposition[c] += dy[c];
        }
    });
}

}  // namespace strobe::gpt::cpu::STROBE_GPT_ISA
