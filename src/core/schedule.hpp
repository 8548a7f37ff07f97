// Which tile a worker of a persistent kernel does next. Every tile of the problem has one index; the mapping from index
// to (batch, head, query block) decides what the L2 cache holds and in which order long and short tiles are started.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"

namespace strobe {

struct TileIndex {
    int block = 0;  // query block of the sequence
    int head = 0;
    int batch = 0;
};

/// The tiles of `num_sequences` (batch, head) pairs with `num_blocks` query blocks each.
struct TileOrder {
    int num_heads = 1;
    int heads_per_group = 1;     // (batch, head) pairs whose keys and values share the L2 cache
    bool longest_first = false;  // causal: the last query block sees most keys

    /// Full masks walk the blocks of one head before the next, so that few heads are live at once. Longest-first orders
    /// the blocks of a whole group of heads by descending length: the short tiles at the end even out the workers.
    STROBE_HD constexpr TileIndex tile(int index, int num_blocks, int num_sequences) const {
        TileIndex t;
        int pair = 0;
        if (longest_first) {
            const int group_tiles = heads_per_group * num_blocks;
            const int group = index / group_tiles;
            const int within = index - group * group_tiles;
            const int first = group * heads_per_group;
            const int members = num_sequences - first < heads_per_group ? num_sequences - first : heads_per_group;
            t.block = num_blocks - 1 - within / members;
            pair = first + within % members;
        } else {
            pair = index / num_blocks;
            t.block = index - pair * num_blocks;
        }
        t.batch = pair / num_heads;
        t.head = pair - t.batch * num_heads;
        return t;
    }
};

/// Walks the sequences of a varlen batch in step with ascending tile indices.
struct SequenceCursor {
    int batch = 0;
    int64_t first = 0;  // index of the current sequence's first tile

    /// Moves on to the sequence that holds tile `index`; tiles_of(b) is the number of tiles of sequence b. False when
    /// the batch ends before.
    template <typename TilesOf>
    STROBE_HD constexpr bool seek(int64_t index, int num_batches, TilesOf tiles_of) {
        while (batch < num_batches) {
            const int64_t tiles = tiles_of(batch);
            if (index < first + tiles) return true;
            first += tiles;
            ++batch;
        }
        return false;
    }
};

}  // namespace strobe
