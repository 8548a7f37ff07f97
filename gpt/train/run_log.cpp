#include "gpt/train/run_log.hpp"

#include <fstream>
#include <string>

#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"

namespace strobe::gpt {

RunLog::RunLog(const std::filesystem::path& file, int64_t keep_until) : path_(file) {
    std::string kept;
    if (std::ifstream old(file); old) {
        for (std::string text; std::getline(old, text);) {
            const auto line = nlohmann::ordered_json::parse(text, nullptr, false);
            // A line that was cut short by a kill is not JSON; it lies behind the checkpoint anyway.
            if (!line.is_object() || !line.contains("step") || !line["step"].is_number_integer()) continue;
            if (line["step"].get<int64_t>() > keep_until) continue;
            kept.append(text).push_back('\n');
            remember(line);
        }
    }
    file_.reset(std::fopen(file.c_str(), "w"));
    if (!file_) throw_system_error(file, "cannot write the log", errno);
    std::fputs(kept.c_str(), file_.get());
    std::fflush(file_.get());
}

void RunLog::write(const nlohmann::ordered_json& line) {
    remember(line);
    std::string text = line.dump();
    text.push_back('\n');
    if (std::fputs(text.c_str(), file_.get()) < 0 || std::fflush(file_.get()) != 0)
        throw_system_error(path_, "cannot write the log", errno);
}

void RunLog::remember(const nlohmann::ordered_json& line) {
    const auto number = [&](const char* key) { return line.contains(key) && line[key].is_number(); };
    if (!number("step")) return;
    const auto step = line["step"].get<int64_t>();
    if (number("loss")) training_.push_back({step, line["loss"].get<double>()});
    if (number("held_out_loss")) held_out_.push_back({step, line["held_out_loss"].get<double>()});
}

}  // namespace strobe::gpt
