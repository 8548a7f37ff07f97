#include "gpt/data/corpus.hpp"

#include <algorithm>

#include "gpt/io/file_error.hpp"
#include "gpt/io/mapped_file.hpp"
#include "gpt/io/xxhash64.hpp"
#include "gpt/tokenizer/vocabulary.hpp"

namespace strobe::gpt {
namespace {

namespace fs = std::filesystem;

constexpr size_t kBinaryProbeBytes = 4096;

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

std::vector<fs::path> files_below(const fs::path& folder) {
    std::vector<fs::path> files;
    for (auto entry = fs::recursive_directory_iterator(folder); entry != fs::recursive_directory_iterator(); ++entry) {
        if (is_hidden(entry->path())) {
            if (entry->is_directory()) entry.disable_recursion_pending();
        } else if (entry->is_regular_file()) {
            files.push_back(entry->path());
        }
    }
    std::sort(files.begin(), files.end(),
              [](const fs::path& a, const fs::path& b) { return a.generic_string() < b.generic_string(); });
    return files;
}

bool is_printable(char c) { return c > ' ' && c < 0x7F; }

}  // namespace

void split_documents(std::string_view text, const std::function<void(std::string_view)>& visit) {
    bool after_separator = false;
    while (true) {
        const size_t separator = text.find(kEndOfText);
        std::string_view document = text.substr(0, separator);
        if (after_separator && document.starts_with('\n')) document.remove_prefix(1);
        if (separator != std::string_view::npos && document.ends_with('\n')) document.remove_suffix(1);
        if (!document.empty()) visit(document);
        if (separator == std::string_view::npos) return;
        text.remove_prefix(separator + kEndOfText.size());
        after_separator = true;
    }
}

std::vector<std::string_view> slices_of(std::string_view text, size_t target_bytes) {
    std::vector<std::string_view> slices;
    size_t begin = 0;
    while (text.size() - begin > target_bytes) {
        size_t cut = begin + target_bytes;
        while (cut < text.size() && !(text[cut - 1] == '\n' && is_printable(text[cut - 2]) && is_printable(text[cut]))) ++cut;
        slices.push_back(text.substr(begin, cut - begin));
        begin = cut;
    }
    if (begin < text.size()) slices.push_back(text.substr(begin));
    return slices;
}

Corpus::Corpus(const fs::path& source) : source_(source) {
    if (!fs::exists(source)) throw FileError(source, "does not exist; expected a text file or a folder of them");
    const std::vector<fs::path> candidates = fs::is_directory(source) ? files_below(source) : std::vector{source};
    for (const fs::path& file : candidates) {
        const MappedFile mapped(file);
        if (mapped.text().substr(0, kBinaryProbeBytes).find('\0') == std::string_view::npos) files_.push_back(file);
    }
    XxHash64 hash;
    for_each_document([&](std::string_view document) {
        ++num_documents_;
        num_bytes_ += document.size();
        hash.update(uint64_t{document.size()});
        hash.update(document);
    });
    content_hash_ = hash.digest();
    if (num_documents_ == 0) throw FileError(source, "holds no text");
}

void Corpus::for_each_document(const std::function<void(std::string_view)>& visit) const {
    for (const fs::path& file : files_) {
        const MappedFile mapped(file);
        mapped.expect_sequential_reads();
        split_documents(mapped.text(), visit);
    }
}

}  // namespace strobe::gpt
