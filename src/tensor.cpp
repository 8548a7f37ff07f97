#include "tensor.hpp"

#include <fmt/core.h>

#include <array>

namespace strobe {
namespace {

struct Axis {
    int64_t stride;
    int64_t extent;
};

/// The axes that move the address, smallest stride first, in bytes.
struct Axes {
    std::array<Axis, STROBE_MAX_DIMS> axis{};
    int count = 0;

    explicit Axes(const strobe_tensor& t) {
        const auto bytes = static_cast<int64_t>(dtype_bytes(t.dtype));
        for (int i = 0; i < t.ndim; ++i) {
            if (t.shape[i] <= 1) continue;
            int place = count++;
            for (; place > 0 && axis[place - 1].stride > t.strides[i] * bytes; --place) axis[place] = axis[place - 1];
            axis[place] = {t.strides[i] * bytes, t.shape[i]};
        }
    }
};

/// The bytes that one step of `period` covers when all faster axes run, or -1 when a slower axis is no multiple of it.
int64_t footprint(const Axes& axes, int64_t period, int64_t element_bytes) {
    int64_t bytes = element_bytes;
    for (int i = 0; i < axes.count; ++i) {
        const Axis& a = axes.axis[i];
        if (a.stride < period) {
            bytes += a.stride * (a.extent - 1);
        } else if (a.stride % period != 0) {
            return -1;
        }
    }
    return bytes;
}

std::string dims_text(const int64_t* values, int count) {
    if (count < 0 || count > STROBE_MAX_DIMS) return fmt::format("of {} dimensions", count);
    return list_text({values, static_cast<size_t>(count)});
}

}  // namespace

std::string list_text(std::span<const int64_t> values) {
    std::string text;
    for (int64_t value : values) text += fmt::format("{}{}", text.empty() ? "" : ", ", value);
    return "(" + text + ")";
}

size_t dtype_bytes(int32_t dtype) {
    switch (dtype) {
        case STROBE_F32:
        case STROBE_I32: return 4;
        case STROBE_BF16:
        case STROBE_F16: return 2;
        case STROBE_U8: return 1;
        default: return 0;
    }
}

const char* dtype_name(int32_t dtype) {
    switch (dtype) {
        case STROBE_F32: return "f32";
        case STROBE_BF16: return "bf16";
        case STROBE_F16: return "f16";
        case STROBE_I32: return "i32";
        case STROBE_U8: return "u8";
        default: return "an unknown dtype";
    }
}

std::string device_name(const strobe_tensor& t) {
    if (t.device_type == STROBE_CPU) return "cpu";
    if (t.device_type == STROBE_CUDA) return fmt::format("cuda:{}", t.device_index);
    return fmt::format("device type {}", t.device_type);
}

std::string shape_text(const strobe_tensor& t) { return dims_text(t.shape, t.ndim); }
std::string strides_text(const strobe_tensor& t) { return dims_text(t.strides, t.ndim); }

int64_t num_elements(const strobe_tensor& t) {
    int64_t n = t.ndim == 0 ? 0 : 1;
    for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
    return n;
}

int64_t span_elements(const strobe_tensor& t) {
    if (num_elements(t) == 0) return 0;
    int64_t last = 0;
    for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.strides[i];
    return last + 1;
}

bool overlaps_itself(const strobe_tensor& t) {
    if (num_elements(t) == 0) return false;
    const Axes axes(t);
    int64_t covered = static_cast<int64_t>(dtype_bytes(t.dtype));
    for (int i = 0; i < axes.count; ++i) {
        if (axes.axis[i].stride < covered) return true;
        covered += axes.axis[i].stride * (axes.axis[i].extent - 1);
    }
    return false;
}

bool may_overlap(const strobe_tensor& a, const strobe_tensor& b) {
    if (num_elements(a) == 0 || num_elements(b) == 0 || !a.data || !b.data) return false;
    const auto bytes_a = static_cast<int64_t>(dtype_bytes(a.dtype)), bytes_b = static_cast<int64_t>(dtype_bytes(b.dtype));
    const auto begin_a = reinterpret_cast<uintptr_t>(a.data), begin_b = reinterpret_cast<uintptr_t>(b.data);
    const uintptr_t end_a = begin_a + span_elements(a) * bytes_a, end_b = begin_b + span_elements(b) * bytes_b;
    if (end_a <= begin_b || end_b <= begin_a) return false;

    // Disjoint if, modulo some stride that every slower axis of both respects, the two footprints are apart.
    const Axes axes_a(a), axes_b(b);
    for (const Axes* axes : {&axes_a, &axes_b}) {
        for (int i = 0; i < axes->count; ++i) {
            const int64_t period = axes->axis[i].stride;
            if (period == 0) continue;
            const int64_t width_a = footprint(axes_a, period, bytes_a), width_b = footprint(axes_b, period, bytes_b);
            if (width_a < 0 || width_b < 0 || width_a + width_b > period) continue;
            const auto gap = static_cast<int64_t>((begin_b - begin_a) % static_cast<uintptr_t>(period));
            const auto to_b = begin_b >= begin_a
                                  ? gap
                                  : (period - static_cast<int64_t>((begin_a - begin_b) % static_cast<uintptr_t>(period))) % period;
            if (to_b >= width_a && to_b + width_b <= period) return false;
        }
    }
    return true;
}

}  // namespace strobe
