// Element types, numbered as in strobe.h.
#pragma once

#include <cstdint>

namespace strobe {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i32 = 3, u8 = 4 };

}  // namespace strobe
