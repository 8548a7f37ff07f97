#include "gpt/distributed/spawn.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "gpt/distributed/socket.hpp"

namespace strobe::gpt {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kExitInterrupted = 128 + SIGINT;  // the others may still be saving
constexpr auto kGrace = std::chrono::seconds(5);

std::vector<std::string> own_arguments() {
    std::ifstream file("/proc/self/cmdline", std::ios::binary);
    std::vector<std::string> arguments;
    for (std::string argument; std::getline(file, argument, '\0');) arguments.push_back(argument);
    return arguments;
}

/// This process's environment with the variables of one rank.
std::vector<std::string> environment_of(int rank, int count, int port, int listening_fd) {
    const std::pair<std::string_view, std::string> ours[] = {
        {"RANK", std::to_string(rank)},           {"WORLD_SIZE", std::to_string(count)},
        {"LOCAL_RANK", std::to_string(rank)},     {"LOCAL_WORLD_SIZE", std::to_string(count)},
        {"MASTER_ADDR", "127.0.0.1"},             {"MASTER_PORT", std::to_string(port)},
        {"TORCHELASTIC_USE_AGENT_STORE", "False"}, {"STROBE_RENDEZVOUS_FD", rank == 0 ? std::to_string(listening_fd) : ""}};
    std::vector<std::string> result;
    for (char** entry = environ; *entry; ++entry) {
        const std::string_view text(*entry);
        bool replaced = false;
        for (const auto& [name, value] : ours) {
            replaced |= text.starts_with(name) && text.substr(name.size()).starts_with('=');
        }
        if (!replaced) result.emplace_back(text);
    }
    for (const auto& [name, value] : ours) result.push_back(fmt::format("{}={}", name, value));
    return result;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
    std::vector<char*> result;
    for (std::string& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
}

sigset_t signals_of(std::initializer_list<int> signals) {
    sigset_t set;
    sigemptyset(&set);
    for (const int signal : signals) sigaddset(&set, signal);
    return set;
}

class Children {
public:
    Children(int count, const sigset_t& mask) {
        const Listener listener(0, true);
        const int port = listener.port(), fd = ::fcntl(listener.fd(), F_DUPFD, 3);  // this copy outlives an exec
        std::vector<std::string> arguments = own_arguments();
        const std::vector<char*> argv = pointers(arguments);
        const pid_t parent = ::getpid();
        for (int rank = 0; rank < count; ++rank) {
            std::vector<std::string> environment = environment_of(rank, count, port, fd);
            const std::vector<char*> envp = pointers(environment);
            const pid_t pid = ::fork();
            if (pid < 0) {
                const int error = errno;
                signal_all(SIGKILL);
                throw std::system_error(error, std::generic_category(), "fork");
            }
            if (pid == 0) {
                // A group of its own: Ctrl-C reaches a child once, from the parent.
                ::setpgid(0, 0);
                ::prctl(PR_SET_PDEATHSIG, SIGTERM);
                if (::getppid() != parent) ::_exit(1);
                ::sigprocmask(SIG_SETMASK, &mask, nullptr);
                if (rank != 0) ::close(fd);
                ::execve("/proc/self/exe", argv.data(), envp.data());
                ::_exit(127);
            }
            pids_.push_back(pid);
        }
        ::close(fd);
    }

    bool any() const {
        for (const pid_t pid : pids_)
            if (pid > 0) return true;
        return false;
    }
    void signal_all(int signal) const {
        for (const pid_t pid : pids_)
            if (pid > 0) ::kill(pid, signal);
    }
    /// Takes note of those that have ended.
    void reap() {
        for (size_t rank = 0; rank < pids_.size(); ++rank) {
            int status = 0;
            if (pids_[rank] <= 0 || ::waitpid(pids_[rank], &status, WNOHANG) != pids_[rank]) continue;
            pids_[rank] = 0;
            const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            if (code == 0 || (status_ != 0 && status_ != kExitInterrupted)) continue;
            status_ = code;
            if (WIFSIGNALED(status))
                fmt::print(stderr, "strobe: rank {} was ended by signal {} ({})\n", rank, WTERMSIG(status), ::strsignal(WTERMSIG(status)));
            if (code != kExitInterrupted) deadline_ = Clock::now() + kGrace;
        }
    }
    /// Ends those that a failure has left behind.
    void enforce() {
        if (Clock::now() < deadline_) return;
        signal_all(last_warning_ ? SIGKILL : SIGTERM);
        last_warning_ = true;
        deadline_ = Clock::now() + kGrace;
    }
    int status() const { return status_; }

private:
    std::vector<pid_t> pids_;  // 0: has ended
    int status_ = 0;
    Clock::time_point deadline_ = Clock::time_point::max();
    bool last_warning_ = false;
};

}  // namespace

int run_as_processes(int count) {
    const sigset_t waited = signals_of({SIGINT, SIGTERM, SIGHUP, SIGCHLD});
    sigset_t before;
    ::sigprocmask(SIG_BLOCK, &waited, &before);
    Children children(count, before);
    while (children.any()) {
        const timespec pause{0, 200'000'000};
        const int signal = ::sigtimedwait(&waited, nullptr, &pause);
        if (signal > 0 && signal != SIGCHLD) children.signal_all(signal);
        children.reap();
        children.enforce();
    }
    ::sigprocmask(SIG_SETMASK, &before, nullptr);
    return children.status();
}

}  // namespace strobe::gpt
