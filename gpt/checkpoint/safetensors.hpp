// The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes. The reader maps the file and believes
// nothing: every name, type, shape and offset is checked before the first tensor is handed out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gpt/io/durable_file.hpp"
#include "gpt/io/mapped_file.hpp"

namespace strobe::gpt {

enum class StoredType { f64, f32, f16, bf16, f8_e4m3, f8_e5m2, i64, i32, i16, i8, u64, u32, u16, u8, boolean };

/// As the format spells it: "F32", "BF16", ...
std::string_view to_string(StoredType type);
size_t size_of(StoredType type);

std::string shape_to_string(std::span<const int64_t> shape);

struct StoredTensor {
    StoredType type = StoredType::f32;
    std::vector<int64_t> shape;
    std::span<const std::byte> bytes;  // row-major, little-endian, not necessarily aligned

    int64_t num_elements() const { return static_cast<int64_t>(bytes.size() / size_of(type)); }
    /// Elements [begin, begin + out.size()) as fp32. Throws std::invalid_argument if the type is not F32, F16, BF16 or F64.
    void read_f32(int64_t begin, std::span<float> out) const;
};

class SafetensorsFile {
public:
    /// Throws FileError that names the file, the tensor, and what is wrong with it.
    explicit SafetensorsFile(const std::filesystem::path& file);

    const std::filesystem::path& path() const { return file_.path(); }
    const std::map<std::string, StoredTensor, std::less<>>& tensors() const { return tensors_; }
    /// Null when there is no such tensor.
    const StoredTensor* find(std::string_view name) const;
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

private:
    MappedFile file_;
    std::map<std::string, StoredTensor, std::less<>> tensors_;
    std::map<std::string, std::string> metadata_;
};

/// A tensor to be written.
struct TensorToStore {
    std::string name;
    std::vector<int64_t> shape;  // as in the file
    std::span<const float> values;
    /// The memory holds the transpose: shape[1] rows of shape[0] numbers.
    bool transposed = false;
};

/// Writes fp32 tensors in the order given, their data 8-byte aligned. Metadata must contain what readers expect ("format": "pt").
void write_safetensors(DurableFile& file, std::span<const TensorToStore> tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace strobe::gpt
