#include "gpt/distributed/socket.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include <fmt/core.h>

namespace strobe::gpt {

namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const char* what, int error) { throw ConnectionError(fmt::format("{}: {}", what, std::strerror(error))); }

/// For poll: milliseconds left, rounded up; -1 without a deadline.
int milliseconds_left(Deadline deadline) {
    if (!deadline) return -1;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(*deadline - Clock::now()).count();
    return static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30));
}

/// False when the deadline has passed.
bool wait_for(std::span<pollfd> fds, Deadline deadline) {
    for (;;) {
        const int ready = ::poll(fds.data(), fds.size(), milliseconds_left(deadline));
        if (ready > 0) return true;
        if (ready == 0) return false;
        if (errno != EINTR) fail("poll", errno);
    }
}

void wait_for(int fd, short events, Deadline deadline) {
    pollfd entry{fd, events, 0};
    if (!wait_for({&entry, 1}, deadline)) throw ConnectionError("timed out");
}

/// Bytes moved, 0 when it would block.
size_t send_some(int fd, std::span<const std::byte> bytes) {
    const ssize_t sent = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent >= 0) return static_cast<size_t>(sent);
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return 0;
    fail("sending", errno);
}

size_t receive_some(int fd, std::span<std::byte> bytes) {
    const ssize_t received = ::recv(fd, bytes.data(), bytes.size(), 0);
    if (received > 0) return static_cast<size_t>(received);
    if (received == 0) throw ConnectionError("closed by the other side");
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return 0;
    fail("receiving", errno);
}

void set_option(int fd, int level, int option, int value) { ::setsockopt(fd, level, option, &value, sizeof value); }

struct FreeAddresses {
    void operator()(addrinfo* list) const { ::freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

Addresses resolve(const std::string& host, int port, std::string* problem) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* list = nullptr;
    const int status = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list);
    if (status != 0 && problem) *problem = ::gai_strerror(status);
    return Addresses(status == 0 ? list : nullptr);
}

}  // namespace

Deadline in_seconds(double seconds) {
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// A machine that vanishes without a word is noticed after about a minute and a half.
Socket::Socket(int fd) : fd_(fd) {
    ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 30);
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 15);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 4);
}

Socket::Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Socket& Socket::operator=(Socket&& other) noexcept {
    close();
    fd_ = std::exchange(other.fd_, -1);
    return *this;
}

Socket::~Socket() { close(); }

void Socket::close() noexcept {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

void Socket::send(std::span<const std::byte> bytes, Deadline deadline) const {
    while (!bytes.empty()) {
        const size_t sent = send_some(fd_, bytes);
        bytes = bytes.subspan(sent);
        if (sent == 0) wait_for(fd_, POLLOUT, deadline);
    }
}

void Socket::receive(std::span<std::byte> bytes, Deadline deadline) const {
    while (!bytes.empty()) {
        const size_t received = receive_some(fd_, bytes);
        bytes = bytes.subspan(received);
        if (received == 0) wait_for(fd_, POLLIN, deadline);
    }
}

void Socket::send_text(std::string_view text, Deadline deadline) const {
    const auto length = static_cast<uint32_t>(text.size());
    std::string message(reinterpret_cast<const char*>(&length), sizeof length);
    message += text;
    send(std::as_bytes(std::span(message)), deadline);
}

std::string Socket::receive_text(Deadline deadline, size_t max_bytes) const {
    uint32_t length = 0;
    receive(std::as_writable_bytes(std::span(&length, 1)), deadline);
    if (length > max_bytes) throw ConnectionError(fmt::format("a message of {} bytes", length));
    std::string text(length, '\0');
    receive(std::as_writable_bytes(std::span(text)), deadline);
    return text;
}

std::string Socket::peer_host() const {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    char host[NI_MAXHOST] = {};
    if (::getpeername(fd_, reinterpret_cast<sockaddr*>(&address), &size) != 0) fail("getpeername", errno);
    if (::getnameinfo(reinterpret_cast<sockaddr*>(&address), size, host, sizeof host, nullptr, 0, NI_NUMERICHOST) != 0)
        throw ConnectionError("the other side has no address");
    constexpr std::string_view kMapped = "::ffff:";  // an IPv4 address at a socket for both
    return std::string_view(host).starts_with(kMapped) ? host + kMapped.size() : host;
}

void exchange(const Socket& to, std::span<const std::byte> send, const Socket& from, std::span<std::byte> receive) {
    while (!send.empty() || !receive.empty()) {
        const size_t sent = send.empty() ? 0 : send_some(to.fd(), send);
        const size_t received = receive.empty() ? 0 : receive_some(from.fd(), receive);
        send = send.subspan(sent);
        receive = receive.subspan(received);
        if (sent > 0 || received > 0) continue;
        pollfd fds[] = {{send.empty() ? -1 : to.fd(), POLLOUT, 0}, {receive.empty() ? -1 : from.fd(), POLLIN, 0}};
        wait_for(fds, {});
    }
}

Listener::Listener(int port, bool loopback) : socket_(::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    // One socket for both versions of IP; where the machine has no IPv6, one for IPv4.
    if (socket_ && !loopback) {
        set_option(socket_.fd(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
        set_option(socket_.fd(), SOL_SOCKET, SO_REUSEADDR, 1);
        sockaddr_in6 any{};
        any.sin6_family = AF_INET6;
        any.sin6_addr = in6addr_any;
        any.sin6_port = htons(static_cast<uint16_t>(port));
        if (::bind(socket_.fd(), reinterpret_cast<sockaddr*>(&any), sizeof any) == 0 && ::listen(socket_.fd(), SOMAXCONN) == 0) return;
    }
    socket_ = Socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!socket_) fail("socket", errno);
    set_option(socket_.fd(), SOL_SOCKET, SO_REUSEADDR, 1);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY);
    address.sin_port = htons(static_cast<uint16_t>(port));
    if (::bind(socket_.fd(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 || ::listen(socket_.fd(), SOMAXCONN) != 0)
        throw ConnectionError(fmt::format("cannot listen at port {}: {}", port, std::strerror(errno)));
}

Listener::Listener(int fd) : socket_(fd) {}

int Listener::port() const {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    if (::getsockname(socket_.fd(), reinterpret_cast<sockaddr*>(&address), &size) != 0) fail("getsockname", errno);
    const in_port_t port = address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                                                         : reinterpret_cast<sockaddr_in*>(&address)->sin_port;
    return ntohs(port);
}

Socket Listener::accept(Deadline deadline) const {
    for (;;) {
        const int fd = ::accept4(socket_.fd(), nullptr, nullptr, SOCK_CLOEXEC);
        if (fd >= 0) return Socket(fd);
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR && errno != ECONNABORTED) {
            fail("accepting a connection", errno);
        }
        pollfd entry{socket_.fd(), POLLIN, 0};
        if (!wait_for({&entry, 1}, deadline)) return {};
    }
}

Socket connect(const std::string& host, int port, Deadline deadline) {
    constexpr auto kPause = std::chrono::milliseconds(50);
    std::string problem;
    do {
        const Addresses list = resolve(host, port, &problem);
        for (const addrinfo* a = list.get(); a; a = a->ai_next) {
            const int fd = ::socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
            if (fd < 0) continue;
            Socket socket(fd);
            int error = ::connect(fd, a->ai_addr, a->ai_addrlen) == 0 ? 0 : errno;
            if (error == EINPROGRESS) {
                pollfd entry{fd, POLLOUT, 0};
                socklen_t size = sizeof error;
                if (!wait_for({&entry, 1}, deadline)) error = ETIMEDOUT;
                else if (::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
            }
            if (error == 0) return socket;
            problem = std::strerror(error);
        }
        std::this_thread::sleep_for(kPause);
    } while (!deadline || Clock::now() < *deadline);
    throw ConnectionError(fmt::format("cannot connect to {}:{}: {}", host, port, problem));
}

bool is_loopback(const std::string& host) {
    const Addresses list = resolve(host, 0, nullptr);
    bool has_ipv4 = false;
    for (const addrinfo* a = list.get(); a; a = a->ai_next) {
        if (a->ai_family == AF_INET && ntohl(reinterpret_cast<const sockaddr_in*>(a->ai_addr)->sin_addr.s_addr) == INADDR_LOOPBACK)
            has_ipv4 = true;
        else if (a->ai_family != AF_INET6 || !IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(a->ai_addr)->sin6_addr))
            return false;
    }
    return has_ipv4;
}

}  // namespace strobe::gpt
