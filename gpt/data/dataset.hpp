// From what a user names - text, folders of text, shards - to a training and a held-out stream of tokens, through a cache.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>

#include "gpt/data/sampler.hpp"
#include "gpt/tokenizer/tokenizer.hpp"

namespace strobe::gpt {

struct DatasetOptions {
    /// A text file, a folder of text files, a token shard (.tok, llm.c's .bin), or a folder of .bin files.
    std::filesystem::path source;
    /// Where token shards are kept; empty: default_cache_folder().
    std::filesystem::path cache;
    /// Share of the text that is never trained on. With enough documents every n-th document is held out (n = 1 / share);
    /// otherwise the last part of every document.
    double held_out = 0.1;
    int num_threads = 1;  // of the tokenization; the result does not depend on it
    /// Called with the share of the text that is tokenized.
    std::function<void(double)> progress;
};

struct Dataset {
    TokenStream train, held_out;  // held_out may be empty
    uint64_t fingerprint = 0;     // of the text, its tokenizer and the split: a resumed run must find the same
    bool from_cache = false;
};

/// Tokenizes the source, or takes the shards of an earlier call with the same text, tokenizer and split from the cache. Damaged
/// cache files are made anew. Of .bin files those with "val" in their name are held out; a single shard, or a folder of .bin
/// files without one for validation, has no held-out part. Throws FileError.
Dataset load_dataset(const DatasetOptions& options, const Tokenizer& tokenizer);

/// $STROBE_CACHE, $XDG_CACHE_HOME/strobe, ~/.cache/strobe, or strobe-cache in the folder for temporary files.
std::filesystem::path default_cache_folder();

}  // namespace strobe::gpt
