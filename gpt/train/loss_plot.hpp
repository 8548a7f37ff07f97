// The loss curve as an SVG picture that any browser shows.
#pragma once

#include <span>
#include <string>

#include "gpt/train/run_log.hpp"

namespace strobe::gpt {

struct LossPlot {
    std::string title;
    std::string unit;                       // "nats per byte"
    std::span<const CurvePoint> training;   // drawn faint, with a running mean over it
    std::span<const CurvePoint> held_out;
};

std::string draw_svg(const LossPlot& plot);

}  // namespace strobe::gpt
