// Any bytes as a safetensors file: refused with a FileError, or every tensor it announces can be read.
#include <vector>

#include "fuzz_file.hpp"
#include "gpt/checkpoint/safetensors.hpp"
#include "gpt/io/file_error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace strobe::gpt;
    const FuzzFile file(data, size);
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
