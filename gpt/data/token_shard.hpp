// Token ids on disk, read through a memory map. Two formats.
//
// strobe's own (*.tok), little-endian:
//     offset  type        field
//          0  char[8]     magic "strobtok"
//          8  uint32      version = 1
//         12  uint32      bytes per token: 2 or 4
//         16  uint64      num_tokens
//         24  uint64      num_documents
//         32  uint64      num_text_bytes: length of the text that the tokens stand for
//         40  uint64      vocab_size: every token is below it
//         48  int64       end_of_text token, which starts every document; -1: none
//         56  uint64      source_hash: of the text
//         64  uint64      tokenizer_hash: Tokenizer::fingerprint()
//         72  uint64      XXH64 of bytes [0, 72) followed by the XXH64 of everything from byte 80 on
//         80  tokens, then zeros up to a multiple of 8, then uint64[num_documents]: the index of each document's first token,
//             strictly increasing from 0
//
// llm.c's (*.bin): 256 int32 of header - magic 20240520, version 1 (uint16 tokens, GPT-2) or magic 20240801, version 7 (uint32
// tokens, Llama 3), then the token count - and the tokens. Documents start at the end-of-text token.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "gpt/io/durable_file.hpp"
#include "gpt/io/mapped_file.hpp"
#include "gpt/tokenizer/vocabulary.hpp"

namespace strobe::gpt {

struct ShardInfo {
    uint64_t num_tokens = 0;
    uint64_t num_documents = 0;  // 0 in llm.c's format, which does not count them
    uint64_t num_text_bytes = 0; // likewise
    uint64_t vocab_size = 0;     // 0: unknown
    TokenId end_of_text = -1;
    uint64_t source_hash = 0;
    uint64_t tokenizer_hash = 0;
};

class TokenShard {
public:
    /// Checks the structure: every count against the file's size, document starts in order. Throws FileError.
    explicit TokenShard(const std::filesystem::path& file);

    const std::filesystem::path& path() const { return file_.path(); }
    const ShardInfo& info() const { return info_; }

    /// Copies tokens [begin, begin + out.size()). Throws FileError on a token outside the vocabulary.
    void read(uint64_t begin, std::span<TokenId> out) const;

    /// Appends the document starts in [begin, end), relative to `begin`.
    void document_starts(uint64_t begin, uint64_t end, std::vector<int32_t>& out) const;

    /// Reads everything and throws FileError if a single bit is not as it was written. llm.c's format has no checksum.
    void verify() const;

private:
    void open_own();
    void open_llm_c();
    TokenId token(uint64_t index) const;

    MappedFile file_;
    ShardInfo info_;
    uint32_t bytes_per_token_ = 2;
    const std::byte* tokens_ = nullptr;
    std::span<const uint64_t> starts_;
    bool own_format_ = false;
};

/// Writes strobe's format, document by document.
class TokenShardWriter {
public:
    /// `info` gives vocab_size, end_of_text and the hashes; the counts are the writer's.
    TokenShardWriter(DurableFile& file, const ShardInfo& info);

    void begin_document();
    void add(std::span<const TokenId> tokens);
    void add_text_bytes(uint64_t count) { info_.num_text_bytes += count; }
    /// Completes the file except for DurableFile::finish.
    void finish();

    const ShardInfo& info() const { return info_; }

private:
    void write(std::span<const std::byte> bytes);

    DurableFile* file_;
    ShardInfo info_;
    uint32_t bytes_per_token_;
    std::vector<uint64_t> starts_;
    std::vector<uint16_t> narrow_;
    XxHash64 payload_hash_;
};

}  // namespace strobe::gpt
