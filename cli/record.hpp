// What every JSON file that strobe writes begins with: which program, on which machine, called how.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace strobe::cli {

/// program, version, commit, command line, UTC time, machine. `kind` names the record: "info", "verify", "bench".
nlohmann::ordered_json record_header(const std::string& kind);

/// The machine: processor, threads that a call uses, memory, instruction sets.
nlohmann::ordered_json machine_json();

/// Throws Exit where write_json would, before the work is done. "" is no file and passes.
void check_writable(const std::string& path);

/// Writes through a temporary file, so that a reader never sees half of it. Throws Exit when the file cannot be written.
void write_json(const std::string& path, const nlohmann::ordered_json& json);

}  // namespace strobe::cli
