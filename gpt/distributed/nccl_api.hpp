// The functions of NCCL that are used here, by its public ABI as of 2.18, found in the library at run time.
#pragma once

#include <climits>
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
/// What a later version has beyond this it fills in itself.
struct NcclConfig {
    size_t size = sizeof(NcclConfig);
    unsigned magic = 0xcafebeefu;
    unsigned version = 21801;
    int blocking = INT_MIN;  // INT_MIN, null: as NCCL likes
    int cga_cluster_size = INT_MIN;
    int min_ctas = INT_MIN;
    int max_ctas = INT_MIN;
    const char* net_name = nullptr;
    int split_share = INT_MIN;
};

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
    NcclStatus (*ncclCommSplit)(NcclComm comm, int color, int key, NcclComm* part, NcclConfig* config) = nullptr;
    NcclStatus (*ncclCommDestroy)(NcclComm comm) = nullptr;
    NcclStatus (*ncclCommAbort)(NcclComm comm) = nullptr;
    const char* (*ncclGetErrorString)(NcclStatus status) = nullptr;
    const char* (*ncclGetLastError)(NcclComm comm) = nullptr;
    NcclStatus (*ncclGroupStart)() = nullptr;
    NcclStatus (*ncclGroupEnd)() = nullptr;
    NcclStatus (*ncclReduceScatter)(const void* from, void* to, size_t piece, NcclType type, NcclOp op, NcclComm comm, void* stream) = nullptr;
    NcclStatus (*ncclAllGather)(const void* from, void* to, size_t piece, NcclType type, NcclComm comm, void* stream) = nullptr;
    NcclStatus (*ncclAllReduce)(const void* from, void* to, size_t count, NcclType type, NcclOp op, NcclComm comm, void* stream) = nullptr;

private:
    void* handle_;  // never unloaded: its threads and CUDA state live on
};

}  // namespace strobe::gpt::cuda
