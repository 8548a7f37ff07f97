// Small sound inputs for the fuzzers of the trainer's readers, in the formats that the fuzz targets describe: a mutation of
// a sound file gets further than one of nothing.
//   fuzz_seeds FOLDER      writes FOLDER/fuzz_NAME/seed-...
#include <cstdio>
#include <fstream>
#include <iterator>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "fuzz_file.hpp"
#include "gpt/checkpoint/hf_config.hpp"
#include "gpt/checkpoint/safetensors.hpp"
#include "gpt/data/token_shard.hpp"

namespace strobe::gpt {

namespace {

namespace fs = std::filesystem;

class Seeds {
public:
    explicit Seeds(fs::path root) : root_(std::move(root)) { fs::create_directories(scratch()); }
    ~Seeds() { fs::remove_all(scratch()); }

    fs::path scratch() const { return root_ / ".scratch"; }

    void add(const std::string& target, const std::string& name, const std::string& bytes) const {
        fs::create_directories(root_ / target);
        std::ofstream(root_ / target / ("seed-" + name), std::ios::binary) << bytes;
    }

    /// What `write` writes into a file.
    template <class Write>
    std::string written(Write&& write) const {
        const fs::path path = scratch() / "file";
        fs::remove(path);
        DurableFile file(path);
        write(file);
        file.finish();
        return read(path);
    }

    static std::string read(const fs::path& path) {
        std::ifstream file(path, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }

private:
    fs::path root_;
};

std::string selected(uint8_t choice, const std::string& rest) { return static_cast<char>(choice) + rest; }

void add_safetensors(const Seeds& seeds) {
    const std::vector<float> values{1.0f, -2.0f, 3.5f, 0.0f, 5.0f, 6.0f};
    const std::vector<TensorToStore> tensors{{"a.weight", {2, 3}, values, false}, {"b", {2}, std::span(values).first(2), false}};
    const std::string file = seeds.written([&](DurableFile& out) { write_safetensors(out, tensors, {{"format", "pt"}}); });
    seeds.add("fuzz_safetensors", "raw", selected(0, file));
    constexpr size_t kBytes = 16;
    for (int type = 0; type <= static_cast<int>(StoredType::boolean); ++type) {
        const StoredType t = static_cast<StoredType>(type);
        const std::string header = fmt::format(R"({{"t":{{"dtype":"{}","shape":[{},1],"data_offsets":[0,{}]}}}})", to_string(t),
                                               kBytes / size_of(t), kBytes);
        seeds.add("fuzz_safetensors", std::string(to_string(t)), selected(1, header + '\0' + std::string(kBytes, 'x')));
    }
    const std::string two = R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                            R"("e":{"dtype":"F16","shape":[0,4],"data_offsets":[8,8]},"__metadata__":{"format":"pt"}})";
    seeds.add("fuzz_safetensors", "two", selected(1, two + std::string(9, '\0')));
}

void add_configs(const Seeds& seeds) {
    seeds.add("fuzz_json_config", "gpt2", to_hf_config(gpt2_config(2, 24, 3, 16, 257), 256).dump());
    seeds.add("fuzz_json_config", "llama", to_hf_config(llama_config(2, 32, 4, 2, 16, 257), -1).dump());
}

void add_shards(const Seeds& seeds) {
    for (const uint64_t vocab_size : {uint64_t{300}, uint64_t{100000}}) {
        const std::string file = seeds.written([&](DurableFile& out) {
            TokenShardWriter writer(out, {.vocab_size = vocab_size, .end_of_text = 256, .source_hash = 1, .tokenizer_hash = 2});
            for (const std::vector<TokenId>& document : {std::vector<TokenId>{256, 1, 2, 3, 4, 5, 6, 7}, std::vector<TokenId>{256, 9, 8}}) {
                writer.begin_document();
                writer.add(document);
                writer.add_text_bytes(document.size() - 1);
            }
            writer.finish();
        });
        seeds.add("fuzz_token_shard", std::to_string(vocab_size), selected(0, file));
    }
    const uint16_t narrow[] = {50256, 1, 2, 3, 50256, 4, 5, 6, 7};
    const uint32_t wide[] = {128000, 1, 2, 3, 128000, 4, 5, 6, 7};
    seeds.add("fuzz_token_shard", "wide", selected(1, bytes_of(wide)));
    seeds.add("fuzz_token_shard", "narrow", selected(2, bytes_of(narrow)));
}

// Small ones only, on the tokens that the fuzzer lends: a file with all of them is mutated where it matters too seldom.
void add_vocabularies(const Seeds& seeds) {
    const std::string text = "the thin thing then thanks the other; \xC3\xA9t\xC3\xA9 1234 don't";
    const std::string end = "\xFF" + text;
    seeds.add("fuzz_vocabulary", "gpt2-lent", selected(5, R"(,"th":256,"the":257,"<|endoftext|>":258)" "\1#version: 0.2\nt h\nth e\n" + end));
    seeds.add("fuzz_vocabulary", "tiktoken-lent", selected(3, "dGg= 256\ndGhl 257\n" + end));
    const std::string tokens = ",\"th\":256,\"the\":257\1", merges = "\"t h\",[\"th\",\"e\"]\1";
    const std::string added = R"({"content":"<|endoftext|>","id":258,"special":true})";
    const std::string byte_level = R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":true})";
    const std::string split = R"({"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\p{N}{1,3}|[^\\s\\d]+|\\s+(?!\\S)|\\s+"},)"
                              R"("behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]})";
    seeds.add("fuzz_vocabulary", "json-byte-level", selected(1, tokens + merges + byte_level + "\1" + added + end));
    seeds.add("fuzz_vocabulary", "json-split", selected(1, tokens + merges + split + "\1" + added + end));
}

}  // namespace

}  // namespace strobe::gpt

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
        return 2;
    }
    const strobe::gpt::Seeds seeds(argv[1]);
    strobe::gpt::add_safetensors(seeds);
    strobe::gpt::add_configs(seeds);
    strobe::gpt::add_shards(seeds);
    strobe::gpt::add_vocabularies(seeds);
}
