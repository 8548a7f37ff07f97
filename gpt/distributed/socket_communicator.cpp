#include <sys/socket.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include <fmt/core.h>

#include "gpt/distributed/communicator.hpp"

namespace strobe::gpt {

namespace {

/// A connection to each other process. Those of higher rank knock at those of lower rank.
std::vector<Socket> connect_all(ProcessGroup& group) {
    struct Knock {
        uint64_t run = 0;
        int32_t rank = 0;
        int32_t unused = 0;
    };
    const Launch& launch = group.launch();
    const Listener listener(0, launch.on_one_machine() && is_loopback(launch.address));
    const uint64_t run = std::stoull(group.from_leader(std::to_string((uint64_t{std::random_device{}()} << 32) | std::random_device{}())));
    const std::vector<std::string> ports = group.exchange(std::to_string(listener.port()));
    const Deadline deadline = in_seconds(launch.timeout_seconds);

    std::vector<Socket> peers(static_cast<size_t>(group.size()));
    for (int rank = 0; rank < group.rank(); ++rank) {
        const auto r = static_cast<size_t>(rank);
        peers[r] = connect(group.host(rank), std::stoi(ports[r]), deadline);
        const Knock knock{run, group.rank()};
        peers[r].send(std::as_bytes(std::span(&knock, 1)), deadline);
    }
    for (int missing = group.size() - 1 - group.rank(); missing > 0;) {
        Socket socket = listener.accept(deadline);
        if (!socket) throw ConnectionError(fmt::format("{} processes of higher rank do not reach rank {} at {}:{}", missing, group.rank(),
                                                       group.host(group.rank()), listener.port()));
        try {
            Knock knock;
            socket.receive(std::as_writable_bytes(std::span(&knock, 1)), in_seconds(5.0));
            if (knock.run != run || knock.rank <= group.rank() || knock.rank >= group.size()) continue;
            peers[static_cast<size_t>(knock.rank)] = std::move(socket);
            --missing;
        } catch (const ConnectionError&) {
            // Somebody who is none of us.
        }
    }
    return peers;
}

class SocketCommunicator final : public Communicator {
public:
    explicit SocketCommunicator(ProcessGroup& group)
        : rank_(group.rank()), size_(group.size()), peers_(connect_all(group)), worker_([this](std::stop_token stop) { work(stop); }) {}

    // Whoever waits for bytes that nobody will send any more - there was an error - is told so.
    ~SocketCommunicator() override {
        for (const Socket& socket : peers_)
            if (socket) ::shutdown(socket.fd(), SHUT_RDWR);
    }

    void reduce_scatter(float* data, int64_t piece, Pace) override {
        ask([this, data, piece] {
            const auto count = static_cast<size_t>(piece);
            received_.resize(std::max(received_.size(), count));
            float* mine = data + rank_ * piece;
            each_pair([&](int to, int from) {
                gpt::exchange(peer(to), std::as_bytes(std::span(data + to * piece, count)), peer(from),
                              std::as_writable_bytes(std::span(received_.data(), count)));
                for (size_t i = 0; i < count; ++i) mine[i] += received_[i];
            });
        });
    }
    void all_gather(Buffer data, int64_t piece) override {
        ask([this, data, piece] {
            const auto bytes = static_cast<size_t>(piece) * size_of(data.precision);
            const auto at = [&](int rank) { return static_cast<std::byte*>(data.data) + static_cast<size_t>(rank) * bytes; };
            each_pair([&](int to, int from) { gpt::exchange(peer(to), {at(rank_), bytes}, peer(from), {at(from), bytes}); });
        });
    }
    void all_reduce(double* data, int64_t count) override {
        ask([this, data, count] {
            const auto n = static_cast<size_t>(count);
            std::vector<double> all(n * static_cast<size_t>(size_));
            const auto of = [&](int rank) { return std::span(all).subspan(n * static_cast<size_t>(rank), n); };
            std::copy_n(data, n, of(rank_).begin());
            each_pair([&](int to, int from) {
                gpt::exchange(peer(to), std::as_bytes(of(rank_)), peer(from), std::as_writable_bytes(of(from)));
            });
            std::fill_n(data, n, 0.0);
            for (int rank = 0; rank < size_; ++rank)
                for (size_t i = 0; i < n; ++i) data[i] += of(rank)[i];
        });
    }
    void join() override {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return tasks_.empty() || error_; });
        if (error_) std::rethrow_exception(error_);
    }
    std::string name() const override { return "sockets"; }

private:
    const Socket& peer(int rank) const { return peers_[static_cast<size_t>(rank)]; }

    /// A round for each distance between ranks: everybody sends to one and hears another, and sums in an order of their
    /// own that is the same every time.
    template <class Fn>
    void each_pair(Fn&& fn) const {
        for (int distance = 1; distance < size_; ++distance) {
            fn((rank_ + distance) % size_, (rank_ - distance + size_) % size_);
        }
    }

    void ask(std::function<void()> task) {
        {
            const std::lock_guard lock(mutex_);
            tasks_.push_back(std::move(task));
        }
        changed_.notify_all();
    }

    void work(const std::stop_token& stop) {
        std::unique_lock lock(mutex_);
        while (changed_.wait(lock, stop, [this] { return !tasks_.empty() && !error_; })) {
            const std::function<void()> task = tasks_.front();
            lock.unlock();
            std::exception_ptr error;
            try {
                task();
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            error_ = error;
            tasks_.pop_front();
            changed_.notify_all();
        }
    }

    int rank_, size_;
    std::vector<Socket> peers_;
    std::vector<float> received_;
    std::mutex mutex_;
    std::condition_variable_any changed_;
    std::deque<std::function<void()>> tasks_;  // the first is under way
    std::exception_ptr error_;
    std::jthread worker_;
};

}  // namespace

std::unique_ptr<Communicator> make_socket_communicator(ProcessGroup& group) { return std::make_unique<SocketCommunicator>(group); }

std::unique_ptr<Communicator> make_communicator(ProcessGroup& group, Backend& backend) {
    return backend.device() == Device::cpu ? make_socket_communicator(group) : cuda::make_nccl_communicator(group, backend.exec());
}

}  // namespace strobe::gpt
