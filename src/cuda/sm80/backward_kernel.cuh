// FlashAttention-2 backward on mma.sync. One CTA per (key tile, key head, batch): K and V stay in shared memory, dK and
// dV in registers, over all query tiles of all query heads that share the key head. P is recomputed from the LSE,
// scores are held transposed (keys x queries). dQ is reduced into the fp32 workspace: as CTAs come by, or in turns
// (backward_order.hpp), or left to a deterministic pass of its own.
#pragma once

#include "cuda/common/counter.cuh"
#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm80/backward_rows.cuh"
#include "cuda/sm80/backward_order.hpp"
#include "cuda/sm80/product_share.cuh"
#include "cuda/sm80/score_gradient.cuh"

namespace strobe::sm80 {

template <uint64_t kVariantCode, bool kInTurns>
__global__ void __launch_bounds__(BackwardConfig(cuda::decode_variant(kVariantCode)).threads,
                                  BackwardConfig(cuda::decode_variant(kVariantCode)).ctas_per_sm)
    backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ KeyTileOrder order,
                    const __grid_constant__ BackwardWorkspace ws) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr BackwardConfig kConfig(V);
    constexpr int kD = V.head_dim, kM = V.block_m, kN = V.block_n, kStages = V.stages, kThreads = kConfig.threads;
    constexpr bool kGeneral = is_general(V.features), kHasBias = has_bias(V.features);
    constexpr bool kShares = shares_products(V);
    constexpr int kScoreKeys = kShares ? 16 : kN / kConfig.score_warps_n;
    constexpr int kScoreQueries = kShares ? 32 : kConfig.step_m / kConfig.score_warps_m;
    constexpr int kScoreM = kScoreKeys / 16, kScoreN = kScoreQueries / 8;
    constexpr int kOutRows = kN / kConfig.out_warps_n;
    constexpr int kOutM = kOutRows / 16, kOutN = kD / kConfig.out_warps_d / 8;
    constexpr int kDqRows = kM / kConfig.dq_warps_m;
    constexpr int kDqM = kDqRows / 16, kDqN = kD / kConfig.dq_warps_d / 8;
    constexpr bool kPInRegisters = kConfig.p_in_registers;
    constexpr int kOutWarpsD = kConfig.out_warps_d, kDqWarpsD = kConfig.dq_warps_d;
    // With two CTAs on an SM part of dQ between dV and dK does better, as its reductions drain behind dK.
    constexpr bool kSplitsDq = V.features == Features::plain && kStages == 1 && !kInTurns && kD == 128;
    extern __shared__ __align__(128) unsigned char smem[];

    KeyTile index;
    if constexpr (kInTurns) {
        __shared__ int claim;
        if (threadIdx.x == 0) claim = atomicAdd(ws.claims, 1);
        __syncthreads();
        index = order.claimed(claim);
    } else {
        const TileIndex at = order.at(blockIdx.x);
        index = {at.tile, at.head, false};
    }
    const int batch = index.head / p.size.num_heads_k;
    const int kv_head = index.head % p.size.num_heads_k;
    const int group = p.size.num_heads / p.size.num_heads_k;
    const Sequence seq = sequence_of(p, batch);
    const int k_begin = index.tile * kN;
    if (k_begin >= seq.rows_k) return;
    MaskParams mask_params = p.mask;
    if constexpr (V.mask == MaskClass::full) mask_params.window_left = mask_params.window_right = -1;
    const BandMask mask = seq.mask(mask_params);
    const Band band(mask);
    const IndexRange queries = mask.query_range(k_begin, k_begin + kN);
    const int tile_begin = queries.empty() ? 0 : static_cast<int>(queries.begin / kM);
    int tiles = queries.empty() ? 0 : static_cast<int>((queries.end + kM - 1) / kM) - tile_begin;
    if constexpr (kInTurns) {  // turns of a sequence longer than it was said to be have not been cleared
        const int most = static_cast<int>((p.size.seqlen_q + kM - 1) / kM) - tile_begin;
        tiles = tiles < most ? tiles : most < 0 ? 0 : most;
    }
    const int steps = tiles * group;
    // CTAs of one head run side by side. Where all of them see all queries each
    // starts at another query tile, lest they all add to the same dQ at once. (Where
    // loads and products alternate, with one stage, they drift apart by themselves.)
    constexpr bool kSpreadsStarts = kStages > 1 && !kPInRegisters && !kInTurns;
    const bool down = kInTurns && p.mask.is_band() && !index.falling;
    const int last_tile = down ? tile_begin : tile_begin + tiles - 1;
    const int first_tile =
        down ? tile_begin + tiles - 1
             : tile_begin + (kSpreadsStarts && !p.mask.is_band()
                                 ? static_cast<int>(static_cast<int64_t>(index.tile) * tiles / order.tiles)
                                 : 0);

    const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const ProductShare share(warp);
    const int score_key = kShares ? share.first_key + 16 * share.role : warp % kConfig.score_warps_n * kScoreKeys;
    const int score_query = kShares ? share.first_query : warp / kConfig.score_warps_n * kScoreQueries;
    const int out_row = warp / kOutWarpsD * kOutRows, out_col = warp % kOutWarpsD * 16;
    const int dq_row = warp / kDqWarpsD * kDqRows, dq_col = warp % kDqWarpsD * 16;

    const uint32_t k_smem = smem_address(smem);
    const uint32_t v_smem = k_smem + kConfig.kv_bytes;
    const uint32_t q_smem = v_smem + kConfig.kv_bytes;
    const uint32_t do_smem = q_smem + kStages * kConfig.q_bytes;
    const uint32_t ds_smem = do_smem + kStages * kConfig.q_bytes;  // then P, unless it stays in registers
    constexpr int kStatOffset =
        2 * kConfig.kv_bytes + 2 * kStages * kConfig.q_bytes + (kPInRegisters ? 1 : 2) * kConfig.score_bytes;
    const uint32_t stat_smem = k_smem + kStatOffset;  // per stage: lse, then delta
    const uint32_t bias_smem = stat_smem + 2 * kStages * kConfig.stat_bytes;

    // Each operand's place, from which its tiles (K and V, Q and dO, P and dS, the stages) are constants away.
    constexpr uint32_t kToV = kConfig.kv_bytes, kToDout = kStages * kConfig.q_bytes, kToP = kConfig.score_bytes;
    const auto key_rows = kShares ? FragmentAddress<kD>::rows_first(k_smem + share.role * kToV, lane, share.first_key)
                                  : FragmentAddress<kD>::rows_first(k_smem, lane, score_key);
    const auto query_rows =
        FragmentAddress<kD>::chunks_first(q_smem + (kShares ? share.role * kToDout : 0), lane, score_query);
    const auto query_cols = FragmentAddress<kD>::rows_first(q_smem, lane, 0, out_col);
    const auto key_cols = FragmentAddress<kD>::rows_first(k_smem, lane, 0, dq_col);
    const auto score_store = FragmentAddress<kM>::accumulator(ds_smem, lane, score_key, score_query);
    const auto score_rows = FragmentAddress<kM>::rows_first(ds_smem, lane, out_row);
    const auto score_cols = FragmentAddress<kM>::chunks_first(ds_smem, lane, 0, dq_row);

    // Where turns leave no registers to hold it in, a sequence's place is read again.
    constexpr bool kReadsAnew = kInTurns && kPInRegisters && !kStoresMatrices;
    const auto sequence = [&] { return kReadsAnew ? sequence_of(p, made_anew(batch)) : seq; };
    const auto load_queries = [&](int head, int tile, int stage) {
        // Read each time where registers are short: or a thread's places in the tiles would be held over the step.
        const int thread = kPInRegisters ? static_cast<int>(threadIdx.x) : thread_index();
        const Sequence seq = sequence();
        const int64_t row = seq.q_row + static_cast<int64_t>(tile) * kM;
        const int valid = static_cast<int>(seq.seqlen_q) - tile * kM;
        const Operand q(p.q, batch, row, head);
        const Operand dout(p.dout, batch, row, head);
        load_tile<kM, kD, kThreads, !kGeneral>(q_smem + stage * kConfig.q_bytes, q.data, q.row_stride, valid,
                                               p.size.head_dim, q.aligned(p.size.head_dim), thread);
        load_tile<kM, kD, kThreads, !kGeneral>(do_smem + stage * kConfig.q_bytes, dout.data, dout.row_stride, valid,
                                               p.size.head_dim_v, dout.aligned(p.size.head_dim_v), thread);
        if (thread < kM / 2) {
            const int64_t stat = (ws.template first_tile<kM>(p, seq, batch, head) + tile) * kM;
            const float* from = (thread < kM / 4 ? ws.lse : ws.delta) + stat + thread % (kM / 4) * 4;
            cp_async_16(stat_smem + stage * 2 * kConfig.stat_bytes + thread * 16, from);
        }
        if constexpr (kHasBias) {
            const Bias bias(p, seq, batch, head);
            if (V.features == Features::tiled || bias.staged()) {
                bias.template load_tile<kM, kN, kThreads>(bias_smem + stage * kConfig.bias_bytes,
                                                          static_cast<int64_t>(tile) * kM, k_begin, thread);
            }
        }
        cp_async_commit();
    };

    float dk[kOutM][kOutN][4], dv[kOutM][kOutN][4];
    clear(dk);
    clear(dv);
    if (steps > 0) {
        const Operand k_in(p.k, batch, seq.k_row + k_begin, kv_head);
        const Operand v_in(p.v, batch, seq.k_row + k_begin, kv_head);
        const int valid = static_cast<int>(seq.seqlen_k - k_begin);
        load_tile<kN, kD, kThreads, !kGeneral>(k_smem, k_in.data, k_in.row_stride, valid, p.size.head_dim,
                                               k_in.aligned(p.size.head_dim), thread);
        load_tile<kN, kD, kThreads, !kGeneral>(v_smem, v_in.data, v_in.row_stride, valid, p.size.head_dim_v,
                                               v_in.aligned(p.size.head_dim_v), thread);
        load_queries(kv_head * group, first_tile, 0);
    }

    int64_t added_to = -1;  // the query tile whose turn has not been handed on
    const auto hand_on = [&] {  // behind a barrier: everyone's additions come before it
        if constexpr (kInTurns) {
            if (thread == 0 && added_to >= 0) cuda::add_release(ws.turns + added_to, 1);
        }
    };
    int head = kv_head * group, tile = first_tile;
    for (int step = 0; step < steps; ++step) {
        const int stage = kStages > 1 ? step & 1 : 0;
        int next_tile, next_head;
        const auto look_ahead = [&] {  // as late as it can be: the products need the registers
            const bool wraps = tile == last_tile;
            if constexpr (kInTurns) {
                next_tile = wraps ? first_tile : down ? tile - 1 : tile + 1;
            } else {
                next_tile = wraps ? tile_begin : tile + 1;
            }
            next_head = (kSpreadsStarts ? next_tile == first_tile : wraps) ? head + 1 : head;
        };
        if (kStages > 1) look_ahead();
        cp_async_wait<0>();
        __syncthreads();  // this step's queries have landed; everyone is done with the last step's tiles, P and dS
        if (kStages > 1 && step + 1 < steps) load_queries(next_head, next_tile, stage ^ 1);
        hand_on();
        const ScoreFunctionOf<V.features> score(p, seq, batch, head);
        const uint32_t batch_head = static_cast<uint32_t>(batch * p.size.num_heads + head);
        const uint32_t to_stage = stage * kConfig.q_bytes;
        const uint32_t my_stats = stat_smem + stage * 2 * kConfig.stat_bytes + 8 * (lane % 4);

        // Scores; with P in registers also dV and dK. Not unrolled: two parts at once would not fit in registers.
#pragma unroll 1
        for (int part = 0; part < kM / kConfig.step_m; ++part) {
            const int query = part * kConfig.step_m + score_query;  // the warp's first, in the tile
            const int q0 = tile * kM + query, k0 = k_begin + score_key;
            const auto store = score_store.moved_chunks(part * kConfig.step_m / 8);
            uint32_t ds[kScoreM][kScoreN][2];
            if (V.mask == MaskClass::band && !(kShares ? band.any_visible(tile * kM, kM, k_begin, kN)  // all warps meet
                                                       : band.any_visible(q0, kScoreQueries, k0, kScoreKeys))) {
                clear(ds);
                packed_to_tile(ds, store);
                if constexpr (!kPInRegisters) packed_to_tile(ds, store + kToP);
                continue;
            }
            float s[kScoreM][kScoreN][4], dp[kScoreM][kScoreN][4];
            const auto queries_b = query_rows.moved(to_stage + part * (kConfig.step_m * kD * 2));
            const FragmentOrigin<true> origin{q0 + 2 * (lane % 4), k0 + lane / 4};
            const DropoutBits<true> bits(p, batch_head, origin);
            ScoreGradient<V.dtype, true, V.features, kScoreM, kScoreN> gradient;
            if constexpr (kShares) {
                float product[2][kScoreN][4];
                multiply<V.dtype, true, 2, kScoreN, kD / 16>(product, a_rows<2>(key_rows), b_rows(queries_b));
                share.swap_halves(product, s[0], dp[0], ds_smem, kToP);
            } else {
                multiply<V.dtype, true, kScoreM, kScoreN, kD / 16>(s, a_rows<kScoreM>(key_rows), b_rows(queries_b),
                                                                   gradient.template beside_scores<kD / 16>(bits));
            }
            const bool masked = !band.all_visible(q0, kScoreQueries, k0, kScoreKeys);
            if constexpr (kHasBias) {
                const auto bias = FragmentAddress<kN>::chunks_first(bias_smem, lane, score_query, score_key);
                gradient.scores(s, score, band, origin, masked,
                                bias.moved(stage * kConfig.bias_bytes + part * (kConfig.step_m * kN * 2)));
            } else {
                gradient.scores(s, score, band, origin, masked, NoBias());
            }
            if constexpr (!kShares) {
                multiply<V.dtype, true, kScoreM, kScoreN, kD / 16>(dp, a_rows<kScoreM>(key_rows + kToV),
                                                                   b_rows(queries_b + kToDout));
            }
            gradient.probabilities(s, p, score.unit_log2(p), bits,
                                   [&](int, int j, int) { return load_shared_pair(my_stats + 4 * (query + 8 * j)); });
            if constexpr (!kPInRegisters) packed_to_tile(gradient.probability, store + kToP);
            gradient.finish(dp, s, p.dropout, [&](int, int j, int) {
                return load_shared_pair(my_stats + kConfig.stat_bytes + 4 * (query + 8 * j));
            });
            pack_fragments<V.dtype>(ds, dp);
            packed_to_tile(ds, store);
            if constexpr (kPInRegisters) {
                const auto queries_k = query_cols.moved(to_stage + part * (kConfig.step_m * kD * 2));
                multiply<V.dtype, false, kOutM, kOutN, kConfig.step_m / 16>(dv, a_registers(gradient.probability),
                                                                            b_columns<1>(queries_k + kToDout));
                multiply<V.dtype, false, kOutM, kOutN, kConfig.step_m / 16>(dk, a_registers(ds),
                                                                            b_columns<1>(queries_k));
            }
        }
        __syncthreads();  // P and dS are complete

        // The products whose operands are other warps' P and dS. dQ comes first where it can, so that its reductions
        // drain behind the others; with one stage it comes last, behind the next step's loads.
        constexpr int kDqParts = (kD == 128 || kD == 256) && kDqN % 4 == 0 ? 2 : 1;
        const auto add_dq = [&](int begin, int end) {
            if (!takes_turns(V) && !ws.dq) return;
            const Sequence seq = sequence();
            const int64_t query_tile = ws.template first_tile<kM>(p, seq, batch, head) + tile;
            float* const to = ws.dq + query_tile * (kM * kD) + warp * (kDqRows * kDqN * 8) + dq_offset(0, lane, 0);
            int seen = 0, turn = 0;  // asked for ahead of the product
            if constexpr (kInTurns) {
                const int seqlen_q = static_cast<int>(seq.seqlen_q);
                const int q_end = tile * kM + kM < seqlen_q ? tile * kM + kM : seqlen_q;
                turn = index.turn(order.first_adding(band.low, tile * kM, kN),
                                  order.last_adding(band.high, q_end - 1, band.seqlen_k, kN));
                added_to = query_tile;
                seen = cuda::load_relaxed(ws.turns + query_tile);
            }
            // In halves where all of it beside dK and dV would not fit in
            // registers; the first half's reductions drain behind the second.
            constexpr int kPartN = kDqN / kDqParts;
#pragma unroll 1
            for (int part = begin; part < end; ++part) {
                float dq[kDqM][kPartN][4];
                multiply<V.dtype, true, kDqM, kPartN, kN / 16>(
                    dq, a_columns<kDqM>(score_cols), [&](int k, int j, uint32_t(&b)[4]) {
                        ldmatrix_transposed(b, key_cols.at(16 * k, 16 * kDqWarpsD * (j + part * kPartN / 2)));
                    });
                // What follows only adds, and is not begun before the turn is seen: no acquire for the load ahead.
                if constexpr (kInTurns) {
                    while (seen < turn) seen = cuda::load_acquire(ws.turns + query_tile);
                    __syncwarp();
                }
#pragma unroll
                for (int i = 0; i < kDqM; ++i)
#pragma unroll
                    for (int j = 0; j < kPartN; ++j) add_dq_atom(to + (i * kDqN + j + part * kPartN) * 128, dq[i][j]);
            }
        };
        if constexpr (kStages > 1) add_dq(0, kDqParts);
        if constexpr (!kPInRegisters) {
            const bool sees = V.mask == MaskClass::full || band.any_visible(tile * kM, kM, k_begin + out_row, kOutRows);
            const auto queries_k = query_cols.moved(to_stage);
            if (sees) {
                multiply<V.dtype, false, kOutM, kOutN, kM / 16>(dv, a_rows<kOutM>(score_rows + kToP),
                                                                b_columns<kOutWarpsD>(queries_k + kToDout));
            }
            if constexpr (kSplitsDq) add_dq(0, 1);
            if (sees) {
                multiply<V.dtype, false, kOutM, kOutN, kM / 16>(dk, a_rows<kOutM>(score_rows),
                                                                b_columns<kOutWarpsD>(queries_k));
            }
        }
        if constexpr (kStages == 1) {
            look_ahead();
            // Everyone is done with the queries. Where P stays in registers they are already.
            if (!kPInRegisters && step + 1 < steps) __syncthreads();
            if (step + 1 < steps) load_queries(next_head, next_tile, 0);
            add_dq(kSplitsDq ? 1 : 0, kDqParts);
        }
        head = next_head;
        tile = next_tile;
    }

    if constexpr (kInTurns) {
        __syncthreads();  // everyone has added
        hand_on();
    }

    // Read again rather than kept in registers over the loop.
    const Sequence keys = sequence_of(p, batch);
    const float dv_scale = may_drop(V.features) && p.dropout.enabled() ? p.dropout.rescale : 1.0f;
    const float dk_scale = p.score.softmax_scale * dv_scale;
#pragma unroll
    for (int i = 0; i < kOutM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            // Keys past the sequence's end have P = 0, but 0 * inf from a bad dout row must not reach them.
            const bool live = k_begin + out_row + 16 * i + 8 * (e >> 1) + lane / 4 < keys.seqlen_k;
#pragma unroll
            for (int j = 0; j < kOutN; ++j) {
                dk[i][j][e] = live ? dk[i][j][e] * dk_scale : 0.0f;
                dv[i][j][e] = live ? dv[i][j][e] * dv_scale : 0.0f;
            }
        }
    const Result dk_out(p.dk, p.grad_dtype, batch, keys.k_row + k_begin, kv_head);
    const Result dv_out(p.dv, p.grad_dtype, batch, keys.k_row + k_begin, kv_head);
    const int rows_left = static_cast<int>(keys.rows_k - k_begin);
    if (dk_out.is_float) {
        store_float<kOutWarpsD>(dk, dk_out, out_row, out_col, rows_left, p.size.head_dim, p.accumulate, lane);
        store_float<kOutWarpsD>(dv, dv_out, out_row, out_col, rows_left, p.size.head_dim_v, p.accumulate, lane);
        return;
    }
    __syncthreads();  // everyone is done with K and V
    fragments_to_tile<V.dtype, kD, kOutWarpsD>(dk, k_smem, out_row, out_col, lane);
    fragments_to_tile<V.dtype, kD, kOutWarpsD>(dv, v_smem, out_row, out_col, lane);
    __syncthreads();
    tile_to_global<kD, kN, !kGeneral>(k_smem, dk_out, rows_left, p.size.head_dim, thread, kThreads);
    tile_to_global<kD, kN, !kGeneral>(v_smem, dv_out, rows_left, p.size.head_dim_v, thread, kThreads);
}

}  // namespace strobe::sm80
