// Which CTA takes which tile. Heads are taken in groups whose operands fit in the L2 cache; inside a group either tiles
// run fastest (every tile costs the same) or heads do, heaviest tiles first (causal and windowed masks), so that the
// hardware's first-come order is longest-processing-time first.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"

namespace strobe::sm80 {

struct TileIndex {
    int tile;
    int head;  // batch * num_heads + head
};

struct TileOrder {
    int64_t heads = 0;  // of all batches
    int tiles = 0;      // of one head
    int group = 1;      // heads taken together
    bool reversed = false;

    STROBE_HD constexpr int64_t size() const { return heads * tiles; }

    /// In 32 bits: a grid has fewer than 2^31 CTAs, and divisions of 64 bits would take a CTA microseconds before its first load.
    STROBE_HD constexpr TileIndex at(int64_t cta) const {
        const uint32_t index = static_cast<uint32_t>(cta), per_group = static_cast<uint32_t>(group) * tiles;
        const uint32_t first = index / per_group * group;
        const uint32_t in_group = index % per_group;
        const uint32_t left = static_cast<uint32_t>(heads) - first, width = left < static_cast<uint32_t>(group) ? left : group;
        const int tile = static_cast<int>(in_group / width);
        return {reversed ? tiles - 1 - tile : tile, static_cast<int>(first + in_group % width)};
    }

    /// head_bytes: what one head streams through the cache.
    STROBE_HD static constexpr TileOrder make(int64_t heads, int64_t tiles, int64_t head_bytes, bool uneven, bool reversed) {
        constexpr int64_t kCacheBytes = 32ll << 20;
        TileOrder order;
        order.heads = heads;
        order.tiles = static_cast<int>(tiles);
        int64_t group = uneven ? kCacheBytes / (head_bytes > 0 ? head_bytes : 1) : 1;
        group = group < 1 ? 1 : group > heads ? heads : group;
        order.group = static_cast<int>(group < 1 ? 1 : group);
        order.reversed = uneven && reversed;
        return order;
    }
};

}  // namespace strobe::sm80
