// FlashAttention-2 forward on mma.sync (Dao, "FlashAttention-2: faster attention with better parallelism and work
// partitioning", 2023). One CTA per (query tile, head, batch); warps, or pairs of warps, split the query rows. O stays
// unnormalised in registers until the end.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm80/config.hpp"
#include "cuda/sm80/dropout.cuh"
#include "cuda/sm80/forward_softmax.cuh"
#include "cuda/sm80/output.cuh"
#include "cuda/sm80/schedule.hpp"
#include "cuda/sm80/score.cuh"
#include "cuda/sm80/tile.cuh"

namespace strobe::sm80 {

/// Rows that keep what dropout's bits take of the columns in shared memory, behind the configuration's.
constexpr bool shares_columns(const Variant& v) { return v.head_dim == 64 && v.features == Features::dropout; }
constexpr int column_bytes(const Variant& v) { return shares_columns(v) ? v.stages * v.block_n * 4 : 0; }

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(ForwardConfig(cuda::decode_variant(kVariantCode)).threads,
                                  ForwardConfig(cuda::decode_variant(kVariantCode)).ctas_per_sm)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ TileOrder order) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr ForwardConfig kConfig(V);
    constexpr int kD = V.head_dim, kM = V.block_m, kN = V.block_n, kStages = V.stages;
    constexpr int kThreads = kConfig.threads, kRows = kConfig.rows, kPair = kConfig.warps_of_rows;
    constexpr int kMAtoms = kConfig.m_atoms, kNAtoms = kConfig.n_atoms, kDAtoms = kConfig.d_atoms;
    constexpr bool kGeneral = is_general(V.features), kHasBias = has_bias(V.features);
    constexpr bool kBiased = V.features == Features::biased;
    constexpr bool kCapped = V.features == Features::capped;
    static_assert(!kCapped || (V.dtype == DType::bf16 && kPair == 1));
    // V's copies are spread over the product before: in one burst they would
    // hold up its operands. (The other head dims have no registers for it.)
    constexpr bool kSpreads = kStages == 1 && kD == 256 && V.features == Features::plain;
    // Rows whose registers allow: the probabilities of a step of k are
    // made under the step before, and loads have no edges to look for.
    constexpr bool kStepwise = kD == 64 && (V.features == Features::dropout || V.features == Features::tiled);
    constexpr bool kDrops = shares_columns(V);
    static_assert(!kStepwise || kStages > 1);
    extern __shared__ __align__(256) unsigned char smem[];

    const TileIndex index = order.at(blockIdx.x);
    // Pairs of warps, whose registers leave room for two CTAs of four warps alone, cannot hide what a tile costs beside
    // its keys: for them that is done in few instructions.
    constexpr bool kBrief = kPair > 1;
    const int batch =
        kBrief ? static_cast<int>(static_cast<uint32_t>(index.head) / static_cast<uint32_t>(p.size.num_heads))
               : index.head / p.size.num_heads;
    const int head = kBrief ? index.head - batch * p.size.num_heads : index.head % p.size.num_heads;
    const Sequence seq = sequence_of(p, batch);
    const int64_t q_begin = static_cast<int64_t>(index.tile) * kM;
    if (q_begin >= seq.rows_q) return;
    MaskParams mask_params = p.mask;
    if constexpr (V.mask == MaskClass::full) mask_params.window_left = mask_params.window_right = -1;
    const BandMask mask = seq.mask(mask_params);
    const Band band(mask);
    int tile_begin, tile_end;
    if constexpr (kBrief) {
        const int2 keys = band.key_range(static_cast<int>(q_begin), kM, static_cast<int>(seq.seqlen_q));
        tile_begin = keys.x / kN;
        tile_end = (keys.y + kN - 1) / kN;
    } else {
        const IndexRange keys = mask.key_range(q_begin, q_begin + kM);
        tile_begin = keys.empty() ? 0 : static_cast<int>(keys.begin / kN);
        tile_end = keys.empty() ? 0 : static_cast<int>((keys.end + kN - 1) / kN);
    }

    const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int row0 = warp / kPair * kRows, side = kPair == 1 ? 0 : warp % kPair;
    const int key0 = side * (kN / kPair), col0 = side * (kD / kPair);  // this warp's keys of a tile and columns of O
    const int q0 = static_cast<int>(q_begin) + row0;

    const uint32_t q_smem = smem_address(smem);
    const uint32_t k_smem = q_smem + kConfig.q_bytes;
    const uint32_t v_smem = k_smem + kStages * kConfig.kv_bytes;
    const uint32_t bias_smem = v_smem + kStages * kConfig.kv_bytes;
    const uint32_t p_smem = v_smem + kStages * kConfig.kv_bytes;  // of warp pairs, which have no bias
    const Operand q_in(p.q, batch, seq.q_row + q_begin, head);
    const int kv_head =
        kBrief && p.size.num_heads == p.size.num_heads_k ? head : head / (p.size.num_heads / p.size.num_heads_k);
    const Operand k_in(p.k, batch, seq.k_row, kv_head);
    const Operand v_in(p.v, batch, seq.k_row, kv_head);
    const ScoreFunctionOf<V.features> score(p, seq, batch, head);

    const auto load_k = [&](int tile, int stage) {
        load_tile<kN, kD, kThreads, !kGeneral>(
            k_smem + stage * kConfig.kv_bytes, k_in.row(static_cast<int64_t>(tile) * kN), k_in.row_stride,
            band.seqlen_k - tile * kN, p.size.head_dim, k_in.aligned(p.size.head_dim), thread);
    };
    const auto columns = [&] {
        if constexpr (kDrops) {
            return DropoutColumns<kMAtoms, kN, kStages>(p, q_smem + kConfig.smem_bytes,
                                                        static_cast<uint32_t>(index.head), q0 + lane / 4);
        } else {
            return 0;
        }
    }();
    // And the bias, which is wanted when V is, or a little before.
    const auto load_v = [&](int tile, int stage) {
        load_tile<kN, kD, kThreads, !kGeneral>(
            v_smem + stage * kConfig.kv_bytes, v_in.row(static_cast<int64_t>(tile) * kN), v_in.row_stride,
            band.seqlen_k - tile * kN, p.size.head_dim_v, v_in.aligned(p.size.head_dim_v), thread);
        if constexpr (kDrops) columns.make(tile * kN, stage, thread);
        if constexpr (kHasBias) {
            if (!kBiased || score.bias.staged()) {
                score.bias.template load_tile<kM, kN, kThreads>(bias_smem + stage * kConfig.bias_bytes, q_begin,
                                                                tile * kN, thread);
            }
        }
    };

    float o[kMAtoms][kDAtoms][4];
    clear(o);
    OnlineSoftmax<kMAtoms, kHasBias> softmax(score.unit_log2(p));
    const WarpPair<kMAtoms> pair(p_smem + kM * kN * 2, thread);

    if (tile_begin < tile_end) {
        load_tile<kM, kD, kThreads, !kGeneral>(q_smem, q_in.data, q_in.row_stride,
                                               static_cast<int>(seq.seqlen_q - q_begin), p.size.head_dim,
                                               q_in.aligned(p.size.head_dim), thread);
        load_k(tile_end - 1, 0);
        if (kStages == 1) cp_async_commit();
        load_v(tile_end - 1, 0);
        cp_async_commit();
#pragma unroll
        for (int ahead = 1; ahead < kStages - 1; ++ahead) {
            if (tile_end - 1 - ahead >= tile_begin) {
                load_k(tile_end - 1 - ahead, ahead);
                load_v(tile_end - 1 - ahead, ahead);
            }
            cp_async_commit();
        }
    }

    const auto q_operand = FragmentAddress<kD>::rows_first(q_smem, lane, row0);
    constexpr int kPCols = kPair == 1 ? 64 : kN;
    const auto p_store = FragmentAddress<kPCols>::accumulator(p_smem, lane, row0, key0);
    const auto p_operand = FragmentAddress<kPCols>::rows_first(p_smem, lane, row0);
    // Of the tiles that the loop loads none has fewer keys: only the last one may, which was the first to be loaded.
    const auto key_stream = [&](const Operand& in) {
        const int64_t first = static_cast<int64_t>(tile_end - kStages) * kN;
        if constexpr (kStepwise) return StreamCopy<kN, kD, kThreads, true>(in.row(first), in.row_stride, thread);
        else return NoStream();
    };
    const auto bias_stream = [&] {
        if constexpr (kStepwise && kHasBias) {
            const uint16_t* const rows =
                static_cast<const uint16_t*>(score.bias.data) + q_begin * score.bias.row_stride;
            return StreamCopy<kM, kN, kThreads, false>(rows + static_cast<int64_t>(tile_end - kStages) * kN,
                                                       score.bias.row_stride, thread);
        } else {
            return NoStream();
        }
    };
    auto k_stream = key_stream(k_in), v_stream = key_stream(v_in);
    auto b_stream = bias_stream();
    bool streams = kStepwise && p.size.head_dim == kD && p.size.head_dim_v == kD && k_stream.serves(k_in.row_stride) &&
                   v_stream.serves(v_in.row_stride);
    if constexpr (kStepwise && kHasBias) {
        streams &= seq.seqlen_q - q_begin >= kM && b_stream.serves(score.bias.row_stride);
    }
    int stage = 0;
    for (int tile = tile_end - 1; tile >= tile_begin; --tile) {
        const bool first = tile == tile_end - 1;
        // The tile of each operand that is loaded now, and where it goes.
        const int next = kStages > 1 ? tile - (kStages - 1) : tile;
        const int free_stage = kStages == 1 ? 0 : stage == 0 ? kStages - 1 : stage - 1;
        const bool wanted = kStages > 1 ? next >= tile_begin : !first;
        const auto load_next = [&] {
            if (kStages > 1) load_k(next, free_stage);
            load_v(next, free_stage);
        };
        if constexpr (kStages > 1) {
            cp_async_wait<kStages - 2>();
        } else if (first) {
            cp_async_wait<1>();  // Q and K are enough to begin with
        } else {
            cp_async_wait<0>();
        }
        // What was waited for has landed; everyone is done with the tile before, and its buffers are free.
        __syncthreads();
        if constexpr (!kSpreads) {
            if (kStepwise && wanted && streams) {
                k_stream.load(k_smem + free_stage * kConfig.kv_bytes);
                v_stream.load(v_smem + free_stage * kConfig.kv_bytes);
                b_stream.load(bias_smem + free_stage * kConfig.bias_bytes);
                if constexpr (kDrops) columns.make(next * kN, free_stage, thread);
            } else if (wanted) {
                load_next();
            }
            if (kStages > 1 || wanted) cp_async_commit();
        }

        const int k0 = tile * kN;
        const bool works = V.mask == MaskClass::full || band.any_visible(q0, kRows, k0, kN);
        float s[kMAtoms][kNAtoms][4];
        const auto k_operand = FragmentAddress<kD>::chunks_first(k_smem + stage * kConfig.kv_bytes, lane, key0);
        const FragmentOrigin<false> origin{q0 + lane / 4, k0 + key0 + 2 * (lane % 4)};
        if constexpr (kSpreads) {
            using Copy = SpreadCopy<kN, kD, kThreads>;
            const bool spread = wanted && works && k0 + kN <= band.seqlen_k && p.size.head_dim_v == kD;
            if (wanted && !spread) load_next();
            constexpr int kCopies = Copy::kCopies, kPerStep = (kCopies + kD / 32 - 1) / (kD / 32);
            Copy copy;
            if (works) {
                multiply<V.dtype, true, kMAtoms, kNAtoms, kD / 16>(
                    s, a_rows<kMAtoms>(q_operand.anew()), b_rows(k_operand), [&](int k) {
#pragma unroll
                        for (int n = k * kPerStep; n < (k + 1) * kPerStep && n < kCopies; ++n) {
                            if (n == 0) copy.start(v_smem, v_in.row(k0), v_in.row_stride);
                            copy.copy(n, spread);
                        }
                    });
            }
            cp_async_commit();
        } else if (works) {
            multiply<V.dtype, true, kMAtoms, kNAtoms, kD / 16>(s, a_rows<kMAtoms>(q_operand.anew()), b_rows(k_operand));
        }
        if constexpr (kStages == 1) {
            cp_async_wait<0>();
            __syncthreads();  // V has landed; everyone is done with this K
            if (tile > tile_begin) load_k(tile - 1, 0);
            cp_async_commit();
        }
        if (works) {
            if constexpr (kHasBias) {
                const auto bias = FragmentAddress<kN>::rows_first(bias_smem + stage * kConfig.bias_bytes, lane, row0);
                if constexpr (kBiased) {
                    score.apply(s, origin, bias);
                } else {
                    score.bias.template add_tile<V.dtype, false>(s, score.scale, bias);
                }
            } else if constexpr (kGeneral) {
                score.apply(s, origin, NoBias());
            }
            const bool masked = !band.all_visible(q0, kRows, k0 + key0, kN / kPair);
            if (masked) apply_mask(s, band, origin, kCapped ? NAN : -INFINITY);
            if constexpr (kCapped) {
                const TightSoftcap tight(score.softcap, softmax.scale_log2);
                SoftcapCurve curve[kMAtoms][2];
                softmax.prepare(s, o, tight, score.softcap, curve);
                if (masked) apply_mask(s, band, origin, TightSoftcap::kHidden);
                softmax.exponentiate(s, softmax.sum, [&](float x, float offset, int i, int h) {
                    return tight.exponent(x, offset, curve[i][h]);
                });
                uint32_t probability[kMAtoms][kNAtoms][2];
                pack_fragments<V.dtype>(probability, s);
                multiply<V.dtype, false, kMAtoms, kDAtoms, kN / 16>(
                    o, a_registers(probability),
                    b_columns<1>(FragmentAddress<kD>::rows_first(v_smem + stage * kConfig.kv_bytes, lane)));
            } else if constexpr (kStepwise) {
                softmax.settle(s, o);
                float offset[kMAtoms][2];
                for_each_row<kMAtoms>([&](int i, int h) { offset[i][h] = softmax.exponent_offset(i, h); });
                const auto v_operand =
                    b_columns<1>(FragmentAddress<kD>::rows_first(v_smem + stage * kConfig.kv_bytes, lane));
                // Basic blocks of two steps: of the whole product in one, the assembler has the exponentials and bits
                // of all steps in flight at once, for which registers are too few. The branches, each on something
                // else, are never taken, and never seen not to be.
                const auto end_block = [&](int k) {
                    if constexpr (kDrops) {  // on parameters, which take no register
                        const bool never = k == 1   ? p.size.num_heads_k < 0
                                           : k == 3 ? p.size.head_dim_v < 0
                                                    : k == 5 && p.mask.window_left < -7;
                        if (never) asm volatile("trap;");
                    } else {
                        if (k % 2 == 1 && tile < k - kN) __trap();
                    }
                };
                const auto keep = [&] {
                    if constexpr (kDrops) return columns.keep(stage, lane);
                    else return [](int) { return [](int) { return [](int, uint32_t pair) { return pair; }; }; };
                }();
                multiply<V.dtype, false, kMAtoms, kDAtoms, kN / 16>(
                    o, softmax.template a_probabilities<V.dtype>(s, offset, keep), v_operand, end_block);
            } else if constexpr (kPair == 1) {
                softmax.update(s, o);
                uint32_t probability[kMAtoms][kNAtoms][2];
                pack_fragments<V.dtype>(probability, s);
                const DropoutBits<false> bits(p, static_cast<uint32_t>(index.head), origin);
                if constexpr (kBiased) {
                    if (p.dropout.enabled()) {
                        DropoutMask<kMAtoms, kNAtoms> dropped;
                        bits.make_anywhere(dropped, p.mask);
                        dropped.apply(probability);
                    }
                }
                const auto v_operand =
                    b_columns<1>(FragmentAddress<kD>::rows_first(v_smem + stage * kConfig.kv_bytes, lane));
                if constexpr (V.features == Features::dropout) {
                    multiply<V.dtype, false, kMAtoms, kDAtoms, kN / 16>(o, bits.a_kept(probability), v_operand);
                } else {
                    multiply<V.dtype, false, kMAtoms, kDAtoms, kN / 16>(o, a_registers(probability), v_operand);
                }
            } else {
                pair.template update<V.dtype>(softmax, s, o, p_store.anew(), first);
                const auto v_operand =
                    FragmentAddress<kD>::rows_first(v_smem + stage * kConfig.kv_bytes, lane, 0, col0);
                multiply<V.dtype, false, kMAtoms, kDAtoms, kN / 16>(o, a_rows<kMAtoms>(p_operand.anew()),
                                                                    b_columns<1>(v_operand));
            }
        }
        if constexpr (kPair > 1) {
            if (!works) pair.idle(first);
        }
        if constexpr (kStages > 1) stage = stage == kStages - 1 ? 0 : stage + 1;
    }

    if constexpr (kPair == 1) {
        softmax.finish();
    } else {
        pair.finish(softmax);
    }
    // Where registers are short, read again rather than kept in them over the loop.
    const Sequence rows = kPair == 1 && kD % 64 == 0 ? seq : sequence_of(p, made_anew(batch));
    const float rescale = may_drop(V.features) && p.dropout.enabled() ? p.dropout.rescale : 1.0f;
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = q0 + 16 * i + 8 * h + lane / 4;
            const bool live = row < rows.seqlen_q && softmax.sum[i][h] != 0.0f;
            if constexpr (kBrief) {
                const float factor = __fdividef(rescale, softmax.sum[i][h]);
                for_row(o[i], h, [&](float& x) { x *= factor; });
                if (!__all_sync(0xffffffffu, live)) for_row(o[i], h, [&](float& x) { x = live ? x : 0.0f; });
            } else {
                const float factor = live ? rescale / softmax.sum[i][h] : 0.0f;
#pragma unroll
                for (int j = 0; j < kDAtoms; ++j)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) o[i][j][e] = live ? o[i][j][e] * factor : 0.0f;
            }
            if (p.lse && side == 0 && lane % 4 == 0 && row < rows.rows_q) {
                p.lse.data[batch * p.lse.batch_stride + head * p.lse.head_stride + rows.q_row + row] =
                    live ? softmax.lse(i, h) : -INFINITY;
            }
        }

    // The Q tile is free, and every warp reads back only what it wrote, or its pair.
    const Result out(p.out, p.out_dtype, batch, rows.q_row + q0, head);
    const int rows_left = static_cast<int>(rows.rows_q) - q0;
    const uint32_t rows_smem = q_smem + row0 * kD * 2;
    if constexpr (kPair == 1) {
        store_rows<V.dtype, kD, kRows, !kGeneral>(o, rows_smem, out, rows_left, p.size.head_dim_v, false, lane);
    } else if (out.is_float) {
        store_float<1>(o, out, 0, col0, rows_left, p.size.head_dim_v, false, lane);
    } else {
        uint32_t packed[kMAtoms][kDAtoms][2];
        pack_fragments<V.dtype>(packed, o);
        packed_to_tile(packed, FragmentAddress<kD>::accumulator(rows_smem, lane, 0, col0));
        pair.sync();
        const int pair_thread = side * kWarpSize + lane;
        if (rows_left >= kRows && p.size.head_dim_v == kD) {
            whole_tile_to_global<kD, kRows, pair.kThreads>(rows_smem, out, pair_thread);
        } else {
            tile_to_global<kD, kRows, !kGeneral>(rows_smem, out, rows_left, p.size.head_dim_v, pair_thread,
                                                 pair.kThreads);
        }
    }
}

}  // namespace strobe::sm80
