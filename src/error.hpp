// How a call fails inside the library; the C ABI turns these into a status and a text.
#pragma once

#include <stdexcept>
#include <string>

#include "strobe/strobe.h"

namespace strobe {

class CallError : public std::runtime_error {
public:
    CallError(strobe_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
    strobe_status status() const { return status_; }

private:
    strobe_status status_;
};

[[noreturn]] inline void invalid_argument(const std::string& text) { throw CallError(STROBE_INVALID_ARGUMENT, text); }
[[noreturn]] inline void unsupported(const std::string& text) { throw CallError(STROBE_UNSUPPORTED, text); }

}  // namespace strobe
