// Processes that meet, and those that cannot.
#include "gpt/distributed/communicator.hpp"
#include "gpt/tests/distributed/ranks.hpp"

namespace strobe::gpt::test {

TEST(ProcessGroup, exchanges_and_sums) {
    for (const int size : {2, 3, 5}) {
        on_ranks(size, [&](ProcessGroup& group) {
            EXPECT_EQ(group.size(), size);
            for (int round = 0; round < 20; ++round) {
                // Texts of every length, empty ones too.
                const std::string mine(static_cast<size_t>(group.rank() * round * 50), static_cast<char>('a' + group.rank()));
                const std::vector<std::string> all = group.exchange(mine);
                ASSERT_EQ(all.size(), static_cast<size_t>(size));
                for (int rank = 0; rank < size; ++rank)
                    EXPECT_EQ(all[static_cast<size_t>(rank)], std::string(static_cast<size_t>(rank * round * 50), static_cast<char>('a' + rank)));
            }
            EXPECT_EQ(group.from_leader("text of rank " + std::to_string(group.rank())), "text of rank 0");
            double values[] = {1.0, static_cast<double>(group.rank())};
            group.sum(values);
            EXPECT_EQ(values[0], size);
            EXPECT_EQ(values[1], size * (size - 1) / 2);
            EXPECT_FALSE(group.any(false));
            EXPECT_TRUE(group.any(group.rank() == size - 1));
        });
    }
}

TEST(ProcessGroup, who_leaves_in_order_ends_nobody) {
    on_ranks(3, [](ProcessGroup& group) {
        group.barrier();
        if (group.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    });
}

TEST(ProcessGroup, strangers_are_passed_over) {
    std::vector<Launch> all = launches(2);
    const Socket silent = connect("127.0.0.1", all[0].port, in_seconds(5.0));
    const Socket talks_else = connect("127.0.0.1", all[0].port, in_seconds(5.0));
    talks_else.send_text("GET / HTTP/1.1\r\n\r\n");
    const Socket sends_json = connect("127.0.0.1", all[0].port, in_seconds(5.0));
    sends_json.send_text("{\"rank\": \"one\"}");
    Socket closes = connect("127.0.0.1", all[0].port, in_seconds(5.0));
    closes.close();
    const std::vector<std::string> errors = in_threads(all, [](const Launch& launch) {
        ProcessGroup group(launch);
        EXPECT_EQ(group.exchange(std::to_string(group.rank())).back(), "1");
    });
    EXPECT_EQ(errors, (std::vector<std::string>{"", ""}));
}

// Debian gives a machine's own name 127.0.1.1, where nobody hears who listens at 127.0.0.1 alone. And rank 0 may know
// itself by another name than the others know it by.
TEST(ProcessGroup, meets_at_any_address_of_rank_0) {
    struct Names {
        const char *leader, *others;
        bool one_machine;
    };
    for (const auto [leader, others, one_machine] : {Names{"127.0.0.1", "localhost", true}, Names{"127.0.1.1", "127.0.1.1", true},
                                                     Names{"localhost", "127.0.1.1", false}}) {
        std::vector<Launch> all = launches(3, 5.0);
        ::close(all[0].listening_fd);
        for (Launch& launch : all) {
            launch.address = launch.rank == 0 ? leader : others;
            launch.listening_fd = -1;
            if (!one_machine) launch.local_rank = 0, launch.local_size = 1;
        }
        const std::vector<std::string> errors = in_threads(all, [&](const Launch& launch) {
            ProcessGroup group(launch);
            // Who came by the loopback is where rank 0 is, and is reached by the same name.
            for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(group.host(rank), launch.address);
            std::vector<float> data(6, static_cast<float>(group.rank()));
            const auto communicator = make_socket_communicator(group);
            communicator->reduce_scatter(data.data(), 2, Pace::swift);
            communicator->join();
            EXPECT_EQ(data[static_cast<size_t>(2 * group.rank())], 3.0f);
            group.barrier();
        });
        EXPECT_EQ(errors, (std::vector<std::string>{"", "", ""})) << leader << ", " << others;
    }
}

TEST(ProcessGroup, contradictions_are_named) {
    const auto meet = [](const Launch& launch) { ProcessGroup group(launch); };
    {
        std::vector<Launch> all = launches(2);
        all[1].size = 3;
        for (const std::string& error : in_threads(all, meet)) {
            EXPECT_NE(error.find("rank 1"), std::string::npos) << error;
            EXPECT_NE(error.find("as one of 3 processes"), std::string::npos) << error;
            EXPECT_NE(error.find("as one of 2"), std::string::npos) << error;
        }
    }
    {
        std::vector<Launch> all = launches(3);
        all[2].rank = 1;
        const std::vector<std::string> errors = in_threads(all, meet);
        EXPECT_NE(errors[0].find("two processes were started as rank 1"), std::string::npos) << errors[0];
        EXPECT_NE(errors[1].find("two processes were started as rank 1"), std::string::npos) << errors[1];
        EXPECT_NE(errors[2].find("two processes were started as rank 1"), std::string::npos) << errors[2];
    }
}

TEST(ProcessGroup, the_missing_are_named_in_time) {
    std::vector<Launch> all = launches(4, 1.0);
    all.erase(all.begin() + 2);
    const auto start = std::chrono::steady_clock::now();
    for (const std::string& error : in_threads(all, [](const Launch& launch) { ProcessGroup group(launch); })) {
        EXPECT_NE(error.find("of 4 processes"), std::string::npos) << error;
        EXPECT_NE(error.find("within 1 s: rank 2"), std::string::npos) << error;
    }
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

TEST(ProcessGroup, no_leader_no_group) {
    std::vector<Launch> all = launches(2, 0.5);
    ::close(all[0].listening_fd);
    try {
        ProcessGroup group(all[1]);
        FAIL() << "nobody was there";
    } catch (const ConnectionError& e) {
        EXPECT_NE(std::string(e.what()).find("rank 1 does not reach rank 0 at 127.0.0.1:"), std::string::npos) << e.what();
    }
}

}  // namespace strobe::gpt::test
