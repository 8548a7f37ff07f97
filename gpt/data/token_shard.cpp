#include "gpt/data/token_shard.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include <fmt/core.h>

#include "gpt/io/file_error.hpp"

namespace strobe::gpt {
namespace {

struct Header {
    std::array<char, 8> magic;
    uint32_t version;
    uint32_t bytes_per_token;
    uint64_t num_tokens;
    uint64_t num_documents;
    uint64_t num_text_bytes;
    uint64_t vocab_size;
    int64_t end_of_text;
    uint64_t source_hash;
    uint64_t tokenizer_hash;
    uint64_t hash;
};
static_assert(sizeof(Header) == 80 && std::is_trivially_copyable_v<Header>);

constexpr std::array<char, 8> kMagic = {'s', 't', 'r', 'o', 'b', 't', 'o', 'k'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHashedHeaderBytes = offsetof(Header, hash);

constexpr size_t kLlmcHeaderBytes = 1024;
struct LlmcFormat {
    int32_t magic, version;
    uint32_t bytes_per_token;
    TokenId end_of_text;
    uint64_t vocab_size;
};
constexpr std::array<LlmcFormat, 2> kLlmcFormats = {{{20240520, 1, 2, 50256, 50257}, {20240801, 7, 4, 128000, 128256}}};

uint64_t header_hash(const Header& header, uint64_t payload_hash) {
    XxHash64 hash;
    hash.update(std::as_bytes(std::span(&header, 1)).first(kHashedHeaderBytes));
    hash.update(payload_hash);
    return hash.digest();
}

uint64_t padded_to_8(uint64_t bytes) { return (bytes + 7) / 8 * 8; }

}  // namespace

TokenShard::TokenShard(const std::filesystem::path& file) : file_(file) {
    const std::span<const std::byte> bytes = file_.bytes();
    if (bytes.size() >= sizeof(Header) && std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0) {
        open_own();
    } else {
        open_llm_c();
    }
}

void TokenShard::open_own() {
    const auto refuse = [&](std::string_view problem) { throw FileError(path(), problem); };
    const std::span<const std::byte> bytes = file_.bytes();
    Header header;
    std::memcpy(&header, bytes.data(), sizeof header);
    if (header.version != kVersion) {
        refuse(fmt::format("token shard of version {}; this program reads version {}", header.version, kVersion));
    }
    if (header.bytes_per_token != 2 && header.bytes_per_token != 4) {
        refuse(fmt::format("{} bytes per token; expected 2 or 4", header.bytes_per_token));
    }
    const uint64_t payload = bytes.size() - sizeof(Header);
    // Bounding both counts first keeps the sizes below from wrapping.
    if (header.num_tokens > payload / header.bytes_per_token || header.num_documents > payload / 8 ||
        padded_to_8(header.num_tokens * header.bytes_per_token) + header.num_documents * 8 != payload) {
        refuse(fmt::format("{} bytes long, which does not fit its header ({} tokens of {} bytes, {} documents): truncated?", bytes.size(),
                           header.num_tokens, header.bytes_per_token, header.num_documents));
    }
    if (header.vocab_size == 0 || header.vocab_size > kMaxVocabSize) {
        refuse(fmt::format("vocabulary size of {}", header.vocab_size));
    }
    if (header.end_of_text < -1 || header.end_of_text >= static_cast<int64_t>(header.vocab_size)) {
        refuse(fmt::format("end-of-text token {} in a vocabulary of {}", header.end_of_text, header.vocab_size));
    }
    own_format_ = true;
    bytes_per_token_ = header.bytes_per_token;
    tokens_ = bytes.data() + sizeof(Header);
    const std::byte* starts = tokens_ + padded_to_8(header.num_tokens * header.bytes_per_token);
    starts_ = {reinterpret_cast<const uint64_t*>(starts), header.num_documents};
    if ((header.num_tokens > 0) != (header.num_documents > 0)) {
        refuse("tokens without documents, or documents without tokens");
    }
    for (size_t i = 0; i < starts_.size(); ++i) {
        if (starts_[i] >= header.num_tokens || (i == 0 ? starts_[0] != 0 : starts_[i] <= starts_[i - 1])) {
            refuse(fmt::format("document {} starts at token {}, out of order", i, starts_[i]));
        }
    }
    info_ = {header.num_tokens, header.num_documents, header.num_text_bytes, header.vocab_size,
             static_cast<TokenId>(header.end_of_text), header.source_hash, header.tokenizer_hash};
}

void TokenShard::open_llm_c() {
    const std::span<const std::byte> bytes = file_.bytes();
    std::array<int32_t, 3> header{};
    if (bytes.size() >= kLlmcHeaderBytes) std::memcpy(header.data(), bytes.data(), sizeof header);
    const auto format = std::find_if(kLlmcFormats.begin(), kLlmcFormats.end(), [&](const LlmcFormat& candidate) {
        return candidate.magic == header[0] && candidate.version == header[1];
    });
    if (format == kLlmcFormats.end()) throw FileError(path(), "is not a token shard (neither strobe's nor llm.c's)");
    const uint64_t payload = bytes.size() - kLlmcHeaderBytes;
    if (header[2] < 0 || static_cast<uint64_t>(header[2]) * format->bytes_per_token != payload) {
        throw FileError(path(), fmt::format("header announces {} tokens of {} bytes, the file holds {} bytes of them: truncated?",
                                            header[2], format->bytes_per_token, payload));
    }
    bytes_per_token_ = format->bytes_per_token;
    tokens_ = bytes.data() + kLlmcHeaderBytes;
    info_.num_tokens = static_cast<uint64_t>(header[2]);
    info_.vocab_size = format->vocab_size;
    info_.end_of_text = format->end_of_text;
}

TokenId TokenShard::token(uint64_t index) const {
    if (bytes_per_token_ == 2) return reinterpret_cast<const uint16_t*>(tokens_)[index];
    return static_cast<TokenId>(reinterpret_cast<const uint32_t*>(tokens_)[index]);
}

void TokenShard::read(uint64_t begin, std::span<TokenId> out) const {
    if (begin > info_.num_tokens || out.size() > info_.num_tokens - begin) {
        throw FileError(path(), fmt::format("tokens {} to {} are beyond its {}", begin, begin + out.size(), info_.num_tokens));
    }
    for (size_t i = 0; i < out.size(); ++i) {
        out[i] = token(begin + i);
        if (out[i] < 0 || static_cast<uint64_t>(out[i]) >= info_.vocab_size) {
            throw FileError(path(), fmt::format("token {} is {}, outside the vocabulary of {}", begin + i,
                                                static_cast<uint32_t>(out[i]), info_.vocab_size));
        }
    }
}

void TokenShard::document_starts(uint64_t begin, uint64_t end, std::vector<int32_t>& out) const {
    if (own_format_) {
        for (auto start = std::lower_bound(starts_.begin(), starts_.end(), begin); start != starts_.end() && *start < end; ++start) {
            out.push_back(static_cast<int32_t>(*start - begin));
        }
        return;
    }
    for (uint64_t i = begin; i < std::min(end, info_.num_tokens); ++i) {
        if (token(i) == info_.end_of_text) out.push_back(static_cast<int32_t>(i - begin));
    }
}

void TokenShard::verify() const {
    if (own_format_) {
        Header header;
        std::memcpy(&header, file_.bytes().data(), sizeof header);
        if (header_hash(header, xxhash64(file_.bytes().subspan(sizeof header))) != header.hash) {
            throw FileError(path(), "checksum does not match: the file is damaged; remove it to have it made anew");
        }
    }
    std::array<TokenId, 4096> block;
    for (uint64_t at = 0; at < info_.num_tokens; at += block.size()) {
        read(at, std::span(block).first(std::min<uint64_t>(block.size(), info_.num_tokens - at)));
    }
}

TokenShardWriter::TokenShardWriter(DurableFile& file, const ShardInfo& info)
    : file_(&file), info_(info), bytes_per_token_(info.vocab_size <= 0x10000 ? 2 : 4) {
    info_.num_tokens = info_.num_documents = info_.num_text_bytes = 0;
    const Header placeholder{};
    file_->write(std::as_bytes(std::span(&placeholder, 1)));
}

void TokenShardWriter::write(std::span<const std::byte> bytes) {
    payload_hash_.update(bytes);
    file_->write(bytes);
}

void TokenShardWriter::begin_document() {
    if (starts_.empty() || starts_.back() != info_.num_tokens) starts_.push_back(info_.num_tokens);
}

void TokenShardWriter::add(std::span<const TokenId> tokens) {
    info_.num_tokens += tokens.size();
    if (bytes_per_token_ == 4) return write(std::as_bytes(tokens));
    narrow_.assign(tokens.begin(), tokens.end());
    write(std::as_bytes(std::span(narrow_)));
}

void TokenShardWriter::finish() {
    // A document that got no token has no place of its own.
    if (!starts_.empty() && starts_.back() == info_.num_tokens) starts_.pop_back();
    info_.num_documents = starts_.size();
    const uint64_t token_bytes = info_.num_tokens * bytes_per_token_;
    const std::array<std::byte, 8> zeros{};
    write(std::span(zeros).first(padded_to_8(token_bytes) - token_bytes));
    write(std::as_bytes(std::span(starts_)));
    Header header{kMagic, kVersion, bytes_per_token_, info_.num_tokens, info_.num_documents, info_.num_text_bytes,
                  info_.vocab_size, info_.end_of_text, info_.source_hash, info_.tokenizer_hash, 0};
    header.hash = header_hash(header, payload_hash_.digest());
    file_->overwrite_start(std::as_bytes(std::span(&header, 1)));
}

}  // namespace strobe::gpt
