#include "gpt/io/strict_json.hpp"

#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/io/mapped_file.hpp"

namespace strobe::gpt {
namespace {

using Json = nlohmann::json;

/// Builds the document from parser events. nlohmann's own builder keeps the last of duplicate keys and has no depth
/// limit.
class StrictBuilder final : public Json::json_sax_t {
public:
    StrictBuilder(const std::filesystem::path& file, size_t max_depth) : file_(file), max_depth_(max_depth) {}

    bool null() override { return add(nullptr); }
    bool boolean(bool value) override { return add(value); }
    bool number_integer(number_integer_t value) override { return add(value); }
    bool number_unsigned(number_unsigned_t value) override { return add(value); }
    bool number_float(number_float_t value, const string_t&) override { return add(value); }
    bool string(string_t& value) override { return add(std::move(value)); }
    bool binary(binary_t&) override { return false; }

    bool start_object(size_t) override { return open(Json::object()); }
    bool start_array(size_t) override { return open(Json::array()); }
    bool end_object() override { return close(); }
    bool end_array() override { return close(); }

    bool key(string_t& key) override {
        if (open_.back()->contains(key)) {
            throw FileError(file_, "key '" + shorten(key) + "' occurs twice in one object");
        }
        key_ = std::move(key);
        return true;
    }

    bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
        throw FileError(file_, "is not valid JSON (byte " + std::to_string(position) + ")");
    }

    Json take() { return std::move(root_); }

private:
    static std::string shorten(const std::string& text) { return text.size() <= 80 ? text : text.substr(0, 80) + "..."; }

    Json* place(Json value) {
        if (open_.empty()) {
            root_ = std::move(value);
            return &root_;
        }
        Json& parent = *open_.back();
        if (parent.is_array()) {
            parent.push_back(std::move(value));
            return &parent.back();
        }
        return &(parent[std::exchange(key_, {})] = std::move(value));
    }

    template <class T>
    bool add(T&& value) {
        place(Json(std::forward<T>(value)));
        return true;
    }

    // Only the innermost open container grows, so the pointers to the outer ones stay valid.
    bool open(Json container) {
        if (open_.size() >= max_depth_) {
            throw FileError(file_, "JSON is nested more than " + std::to_string(max_depth_) + " levels deep");
        }
        open_.push_back(place(std::move(container)));
        return true;
    }

    bool close() {
        open_.pop_back();
        return true;
    }

    const std::filesystem::path& file_;
    size_t max_depth_;
    Json root_;
    std::vector<Json*> open_;
    std::string key_;
};

}  // namespace

Json parse_strict_json(std::string_view text, const std::filesystem::path& file, const JsonLimits& limits) {
    if (text.size() > limits.max_bytes) {
        throw FileError(file, "JSON of " + std::to_string(text.size()) + " bytes is longer than the limit of " +
                                  std::to_string(limits.max_bytes));
    }
    StrictBuilder builder(file, limits.max_depth);
    if (!Json::sax_parse(text.begin(), text.end(), &builder)) throw FileError(file, "is not valid JSON");
    return builder.take();
}

Json read_json_file(const std::filesystem::path& file, const JsonLimits& limits) {
    const MappedFile mapped(file);
    return parse_strict_json(mapped.text(), file, limits);
}

}  // namespace strobe::gpt
