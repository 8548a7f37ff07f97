// The functions of NCCL that are used here, by its public ABI (stable since 2.10), found in the library at run time.
#pragma once

#include <cstddef>
#include <string>

namespace strobe::gpt::cuda {

inline constexpr size_t kNcclIdBytes = 128;
struct NcclId {
    char bytes[kNcclIdBytes];
};
struct NcclCommOpaque;
using NcclComm = NcclCommOpaque*;
enum class NcclType : int { int8 = 0, float32 = 7, float64 = 8, bfloat16 = 9 };
enum class NcclOp : int { sum = 0 };
using NcclStatus = int;
inline constexpr NcclStatus kNcclSuccess = 0;

class NcclLibrary {
public:
    /// Throws std::invalid_argument where the library is not found.
    NcclLibrary();

    std::string version() const;
    /// Throws std::runtime_error with NCCL's own words.
    void check(NcclStatus status, const char* what, NcclComm comm = nullptr) const;

    // `stream` is a cudaStream_t.
    NcclStatus (*ncclGetVersion)(int* version) = nullptr;
    NcclStatus (*ncclGetUniqueId)(NcclId* id) = nullptr;
    NcclStatus (*ncclCommInitRank)(NcclComm* comm, int size, NcclId id, int rank) = nullptr;
    NcclStatus (*ncclCommDestroy)(NcclComm comm) = nullptr;
    NcclStatus (*ncclCommAbort)(NcclComm comm) = nullptr;
    const char* (*ncclGetErrorString)(NcclStatus status) = nullptr;
    const char* (*ncclGetLastError)(NcclComm comm) = nullptr;
    NcclStatus (*ncclReduceScatter)(const void* from, void* to, size_t piece, NcclType type, NcclOp op, NcclComm comm, void* stream) = nullptr;
    NcclStatus (*ncclAllGather)(const void* from, void* to, size_t piece, NcclType type, NcclComm comm, void* stream) = nullptr;
    NcclStatus (*ncclAllReduce)(const void* from, void* to, size_t count, NcclType type, NcclOp op, NcclComm comm, void* stream) = nullptr;

private:
    void* handle_;  // never unloaded: its threads and CUDA state live on
};

}  // namespace strobe::gpt::cuda
