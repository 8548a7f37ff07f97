// Any bytes as a token shard, of strobe's format or llm.c's: refused with a FileError, or batches come out of it. The first
// byte chooses between a file as it is and tokens behind one of llm.c's headers, whose length and count no mutation meets.
#include <vector>

#include "fuzz_file.hpp"
#include "gpt/data/sampler.hpp"
#include "gpt/io/file_error.hpp"

namespace {

std::string behind_llm_c_header(bool wide, std::string_view tokens) {
    const int32_t header[3] = {wide ? 20240801 : 20240520, wide ? 7 : 1, static_cast<int32_t>(tokens.size() / (wide ? 4 : 2))};
    std::string file = bytes_of(header);
    file.resize(1024);
    return file.append(tokens.substr(0, static_cast<size_t>(header[2]) * (wide ? 4 : 2)));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace strobe::gpt;
    if (size == 0) return 0;
    const std::string_view given(reinterpret_cast<const char*>(data) + 1, size - 1);
    const FuzzFile file(data[0] % 3 == 0 ? std::string(given) : behind_llm_c_header(data[0] % 3 == 1, given));
    try {
        std::vector<TokenShard> shards;
        shards.emplace_back(file.path());
        const uint64_t num_tokens = shards[0].info().num_tokens;
        const TokenStream stream(std::move(shards));
        Batch batch;
        SequentialBatches all(stream, {.seqlen = 5}, 3);
        uint64_t targets = 0;
        while (all.next(batch)) {
            targets += batch.targets.size();
            if (batch.cu_seqlens.back() != static_cast<int32_t>(batch.tokens.size())) std::abort();
        }
        if (targets != (num_tokens == 0 ? 0 : num_tokens - 1)) std::abort();
        if (num_tokens > 5) {
            Sampler sampler(stream, {.row = {.seqlen = 5}, .batch_size = 2});
            for (int i = 0; i < 4; ++i) sampler.next(batch);
        }
    } catch (const FileError&) {
    }
    return 0;
}
