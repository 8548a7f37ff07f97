// kill -9 while a checkpoint is written: at every single system call that changes the disk, and at random moments. What
// is left must open, and be one of the two states the run was in.
//
// This program defines the calls that gpt/io uses itself, in front of the C library's, counts them, and kills the
// process at the one it was told.
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdarg>
#include <csignal>
#include <cstring>
#include <random>
#include <thread>

#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace {

std::atomic<long> calls{0};
std::atomic<long> kill_at{-1};

/// Counts a call; dies before it takes effect if it is the one.
void before_call() {
    if (++calls == kill_at) ::kill(::getpid(), SIGKILL);
}

/// Half a write is what a crash in the middle of one leaves.
bool dies_in_this_write() { return calls + 1 == kill_at; }

}  // namespace

extern "C" {

ssize_t write(int fd, const void* data, size_t size) {
    if (dies_in_this_write()) ::syscall(SYS_write, fd, data, size / 2);
    before_call();
    return ::syscall(SYS_write, fd, data, size);
}

int fsync(int fd) {
    before_call();
    return static_cast<int>(::syscall(SYS_fsync, fd));
}

int rename(const char* from, const char* to) noexcept {
    before_call();
    return static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

int renameat2(int from_fd, const char* from, int to_fd, const char* to, unsigned flags) noexcept {
    before_call();
    return static_cast<int>(::syscall(SYS_renameat2, from_fd, from, to_fd, to, flags));
}

int unlink(const char* path) noexcept {
    before_call();
    return static_cast<int>(::syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}

int unlinkat(int fd, const char* path, int flags) noexcept {
    before_call();
    return static_cast<int>(::syscall(SYS_unlinkat, fd, path, flags));
}

int mkdir(const char* path, mode_t mode) noexcept {
    before_call();
    return static_cast<int>(::syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}

}  // extern "C"

namespace strobe::gpt {
namespace {

namespace fs = std::filesystem;

/// Runs `body` in a child; true if it was killed, false if it ended well.
template <class Body>
bool killed(Body body) {
    const pid_t child = ::fork();
    if (child == 0) {
        try {
            body();
        } catch (...) {
            ::_exit(3);
        }
        ::_exit(0);
    }
    int status = 0;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    if (WIFSIGNALED(status)) return true;
    EXPECT_EQ(WEXITSTATUS(status), 0) << "the child failed";
    return false;
}

/// One save in a child that dies at call `at`, starting from a copy of `before`. Returns the step that is left.
class CrashAt {
public:
    CrashAt(const fs::path& before, const fs::path& root) : before_(before), root_(root) {}

    bool save(const SmallRun& next, int keep, long at) {
        fs::remove_all(root_);
        fs::copy(before_, root_, fs::copy_options::recursive);
        return killed([&] {
            CheckpointStore store(root_, keep);
            calls = 0;
            kill_at = at;
            store.save(next.contents());
        });
    }

private:
    fs::path before_, root_;
};

void crash_everywhere(Architecture architecture, int64_t old_step, int64_t next_step, int keep) {
    TemporaryFolder folder;
    SmallRun old(architecture), next(architecture);
    old.fill(old_step);
    next.fill(next_step);
    next.state.trainer = "next";
    {
        SmallRun older(architecture);
        older.fill(old_step - 1);
        CheckpointStore store(folder / "before");
        store.save(older.contents());
        store.save(old.contents());
    }
    CrashAt crash(folder / "before", folder / "run");
    int left_old = 0, left_next = 0;
    for (long at = 1;; ++at) {
        const bool died = crash.save(next, keep, at);
        std::vector<std::string> refused;
        const SmallRun left = read_run(open_checkpoint(folder / "run", &refused));
        ASSERT_TRUE(refused.empty()) << "call " << at << ": " << refused[0];
        ASSERT_TRUE(left == old || left == next) << "call " << at << " left step " << left.state.step;
        (left == next ? left_next : left_old) += 1;
        ASSERT_FALSE(left == old && left_next > 0) << "the new checkpoint vanished at call " << at;
        // Whoever comes next can write there, and finds no rubbish.
        SmallRun after(architecture);
        after.fill(next_step + 1);
        {
            CheckpointStore store(folder / "run", 1);
            store.save(after.contents());
        }
        ASSERT_EQ(std::distance(fs::directory_iterator(folder / "run"), {}), 2);
        ASSERT_TRUE(read_run(open_checkpoint(folder / "run")) == after);
        if (!died) break;
    }
    EXPECT_GT(left_old, 15);
    EXPECT_GE(left_next, 3);
}

TEST(CheckpointCrash, AtEveryCallOfASave) { crash_everywhere(Architecture::llama, 10, 20, 2); }

TEST(CheckpointCrash, AtEveryCallOfASaveThatKeepsOnlyTheNewest) { crash_everywhere(Architecture::gpt2, 10, 20, 1); }

TEST(CheckpointCrash, AtEveryCallOfASaveOfTheSameStep) { crash_everywhere(Architecture::gpt2, 20, 20, 2); }

/// By the name alone; -1 if there is none. The folder changes under our feet.
int64_t newest_step(const fs::path& root) {
    try {
        const std::vector<fs::path> checkpoints = list_checkpoints(root);
        return checkpoints.empty() ? -1 : std::stoll(checkpoints[0].filename().string().substr(5));
    } catch (const fs::filesystem_error&) {
        return -1;
    }
}

TEST(CheckpointCrash, AtRandomMomentsOfManySaves) {
    TemporaryFolder folder;
    std::mt19937 random(1);
    int64_t last_seen = 0;
    for (int round = 0; round < 20; ++round) {
        const pid_t child = ::fork();
        if (child == 0) {
            kill_at = -1;
            SmallRun run(Architecture::llama);
            CheckpointStore store(folder / "run");
            for (int64_t step = last_seen + 1;; ++step) {
                run.fill(step);
                store.save(run.contents());
            }
        }
        // However slow the machine: one save at least, then some part of the next ones.
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
        while (newest_step(folder / "run") <= last_seen && std::chrono::steady_clock::now() < deadline) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 50000));
        ::kill(child, SIGKILL);
        ::waitpid(child, nullptr, 0);
        std::vector<std::string> refused;
        const SmallRun left = read_run(open_checkpoint(folder / "run", &refused));
        ASSERT_TRUE(refused.empty()) << refused[0];
        SmallRun expected(Architecture::llama);
        expected.fill(left.state.step);
        ASSERT_TRUE(left == expected);
        ASSERT_GT(left.state.step, last_seen);
        last_seen = left.state.step;
    }
}

}  // namespace
}  // namespace strobe::gpt
