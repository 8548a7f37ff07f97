#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>

#include <fmt/core.h>

#include "gpt/checkpoint/checkpoint.hpp"
#include "gpt/io/durable_file.hpp"
#include "gpt/io/file_error.hpp"

namespace strobe::gpt {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kStepPrefix = "step-";
constexpr std::string_view kTrashPrefix = ".removed-";

/// The step of a checkpoint's folder name; -1 for any other name.
int64_t step_of(const fs::path& path) {
    const std::string name = path.filename().string();
    if (!name.starts_with(kStepPrefix)) return -1;
    int64_t step = -1;
    const char* end = name.data() + name.size();
    const auto [stop, error] = std::from_chars(name.data() + kStepPrefix.size(), end, step);
    return error == std::errc() && stop == end && step >= 0 ? step : -1;
}

/// A folder loses its name first and its files later, so that no name ever stands for half a checkpoint.
void remove_folder(const fs::path& folder) {
    const fs::path trash = folder.parent_path() / (std::string(kTrashPrefix) + temporary_sibling(folder).filename().string().substr(1));
    if (std::rename(folder.c_str(), trash.c_str()) != 0) throw_system_error(folder, "cannot rename away", errno);
    fs::remove_all(trash);
}

/// Gives `fresh` the name `final`. A checkpoint that has the name already (the same step, saved before) is swapped out
/// in the same instant and removed.
void move_into_place(const fs::path& fresh, const fs::path& final) {
    if (::renameat2(AT_FDCWD, fresh.c_str(), AT_FDCWD, final.c_str(), RENAME_NOREPLACE) == 0) return;
    if (errno == EEXIST) {
        if (::renameat2(AT_FDCWD, fresh.c_str(), AT_FDCWD, final.c_str(), RENAME_EXCHANGE) == 0) {
            return remove_folder(fresh);
        }
        // Without an atomic swap the step is absent for a moment; the checkpoint before it is not.
        remove_folder(final);
    }
    if (std::rename(fresh.c_str(), final.c_str()) != 0) throw_system_error(final, "cannot rename into place", errno);
}

}  // namespace

std::vector<fs::path> list_checkpoints(const fs::path& root) {
    std::vector<fs::path> checkpoints;
    if (!fs::is_directory(root)) return checkpoints;
    for (const auto& entry : fs::directory_iterator(root)) {
        if (step_of(entry.path()) >= 0 && entry.is_directory()) checkpoints.push_back(entry.path());
    }
    std::sort(checkpoints.begin(), checkpoints.end(), [](const fs::path& a, const fs::path& b) { return step_of(a) > step_of(b); });
    return checkpoints;
}

CheckpointStore::CheckpointStore(const fs::path& root, int keep) : root_(root), keep_(keep) {
    if (keep < 1) throw std::invalid_argument(fmt::format("cannot keep {} checkpoints; at least 1", keep));
    fs::create_directories(root);
    const fs::path lock = root / ".lock";
    lock_fd_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (lock_fd_ < 0) throw_system_error(lock, "cannot open", errno);
    // The kernel drops the lock with the process, however it ends.
    if (::flock(lock_fd_, LOCK_EX | LOCK_NB) != 0) {
        const int error = errno;
        ::close(lock_fd_);
        if (error == EWOULDBLOCK) throw FileError(root, "another process is saving checkpoints here");
        throw_system_error(lock, "cannot lock", error);
    }
    for (const auto& entry : fs::directory_iterator(root)) {
        const std::string name = entry.path().filename().string();
        if (name.starts_with(kTrashPrefix) || name.starts_with("." + std::string(kStepPrefix))) {
            fs::remove_all(entry.path());
        }
    }
}

CheckpointStore::~CheckpointStore() {
    if (lock_fd_ >= 0) ::close(lock_fd_);
}

fs::path CheckpointStore::save(const CheckpointContents& contents) {
    const int64_t step = contents.state != nullptr ? contents.state->step : 0;
    const fs::path final = root_ / fmt::format("{}{:08}", kStepPrefix, step);
    const fs::path fresh = temporary_sibling(final);
    try {
        fs::create_directory(fresh);
        write_checkpoint_files(fresh, contents);
        move_into_place(fresh, final);
    } catch (...) {
        std::error_code ignored;
        fs::remove_all(fresh, ignored);
        throw;
    }
    fsync_folder(root_);
    prune(final);
    return final;
}

void CheckpointStore::prune(const fs::path& newest) const {
    const std::vector<fs::path> checkpoints = list_checkpoints(root_);
    for (size_t i = static_cast<size_t>(keep_); i < checkpoints.size(); ++i) {
        if (checkpoints[i] != newest) remove_folder(checkpoints[i]);
    }
}

Checkpoint open_checkpoint(const fs::path& path, std::vector<std::string>* refused) {
    if (fs::exists(path / "config.json")) return Checkpoint(path);
    const std::vector<fs::path> checkpoints = list_checkpoints(path);
    if (checkpoints.empty()) {
        throw FileError(path, "is neither a checkpoint (it has no config.json) nor a folder of them");
    }
    std::string last_problem;
    for (const fs::path& candidate : checkpoints) {
        try {
            return Checkpoint(candidate);
        } catch (const FileError& problem) {
            last_problem = problem.what();
            if (refused != nullptr) refused->push_back(last_problem);
        }
    }
    throw FileError(path, "none of its checkpoints can be read; " + last_problem);
}

}  // namespace strobe::gpt
