// The order in which the roles of the sm90 forward kernel wait for one another, as a model that runs without a GPU: the
// loaders and the consumers of one CTA, step by step, over tiles with and without keys. Whatever each holds while it waits,
// all must come to the end. The steps are those of forward_producer.cuh, forward_pipelined.cuh and forward_sequential.cuh.
#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace strobe {
namespace {

constexpr int kTileSlots = 4;

/// An mbarrier or a named barrier: a phase ends with the last of its arrivals.
struct ModelBarrier {
    int arrivals = 0, missing = 0, phases = 0;
};

enum class Consumers {
    sequential,
    pipelined,
    walking,  // as pipelined was once: looks for the next tile with keys before it finishes its own
    copying,  // the same, but copies its tile and gives back the slot
};

struct Plan {
    Consumers kind = Consumers::pipelined;
    int groups = 2, stages = 2, query_stages = 1;

    bool output_in_values() const { return kind != Consumers::sequential && query_stages == 1; }
};

/// One CTA on a sequence of tiles, each given by its number of key blocks. Every role is a list of waits and arrivals.
class Model {
public:
    Model(const Plan& plan, const std::vector<int>& tiles) : plan_(plan), tiles_(tiles) {
        load_queries_and_keys();
        load_values();
        for (int g = 0; g < plan.groups; ++g) plan.kind == Consumers::sequential ? consume_sequentially(g) : consume_pipelined(g);
    }

    /// Runs the roles in random turns. True if all come to their ends.
    bool ends(uint32_t seed) {
        std::mt19937 random(seed);
        std::vector<size_t> at(roles_.size(), 0);
        for (;;) {
            std::vector<size_t> able;
            bool done = true;
            for (size_t r = 0; r < roles_.size(); ++r) {
                if (at[r] == roles_[r].size()) continue;
                done = false;
                if (!roles_[r][at[r]].waits || complete(roles_[r][at[r]])) able.push_back(r);
            }
            if (done || able.empty()) return done;
            const size_t r = able[random() % able.size()];
            // Until it has to wait.
            for (; at[r] < roles_[r].size(); ++at[r]) {
                const Step& step = roles_[r][at[r]];
                if (step.waits) {
                    if (!complete(step)) break;
                } else if (--step.barrier->missing == 0) {
                    step.barrier->missing = step.barrier->arrivals;
                    ++step.barrier->phases;
                }
            }
        }
    }

private:
    struct Step {
        ModelBarrier* barrier;
        bool waits;
        int phase;       // waited for: its parity alone, as an mbarrier has it, ...
        bool by_number;  // ... or the phase itself, as whoever takes part in a named barrier
    };
    using Role = std::vector<Step>;

    static bool complete(const Step& s) {
        return s.by_number ? s.barrier->phases > s.phase : (s.barrier->phases & 1) != (s.phase & 1);
    }
    ModelBarrier* barrier(const char* name, int i, int arrivals) {
        auto [at, is_new] = barriers_.try_emplace({name, i});
        if (is_new) at->second = {arrivals, arrivals, 0};
        return &at->second;
    }
    static void wait(Role& r, ModelBarrier* b, int phase) { r.push_back({b, true, phase, false}); }
    static void arrive(Role& r, ModelBarrier* b) { r.push_back({b, false, 0, false}); }

    // Rings: item number `count` of a stream.
    ModelBarrier* full(const char* name, int size, int count) { return barrier(name, count % size, 1); }
    ModelBarrier* empty(const char* name, int size, int count) {
        const int loaders = std::string(name) == "tile empty" ? 1 : 0;
        return barrier(name, count % size, plan_.groups + loaders);
    }
    ModelBarrier* k_full(int n) { return full("k full", plan_.stages, n); }
    ModelBarrier* k_empty(int n) { return empty("k empty", plan_.stages, n); }
    ModelBarrier* v_full(int n) { return full("v full", plan_.stages, n); }
    ModelBarrier* v_empty(int n) { return empty("v empty", plan_.stages, n); }
    ModelBarrier* tile_full(int n) { return full("tile full", kTileSlots, n); }
    ModelBarrier* tile_empty(int n) { return empty("tile empty", kTileSlots, n); }
    ModelBarrier* q_full(int g, int n) { return barrier("q full", 2 * g + n % plan_.query_stages, 1); }
    ModelBarrier* q_empty(int g, int n) { return barrier("q empty", 2 * g + n % plan_.query_stages, 1); }

    void load_queries_and_keys() {
        Role r;
        int queries = 0, keys = 0;
        for (int t = 0; t <= num_tiles(); ++t) {
            wait(r, tile_empty(t), t / kTileSlots ^ 1);
            arrive(r, tile_full(t));
            if (t == num_tiles()) break;
            for (int n = tiles_[t] - 1; n >= 0; --n, ++keys) {
                wait(r, k_empty(keys), keys / plan_.stages ^ 1);
                arrive(r, k_full(keys));
                if (n != tiles_[t] - 1) continue;
                for (int g = 0; g < plan_.groups; ++g) {
                    wait(r, q_empty(g, queries), queries / plan_.query_stages ^ 1);
                    arrive(r, q_full(g, queries));
                }
                ++queries;
            }
        }
        roles_.push_back(r);
    }

    void load_values() {
        Role r;
        int values = 0;
        for (int t = 0; t <= num_tiles(); ++t) {
            wait(r, tile_full(t), t / kTileSlots);
            arrive(r, tile_empty(t));
            if (t == num_tiles()) break;
            const int lent = plan_.output_in_values() && tiles_[t] > 0 ? plan_.groups : 0;
            for (int n = 0; n < tiles_[t] + lent; ++n, ++values) {
                wait(r, v_empty(values), values / plan_.stages ^ 1);
                arrive(r, v_full(values));
            }
        }
        roles_.push_back(r);
    }

    struct Place {
        int tile = 0, query = 0, key = 0, value = 0, turns = 0;
    };

    void wait_tile(Role& r, const Place& p) { wait(r, tile_full(p.tile), p.tile / kTileSlots); }
    void wait_key(Role& r, const Place& p) { wait(r, k_full(p.key), p.key / plan_.stages); }
    void wait_value(Role& r, int count) { wait(r, v_full(count), count / plan_.stages); }
    void wait_turn(Role& r, int g, Place& p) {
        ModelBarrier* turn = barrier("turn", g, 2);
        arrive(r, turn);
        r.push_back({turn, true, p.turns++, true});
    }
    void pass_turn(Role& r, int from) { arrive(r, barrier("turn", (from + 1) % plan_.groups, 2)); }

    /// Answers tiles without keys; true at one that has some.
    bool find_tile(Role& r, Place& p) {
        for (;; ++p.tile) {
            wait_tile(r, p);
            if (p.tile == num_tiles()) return false;
            if (tiles_[p.tile] > 0) return true;
            arrive(r, tile_empty(p.tile));
        }
    }

    void consume_sequentially(int g) {
        Role r;
        Place p;
        for (; find_tile(r, p); ++p.tile, ++p.query) {
            wait(r, q_full(g, p.query), p.query / plan_.query_stages);
            for (int n = 0; n < tiles_[p.tile]; ++n, ++p.key, ++p.value) {
                wait_key(r, p);
                arrive(r, k_empty(p.key));
                wait_value(r, p.value);
                arrive(r, v_empty(p.value));
                if (n == 0 && p.query > 0) arrive(r, q_empty(g, p.query - 1));
            }
            arrive(r, tile_empty(p.tile));
        }
        roles_.push_back(r);
    }

    void start_scores(Role& r, int g, const Place& p) {
        wait(r, q_full(g, p.query), p.query / plan_.query_stages);
        wait_key(r, p);
    }
    void begin_tile(Role& r, int g, Place& p) {
        arrive(r, k_empty(p.key++));
        if (plan_.output_in_values() && tiles_[p.tile] == 1) arrive(r, q_empty(g, p.query));
    }
    void return_value_buffer(Role& r, int count) {
        wait_value(r, count);
        arrive(r, v_empty(count));
    }
    void finish_tile(Role& r, int g, Place& p, int tile) {
        arrive(r, v_empty(p.value++));
        if (plan_.output_in_values()) {
            for (int other = 0; other < g; ++other) return_value_buffer(r, p.value + other);
            wait_value(r, p.value + g);
        }
        if (plan_.kind != Consumers::copying) arrive(r, tile_empty(tile));
    }
    void release_staging(Role& r, int g, Place& p) {
        if (!plan_.output_in_values()) {
            arrive(r, q_empty(g, p.query - 1));
            return;
        }
        arrive(r, v_empty(p.value + g));
        for (int other = g + 1; other < plan_.groups; ++other) return_value_buffer(r, p.value + other);
        p.value += plan_.groups;
    }

    void consume_pipelined(int g) {
        Role r;
        Place p;
        if (g == 0) pass_turn(r, plan_.groups - 1);
        while (find_tile(r, p)) {
            wait_turn(r, g, p);
            start_scores(r, g, p);
            pass_turn(r, g);
            begin_tile(r, g, p);
            for (bool more = true; more;) {
                const int tile = p.tile;
                for (int n = tiles_[tile] - 2; n >= 0; --n) {
                    wait_key(r, p);
                    wait_turn(r, g, p);
                    wait_value(r, p.value);
                    pass_turn(r, g);
                    arrive(r, k_empty(p.key++));
                    arrive(r, v_empty(p.value++));
                    if (plan_.output_in_values() && n == 0) arrive(r, q_empty(g, p.query));
                }
                ++p.tile;
                if (plan_.kind == Consumers::copying) arrive(r, tile_empty(tile));
                if (plan_.kind != Consumers::pipelined) {
                    more = find_tile(r, p);
                } else {
                    wait_tile(r, p);
                    more = p.tile < num_tiles() && tiles_[p.tile] > 0;
                }
                wait_value(r, p.value);
                wait_turn(r, g, p);
                ++p.query;
                if (more) start_scores(r, g, p);
                pass_turn(r, g);
                finish_tile(r, g, p, tile);
                if (more) begin_tile(r, g, p);
                release_staging(r, g, p);
            }
        }
        roles_.push_back(r);
    }

    int num_tiles() const { return static_cast<int>(tiles_.size()); }

    const Plan plan_;
    const std::vector<int> tiles_;
    std::map<std::pair<std::string, int>, ModelBarrier> barriers_;
    std::deque<Role> roles_;
};

bool ends(const Plan& plan, const std::vector<int>& tiles, uint32_t seed = 1) { return Model(plan, tiles).ends(seed); }

std::vector<int> tiles_without_keys_behind(std::vector<int> tiles, int count) {
    tiles.insert(tiles.end(), static_cast<size_t>(count), 0);
    return tiles;
}

/// What the rows of variants.def make of it: consumers, stages, query buffers.
constexpr Plan kPlans[] = {
    {Consumers::pipelined, 2, 2, 1},  {Consumers::pipelined, 2, 2, 2},  {Consumers::pipelined, 2, 3, 1},  {Consumers::pipelined, 3, 4, 2},
    {Consumers::sequential, 2, 4, 2}, {Consumers::sequential, 4, 4, 2},
};

TEST(Sm90ForwardProtocol, EveryShortSequenceOfTilesEnds) {
    constexpr int kTiles = 6, kLengths = 4;
    for (const Plan& plan : kPlans) {
        for (int code = 0; code < 1 << 2 * kTiles; ++code) {
            std::vector<int> tiles;
            for (int t = 0; t < kTiles; ++t) tiles.push_back(code >> 2 * t & (kLengths - 1));
            ASSERT_TRUE(ends(plan, tiles, static_cast<uint32_t>(code))) << code;
        }
    }
}

TEST(Sm90ForwardProtocol, ManyTilesWithoutKeysEnd) {
    std::mt19937 random(7);
    for (const Plan& plan : kPlans) {
        for (int count = 0; count < 20; ++count) {
            for (const std::vector<int>& first : {std::vector<int>{}, {1}, {2}, {1, 3}, {5, 1}}) {
                std::vector<int> tiles = tiles_without_keys_behind(first, count);
                EXPECT_TRUE(ends(plan, tiles)) << count;
                tiles.push_back(2);
                EXPECT_TRUE(ends(plan, tiles)) << count;
            }
        }
        for (uint32_t seed = 0; seed < 300; ++seed) {
            std::vector<int> tiles(40);
            for (int& t : tiles) t = random() % 8 ? 0 : static_cast<int>(random() % 4);
            EXPECT_TRUE(ends(plan, tiles, seed)) << seed;
        }
    }
}

/// That the model sees what it is for: a consumer that walks on with its tile unfinished holds the tile's slot, or, having
/// copied it, stops the loader of values, which wants its last buffer back and passes no tile on before.
TEST(Sm90ForwardProtocol, WalkingWithAnUnfinishedTileStops) {
    const std::vector<int> few = tiles_without_keys_behind({1}, 2), many = tiles_without_keys_behind({1}, 8);
    for (Consumers kind : {Consumers::walking, Consumers::copying}) {
        for (int query_stages : {1, 2}) {
            const Plan plan{kind, 2, 2, query_stages};
            EXPECT_TRUE(ends(plan, few));
            EXPECT_EQ(ends(plan, many), kind == Consumers::copying && !plan.output_in_values());
        }
    }
}

}  // namespace
}  // namespace strobe
