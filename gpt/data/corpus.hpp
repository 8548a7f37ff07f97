// Text on disk as a sequence of documents.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string_view>
#include <vector>

namespace strobe::gpt {

/// A text file, or all text files below a folder: sorted by path, hidden ones and files with a NUL byte near their start left
/// out. "<|endoftext|>" inside a file ends one document and starts the next; the line feeds next to it belong to neither.
class Corpus {
public:
    /// Reads everything once. Throws FileError if there is no text.
    explicit Corpus(const std::filesystem::path& source);

    const std::filesystem::path& source() const { return source_; }
    uint64_t num_documents() const { return num_documents_; }
    uint64_t num_bytes() const { return num_bytes_; }
    /// Of the documents in order; not of file names or dates.
    uint64_t content_hash() const { return content_hash_; }

    /// Visits every document, empty ones left out. The text is valid during the call only.
    void for_each_document(const std::function<void(std::string_view)>& visit) const;

private:
    std::filesystem::path source_;
    std::vector<std::filesystem::path> files_;
    uint64_t num_documents_ = 0;
    uint64_t num_bytes_ = 0;
    uint64_t content_hash_ = 0;
};

/// Calls visit(document) for every non-empty document of a file's text.
void split_documents(std::string_view text, const std::function<void(std::string_view)>& visit);

/// Cuts `text` into slices of about `target_bytes` that encode apart as they do together: a cut lies behind a line feed that
/// has printable ASCII on both sides, which is a piece border in every published pattern.
std::vector<std::string_view> slices_of(std::string_view text, size_t target_bytes);

}  // namespace strobe::gpt
