// Calls of the C ABI, and what the text of their last error says.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "dense_call.hpp"

namespace strobe {

using Change = std::function<void(DenseCall&)>;
using Says = std::vector<const char*>;  // pieces of a text, in any order

inline strobe_status forward(const DenseCall& c) { return strobe_attention_forward(&c.attention, &c.forward, nullptr); }
inline strobe_status backward(const DenseCall& c) { return strobe_attention_backward(&c.attention, &c.backward, nullptr); }

inline void expect_error_says(const Says& says) {
    const std::string text = strobe_last_error();
    for (const char* piece : says) {
        EXPECT_NE(text.find(piece), std::string::npos) << "\"" << piece << "\" is not in: " << text;
    }
}

}  // namespace strobe
