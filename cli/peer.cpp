#include "peer.hpp"

#include <fmt/core.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "exit.hpp"
#include "torch_peer.hpp"

namespace strobe::cli {

Peer::Peer(const std::string& python) : python_(python) {
    int request[2], answer[2];
    if (pipe(request) != 0 || pipe(answer) != 0) throw Exit{kExitDevice, "--vs: cannot make a pipe"};
    pid_ = fork();
    if (pid_ < 0) throw Exit{kExitDevice, "--vs: cannot start a process"};
    if (pid_ == 0) {
        dup2(request[0], STDIN_FILENO);
        dup2(answer[1], STDOUT_FILENO);
        for (const int fd : {request[0], request[1], answer[0], answer[1]}) close(fd);
        // Its threads sleep while they have nothing to do: by default they spin, after a backward for more than 100 ms, and take
        // a core from whoever runs next. Its own times are the same.
        setenv("OMP_WAIT_POLICY", "passive", 0);
        execlp(python.c_str(), python.c_str(), "-c", kTorchPeerProgram, static_cast<char*>(nullptr));
        _exit(127);
    }
    close(request[0]);
    close(answer[1]);
    std::signal(SIGPIPE, SIG_IGN);
    to_ = fdopen(request[1], "w");
    from_ = fdopen(answer[0], "r");
}

Peer::~Peer() {
    std::fclose(to_);
    std::fclose(from_);
    waitpid(pid_, nullptr, 0);
}

nlohmann::json Peer::ask(const nlohmann::json& request) {
    std::fputs((request.dump() + "\n").c_str(), to_);
    std::fflush(to_);
    char* line = nullptr;
    size_t capacity = 0;
    const ssize_t length = getline(&line, &capacity, from_);
    const std::string text(line ? line : "", length > 0 ? static_cast<size_t>(length) : 0);
    std::free(line);
    if (length <= 0) {
        throw Exit{kExitDevice, fmt::format("--vs torch: {} stopped; it needs PyTorch (--python names another interpreter)",
                                            python_)};
    }
    return nlohmann::json::parse(text);
}

}  // namespace strobe::cli
