// Ranks of a group as threads of one process.
#pragma once

#include <unistd.h>

#include <exception>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "gpt/distributed/process_group.hpp"

namespace strobe::gpt::test {

/// A launch of `size` processes here, with a socket that listens already; one for each rank.
inline std::vector<Launch> launches(int size, double timeout_seconds = 60.0) {
    const Listener listener(0, true);
    std::vector<Launch> all;
    for (int rank = 0; rank < size; ++rank)
        all.push_back({.rank = rank, .size = size, .local_rank = rank, .local_size = size, .address = "127.0.0.1", .port = listener.port(),
                       .listening_fd = rank == 0 ? ::dup(listener.fd()) : -1, .timeout_seconds = timeout_seconds});
    return all;
}

/// Calls fn(launch) in a thread for each; returns what each threw, "" for nothing.
template <class Fn>
std::vector<std::string> in_threads(const std::vector<Launch>& all, Fn&& fn) {
    std::vector<std::string> errors(all.size());
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < all.size(); ++i)
        threads.emplace_back([&, i] {
            try {
                fn(all[i]);
            } catch (const std::exception& e) {
                errors[i] = e.what();
            }
        });
    threads.clear();
    return errors;
}

/// fn(group) on `size` ranks, none of which may throw.
template <class Fn>
void on_ranks(int size, Fn&& fn) {
    const std::vector<std::string> errors = in_threads(launches(size), [&](const Launch& launch) {
        ProcessGroup group(launch);
        try {
            fn(group);
            if (testing::Test::HasFatalFailure()) group.fail("a check did not hold");
        } catch (const std::exception& e) {
            group.fail(e.what());  // which ends this test program: the others would wait
            throw;
        }
    });
    for (const std::string& error : errors) EXPECT_EQ(error, "");
}

}  // namespace strobe::gpt::test
