#include "gpt/train/loss_plot.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include <fmt/core.h>

namespace strobe::gpt {

namespace {

constexpr double kWidth = 860, kHeight = 480, kLeft = 64, kRight = 24, kTop = 48, kBottom = 52;
constexpr size_t kMaxPoints = 1200;  // a picture has no more columns

struct Axes {
    double x_max = 1, y_min = 0, y_max = 1;

    double x(double step) const { return kLeft + step / x_max * (kWidth - kLeft - kRight); }
    double y(double loss) const {
        const double clamped = std::clamp(loss, y_min, y_max);
        return kTop + (y_max - clamped) / (y_max - y_min) * (kHeight - kTop - kBottom);
    }
};

/// 1, 2 or 5 times a power of ten, so that about `count` of them fill `range`.
double tick_of(double range, double count) {
    const double rough = range / count, power = std::pow(10.0, std::floor(std::log10(rough)));
    for (const double factor : {1.0, 2.0, 5.0})
        if (rough <= factor * power) return factor * power;
    return 10.0 * power;
}

std::vector<CurvePoint> thinned(std::span<const CurvePoint> points) {
    const size_t stride = points.size() / kMaxPoints + 1;
    std::vector<CurvePoint> out;
    for (size_t i = 0; i < points.size(); i += stride) out.push_back(points[i]);
    if (!points.empty() && out.back().step != points.back().step) out.push_back(points.back());
    return out;
}

/// Mean of the points around each, over a fiftieth of the run.
std::vector<CurvePoint> smoothed(std::span<const CurvePoint> points) {
    const size_t reach = points.size() / 100;
    std::vector<CurvePoint> out;
    std::vector<double> sums(points.size() + 1);
    for (size_t i = 0; i < points.size(); ++i) sums[i + 1] = sums[i] + points[i].loss;
    for (size_t i = 0; i < points.size(); ++i) {
        const size_t begin = i < reach ? 0 : i - reach, end = std::min(points.size(), i + reach + 1);
        out.push_back({points[i].step, (sums[end] - sums[begin]) / static_cast<double>(end - begin)});
    }
    return out;
}

std::string polyline(const Axes& axes, std::span<const CurvePoint> points, const char* style) {
    std::string path;
    for (const CurvePoint& p : thinned(points)) {
        if (!std::isfinite(p.loss)) continue;
        path += fmt::format("{:.1f},{:.1f} ", axes.x(static_cast<double>(p.step)), axes.y(p.loss));
    }
    return fmt::format("<polyline points=\"{}\" fill=\"none\" {}/>\n", path, style);
}

std::string escaped(const std::string& text) {
    std::string out;
    for (const char c : text) {
        if (c == '<') out += "&lt;";
        else if (c == '&') out += "&amp;";
        else out += c;
    }
    return out;
}

Axes axes_of(const LossPlot& plot, std::span<const CurvePoint> smooth) {
    Axes a;
    double low = INFINITY, high = -INFINITY;
    const auto include = [&](std::span<const CurvePoint> points) {
        for (const CurvePoint& p : points) {
            a.x_max = std::max(a.x_max, static_cast<double>(p.step));
            if (!std::isfinite(p.loss)) continue;
            low = std::min(low, p.loss);
            high = std::max(high, p.loss);
        }
    };
    include(smooth);
    include(plot.held_out);
    if (!(low < high)) low = std::isfinite(low) ? low - 0.5 : 0.0, high = low + 1.0;
    const double tick = tick_of(high - low, 6);
    a.y_min = std::floor(low / tick) * tick;
    a.y_max = std::ceil(high / tick) * tick;
    return a;
}

}  // namespace

std::string draw_svg(const LossPlot& plot) {
    const std::vector<CurvePoint> smooth = smoothed(plot.training);
    const Axes axes = axes_of(plot, smooth);
    std::string out = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
        "font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n"
        "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
        "<text x=\"{2}\" y=\"26\" font-size=\"16\">{3}</text>\n",
        kWidth, kHeight, kLeft, escaped(plot.title));
    const double y_tick = tick_of(axes.y_max - axes.y_min, 6);
    for (double v = axes.y_min; v < axes.y_max + y_tick / 2; v += y_tick)
        out += fmt::format("<line x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\" stroke=\"#e4e4e4\"/>"
                           "<text x=\"{3}\" y=\"{4:.1f}\" text-anchor=\"end\">{5:.4g}</text>\n",
                           kLeft, kWidth - kRight, axes.y(v), kLeft - 8, axes.y(v) + 4, v);
    const double x_tick = std::max(1.0, tick_of(axes.x_max, 8));
    for (double v = 0; v <= axes.x_max; v += x_tick)
        out += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{:.0f}</text>\n", axes.x(v),
                           kHeight - kBottom + 20, v);
    out += fmt::format("<text x=\"{0:.1f}\" y=\"{1}\" text-anchor=\"middle\">step</text>\n"
                       "<text x=\"18\" y=\"{2:.1f}\" transform=\"rotate(-90 18 {2:.1f})\" text-anchor=\"middle\">{3}"
                       "</text>\n",
                       (kLeft + kWidth - kRight) / 2, kHeight - 12, kHeight / 2, escaped(plot.unit));
    out += polyline(axes, plot.training, "stroke=\"#9ecae1\" stroke-width=\"1\"");
    out += polyline(axes, smooth, "stroke=\"#2171b5\" stroke-width=\"2\"");
    out += polyline(axes, plot.held_out, "stroke=\"#d94801\" stroke-width=\"2\"");
    for (const CurvePoint& p : thinned(plot.held_out)) {
        if (!std::isfinite(p.loss)) continue;
        out += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" fill=\"#d94801\"/>\n",
                           axes.x(static_cast<double>(p.step)), axes.y(p.loss));
    }
    const double legend = kWidth - kRight - 190;
    out += fmt::format("<text x=\"{0}\" y=\"64\" fill=\"#2171b5\">training (running mean)</text>\n", legend);
    if (!plot.held_out.empty())
        out += fmt::format("<text x=\"{}\" y=\"82\" fill=\"#d94801\">held out, last {:.4f}</text>\n", legend,
                           plot.held_out.back().loss);
    return out + "</svg>\n";
}

}  // namespace strobe::gpt
