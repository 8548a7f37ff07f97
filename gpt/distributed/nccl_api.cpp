#include "gpt/distributed/nccl_api.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

#include <fmt/core.h>

namespace strobe::gpt::cuda {

namespace {

constexpr const char* kSoname = "libnccl.so.2";

void* open_library() {
    // A process may record its step while another does one that it has recorded already: recording must not need the
    // others.
    ::setenv("NCCL_GRAPH_REGISTER", "0", 0);
    // Where NCCL_DEBUG asks for words they would come between ours.
    ::setenv("NCCL_DEBUG_FILE", "/dev/stderr", 0);
    if (const char* named = std::getenv("STROBE_NCCL")) {
        if (void* handle = dlopen(named, RTLD_NOW | RTLD_LOCAL)) return handle;
        throw std::invalid_argument(fmt::format("environment: STROBE_NCCL is '{}', which cannot be loaded: {}", named, dlerror()));
    }
    if (void* handle = dlopen(kSoname, RTLD_NOW | RTLD_LOCAL)) return handle;
    throw std::invalid_argument(fmt::format("several processes on device cuda: {} is not found; install NCCL, or name its file in "
                                            "STROBE_NCCL (PyTorch brings one: site-packages/nvidia/nccl/lib)", kSoname));
}

}  // namespace

NcclLibrary::NcclLibrary() : handle_(open_library()) {
#define STROBE_GPT_LOAD(name)                                              \
    name = reinterpret_cast<decltype(name)>(dlsym(handle_, #name));        \
    if (!name) throw std::runtime_error("NCCL: no function " #name " in the library")
    STROBE_GPT_LOAD(ncclGetVersion);
    STROBE_GPT_LOAD(ncclGetUniqueId);
    STROBE_GPT_LOAD(ncclCommInitRank);
    STROBE_GPT_LOAD(ncclCommSplit);
    STROBE_GPT_LOAD(ncclCommDestroy);
    STROBE_GPT_LOAD(ncclCommAbort);
    STROBE_GPT_LOAD(ncclGetErrorString);
    STROBE_GPT_LOAD(ncclGetLastError);
    STROBE_GPT_LOAD(ncclGroupStart);
    STROBE_GPT_LOAD(ncclGroupEnd);
    STROBE_GPT_LOAD(ncclReduceScatter);
    STROBE_GPT_LOAD(ncclAllGather);
    STROBE_GPT_LOAD(ncclAllReduce);
#undef STROBE_GPT_LOAD
}

std::string NcclLibrary::version() const {
    int number = 0;
    check(ncclGetVersion(&number), "its version");
    return fmt::format("{}.{}.{}", number / 10000, number / 100 % 100, number % 100);
}

void NcclLibrary::check(NcclStatus status, const char* what, NcclComm comm) const {
    if (status == kNcclSuccess) return;
    const char* detail = ncclGetLastError(comm);
    throw std::runtime_error(fmt::format("NCCL: {}: {}{}{}", what, ncclGetErrorString(status), detail && *detail ? ": " : "", detail ? detail : ""));
}

}  // namespace strobe::gpt::cuda
