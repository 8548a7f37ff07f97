// The deterministic mode's order. Key tiles add to a query tile's dQ one after the other, in the order in which CTAs begin them:
// who waits for a turn waits for CTAs that are running, never for one that might not be. They should find those gone by.
//
// Without a mask all begin at the first query tile, each one hand-over behind the last. That costs the launch one hand-over for each
// key tile of a head, once: where as many heads are begun together as the machine has room for, a CTA that is done follows one that
// has just begun. With a mask the last key tile is begun first: on the way up from their diagonals two neighbours pass a query tile
// one after the other all by themselves. Only the last group of heads begins with the longest tiles and walks down, lest the
// launch end with those.
#pragma once

#include "cuda/sm80/schedule.hpp"

namespace strobe::sm80 {

struct KeyTile {
    int tile;
    int head;      // batch * num_heads_k + key head
    bool falling;  // its head's tiles are begun last to first

    /// How many of the key tiles [first, last], of which this is one, are begun before it.
    STROBE_HD constexpr int turn(int first, int last) const { return falling ? last - tile : tile - first; }
};

struct KeyTileOrder : TileOrder {
    STROBE_HD constexpr KeyTile claimed(int claim) const {
        const TileIndex index = at(claim);
        const bool last_group = index.head / group * group + group >= heads;
        return {reversed && last_group ? tiles - 1 - index.tile : index.tile, index.head, reversed && !last_group};
    }

    /// The first and the last key tile that add to the query tile of [first_query, last_query]; low and high: see Band in score.cuh.
    STROBE_HD static constexpr int first_adding(int low, int first_query, int block_n) {
        return first_query + low > 0 ? (first_query + low) / block_n : 0;
    }
    STROBE_HD constexpr int last_adding(int high, int last_query, int seqlen_k, int block_n) const {
        const int key = high < seqlen_k - 1 - last_query ? last_query + high : seqlen_k - 1;
        return key / block_n < tiles ? key / block_n : tiles - 1;
    }

    /// ctas: how many the machine has room for. Otherwise as TileOrder::make.
    STROBE_HD static constexpr KeyTileOrder in_turns(int64_t heads, int64_t tiles, int64_t head_bytes, bool uneven, int64_t ctas) {
        KeyTileOrder order{make(heads, tiles, head_bytes, uneven, true)};
        if (!uneven && tiles > 0) {
            const int64_t together = (ctas + tiles / 2) / tiles;
            order.group = static_cast<int>(together < 1 ? 1 : together > heads ? heads : together);
        }
        return order;
    }
};

}  // namespace strobe::sm80
