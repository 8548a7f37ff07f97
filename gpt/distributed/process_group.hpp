// The processes of a run know one another: each has a connection to rank 0 over which small things are exchanged, and a second
// one that a thread watches, so that the end of one process is the end of all, with a message that names the one.
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "gpt/distributed/launch.hpp"
#include "gpt/distributed/socket.hpp"

namespace strobe::gpt {

class ProcessGroup {
public:
    /// Waits until all processes of the launch are there. Throws std::invalid_argument where they contradict one another,
    /// ConnectionError where some do not come within the time-out.
    explicit ProcessGroup(const Launch& launch);
    ProcessGroup(const ProcessGroup&) = delete;
    ProcessGroup& operator=(const ProcessGroup&) = delete;
    /// Leaves in order: the others go on. After fail(): in silence.
    ~ProcessGroup();

    int rank() const { return launch_.rank; }
    int size() const { return launch_.size; }
    bool leads() const { return launch_.rank == 0; }
    const Launch& launch() const { return launch_; }
    /// The address at which this process reaches another.
    const std::string& host(int rank) const {
        const std::string& host = hosts_[static_cast<size_t>(rank)];
        return host.empty() ? launch_.address : host;
    }

    // All processes call these in the same order.

    /// What each gave, by rank.
    std::vector<std::string> exchange(std::string_view mine);
    void barrier() { exchange(""); }
    std::string from_leader(std::string_view text) { return exchange(leads() ? text : "").front(); }
    /// Sums over the processes, the same bits on each.
    void sum(std::span<double> values);
    bool any(bool mine);

    /// Tells the others why this process ends; they end with that message.
    void fail(std::string_view why) noexcept;
    /// After a ConnectionError: the watching thread may know whose end was the reason, and then ends this process.
    void await_verdict() const;

private:
    struct Peer {
        Socket control, watch;
        std::string name;  // for messages
        bool left = false;
    };
    void meet_as_leader();
    void meet_leader();
    std::string gather(const Listener& listener, Socket Peer::*channel, Deadline deadline);
    bool take_in(Socket socket, Socket Peer::*channel, std::string& problem);
    void greet_all(const std::string& text) noexcept;
    void watch() noexcept;
    std::string listen_to(Peer& peer, int rank) const;
    void tell_all(std::string_view verdict, int except) noexcept;

    Launch launch_;
    std::vector<std::string> hosts_;  // numeric; empty: rank 0's machine, for which each has its own name
    std::vector<Peer> peers_;  // rank 0: of all ranks, its own empty; others: rank 0
    int wake_fd_ = -1;
    std::atomic<bool> failing_ = false;
    std::thread watcher_;
};

/// Null for a single process.
std::unique_ptr<ProcessGroup> join_group(const Launch& launch);

}  // namespace strobe::gpt
