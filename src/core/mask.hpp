// Which keys a query sees. Every mask strobe knows is a band around a diagonal: causal is a band with right = 0, a
// sliding window is a band, full attention is a band without edges. A mask answers three questions: the keys a block of
// queries needs, the queries a block of keys needs, and whether one element is visible. CPU kernels, GPU kernels, the
// reference and the schedulers all ask here.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"

namespace strobe {

/// A half-open range of row or column indices; empty when end <= begin.
struct IndexRange {
    int64_t begin = 0;
    int64_t end = 0;

    STROBE_HD constexpr bool empty() const { return end <= begin; }
    STROBE_HD constexpr int64_t size() const { return empty() ? 0 : end - begin; }
};

/// Query i sees key j iff  i + diagonal - left <= j <= i + diagonal + right  (left or right < 0: no bound on that side)
/// and j < seqlen_k. One value serves one sequence of a batch: `diagonal` is seqlen_k - seqlen_q (bottom-right alignment)
/// unless the caller placed the blocks himself by positions.
struct BandMask {
    int64_t left = -1;
    int64_t right = -1;
    int64_t diagonal = 0;
    int64_t seqlen_q = 0;
    int64_t seqlen_k = 0;

    STROBE_HD constexpr bool visible(int64_t i, int64_t j) const {
        return j < seqlen_k && (right < 0 || j <= i + diagonal + right) && (left < 0 || j >= i + diagonal - left);
    }

    /// Keys that at least one query in [q_begin, q_end) may see.
    STROBE_HD constexpr IndexRange key_range(int64_t q_begin, int64_t q_end) const {
        const int64_t last_q = min(q_end, seqlen_q) - 1;
        IndexRange r{0, seqlen_k};
        if (left >= 0) r.begin = max(r.begin, q_begin + diagonal - left);
        if (right >= 0) r.end = min(r.end, last_q + diagonal + right + 1);
        if (last_q < q_begin) r.end = r.begin;
        return r;
    }

    /// Queries that may see at least one key in [k_begin, k_end).
    STROBE_HD constexpr IndexRange query_range(int64_t k_begin, int64_t k_end) const {
        const int64_t last_k = min(k_end, seqlen_k) - 1;
        IndexRange r{0, seqlen_q};
        if (right >= 0) r.begin = max(r.begin, k_begin - diagonal - right);
        if (left >= 0) r.end = min(r.end, last_k - diagonal + left + 1);
        if (last_k < k_begin) r.end = r.begin;
        return r;
    }

    /// True when every query in [q_begin, q_end) sees every key in [k_begin, k_end): the tile needs no element test.
    STROBE_HD constexpr bool all_visible(int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end) const {
        return k_end <= seqlen_k && (right < 0 || k_end - 1 <= q_begin + diagonal + right) &&
               (left < 0 || k_begin >= q_end - 1 + diagonal - left);
    }

private:
    STROBE_HD static constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
    STROBE_HD static constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
};

}  // namespace strobe
