// A peer in a process of its own: `strobe bench --vs torch` runs PyTorch beside strobe, in turn, on the same inputs.
#pragma once

#include <sys/types.h>

#include <cstdio>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace strobe::cli {

class Peer {
public:
    /// Starts `python` on the peer program. Throws Exit when it does not start.
    explicit Peer(const std::string& python);
    ~Peer();
    Peer(const Peer&) = delete;
    Peer& operator=(const Peer&) = delete;

    /// Sends a request and waits for the answer. Throws Exit when the peer has died.
    nlohmann::json ask(const nlohmann::json& request);

private:
    std::string python_;
    pid_t pid_ = -1;
    std::FILE* to_ = nullptr;
    std::FILE* from_ = nullptr;
};

}  // namespace strobe::cli
