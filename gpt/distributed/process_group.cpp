#include "gpt/distributed/process_group.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "strobe/strobe.hpp"

namespace strobe::gpt {

namespace {

using Json = nlohmann::json;

constexpr double kGreetingSeconds = 5.0;  // for what is no process of ours and says nothing
constexpr size_t kGreetingBytes = 1 << 16;
constexpr int kExitFailed = 1;
constexpr std::string_view kLeft = "left", kFailed = "failed: ";

std::string this_process() {
    char host[256] = {};
    ::gethostname(host, sizeof host - 1);
    return fmt::format("process {} on {}", ::getpid(), host);
}

std::string greeting_of(const Launch& launch) {
    return Json{{"strobe", version()}, {"rank", launch.rank}, {"size", launch.size}, {"name", this_process()}}.dump();
}

/// Texts behind one another, each with its length in front.
std::string packed(const std::vector<std::string>& texts) {
    std::string result;
    for (const std::string& text : texts) {
        const auto length = static_cast<uint32_t>(text.size());
        result.append(reinterpret_cast<const char*>(&length), sizeof length).append(text);
    }
    return result;
}

void unpack(std::string_view from, std::vector<std::string>& texts) {
    for (std::string& text : texts) {
        uint32_t length = 0;
        if (from.size() < sizeof length) throw ConnectionError("rank 0 sent half a message");
        std::memcpy(&length, from.data(), sizeof length);
        from.remove_prefix(sizeof length);
        if (from.size() < length) throw ConnectionError("rank 0 sent half a message");
        text = from.substr(0, length);
        from.remove_prefix(length);
    }
}

std::string described(int rank, const std::string& name) { return fmt::format("rank {} ({})", rank, name); }

}  // namespace

ProcessGroup::ProcessGroup(const Launch& launch) : launch_(launch) {
    if (launch.rank == 0)
        meet_as_leader();
    else
        meet_leader();
    wake_fd_ = ::eventfd(0, EFD_CLOEXEC);  // behind what may throw
    if (wake_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    watcher_ = std::thread([this] { watch(); });
}

/// False for a connection that is none of ours. A contradiction goes into `problem`.
bool ProcessGroup::take_in(Socket socket, Socket Peer::*channel, std::string& problem) {
    try {
        const Json greeting = Json::parse(socket.receive_text(in_seconds(kGreetingSeconds), kGreetingBytes));
        const int rank = greeting.at("rank").get<int>(), size = greeting.at("size").get<int>();
        const std::string name = greeting.at("name").get<std::string>(), theirs = greeting.at("strobe").get<std::string>();
        const std::string who = described(rank, name);
        if (theirs != version())
            problem = fmt::format("{} is strobe {}, rank 0 is strobe {}", who, theirs, version());
        else if (size != launch_.size)
            problem = fmt::format("{} was started as one of {} processes, rank 0 ({}) as one of {}", who, size, this_process(), launch_.size);
        else if (rank < 1 || rank >= size)
            problem = rank == 0 ? fmt::format("two processes were started as rank 0: {} and {}", this_process(), name)
                                : fmt::format("{} cannot be one of {} processes", who, size);
        else if (Peer& peer = peers_[static_cast<size_t>(rank)]; peer.*channel)
            problem = fmt::format("two processes were started as rank {}: {} and {}", rank, peer.name, name);
        if (!problem.empty()) {
            socket.send_text(Json{{"error", problem}}.dump(), in_seconds(kGreetingSeconds));
            return true;
        }
        Peer& peer = peers_[static_cast<size_t>(rank)];
        const std::string host = socket.peer_host();
        // Who came by the loopback is on this machine; elsewhere that address means another.
        hosts_[static_cast<size_t>(rank)] = host.starts_with("127.") || host == "::1" ? "" : host;
        peer.name = name;
        peer.*channel = std::move(socket);
        return true;
    } catch (const ConnectionError&) {
        return false;
    } catch (const Json::exception&) {
        return false;
    }
}

/// Throws std::invalid_argument for a contradiction; otherwise returns who has not come in time.
std::string ProcessGroup::gather(const Listener& listener, Socket Peer::*channel, Deadline deadline) {
    std::string problem;
    for (int missing = launch_.size - 1; missing > 0;) {
        Socket socket = listener.accept(deadline);
        if (!socket) break;
        if (take_in(std::move(socket), channel, problem)) --missing;
        if (!problem.empty()) {
            greet_all(Json{{"error", problem}}.dump());
            throw std::invalid_argument(problem);
        }
    }
    std::string absent;
    for (int rank = 1; rank < launch_.size; ++rank)
        if (!(peers_[static_cast<size_t>(rank)].*channel)) absent += fmt::format("{}{}", absent.empty() ? "" : ", ", rank);
    return absent;
}

void ProcessGroup::greet_all(const std::string& text) noexcept {
    for (const Peer& peer : peers_) {
        if (!peer.control) continue;
        try {
            peer.control.send_text(text, in_seconds(kGreetingSeconds));
        } catch (const std::exception&) {
            // Who has gone again will be missed at once.
        }
    }
}

void ProcessGroup::meet_as_leader() {
    const Deadline deadline = in_seconds(launch_.timeout_seconds);
    const Listener listener = launch_.listening_fd >= 0
                                  ? Listener(launch_.listening_fd)
                                  : Listener(launch_.port, launch_.on_one_machine() && is_loopback(launch_.address));
    peers_.resize(static_cast<size_t>(launch_.size));
    hosts_.resize(peers_.size());
    std::string absent = gather(listener, &Peer::control, deadline);
    if (absent.empty()) {
        greet_all(Json{{"hosts", hosts_}, {"leader", this_process()}}.dump());
        absent = gather(listener, &Peer::watch, in_seconds(launch_.timeout_seconds));
        if (absent.empty()) return;
    }
    const std::string problem = fmt::format("of {} processes these did not come to {}:{} within {:.0f} s: rank {}", launch_.size,
                                            launch_.address, launch_.port, launch_.timeout_seconds, absent);
    greet_all(Json{{"error", problem}}.dump());
    throw ConnectionError(problem);
}

void ProcessGroup::meet_leader() {
    // Rank 0 is the first to say who is missing.
    const Deadline deadline = in_seconds(launch_.timeout_seconds + kGreetingSeconds);
    Peer leader;
    Json welcome;
    try {
        leader.control = connect(launch_.address, launch_.port, deadline);
        leader.control.send_text(greeting_of(launch_), deadline);
        welcome = Json::parse(leader.control.receive_text(deadline));
        if (!welcome.contains("error")) {
            leader.watch = connect(launch_.address, launch_.port, deadline);
            leader.watch.send_text(greeting_of(launch_), deadline);
            leader.name = welcome.at("leader").get<std::string>();
            hosts_ = welcome.at("hosts").get<std::vector<std::string>>();
        }
    } catch (const std::exception& e) {
        throw ConnectionError(fmt::format("rank {} does not reach rank 0 at {}:{} ({}): was it started, and there?", launch_.rank,
                                          launch_.address, launch_.port, e.what()));
    }
    if (welcome.contains("error")) throw std::invalid_argument(welcome["error"].get<std::string>());
    peers_.push_back(std::move(leader));
}

ProcessGroup::~ProcessGroup() {
    if (!failing_.exchange(true)) tell_all(kLeft, -1);
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(wake_fd_, &one, sizeof one);
    if (watcher_.joinable()) watcher_.join();
    ::close(wake_fd_);
}

std::vector<std::string> ProcessGroup::exchange(std::string_view mine) {
    std::vector<std::string> all(static_cast<size_t>(size()));
    if (leads()) {
        all[0] = mine;
        for (size_t r = 1; r < all.size(); ++r) all[r] = peers_[r].control.receive_text();
        const std::string together = packed(all);
        for (size_t r = 1; r < all.size(); ++r) peers_[r].control.send_text(together);
    } else {
        peers_.front().control.send_text(mine);
        unpack(peers_.front().control.receive_text(), all);
    }
    return all;
}

void ProcessGroup::sum(std::span<double> values) {
    const std::vector<std::string> all = exchange({reinterpret_cast<const char*>(values.data()), values.size_bytes()});
    std::fill(values.begin(), values.end(), 0.0);
    for (const std::string& text : all) {
        if (text.size() != values.size_bytes()) throw std::logic_error("the processes sum different numbers of values");
        for (size_t i = 0; i < values.size(); ++i) {
            double value = 0.0;
            std::memcpy(&value, text.data() + i * sizeof value, sizeof value);
            values[i] += value;
        }
    }
}

bool ProcessGroup::any(bool mine) {
    for (const std::string& text : exchange(mine ? "1" : ""))
        if (!text.empty()) return true;
    return false;
}

void ProcessGroup::tell_all(std::string_view verdict, int except) noexcept {
    for (size_t i = 0; i < peers_.size(); ++i) {
        if (!peers_[i].watch || static_cast<int>(i) == except) continue;
        try {
            peers_[i].watch.send_text(verdict, in_seconds(kGreetingSeconds));
        } catch (const std::exception&) {
            // It is gone already.
        }
    }
}

void ProcessGroup::fail(std::string_view why) noexcept {
    if (failing_.exchange(true)) return;
    try {
        tell_all(leads() ? fmt::format("{} failed: {}", described(0, this_process()), why) : fmt::format("{}{}", kFailed, why), -1);
    } catch (const std::exception&) {
        // Without memory for a message: the connection's end says enough.
    }
}

void ProcessGroup::await_verdict() const { std::this_thread::sleep_for(std::chrono::seconds(3)); }

/// Nothing when it left in order, else what is to be told.
std::string ProcessGroup::listen_to(Peer& peer, int rank) const {
    try {
        const std::string text = peer.watch.receive_text(in_seconds(kGreetingSeconds));
        peer.left = text == kLeft;
        if (peer.left) return "";
        return text.starts_with(kFailed) ? fmt::format("{} {}", described(rank, peer.name), text) : text;
    } catch (const ConnectionError& e) {
        return fmt::format("{} is gone: it was killed, has crashed, or its machine is out of reach ({})", described(rank, peer.name), e.what());
    }
}

void ProcessGroup::watch() noexcept {
    std::vector<pollfd> fds(peers_.size() + 1);
    for (;;) {
        fds.back() = {wake_fd_, POLLIN, 0};
        for (size_t i = 0; i < peers_.size(); ++i) fds[i] = {peers_[i].left ? -1 : peers_[i].watch.fd(), POLLIN, 0};
        if (::poll(fds.data(), fds.size(), -1) < 0) continue;
        if (fds.back().revents) return;
        for (size_t i = 0; i < peers_.size(); ++i) {
            if (!fds[i].revents || peers_[i].left) continue;
            const int rank = leads() ? static_cast<int>(i) : 0;
            const std::string verdict = listen_to(peers_[i], rank);
            if (verdict.empty()) continue;
            // This process fails by itself and says so.
            if (failing_.exchange(true)) return;
            if (leads()) tell_all(verdict, rank);
            const std::string line = fmt::format("strobe: rank {} of {} ends: {}\n", launch_.rank, launch_.size, verdict);
            [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
            // The other threads wait for numbers that nobody will send. A checkpoint under way is not there until it is
            // whole.
            ::_exit(kExitFailed);
        }
    }
}

std::unique_ptr<ProcessGroup> join_group(const Launch& launch) {
    return launch.size > 1 ? std::make_unique<ProcessGroup>(launch) : nullptr;
}

}  // namespace strobe::gpt
