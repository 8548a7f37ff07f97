// Durable writing, mapping, and JSON that is not trusted.
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>

#include <nlohmann/json.hpp>

#include "gpt/io/durable_file.hpp"
#include "gpt/io/file_error.hpp"
#include "gpt/io/mapped_file.hpp"
#include "gpt/io/strict_json.hpp"
#include "temporary_folder.hpp"

namespace strobe::gpt {
namespace {

TEST(DurableFile, WritesHashesAndCountsPiecesOfAnySize) {
    TemporaryFolder folder;
    std::string expected = "HEAD";
    DurableFile file(folder / "f");
    file.write("head");
    for (size_t size : {1u, 1000u, 300000u, 5u, 262144u, 262143u}) {
        const std::string piece(size, static_cast<char>('a' + size % 26));
        expected += piece;
        file.write(piece);
    }
    EXPECT_EQ(file.hash(), xxhash64("head" + expected.substr(4)));
    EXPECT_EQ(file.size(), expected.size());
    file.overwrite_start(std::as_bytes(std::span("HEAD", 4)));
    file.finish();
    EXPECT_EQ(read_file(folder / "f"), expected);
}

TEST(DurableFile, NeverReplacesAFileThatIsThere) {
    TemporaryFolder folder;
    write_file(folder / "f", "old");
    EXPECT_THROW_WITH(DurableFile(folder / "f"), FileError, "cannot create");
    EXPECT_EQ(read_file(folder / "f"), "old");
}

TEST(DurableFile, AFailedAtomicWriteLeavesTheOldFileAndNothingElse) {
    TemporaryFolder folder;
    write_file(folder / "f", "old");
    EXPECT_THROW(write_file_atomically(folder / "f", [](DurableFile& file) {
                     file.write("half");
                     throw std::runtime_error("no more");
                 }),
                 std::runtime_error);
    EXPECT_EQ(read_file(folder / "f"), "old");
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
    write_file_atomically(folder / "f", [](DurableFile& file) { file.write("new"); });
    EXPECT_EQ(read_file(folder / "f"), "new");
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

TEST(DurableFile, AFullDiskIsReportedAndCleanedUp) {
    TemporaryFolder folder;
    // A limit on file sizes fails writes as a full disk does.
    struct rlimit before {};
    ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
    const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
    const struct rlimit small = {100000, before.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
    EXPECT_THROW_WITH(write_file_atomically(folder / "f", [](DurableFile& file) { file.write(std::string(500000, 'x')); }),
                      FileError, "cannot write");
    ::setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, old_handler);
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(MappedFile, RefusesWhatIsNoRegularFile) {
    TemporaryFolder folder;
    EXPECT_THROW_WITH(MappedFile(folder / "absent"), FileError, "absent: cannot open: No such file");
    EXPECT_THROW_WITH(MappedFile(folder.path()), FileError, "is not a regular file");
    ASSERT_EQ(::mkfifo((folder / "fifo").c_str(), 0600), 0);
    EXPECT_THROW_WITH(MappedFile(folder / "fifo"), FileError, "is not a regular file");
}

TEST(MappedFile, EmptyFilesAndMovesWork) {
    TemporaryFolder folder;
    write_file(folder / "empty", "");
    EXPECT_TRUE(MappedFile(folder / "empty").bytes().empty());
    write_file(folder / "f", "text");
    MappedFile a(folder / "f");
    MappedFile b(std::move(a));
    a = MappedFile(folder / "empty");
    EXPECT_EQ(b.text(), "text");
    EXPECT_EQ(a.text(), "");
}

nlohmann::json parse(std::string_view text) { return parse_strict_json(text, "f.json", {.max_bytes = 1000, .max_depth = 4}); }

TEST(StrictJson, BuildsWhatTheTextSays) {
    EXPECT_EQ(parse(R"({"a": [1, -2, 3.5, true, null, "x"], "b": {"c": {}, "d": []}, "e": 18446744073709551615})"),
              nlohmann::json::parse(R"({"a": [1, -2, 3.5, true, null, "x"], "b": {"c": {}, "d": []}, "e": 18446744073709551615})"));
    EXPECT_EQ(parse("3"), nlohmann::json(3));
    EXPECT_TRUE(parse("18446744073709551615").is_number_unsigned());
}

TEST(StrictJson, RefusesDamageAndTricks) {
    EXPECT_THROW_WITH(parse(R"({"a": 1, "b": 2, "a": 3})"), FileError, "f.json: key 'a' occurs twice");
    EXPECT_THROW_WITH(parse(R"({"a": {"x": 1}, "\u0061": 3})"), FileError, "key 'a' occurs twice");
    EXPECT_NO_THROW(parse(R"({"a": {"a": 1}, "b": {"a": 3}})"));
    EXPECT_THROW_WITH(parse("[[[[[1]]]]]"), FileError, "nested more than 4");
    EXPECT_NO_THROW(parse("[[[[1]]]]"));
    EXPECT_THROW_WITH(parse(std::string(1001, ' ')), FileError, "longer than the limit of 1000");
    for (const char* bad : {"", "{", "{\"a\": 1", "[1,]", "nul", "{} {}", "{\"a\": 01}", "\"\xFF\"", "{1: 2}", "[1e999]"}) {
        SCOPED_TRACE(bad);
        EXPECT_THROW_WITH(parse(bad), FileError, "is not valid JSON");
    }
}

}  // namespace
}  // namespace strobe::gpt
