// How a command ends: 0 done, 1 the answer is no (a case failed, ...), 2 unusable arguments, 3 the machine refused.
#pragma once

#include <string>

namespace strobe::cli {

inline constexpr int kExitNo = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitDevice = 3;

/// Thrown by a command to end the program with a message.
struct Exit {
    int code;
    std::string message;
};

}  // namespace strobe::cli
