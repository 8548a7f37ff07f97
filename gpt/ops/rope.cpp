#include "gpt/ops/rope.hpp"

#include <cmath>

namespace strobe::gpt {

std::vector<float> rope_table(int64_t context, int64_t head_dim, float theta) {
    const int64_t half = head_dim / 2;
    std::vector<float> table(static_cast<size_t>(2 * context * half));
    for (int64_t i = 0; i < half; ++i) {
        const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
        const float frequency = 1.0f / std::pow(theta, exponent);
        for (int64_t position = 0; position < context; ++position) {
            const float angle = static_cast<float>(position) * frequency;
            table[static_cast<size_t>(position * half + i)] = static_cast<float>(std::cos(static_cast<double>(angle)));
            table[static_cast<size_t>((context + position) * half + i)] =
                static_cast<float>(std::sin(static_cast<double>(angle)));
        }
    }
    return table;
}

}  // namespace strobe::gpt
