// Any bytes as a token shard, of strobe's format or llm.c's: refused with a FileError, or batches come out of it.
#include <vector>

#include "fuzz_file.hpp"
#include "gpt/data/sampler.hpp"
#include "gpt/io/file_error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace strobe::gpt;
    const FuzzFile file(data, size);
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
