// Collectives over sockets against sums made by hand.
#include <vector>

#include "gpt/distributed/communicator.hpp"
#include "gpt/ops/attention_device.hpp"
#include "gpt/tests/distributed/ranks.hpp"

namespace strobe::gpt::test {

namespace {

/// A number that tells rank, call and place.
float value_of(int rank, int call, int64_t i) { return static_cast<float>(rank + 1) * 0.5f + static_cast<float>(call) * 16.0f + static_cast<float>(i % 97); }

}  // namespace

// Each process of a machine has a GPU of its own, and so have its operators' views.
TEST(AttentionDevice, is_that_of_the_operators) {
    Exec exec;
    EXPECT_EQ(attention_device(exec).type, DeviceType::cpu);
    exec.device = Device::cuda;
    exec.device_index = 5;
    EXPECT_EQ(attention_device(exec).type, DeviceType::cuda);
    EXPECT_EQ(attention_device(exec).index, 5);
}

TEST(SocketCommunicator, reduce_scatter_sums_the_own_piece) {
    for (const int size : {2, 3, 5}) {
        on_ranks(size, [&](ProcessGroup& group) {
            const auto communicator = make_socket_communicator(group);
            // Small and larger than what a socket holds; several on their way at once.
            const int64_t pieces[] = {1, 64, 300'000, 7};
            std::vector<std::vector<float>> data;
            for (int call = 0; call < 4; ++call) {
                data.emplace_back(static_cast<size_t>(pieces[call] * size));
                for (size_t i = 0; i < data.back().size(); ++i) {
                    data.back()[i] = value_of(group.rank(), call, static_cast<int64_t>(i));
                }
            }
            for (int call = 0; call < 4; ++call) communicator->reduce_scatter(data[static_cast<size_t>(call)].data(), pieces[call], call % 2 == 0 ? Pace::calm : Pace::swift);
            communicator->join();
            for (int call = 0; call < 4; ++call) {
                const int64_t begin = group.rank() * pieces[call];
                for (int64_t i = begin; i < begin + pieces[call]; ++i) {
                    float sum = 0.0f;
                    for (int rank = 0; rank < size; ++rank) sum += value_of(rank, call, i);
                    ASSERT_EQ(data[static_cast<size_t>(call)][static_cast<size_t>(i)], sum) << "call " << call << ", element " << i;
                }
            }
        });
    }
}

TEST(SocketCommunicator, all_gather_brings_all_pieces) {
    for (const int size : {2, 3, 5}) {
        on_ranks(size, [&](ProcessGroup& group) {
            const auto communicator = make_socket_communicator(group);
            const int64_t piece = 100'001;
            std::vector<float> wide(static_cast<size_t>(piece * size), -1.0f);
            std::vector<uint16_t> narrow(wide.size(), 0);
            for (int64_t i = group.rank() * piece; i < (group.rank() + 1) * piece; ++i) {
                wide[static_cast<size_t>(i)] = value_of(group.rank(), 0, i);
                narrow[static_cast<size_t>(i)] = static_cast<uint16_t>(group.rank() * 1000 + i % 991);
            }
            communicator->all_gather(wide.data(), piece);
            communicator->all_gather({narrow.data(), Precision::bf16}, piece);
            communicator->join();
            for (int64_t i = 0; i < piece * size; ++i) {
                const int rank = static_cast<int>(i / piece);
                ASSERT_EQ(wide[static_cast<size_t>(i)], value_of(rank, 0, i)) << i;
                ASSERT_EQ(narrow[static_cast<size_t>(i)], static_cast<uint16_t>(rank * 1000 + i % 991)) << i;
            }
        });
    }
}

TEST(SocketCommunicator, all_reduce_gives_all_the_same_bits) {
    std::vector<double> results(5);
    on_ranks(5, [&](ProcessGroup& group) {
        const auto communicator = make_socket_communicator(group);
        double values[] = {1.0 / (3.0 + group.rank()), static_cast<double>(group.rank())};
        communicator->all_reduce(values, 2);
        communicator->join();
        EXPECT_EQ(values[1], 10.0);
        results[static_cast<size_t>(group.rank())] = values[0];
    });
    EXPECT_NEAR(results[0], 1.0 / 3 + 1.0 / 4 + 1.0 / 5 + 1.0 / 6 + 1.0 / 7, 1e-15);
    for (const double result : results) EXPECT_EQ(result, results[0]);
}

TEST(SocketCommunicator, an_error_ends_nobodys_destructor) {
    on_ranks(2, [&](ProcessGroup& group) {
        std::vector<float> data(2000);
        auto communicator = make_socket_communicator(group);
        // Rank 1 never makes the call.
        if (group.rank() == 0) {
            communicator->reduce_scatter(data.data(), 1000, Pace::swift);
            communicator.reset();
        }
        group.barrier();
    });
}

}  // namespace strobe::gpt::test
