// The order in which a persistent kernel takes its tiles: every tile once, long ones first where lengths differ.
#include "core/schedule.hpp"

#include <gtest/gtest.h>

#include <map>
#include <tuple>
#include <vector>

namespace strobe {
namespace {

using Key = std::tuple<int, int, int>;

TEST(TileOrder, CoversEveryTileOnce) {
    for (const bool longest_first : {false, true}) {
        for (const int blocks : {1, 2, 7, 64}) {
            for (const int heads : {1, 3, 16}) {
                for (const int batch : {1, 2, 5}) {
                    for (const int group : {1, 2, 5, 16, 1000}) {
                        const TileOrder order{heads, group, longest_first};
                        std::map<Key, int> seen;
                        for (int i = 0; i < blocks * heads * batch; ++i) {
                            const TileIndex t = order.tile(i, blocks, heads * batch);
                            ASSERT_TRUE(t.block >= 0 && t.block < blocks && t.head >= 0 && t.head < heads && t.batch >= 0 &&
                                        t.batch < batch);
                            ++seen[{t.batch, t.head, t.block}];
                        }
                        ASSERT_EQ(seen.size(), static_cast<size_t>(blocks * heads * batch))
                            << blocks << " blocks, " << heads << " heads, " << batch << " sequences, groups of " << group;
                    }
                }
            }
        }
    }
}

TEST(TileOrder, LongestFirstWithinAGroupOfHeads) {
    const int blocks = 9, pairs = 20;
    const TileOrder order{5, 8, true};
    for (int i = 1; i < blocks * pairs; ++i) {
        const TileIndex a = order.tile(i - 1, blocks, pairs), b = order.tile(i, blocks, pairs);
        const int group_a = (a.batch * 5 + a.head) / 8, group_b = (b.batch * 5 + b.head) / 8;
        if (group_a == group_b) {
            EXPECT_GE(a.block, b.block);
        } else {
            EXPECT_EQ(group_b, group_a + 1);
            EXPECT_EQ(b.block, blocks - 1);
        }
    }
}

TEST(TileOrder, FullMasksFinishOneHeadBeforeTheNext) {
    const TileOrder order{4, 1, false};
    for (int i = 0; i < 3 * 8; ++i) {
        const TileIndex t = order.tile(i, 3, 8);
        EXPECT_EQ((t.batch * 4 + t.head) * 3 + t.block, i);
    }
}

TEST(SequenceCursor, FindsTheSequenceOfEachTile) {
    const std::vector<int> tiles = {3, 0, 0, 5, 1, 0};
    const auto tiles_of = [&](int b) { return tiles[static_cast<size_t>(b)]; };
    const std::vector<int> owner = {0, 0, 0, 3, 3, 3, 3, 3, 4};
    for (const int stride : {1, 2, 4}) {
        SequenceCursor cursor;
        for (int i = 0; i < 9; i += stride) {
            ASSERT_TRUE(cursor.seek(i, 6, tiles_of));
            EXPECT_EQ(cursor.batch, owner[static_cast<size_t>(i)]);
            EXPECT_EQ(cursor.first, cursor.batch == 0 ? 0 : cursor.batch == 3 ? 3 : 8);
        }
        EXPECT_FALSE(cursor.seek(9, 6, tiles_of));
        EXPECT_FALSE(cursor.seek(100, 6, tiles_of));
    }
    SequenceCursor none;
    EXPECT_FALSE(none.seek(0, 0, tiles_of));
}

}  // namespace
}  // namespace strobe
