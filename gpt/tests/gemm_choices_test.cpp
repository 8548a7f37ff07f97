#include "gpt/ops/gemm_choices.hpp"

#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "gpt/tests/io/temporary_folder.hpp"

namespace strobe::gpt::test {

namespace {

GemmChoice choice(uint64_t i) { return {{i, i << 40, 0, ~i, 0, 0, 1, 2}, 0.1f * static_cast<float>(i)}; }

}  // namespace

TEST(GemmChoices, another_process_finds_what_was_kept) {
    const TemporaryFolder folder;
    const std::filesystem::path file = folder.path() / "new" / "choices.txt";
    GemmChoices one(file), two(file);
    EXPECT_FALSE(one.find("a"));
    EXPECT_EQ(one.settle("a", choice(1)), choice(1));
    EXPECT_EQ(one.settle("b", choice(2)), choice(2));
    // The second looked at the file before; the first one's choice counts all the same.
    EXPECT_EQ(two.settle("a", choice(7)), choice(1));
    const GemmChoices three(file);
    EXPECT_EQ(three.find("a"), choice(1));
    EXPECT_EQ(three.find("b"), choice(2));
    two.replace("b", choice(5));
    EXPECT_EQ(GemmChoices(file).find("b"), choice(5));
}

TEST(GemmChoices, damaged_lines_are_passed_over) {
    const TemporaryFolder folder;
    const std::filesystem::path file = folder.path() / "choices.txt";
    GemmChoices one(file);
    for (uint64_t i = 1; i <= 4; ++i) one.settle("product" + std::to_string(i), choice(i));
    const std::string sound = read_file(file);
    for (size_t at = 0; at < sound.size(); at += 3) {
        std::string damaged = sound;
        damaged[at] = static_cast<char>(damaged[at] ^ 1);
        std::ofstream(file) << damaged;
        const GemmChoices read(file);
        int left = 0;
        for (uint64_t i = 1; i <= 4; ++i) {
            const std::optional<GemmChoice> found = read.find("product" + std::to_string(i));
            if (!found) continue;
            EXPECT_EQ(*found, choice(i)) << "byte " << at;
            ++left;
        }
        EXPECT_GE(left, 2) << "byte " << at;
        EXPECT_LE(left, 3) << "byte " << at;
    }
    for (const size_t length : {size_t{0}, size_t{20}, sound.size() / 2, sound.size() - 1}) {
        std::ofstream(file) << sound.substr(0, length);
        // What is added behind a torn line stands on a line of its own.
        GemmChoices torn(file);
        torn.settle("late", choice(9));
        EXPECT_EQ(GemmChoices(file).find("late"), choice(9)) << length;
    }
}

TEST(GemmChoices, without_a_file_they_live_as_long_as_the_object) {
    GemmChoices none, unwritable("/proc/none/choices.txt");
    for (GemmChoices* c : {&none, &unwritable}) {
        EXPECT_EQ(c->settle("a", choice(1)), choice(1));
        EXPECT_EQ(c->settle("a", choice(2)), choice(1));
        EXPECT_EQ(c->find("a"), choice(1));
    }
}

}  // namespace strobe::gpt::test
