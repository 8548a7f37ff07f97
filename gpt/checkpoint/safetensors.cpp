#include "gpt/checkpoint/safetensors.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/io/strict_json.hpp"

namespace strobe::gpt {
namespace {

using Json = nlohmann::json;

// The reference implementation's limit on the header.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxRank = 32;
constexpr size_t kMaxNameBytes = 1024;

struct TypeRow {
    StoredType type;
    std::string_view name;
    size_t size;
};
constexpr std::array<TypeRow, 15> kTypes = {{{StoredType::f64, "F64", 8},
                                             {StoredType::f32, "F32", 4},
                                             {StoredType::f16, "F16", 2},
                                             {StoredType::bf16, "BF16", 2},
                                             {StoredType::f8_e4m3, "F8_E4M3", 1},
                                             {StoredType::f8_e5m2, "F8_E5M2", 1},
                                             {StoredType::i64, "I64", 8},
                                             {StoredType::i32, "I32", 4},
                                             {StoredType::i16, "I16", 2},
                                             {StoredType::i8, "I8", 1},
                                             {StoredType::u64, "U64", 8},
                                             {StoredType::u32, "U32", 4},
                                             {StoredType::u16, "U16", 2},
                                             {StoredType::u8, "U8", 1},
                                             {StoredType::boolean, "BOOL", 1}}};

const TypeRow& row_of(StoredType type) { return kTypes[static_cast<size_t>(type)]; }

float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16;
    const uint32_t exponent = half >> 10 & 31u;
    const uint32_t fraction = half & 0x3FFu;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | fraction << 13);
    if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = static_cast<float>(fraction) * 0x1.0p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

template <class T>
T load(const std::byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

/// Reads one entry of the header into a tensor whose bytes lie in `data`.
class EntryReader {
public:
    EntryReader(const std::filesystem::path& file, std::span<const std::byte> data) : file_(file), data_(data) {}

    StoredTensor read(const std::string& name, const Json& entry) const {
        if (name.empty() || name.size() > kMaxNameBytes) {
            throw FileError(file_, "a tensor's name is empty or longer than 1024 bytes");
        }
        if (!entry.is_object()) refuse(name, "its header entry is not an object");
        StoredTensor tensor;
        tensor.type = read_type(name, entry);
        uint64_t expected_bytes = row_of(tensor.type).size;
        for (const Json& extent : array_field(name, entry, "shape", 0, kMaxRank)) {
            const uint64_t length = extent.get<uint64_t>();
            if (length > static_cast<uint64_t>(INT64_MAX)) refuse(name, fmt::format("an extent of {}", length));
            tensor.shape.push_back(static_cast<int64_t>(length));
            if (length != 0 && expected_bytes > std::numeric_limits<uint64_t>::max() / length) {
                refuse(name, "its shape overflows 64 bits");
            }
            expected_bytes *= length;
        }
        const Json& offsets = array_field(name, entry, "data_offsets", 2, 2);
        const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
        if (begin > end || end > data_.size()) {
            refuse(name, fmt::format("data_offsets [{}, {}) lie outside the file's {} bytes of data: truncated?", begin, end, data_.size()));
        }
        if (end - begin != expected_bytes) {
            refuse(name, fmt::format("{} of {} needs {} bytes, data_offsets give {}", row_of(tensor.type).name,
                                     shape_to_string(tensor.shape), expected_bytes, end - begin));
        }
        tensor.bytes = data_.subspan(begin, end - begin);
        return tensor;
    }

private:
    [[noreturn]] void refuse(const std::string& name, std::string_view problem) const {
        throw FileError(file_, fmt::format("tensor '{}': {}", name, problem));
    }

    StoredType read_type(const std::string& name, const Json& entry) const {
        const auto type = entry.find("dtype");
        if (type == entry.end() || !type->is_string()) refuse(name, "has no dtype");
        const std::string& text = type->get_ref<const std::string&>();
        for (const TypeRow& row : kTypes) {
            if (row.name == text) return row.type;
        }
        refuse(name, fmt::format("dtype '{}' is unknown", text.substr(0, 40)));
    }

    const Json& array_field(const std::string& name, const Json& entry, const char* field, size_t min, size_t max) const {
        const auto found = entry.find(field);
        if (found == entry.end() || !found->is_array() || found->size() < min || found->size() > max ||
            !std::all_of(found->begin(), found->end(), [](const Json& item) { return item.is_number_unsigned(); })) {
            refuse(name, fmt::format("{} is not a list of {} to {} whole numbers", field, min, max));
        }
        return *found;
    }

    const std::filesystem::path& file_;
    std::span<const std::byte> data_;
};

}  // namespace

std::string_view to_string(StoredType type) { return row_of(type).name; }
size_t size_of(StoredType type) { return row_of(type).size; }
std::string shape_to_string(std::span<const int64_t> shape) {
    std::string text;
    for (int64_t extent : shape) text += fmt::format("{}{}", text.empty() ? "" : ", ", extent);
    return "(" + text + ")";
}

void StoredTensor::read_f32(int64_t begin, std::span<float> out) const {
    if (begin < 0 || begin > num_elements() || static_cast<int64_t>(out.size()) > num_elements() - begin) {
        throw std::out_of_range("tensor elements outside its extent");
    }
    if (out.empty()) return;
    const std::byte* at = bytes.data() + static_cast<size_t>(begin) * size_of(type);
    const auto convert = [&](auto load_element) {
        for (size_t i = 0; i < out.size(); ++i) out[i] = load_element(at + i * size_of(type));
    };
    switch (type) {
        case StoredType::f32: std::memcpy(out.data(), at, out.size_bytes()); break;
        case StoredType::f64: convert([](const std::byte* p) { return static_cast<float>(load<double>(p)); }); break;
        case StoredType::f16: convert([](const std::byte* p) { return half_to_float(load<uint16_t>(p)); }); break;
        case StoredType::bf16:
            convert([](const std::byte* p) { return std::bit_cast<float>(uint32_t{load<uint16_t>(p)} << 16); });
            break;
        default: throw std::invalid_argument(fmt::format("{} cannot be read as weights; expected F32, F16, BF16 or F64", to_string(type)));
    }
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& file) : file_(file) {
    const std::span<const std::byte> bytes = file_.bytes();
    if (bytes.size() < 8) {
        throw FileError(file, fmt::format("{} bytes are too few for a safetensors file", bytes.size()));
    }
    const uint64_t header_bytes = load<uint64_t>(bytes.data());
    if (header_bytes > kMaxHeaderBytes) throw FileError(file, fmt::format("header length {} exceeds the limit of {}: not a safetensors file?", header_bytes, kMaxHeaderBytes));
    if (header_bytes > bytes.size() - 8) {
        throw FileError(file, fmt::format("header of {} bytes in a file of {}: truncated, or not a safetensors file", header_bytes, bytes.size()));
    }
    const std::string_view header_text = file_.text().substr(8, header_bytes);
    if (!header_text.starts_with('{')) throw FileError(file, "header does not start with '{': not a safetensors file");
    const Json header = parse_strict_json(header_text, file, {.max_bytes = kMaxHeaderBytes, .max_depth = 4});

    const std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
    const EntryReader reader(file_.path(), data);
    for (const auto& [name, entry] : header.items()) {
        if (name != "__metadata__") {
            tensors_.emplace(name, reader.read(name, entry));
            continue;
        }
        if (!entry.is_object()) throw FileError(file, "__metadata__ is not an object");
        for (const auto& [key, value] : entry.items()) {
            if (!value.is_string()) throw FileError(file, "a value of __metadata__ is not a string");
            metadata_.emplace(key, value.get<std::string>());
        }
    }

    // The format allows neither holes nor overlaps: in order of their offsets, tensors tile the data.
    std::vector<std::pair<const std::byte*, const std::string*>> order;
    for (const auto& [name, tensor] : tensors_) order.emplace_back(tensor.bytes.data(), &name);
    std::sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
        if (a.first != b.first) return a.first < b.first;
        return tensors_.at(*a.second).bytes.size() < tensors_.at(*b.second).bytes.size();  // empty tensors first
    });
    const std::byte* expected = data.data();
    for (const auto& [begin, name] : order) {
        if (begin != expected) {
            throw FileError(file, fmt::format("tensor '{}' {} its predecessor in the file", *name, begin < expected ? "overlaps" : "leaves a hole behind"));
        }
        expected += tensors_.at(*name).bytes.size();
    }
    if (expected != data.data() + data.size()) {
        throw FileError(file, fmt::format("{} bytes at the end belong to no tensor", data.data() + data.size() - expected));
    }
}

const StoredTensor* SafetensorsFile::find(std::string_view name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
}

void write_safetensors(DurableFile& file, std::span<const TensorToStore> tensors, const std::map<std::string, std::string>& metadata) {
    Json header = Json::object();
    header["__metadata__"] = metadata;
    uint64_t offset = 0;
    for (const TensorToStore& tensor : tensors) {
        int64_t elements = 1;
        for (const int64_t extent : tensor.shape) elements *= extent;
        if (elements != static_cast<int64_t>(tensor.values.size()) || (tensor.transposed && tensor.shape.size() != 2)) {
            throw std::invalid_argument(fmt::format("tensor '{}' of shape {} got {} values", tensor.name, shape_to_string(tensor.shape), tensor.values.size()));
        }
        const uint64_t end = offset + tensor.values.size_bytes();
        if (!header.emplace(tensor.name, Json{{"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}}).second) {
            throw std::invalid_argument(fmt::format("tensor '{}' is given twice", tensor.name));
        }
        offset = end;
    }
    std::string text = header.dump();
    text.append((8 - text.size() % 8) % 8, ' ');
    const uint64_t header_bytes = text.size();
    file.write_values(std::span(&header_bytes, 1));
    file.write(text);

    std::vector<float> row;
    for (const TensorToStore& tensor : tensors) {
        if (!tensor.transposed) {
            file.write_values(tensor.values);
            continue;
        }
        const auto rows = static_cast<size_t>(tensor.shape[0]), columns = static_cast<size_t>(tensor.shape[1]);
        row.resize(columns);
        for (size_t i = 0; i < rows; ++i) {
            for (size_t j = 0; j < columns; ++j) row[j] = tensor.values[j * rows + i];
            file.write_values(std::span<const float>(row));
        }
    }
}

}  // namespace strobe::gpt
