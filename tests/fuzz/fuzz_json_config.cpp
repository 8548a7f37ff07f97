// Any bytes as config.json: refused with a FileError, or a config whose sizes are usable and that survives being written.
#include <string_view>

#include <nlohmann/json.hpp>

#include "gpt/checkpoint/hf_config.hpp"
#include "gpt/io/file_error.hpp"
#include "gpt/parameters.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace strobe::gpt;
    try {
        const ModelConfig config = parse_hf_config({reinterpret_cast<const char*>(data), size}, "config.json");
        if (parse_hf_config(to_hf_config(config, 0).dump(), "again") != config) std::abort();
        if (config.num_layers <= 64) {
            const ParameterLayout layout(config);
            if (layout.num_elements() <= 0 || layout.arena_elements() < layout.num_elements()) std::abort();
        }
    } catch (const FileError&) {
    }
    return 0;
}
