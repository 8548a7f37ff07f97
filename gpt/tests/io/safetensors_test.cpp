// The reader against hand-made files, sound and not; the writer against the reader.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "gpt/checkpoint/safetensors.hpp"
#include "gpt/io/file_error.hpp"
#include "temporary_folder.hpp"

namespace strobe::gpt {
namespace {

std::string file_of(std::string_view header, size_t data_bytes) {
    const uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + std::string(header) + std::string(data_bytes, '\1');
}

void expect_refused(const std::string& contents, std::string_view part) {
    TemporaryFolder folder;
    write_file(folder / "m.safetensors", contents);
    EXPECT_THROW_WITH(SafetensorsFile(folder / "m.safetensors"), FileError, std::string(part));
    EXPECT_THROW_WITH(SafetensorsFile(folder / "m.safetensors"), FileError, "m.safetensors: ");
}

TEST(Safetensors, ReadsWhatTheWriterWrote) {
    TemporaryFolder folder;
    std::mt19937 random(1);
    std::vector<float> a(12), b(35);
    for (float& x : a) x = std::bit_cast<float>(static_cast<uint32_t>(random()));  // any bits, NaN included
    for (float& x : b) x = std::bit_cast<float>(static_cast<uint32_t>(random()));
    const std::vector<TensorToStore> tensors = {{"z", {3, 4}, a, false}, {"a.t", {5, 7}, b, true}, {"empty", {0, 3}, {}, false}};
    {
        DurableFile file(folder / "m");
        write_safetensors(file, tensors, {{"format", "pt"}});
        file.finish();
    }
    const SafetensorsFile file(folder / "m");
    EXPECT_EQ(file.metadata().at("format"), "pt");
    ASSERT_EQ(file.tensors().size(), 3u);
    const StoredTensor& z = *file.find("z");
    EXPECT_EQ(z.shape, (std::vector<int64_t>{3, 4}));
    EXPECT_EQ(std::memcmp(z.bytes.data(), a.data(), 48), 0);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(z.bytes.data()) % 8, 0u);
    const StoredTensor& t = *file.find("a.t");
    for (size_t i = 0; i < 5; ++i) {
        for (size_t j = 0; j < 7; ++j) {
            EXPECT_EQ(std::memcmp(t.bytes.data() + 4 * (i * 7 + j), &b[j * 5 + i], 4), 0);
        }
    }
    EXPECT_EQ(file.find("empty")->num_elements(), 0);
    EXPECT_EQ(file.find("missing"), nullptr);
}

TEST(Safetensors, WriterRefusesWrongShapesAndDoubleNames) {
    TemporaryFolder folder;
    DurableFile file(folder / "m");
    const std::vector<float> four(4);
    const std::vector<TensorToStore> wrong = {{"a", {5}, four}}, twice = {{"a", {4}, four}, {"a", {4}, four}};
    EXPECT_THROW_WITH(write_safetensors(file, wrong, {}), std::invalid_argument, "got 4 values");
    EXPECT_THROW_WITH(write_safetensors(file, twice, {}), std::invalid_argument, "given twice");
}

TEST(Safetensors, ConvertsEveryHalfAndBfloat16) {
    std::vector<uint16_t> bits(65536);
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
    std::vector<float> got(bits.size());
    StoredTensor tensor{StoredType::f16, {65536}, std::as_bytes(std::span(bits))};
    tensor.read_f32(0, got);
    for (size_t i = 0; i < bits.size(); ++i) {
        const int exponent = static_cast<int>(i >> 10 & 31);
        const double fraction = static_cast<double>(i & 1023);
        double expected = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
        if (exponent == 31) expected = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
        if (i & 0x8000) expected = -expected;
        if (std::isnan(expected)) {
            ASSERT_TRUE(std::isnan(got[i]));
        } else {
            ASSERT_EQ(static_cast<double>(got[i]), expected) << i;
            ASSERT_EQ(std::signbit(got[i]), (i & 0x8000) != 0);
        }
    }
    tensor.type = StoredType::bf16;
    tensor.read_f32(0, got);
    for (size_t i = 0; i < bits.size(); ++i) ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), i << 16);
    tensor.type = StoredType::i16;
    EXPECT_THROW_WITH(tensor.read_f32(0, got), std::invalid_argument, "I16 cannot be read as weights");
    EXPECT_THROW(tensor.read_f32(1, got), std::out_of_range);
}

TEST(Safetensors, AcceptsSoundFiles) {
    TemporaryFolder folder;
    const auto accept = [&](const std::string& contents) {
        write_file(folder / "m", contents);
        return SafetensorsFile(folder / "m").tensors().size();
    };
    EXPECT_EQ(accept(file_of("{}", 0)), 0u);
    EXPECT_EQ(accept(file_of(R"({"__metadata__":{"k":"v"}}   )", 0)), 0u);
    EXPECT_EQ(accept(file_of(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[3,5]},"b":{"dtype":"I8","shape":[3],"data_offsets":[0,3]}})", 5)), 2u);
    EXPECT_EQ(accept(file_of(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4)), 1u);
    EXPECT_EQ(accept(file_of(R"({"a":{"dtype":"F32","shape":[0,9],"data_offsets":[0,0]},"b":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})", 1)), 2u);
}

TEST(Safetensors, RefusesDamagedAndHostileFiles) {
    expect_refused("", "0 bytes are too few");
    expect_refused("1234567", "7 bytes are too few");
    expect_refused(std::string(8, '\xFF'), "exceeds the limit");
    expect_refused(file_of("{}", 0).substr(0, 9), "header of 2 bytes in a file of 9");
    expect_refused(file_of(std::string(R"([1])"), 0), "does not start with '{'");
    expect_refused(file_of(" {}", 0), "does not start with '{'");
    expect_refused(file_of("{\"a\":", 0), "is not valid JSON");
    expect_refused(file_of("{} x", 0), "is not valid JSON");
    expect_refused(file_of("{\"a\":[[[[[[1]]]]]]}", 0), "nested more than");
    expect_refused(file_of("{}", 3), "3 bytes at the end belong to no tensor");
    expect_refused(file_of(R"({"__metadata__":{"k":1}})", 0), "value of __metadata__ is not a string");
    expect_refused(file_of(R"({"__metadata__":[]})", 0), "__metadata__ is not an object");

    const auto one = [](std::string_view entry, size_t bytes) { return file_of(R"({"t":)" + std::string(entry) + "}", bytes); };
    expect_refused(one("3", 4), "tensor 't': its header entry is not an object");
    expect_refused(one(R"({"shape":[1],"data_offsets":[0,4]})", 4), "has no dtype");
    expect_refused(one(R"({"dtype":"F33","shape":[1],"data_offsets":[0,4]})", 4), "dtype 'F33' is unknown");
    expect_refused(one(R"({"dtype":4,"shape":[1],"data_offsets":[0,4]})", 4), "has no dtype");
    expect_refused(one(R"({"dtype":"F32","data_offsets":[0,4]})", 4), "shape is not a list");
    expect_refused(one(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})", 4), "shape is not a list");
    expect_refused(one(R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})", 4), "shape is not a list");
    expect_refused(one(R"({"dtype":"F32","shape":"1","data_offsets":[0,4]})", 4), "shape is not a list");
    expect_refused(one(R"({"dtype":"F32","shape":[1],"data_offsets":[0]})", 4), "data_offsets is not a list");
    expect_refused(one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})", 4), "data_offsets is not a list");
    expect_refused(one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})", 4), "data_offsets [4, 0) lie outside");
    expect_refused(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 4), "lie outside the file's 4 bytes");
    expect_refused(one(R"({"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551615]})", 4), "lie outside");
    expect_refused(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})", 4), "F32 of (2) needs 8 bytes, data_offsets give 4");
    expect_refused(one(R"({"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]})", 4), "overflows 64 bits");
    expect_refused(one(R"({"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]})", 0), "overflows 64 bits");
    expect_refused(one(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]})", 4), "an extent of 18446744073709551615");
    expect_refused(one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})", 8), "leaves a hole");
    const auto two = [](int a0, int a1, int b0, int b1, size_t bytes) {
        const auto entry = [](int begin, int end) {
            return R"({"dtype":"U8","shape":[)" + std::to_string(end - begin) + R"(],"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
        };
        return file_of(R"({"a":)" + entry(a0, a1) + R"(,"b":)" + entry(b0, b1) + "}", bytes);
    };
    expect_refused(two(0, 4, 2, 6, 6), "tensor 'b' overlaps");
    expect_refused(two(0, 4, 0, 4, 4), "tensor 'b' overlaps");
    expect_refused(two(0, 4, 5, 6, 6), "tensor 'b' leaves a hole");
    expect_refused(file_of(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2),
                   "key 'a' occurs twice");
}

TEST(Safetensors, EveryTruncationIsRefused) {
    TemporaryFolder folder;
    std::vector<float> values(20, 1.0f);
    {
        DurableFile file(folder / "m");
        write_safetensors(file, std::vector<TensorToStore>{{"a", {4, 5}, values}}, {{"format", "pt"}});
        file.finish();
    }
    const std::string whole = read_file(folder / "m");
    for (size_t length = 0; length < whole.size(); ++length) {
        write_file(folder / "cut", whole.substr(0, length));
        EXPECT_THROW(SafetensorsFile(folder / "cut"), FileError) << length;
    }
    write_file(folder / "long", whole + "x");
    EXPECT_THROW(SafetensorsFile(folder / "long"), FileError);
}

}  // namespace
}  // namespace strobe::gpt
