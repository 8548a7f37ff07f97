// S and dP by pairs of warps, for the eight-warp backward of 64 x 64 tiles, which shared memory bounds: alone a warp
// would take operands of 32 keys and 16 queries for each of the two, 384 bytes an mma. Here one warp of a pair
// multiplies for S and the other one for dP, both for the same 32 keys and 32 queries, at 256 bytes. Then they swap
// halves, and each goes on with 16 of the keys.
#pragma once

#include "cuda/sm80/score.cuh"

namespace strobe::sm80 {

STROBE_HD constexpr bool shares_products(const Variant& v) {
    return v.head_dim == 256 && v.features == Features::plain && v.block_m == 64 && v.block_n == 64 && v.warps == 8;
}

struct ProductShare {
    static constexpr int kKeys = 32, kQueries = 32, kSide = 64;
    using Layout = TileLayout<kSide>;
    int first_key, first_query;
    int role;  // 0: S and the first 16 keys; 1: dP and the others. Two warps on one scheduler differ

    __device__ explicit ProductShare(int warp)
        : first_key(warp / 4 * kKeys), first_query(warp % 2 * kQueries), role((warp >> 1 & 1) ^ warp / 4) {}

    /// By way of those parts of the dS tile, and of the P tile `to_p` behind it, that the receiving warp itself writes
    /// afterwards: one barrier is enough.
    __device__ __forceinline__ void swap_halves(const float (&product)[2][4][4], float (&s)[4][4], float (&dp)[4][4],
                                                uint32_t ds_smem, uint32_t to_p) const {
        const int lane = thread_index() % kWarpSize;
        // Eight lanes: two rows, whose chunks lie in different banks.
        const int row = (lane >> 3) + (lane & 4), chunk = lane & 3;
        const uint32_t first = ds_smem + Layout::offset(first_key + row, first_query / 8 + chunk);
        const auto place = [&](int receiver, int n) {
            return first + (receiver * 16 + n % 2 * 8) * Layout::kRowBytes + n / 2 * to_p;
        };
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            uint32_t sent[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) sent[e] = __float_as_uint(role ? product[0][n][e] : product[1][n][e]);
            store_shared(place(role ^ 1, n), uint4{sent[0], sent[1], sent[2], sent[3]});
        }
        __syncthreads();  // not of a pair alone: racecheck takes such barriers for none between the pairs
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const uint4 word = load_shared_16(place(role, n));
            const uint32_t got[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[n][e] = role ? __uint_as_float(got[e]) : product[0][n][e];
                dp[n][e] = role ? product[1][n][e] : __uint_as_float(got[e]);
            }
        }
        __syncwarp();  // all is read before the warp writes there
    }
};

}  // namespace strobe::sm80
