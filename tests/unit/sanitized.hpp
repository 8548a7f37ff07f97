// Whether this program runs under a sanitizer, which makes it many times slower.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STROBE_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define STROBE_SANITIZED 1
#endif
#endif
#if !defined(STROBE_SANITIZED)
#define STROBE_SANITIZED 0
#endif

namespace strobe {

inline constexpr bool kSanitized = STROBE_SANITIZED;

}  // namespace strobe
