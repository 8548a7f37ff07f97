// Any bytes as a safetensors file: refused with a FileError, or every tensor it announces can be read. The first byte chooses
// between a file as it is and one whose header's length is lent: mutations seldom keep the two in step. There the header ends
// at the first NUL, which no JSON holds.
#include <algorithm>
#include <vector>

#include "fuzz_file.hpp"
#include "gpt/checkpoint/safetensors.hpp"
#include "gpt/io/file_error.hpp"

namespace {

std::string with_header_length(std::string_view text) {
    const size_t end = std::min(text.find('\0'), text.size());
    return bytes_of(uint64_t{end}).append(text.substr(0, end)).append(text.substr(std::min(end + 1, text.size())));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace strobe::gpt;
    if (size == 0) return 0;
    const std::string_view given(reinterpret_cast<const char*>(data) + 1, size - 1);
    const FuzzFile file(data[0] % 2 == 0 ? std::string(given) : with_header_length(given));
    try {
        const SafetensorsFile opened(file.path());
        size_t total = 0;
        for (const auto& [name, tensor] : opened.tensors()) {
            total += tensor.bytes.size();
            std::vector<float> values(static_cast<size_t>(tensor.num_elements()));
            try {
                tensor.read_f32(0, values);
            } catch (const std::invalid_argument&) {
            }
            volatile std::byte sum{};
            for (const std::byte b : tensor.bytes) sum = sum ^ b;
        }
        if (total > size) std::abort();
    } catch (const FileError&) {
    }
    return 0;
}
