// The time that records carry.
#pragma once

#include <ctime>
#include <string>

namespace strobe::cli {

/// "2000-01-01T00:00:00Z"
inline std::string utc_now() {
    const std::time_t now = std::time(nullptr);
    char text[sizeof "2000-01-01T00:00:00Z"];
    return {text, std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now))};
}

}  // namespace strobe::cli
