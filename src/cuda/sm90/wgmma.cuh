// wgmma: the 64 x N x 16 matrix multiply of one warpgroup, and the shared memory descriptors of its operands.
//
// A tile in shared memory is cut into chunks of one swizzle span of columns; a chunk holds its rows behind one another,
// as one TMA box does. The same layout serves as K-major operand (contraction along the columns: Q and K of Q K^T) and
// as MN-major operand (contraction along the rows: V of P V).
#pragma once

#include <cstdint>

#include "core/params.hpp"

namespace strobe::sm90 {

/// 64-bit matrix descriptor: address, leading and stride byte offsets in units of 16 bytes, swizzle mode.
template <int kSwizzleBytes>
__device__ __forceinline__ uint64_t smem_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
    constexpr uint64_t kMode = kSwizzleBytes == 128 ? 1 : kSwizzleBytes == 64 ? 2 : 3;
    return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
           static_cast<uint64_t>(stride_bytes >> 4) << 32 | kMode << 62;
}

/// The same matrix, `bytes` further.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

/// Orders register and shared memory accesses of this warpgroup before the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Closes a group: the wgmmas since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most kPending of the committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving uses of accumulators across this point; it cannot see that wgmma writes them later.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&reg)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(reg[i])::"memory");
}

/// d (64 x N, fp32) = [scale_d != 0] d + A B. Operand layouts by template: kTransA, kTransB = 1 for MN-major.
template <int N>
struct Wgmma;

#define STROBE_WGMMA_D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define STROBE_WGMMA_D16 STROBE_WGMMA_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define STROBE_WGMMA_D24 STROBE_WGMMA_D16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define STROBE_WGMMA_D32 STROBE_WGMMA_D24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define STROBE_WGMMA_D40 STROBE_WGMMA_D32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define STROBE_WGMMA_D48 STROBE_WGMMA_D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define STROBE_WGMMA_D56 STROBE_WGMMA_D48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define STROBE_WGMMA_D64 STROBE_WGMMA_D56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define STROBE_WGMMA_D72 STROBE_WGMMA_D64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define STROBE_WGMMA_D80 STROBE_WGMMA_D72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define STROBE_WGMMA_D88 STROBE_WGMMA_D80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define STROBE_WGMMA_D96 STROBE_WGMMA_D88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define STROBE_WGMMA_D104 STROBE_WGMMA_D96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define STROBE_WGMMA_D112 STROBE_WGMMA_D104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define STROBE_WGMMA_D120 STROBE_WGMMA_D112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define STROBE_WGMMA_D128 STROBE_WGMMA_D120 ",%120,%121,%122,%123,%124,%125,%126,%127"

#define STROBE_WGMMA_EIGHT(d, n) \
    "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), \
    "+f"(d[n + 4]), "+f"(d[n + 5]), "+f"(d[n + 6]), "+f"(d[n + 7])
#define STROBE_WGMMA_F8(d) STROBE_WGMMA_EIGHT(d, 0)
#define STROBE_WGMMA_F16(d) STROBE_WGMMA_F8(d), STROBE_WGMMA_EIGHT(d, 8)
#define STROBE_WGMMA_F24(d) STROBE_WGMMA_F16(d), STROBE_WGMMA_EIGHT(d, 16)
#define STROBE_WGMMA_F32(d) STROBE_WGMMA_F24(d), STROBE_WGMMA_EIGHT(d, 24)
#define STROBE_WGMMA_F40(d) STROBE_WGMMA_F32(d), STROBE_WGMMA_EIGHT(d, 32)
#define STROBE_WGMMA_F48(d) STROBE_WGMMA_F40(d), STROBE_WGMMA_EIGHT(d, 40)
#define STROBE_WGMMA_F56(d) STROBE_WGMMA_F48(d), STROBE_WGMMA_EIGHT(d, 48)
#define STROBE_WGMMA_F64(d) STROBE_WGMMA_F56(d), STROBE_WGMMA_EIGHT(d, 56)
#define STROBE_WGMMA_F72(d) STROBE_WGMMA_F64(d), STROBE_WGMMA_EIGHT(d, 64)
#define STROBE_WGMMA_F80(d) STROBE_WGMMA_F72(d), STROBE_WGMMA_EIGHT(d, 72)
#define STROBE_WGMMA_F88(d) STROBE_WGMMA_F80(d), STROBE_WGMMA_EIGHT(d, 80)
#define STROBE_WGMMA_F96(d) STROBE_WGMMA_F88(d), STROBE_WGMMA_EIGHT(d, 88)
#define STROBE_WGMMA_F104(d) STROBE_WGMMA_F96(d), STROBE_WGMMA_EIGHT(d, 96)
#define STROBE_WGMMA_F112(d) STROBE_WGMMA_F104(d), STROBE_WGMMA_EIGHT(d, 104)
#define STROBE_WGMMA_F120(d) STROBE_WGMMA_F112(d), STROBE_WGMMA_EIGHT(d, 112)
#define STROBE_WGMMA_F128(d) STROBE_WGMMA_F120(d), STROBE_WGMMA_EIGHT(d, 120)

#define STROBE_WGMMA_SS(N, R, TYPE, r0, r1, r2, r3, r4)                                                               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #r2 ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" STROBE_WGMMA_D##R "}, %" #r0    \
                 ", %" #r1 ", p, 1, 1, %" #r3 ", %" #r4 ";}"                                                           \
                 : STROBE_WGMMA_F##R(d)                                                                               \
                 : "l"(a), "l"(b), "r"(scale_d), "n"(kTransA), "n"(kTransB))

#define STROBE_WGMMA_RS(N, R, TYPE, r0, r1, r2, r3, r4, r5, r6)                                                       \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #r5 ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" STROBE_WGMMA_D##R "}, {%" #r0   \
                 ",%" #r1 ",%" #r2 ",%" #r3 "}, %" #r4 ", p, 1, 1, %" #r6 ";}"                                         \
                 : STROBE_WGMMA_F##R(d)                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(kTransB))

// R = N / 2 accumulators per thread; r0... are R, R + 1, ...: the numbers of the asm operands behind them.
#define STROBE_WGMMA(N, R, r0, r1, r2, r3, r4, r5, r6)                                                                \
    template <>                                                                                                      \
    struct Wgmma<N> {                                                                                                \
        template <DType kType, int kTransA, int kTransB>                                                             \
        __device__ __forceinline__ static void ss(float (&d)[R], uint64_t a, uint64_t b, int scale_d) {              \
            if constexpr (kType == DType::bf16) {                                                                    \
                STROBE_WGMMA_SS(N, R, "bf16", r0, r1, r2, r3, r4);                                                   \
            } else {                                                                                                 \
                STROBE_WGMMA_SS(N, R, "f16", r0, r1, r2, r3, r4);                                                    \
            }                                                                                                        \
        }                                                                                                            \
        template <DType kType, int kTransB>                                                                          \
        __device__ __forceinline__ static void rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, int scale_d) {  \
            if constexpr (kType == DType::bf16) {                                                                    \
                STROBE_WGMMA_RS(N, R, "bf16", r0, r1, r2, r3, r4, r5, r6);                                           \
            } else {                                                                                                 \
                STROBE_WGMMA_RS(N, R, "f16", r0, r1, r2, r3, r4, r5, r6);                                            \
            }                                                                                                        \
        }                                                                                                            \
    };

STROBE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
STROBE_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
STROBE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
STROBE_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
STROBE_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
STROBE_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
STROBE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
STROBE_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
STROBE_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
STROBE_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
STROBE_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
STROBE_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
STROBE_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
STROBE_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
STROBE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef STROBE_WGMMA
#undef STROBE_WGMMA_SS
#undef STROBE_WGMMA_RS

}  // namespace strobe::sm90
