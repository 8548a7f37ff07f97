// TCP connections between the processes of a run. Every wait has an end: a deadline, or the other side's.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace strobe::gpt {

/// A connection that broke or did not come about: somebody else's end is behind it.
class ConnectionError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

using Deadline = std::optional<std::chrono::steady_clock::time_point>;  // none: as long as it takes
Deadline in_seconds(double seconds);

/// A connected socket; non-blocking underneath.
class Socket {
public:
    Socket() = default;
    explicit Socket(int fd);
    Socket(Socket&& other) noexcept;
    Socket& operator=(Socket&& other) noexcept;
    ~Socket();

    int fd() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    void close() noexcept;

    void send(std::span<const std::byte> bytes, Deadline deadline = {}) const;
    void receive(std::span<std::byte> bytes, Deadline deadline = {}) const;
    /// A text with its length in front. Throws ConnectionError for one above `max_bytes`: that is somebody else.
    void send_text(std::string_view text, Deadline deadline = {}) const;
    std::string receive_text(Deadline deadline = {}, size_t max_bytes = size_t{16} << 20) const;
    /// The other side's numeric address.
    std::string peer_host() const;

private:
    int fd_ = -1;
};

/// Sends and receives at the same time, so that two who send to each other cannot block.
void exchange(const Socket& to, std::span<const std::byte> send, const Socket& from, std::span<std::byte> receive);

class Listener {
public:
    /// port 0: a free one. `loopback`: for this machine only. Throws ConnectionError.
    Listener(int port, bool loopback);
    /// Takes over a socket that listens.
    explicit Listener(int fd);

    int port() const;
    int fd() const { return socket_.fd(); }
    /// Empty when the deadline has passed.
    Socket accept(Deadline deadline) const;

private:
    Socket socket_;
};

/// Tries again until somebody listens or the deadline has passed; then throws ConnectionError with the last reason.
Socket connect(const std::string& host, int port, Deadline deadline);

/// Whether whoever knows a name reaches who listens at 127.0.0.1 alone, and no other machine could mean this one by it.
bool is_loopback(const std::string& host);

}  // namespace strobe::gpt
