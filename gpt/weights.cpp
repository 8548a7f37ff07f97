#include "gpt/weights.hpp"

#include <algorithm>

#include "gpt/bf16.hpp"

namespace strobe::gpt {

namespace {

// Numbers that are on their way between the halves and the whole.
constexpr int64_t kPiece = int64_t{1} << 24;

}  // namespace

void Weights::set(const ParameterArena& masters) const {
    if (precision == Precision::fp32) return values.copy_from(masters);
    Memory& memory = values.memory();
    const int64_t vectors = layout.matrices_begin(), end = values.size();
    const bool splits = has_lower_halves();
    memory.copy(values.at(0).data, masters.data(), static_cast<size_t>(vectors) * sizeof(float));
    std::vector<uint16_t> high(static_cast<size_t>(std::min(kPiece, end))), low(high.size());
    for (int64_t begin = 0, count; begin < end; begin += count) {
        const bool whole = begin < vectors;  // vectors are rounded to bf16 as everywhere else
        count = std::min(kPiece, (whole ? vectors : end) - begin);
        for (int64_t i = 0; i < count; ++i) {
            const float x = masters.data()[begin + i];
            const SplitFloat halves = split_float(x);
            high[static_cast<size_t>(i)] = whole || !splits ? round_bf16(x) : halves.high;
            low[static_cast<size_t>(i)] = halves.low;
        }
        const size_t bytes = static_cast<size_t>(count) * sizeof(uint16_t);
        memory.copy(all().offset(begin).data, high.data(), bytes);
        if (!whole && splits) memory.copy(values.at(begin).data, low.data(), bytes);
    }
}

void Weights::get(const ParameterArena& masters) const {
    if (precision == Precision::fp32) return masters.copy_from(values);
    Memory& memory = values.memory();
    const int64_t vectors = layout.matrices_begin(), end = values.size();
    memory.copy(masters.data(), values.at(0).data, static_cast<size_t>(vectors) * sizeof(float));
    std::vector<uint16_t> high(static_cast<size_t>(std::min(kPiece, end - vectors))), low(high.size());
    for (int64_t begin = vectors, count; begin < end; begin += count) {
        count = std::min(kPiece, end - begin);
        const size_t bytes = static_cast<size_t>(count) * sizeof(uint16_t);
        memory.copy(high.data(), all().offset(begin).data, bytes);
        if (has_lower_halves()) memory.copy(low.data(), values.at(begin).data, bytes);
        for (int64_t i = 0; i < count; ++i)
            masters.data()[begin + i] = join_float({high[static_cast<size_t>(i)], low[static_cast<size_t>(i)]});
    }
}

}  // namespace strobe::gpt
