// Attention over a set of keys is the weighted mean of attention over its parts: out = sum_i w_i out_i with
// w_i = exp(lse_i - lse) and lse = log sum_i exp(lse_i). This is how split keys and rings of devices are put together.
#pragma once

#include <cmath>

#include "core/host_device.hpp"

namespace strobe {

/// Folds parts in one after another. `weight_old` scales what has been gathered so far, `weight_new` the part just added;
/// a part whose lse is -inf saw no key and weighs nothing, and while no part saw a key both weights are 0 and lse is -inf.
template <class Real>
struct LseMerge {
    Real lse = -INFINITY;
    Real weight_old = 0;
    Real weight_new = 0;

    STROBE_HD void add(Real part_lse) {
        using std::exp;
        using std::log1p;
        const Real old_lse = lse;
        if (part_lse == -INFINITY) {
            weight_old = old_lse == -INFINITY ? Real(0) : Real(1);
            weight_new = 0;
            return;
        }
        if (old_lse == -INFINITY) {
            lse = part_lse;
            weight_old = 0;
            weight_new = 1;
            return;
        }
        const Real larger = old_lse > part_lse ? old_lse : part_lse;
        const Real smaller = old_lse > part_lse ? part_lse : old_lse;
        lse = larger + log1p(exp(smaller - larger));
        weight_old = exp(old_lse - lse);
        weight_new = exp(part_lse - lse);
    }
};

}  // namespace strobe
