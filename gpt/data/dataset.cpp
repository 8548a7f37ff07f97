#include "gpt/data/dataset.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <optional>
#include <thread>

#include <fmt/core.h>

#include "gpt/data/corpus.hpp"
#include "gpt/io/file_error.hpp"
#include "gpt/text/utf8.hpp"

namespace strobe::gpt {
namespace {

namespace fs = std::filesystem;

// Large enough to keep a thread busy, small enough that a file of any size needs little memory.
constexpr size_t kSliceBytes = size_t{1} << 20;
// Fewer held-out documents than this say little, and the ends of all documents are held out instead.
constexpr double kMinHeldOutDocuments = 8;

/// Tokenizes documents into one shard, slices of a document in parallel.
class ShardBuilder {
public:
    ShardBuilder(DurableFile& file, const ShardInfo& info, const Tokenizer& tokenizer, int num_threads) : writer_(file, info) {
        for (int i = 0; i < std::max(1, num_threads); ++i) encoders_.emplace_back(tokenizer);
        results_.resize(encoders_.size());
    }

    void add(std::string_view document) {
        if (document.empty()) return;
        writer_.begin_document();
        if (writer_.info().end_of_text >= 0) writer_.add(std::span(&writer_.info().end_of_text, 1));
        writer_.add_text_bytes(document.size());
        const std::vector<std::string_view> slices = slices_of(document, kSliceBytes);
        for (size_t first = 0; first < slices.size(); first += encoders_.size()) {
            const size_t count = std::min(encoders_.size(), slices.size() - first);
            encode(std::span(slices).subspan(first, count));
            for (size_t i = 0; i < count; ++i) writer_.add(results_[i]);
        }
    }

    void finish() { writer_.finish(); }

private:
    void encode(std::span<const std::string_view> slices) {
        std::vector<std::exception_ptr> failures(slices.size());
        const auto encode_one = [&](size_t i) {
            try {
                results_[i].clear();
                encoders_[i].encode(slices[i], results_[i]);
            } catch (...) {
                failures[i] = std::current_exception();
            }
        };
        {
            std::vector<std::jthread> threads;
            for (size_t i = 1; i < slices.size(); ++i) threads.emplace_back(encode_one, i);
            encode_one(0);
        }
        for (const std::exception_ptr& failure : failures) {
            if (failure) std::rethrow_exception(failure);
        }
    }

    TokenShardWriter writer_;
    std::deque<Encoder> encoders_;  // stay where they are
    std::vector<std::vector<TokenId>> results_;
};

/// Where the held-out end of a document starts: behind the line feed before the exact place, or else between
/// characters.
size_t held_out_cut(std::string_view document, double share) {
    const auto exact = static_cast<size_t>(static_cast<double>(document.size()) * (1.0 - share));
    const size_t line_end = document.rfind('\n', exact);
    if (line_end != std::string_view::npos && exact - line_end < 4096) return line_end + 1;
    return complete_utf8_prefix(document.substr(0, exact));
}

/// Hands every part of the corpus to one of the two visitors.
template <class Train, class HeldOut>
void split_corpus(const Corpus& corpus, double share, Train train, HeldOut held_out) {
    const bool by_document = share > 0 && static_cast<double>(corpus.num_documents()) * share >= kMinHeldOutDocuments;
    const auto every = static_cast<uint64_t>(by_document ? std::llround(1.0 / share) : 0);
    uint64_t index = 0;
    corpus.for_each_document([&](std::string_view document) {
        ++index;
        if (share == 0 || by_document) {
            if (by_document && index % every == 0) {
                held_out(document);
            } else {
                train(document);
            }
        } else {
            const size_t cut = held_out_cut(document, share);
            train(document.substr(0, cut));
            held_out(document.substr(cut));
        }
    });
}

void build_shards(const Corpus& corpus, const DatasetOptions& options, const Tokenizer& tokenizer, const fs::path& train_file,
                  const fs::path& held_out_file) {
    ShardInfo info;
    info.vocab_size = static_cast<uint64_t>(tokenizer.vocab_size());
    info.end_of_text = tokenizer.end_of_text();
    info.source_hash = corpus.content_hash();
    info.tokenizer_hash = tokenizer.fingerprint();
    write_file_atomically(train_file, [&](DurableFile& train_out) {
        write_file_atomically(held_out_file, [&](DurableFile& held_out_out) {
            ShardBuilder train(train_out, info, tokenizer, options.num_threads);
            ShardBuilder held_out(held_out_out, info, tokenizer, options.num_threads);
            uint64_t done = 0;
            const auto report = [&](std::string_view document) {
                done += document.size();
                if (options.progress) {
                    options.progress(static_cast<double>(done) / static_cast<double>(corpus.num_bytes()));
                }
            };
            split_corpus(corpus, options.held_out, [&](std::string_view d) { train.add(d), report(d); },
                         [&](std::string_view d) { held_out.add(d), report(d); });
            train.finish();
            held_out.finish();
        });
    });
}

/// A shard that is complete and belongs to this text and tokenizer; nothing otherwise.
std::optional<TokenShard> cached_shard(const fs::path& file, const Corpus& corpus, const Tokenizer& tokenizer) {
    if (!fs::exists(file)) return {};
    try {
        TokenShard shard(file);
        shard.verify();
        if (shard.info().source_hash != corpus.content_hash() || shard.info().tokenizer_hash != tokenizer.fingerprint()) return {};
        return shard;
    } catch (const FileError&) {
        return {};
    }
}

bool is_shard(const fs::path& file) { return file.extension() == ".bin" || file.extension() == ".tok"; }

void check_vocabulary(const TokenStream& stream, const fs::path& source, const Tokenizer& tokenizer) {
    for (const TokenShard& shard : stream.shards()) {
        const bool other_tokenizer = shard.info().tokenizer_hash != 0 && shard.info().tokenizer_hash != tokenizer.fingerprint();
        if (other_tokenizer || shard.info().vocab_size > static_cast<uint64_t>(tokenizer.vocab_size())) {
            throw FileError(source, fmt::format("was written with another tokenizer (its vocabulary has {} ids, this one {})",
                                                shard.info().vocab_size, tokenizer.vocab_size()));
        }
    }
}

Dataset load_shards(std::vector<fs::path> files, const fs::path& source, const Tokenizer& tokenizer) {
    std::sort(files.begin(), files.end());
    std::vector<TokenShard> train, held_out;
    XxHash64 fingerprint;
    for (const fs::path& file : files) {
        TokenShard shard(file);
        shard.verify();
        const bool is_held_out = files.size() > 1 && file.filename().string().find("val") != std::string::npos;
        std::vector<TokenId> tokens(std::min<uint64_t>(shard.info().num_tokens, 1 << 16));
        shard.read(0, tokens);
        fingerprint.update(shard.info().num_tokens);
        fingerprint.update(uint64_t{is_held_out});
        fingerprint.update(std::as_bytes(std::span(tokens)));
        (is_held_out ? held_out : train).push_back(std::move(shard));
    }
    Dataset dataset;
    dataset.train = TokenStream(std::move(train));
    dataset.held_out = TokenStream(std::move(held_out));
    dataset.fingerprint = fingerprint.digest();
    check_vocabulary(dataset.train, source, tokenizer);
    check_vocabulary(dataset.held_out, source, tokenizer);
    return dataset;
}

}  // namespace

fs::path default_cache_folder() {
    if (const char* own = std::getenv("STROBE_CACHE"); own != nullptr && *own != '\0') return own;
    if (const char* xdg = std::getenv("XDG_CACHE_HOME"); xdg != nullptr && *xdg != '\0') return fs::path(xdg) / "strobe";
    if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0') return fs::path(home) / ".cache" / "strobe";
    return fs::temp_directory_path() / "strobe-cache";
}

Dataset load_dataset(const DatasetOptions& options, const Tokenizer& tokenizer) {
    if (!(options.held_out >= 0.0 && options.held_out <= 0.5)) {
        throw std::invalid_argument(fmt::format("held_out is {}, must be between 0 and 0.5", options.held_out));
    }
    if (fs::is_directory(options.source)) {
        std::vector<fs::path> shards;
        for (const auto& entry : fs::directory_iterator(options.source)) {
            if (entry.path().extension() == ".bin") shards.push_back(entry.path());
        }
        if (!shards.empty()) return load_shards(std::move(shards), options.source, tokenizer);
    } else if (is_shard(options.source)) {
        return load_shards({options.source}, options.source, tokenizer);
    }

    const Corpus corpus(options.source);
    XxHash64 key;
    for (const uint64_t part : {corpus.content_hash(), tokenizer.fingerprint(), std::bit_cast<uint64_t>(options.held_out)}) key.update(part);
    Dataset dataset;
    dataset.fingerprint = key.digest();

    const fs::path folder = options.cache.empty() ? default_cache_folder() : options.cache;
    const std::string stem = options.source.stem().string() + "-" + to_hex(dataset.fingerprint);
    const fs::path train_file = folder / (stem + ".train.tok");
    const fs::path held_out_file = folder / (stem + ".held-out.tok");
    std::optional<TokenShard> train = cached_shard(train_file, corpus, tokenizer);
    std::optional<TokenShard> held_out = cached_shard(held_out_file, corpus, tokenizer);
    dataset.from_cache = train && held_out;
    if (!dataset.from_cache) {
        fs::create_directories(folder);
        build_shards(corpus, options, tokenizer, train_file, held_out_file);
        train.emplace(train_file);
        held_out.emplace(held_out_file);
    }
    const auto stream_of = [](TokenShard shard) {
        std::vector<TokenShard> shards;
        if (shard.info().num_tokens > 0) shards.push_back(std::move(shard));
        return TokenStream(std::move(shards));
    };
    dataset.train = stream_of(std::move(*train));
    dataset.held_out = stream_of(std::move(*held_out));
    return dataset;
}

}  // namespace strobe::gpt
