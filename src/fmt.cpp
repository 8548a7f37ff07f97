// The half of fmt that its headers leave to a library, compiled once: fmt/core.h then costs a source file little to
// include, and libstrobe needs no libfmt at run time. Sources include fmt/core.h alone: what fmt's other headers
// declare is not all here.
#include <fmt/format-inl.h>

FMT_BEGIN_NAMESPACE
namespace detail {

// Declared extern by fmt, and used by the functions above for '{:L}'.
template FMT_API auto thousands_sep_impl(locale_ref) -> thousands_sep_result<char>;
template FMT_API auto decimal_point_impl(locale_ref) -> char;

}  // namespace detail
FMT_END_NAMESPACE
