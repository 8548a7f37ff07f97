#include "cuda/select.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "core/numeric.hpp"
#include "cuda/sm80/config.hpp"
#include "cuda/sm90/backward_workspace.hpp"

namespace strobe::cuda {
namespace {

/// TMA wants addresses and strides that are multiples of 16 bytes; 16-byte stores want the same of the outputs.
bool aligned_for_tma(const TensorRef& t, DType dtype) {
    const auto element = static_cast<int64_t>(size_of(dtype));
    const bool strides = (t.batch_stride * element) % 16 == 0 && (t.row_stride * element) % 16 == 0 &&
                         (t.head_stride * element) % 16 == 0;
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && strides;
}

bool dims_for_tma(const ProblemSize& size) { return size.head_dim % 8 == 0 && size.head_dim_v % 8 == 0; }

/// In fp32 forward and backward are both on tensor cores or both not, so that their scores are the same to the bit: q, k and v decide.
bool inputs_decide(DType dtype) { return dtype == DType::f32; }

Request shared_request(const AttentionParams& p, Direction direction) {
    Request r;
    r.direction = direction;
    r.dtype = p.dtype;
    r.head_dim = std::max(p.size.head_dim, p.size.head_dim_v);
    r.heads = int64_t{p.size.batch} * p.size.num_heads;
    r.seqlen_q = p.size.seqlen_q;
    r.seqlen_k = p.size.seqlen_k;
    r.band = p.mask.is_band();
    // The plain kernels fold the scale into exp2 and take row maxima before scaling: it must be positive.
    r.general = p.score.softcap > 0 || p.score.alibi_slopes || !(p.score.softmax_scale > 0);
    constexpr float kSmallestScale = 1e-6f;  // scores are held in units of it
    const bool good_unit = p.score.softmax_scale >= kSmallestScale;
    r.capped = p.score.softcap > 0 && !p.score.alibi_slopes && good_unit &&
               sm80::is_moderate_softcap(p.score.softcap / p.score.softmax_scale);
    r.dropout = p.dropout.enabled();
    // Rows of dropout draw the bits of whole groups, which a tile holds if it starts on one, and compare them as halves.
    const bool on_groups = !p.mask.has_positions || ((p.mask.q_position | p.mask.k_position) & 15) == 0;
    r.rare = r.dropout && (!on_groups || p.dropout.drop_below > Dropout::kHalfRanks);
    const BiasRef& bias = p.score.bias;
    r.biased = static_cast<bool>(bias);
    r.tiled = r.biased && p.bias_dtype == p.dtype && good_unit && bias.col_stride == 1 &&
              aligned_for_tma({bias.data, bias.batch_stride, bias.row_stride, bias.head_stride}, p.bias_dtype);
    r.tma_layout = dims_for_tma(p.size) && aligned_for_tma(p.q, p.dtype) && aligned_for_tma(p.k, p.dtype) &&
                   aligned_for_tma(p.v, p.dtype) && (inputs_decide(p.dtype) || aligned_for_tma(p.out, p.out_dtype));
    return r;
}

const char* name(DType dtype) { return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16"; }

/// What a refusal says about the options of a call.
const char* options_text(const Request& request) {
    if (request.biased) return ", bias";
    if (request.rare) return ", dropout at such positions or so much of it";
    if (request.dropout) return ", dropout";
    return request.general ? ", softcap, ALiBi or a scale that is not positive" : "";
}

const char* name(Features features) {
    constexpr const char* kNames[] = {"plain", "capped", "general", "dropout", "tiled", "biased"};
    return kNames[static_cast<int>(features)];
}

Features features_wanted(const Request& request, Arch arch) {
    // The sm80 kernels copy 16 bytes at a time where the layout allows, which is all that the plain ones can do.
    const bool any_layout = arch == Arch::sm80 && !request.tma_layout, general = request.general || any_layout;
    const bool options = request.biased || request.dropout;
    if (request.rare || (options && general) || (request.biased && request.dropout)) return Features::biased;
    if (request.biased) return request.tiled ? Features::tiled : Features::biased;
    if (request.dropout) return Features::dropout;
    if (request.capped && !any_layout) return Features::capped;
    return general ? Features::general : Features::plain;
}

bool covers(Features features, Features wanted) {
    return features == wanted || features == Features::biased ||
           (features == Features::general && (wanted == Features::plain || wanted == Features::capped));
}

/// Of the sm90 backward's rows: those that may take whole heads are for few keys, those with two buffers for keys or a third one for
/// queries for what is longer but gains nothing from doing the rows of q inside the main kernel.
bool fits_length(const Variant& v, const Request& request) {
    constexpr int64_t kLongSequence = 2048;
    // Whole heads need no order to be deterministic, which at head dim 64 makes up for more waiting dq.
    const bool longer = v.mask == MaskClass::band || (request.deterministic && v.head_dim == 64);
    const bool whole = request.seqlen_k <= (longer ? 512 : 256);
    if (whole) return v.keys == Keys::few && sm90::may_take_whole_heads(v);
    const bool brief = !request.deterministic && request.seqlen_q < kLongSequence;
    return brief ? v.keys == Keys::few && !sm90::may_take_whole_heads(v) : v.keys == Keys::any;
}

/// Of two rows that serve a problem: in the sm90 forward the smaller tile changes tiles at less cost, the larger does more
/// per key block and is faster once its loop is long enough; half of a tile twice as tall as the queries would be idle, which
/// costs more than the mask code of a lower one. The sm90 backward has rows for few keys (fits_length).
bool suits_better(const Variant& v, const Variant& best, const Request& request) {
    constexpr int64_t kLongSequence = 2048;
    const auto served = [](const Variant& x) { return std::tuple(x.arch, x.direction, x.dtype, x.head_dim, x.features); };
    if (served(v) != served(best)) return false;
    if (v.arch != Arch::sm90 || v.mask < best.mask) return false;
    if (v.direction == Direction::backward) {
        return v.mask == best.mask && fits_length(v, request) && !fits_length(best, request);
    }
    if (request.seqlen_q <= v.block_m && best.block_m >= 2 * v.block_m) return true;
    if (request.seqlen_q <= best.block_m && v.block_m >= 2 * best.block_m) return false;
    const auto area = [](const Variant& x) { return x.block_m * x.block_n; };
    return v.mask == best.mask && (request.seqlen_k >= kLongSequence ? area(v) > area(best) : area(v) < area(best));
}

}  // namespace

Request request_of(const ForwardParams& p) { return shared_request(p, Direction::forward); }

Request request_of(const BackwardParams& p) {
    Request r = shared_request(p, Direction::backward);
    r.deterministic = p.deterministic;
    r.tiled = r.tiled && !p.dbias && !p.deterministic;
    if (inputs_decide(p.dtype)) return r;
    r.tma_layout = r.tma_layout && aligned_for_tma(p.dout, p.dtype);
    for (const TensorRef& t : {p.dq, p.dk, p.dv}) r.tma_layout = r.tma_layout && aligned_for_tma(t, p.grad_dtype);
    return r;
}

const Variant* select(std::span<const Variant> rows, Arch arch, const Request& request, const DeviceLimits& device,
                      std::string& refusal) {
    const int needed = static_cast<int>(arch);
    if (arch == Arch::sm90 ? device.compute_capability != needed : device.compute_capability < needed) {
        refusal = fmt::format("needs compute capability {}{}, this device has {}.{}", needed / 10.0,
                              arch == Arch::sm90 ? " exactly" : " or more", device.compute_capability / 10,
                              device.compute_capability % 10);
        return nullptr;
    }
    if (arch == Arch::sm90 && !request.tma_layout) {
        refusal = "needs addresses and strides that are multiples of 16 bytes, and head dimensions that are multiples of 8";
        return nullptr;
    }
    constexpr int64_t kMostRows = (int64_t{1} << 30) - 1;  // bands are held in 32 bits: sm80::Band, sm90::TileMask, sm90::ForwardTile
    if (const int64_t longest = std::max(request.seqlen_q, request.seqlen_k); longest > kMostRows) {
        refusal = fmt::format("sequences go up to {} rows on CUDA, {} are wanted", kMostRows, longest);
        return nullptr;
    }
    int largest = 0;
    for (const Variant& v : rows) {
        if (v.arch == arch && v.direction == request.direction && v.dtype == request.dtype) largest = std::max(largest, v.head_dim);
    }
    if (request.head_dim > largest) {
        refusal = largest == 0 ? fmt::format("has no {} kernels for {}", name(request.dtype),
                                             request.direction == Direction::forward ? "forward" : "backward")
                               : fmt::format("head_dim and head_dim_v go up to {} on CUDA, {} is wanted; the CPU serves up to 512",
                                             largest, request.head_dim);
        return nullptr;
    }
    const Features features = features_wanted(request, arch);
    const Variant* best = nullptr;
    const auto rank = [](const Variant& v) { return std::tuple(v.head_dim, v.mask, v.features); };
    for (const Variant& v : rows) {
        const bool serves = v.arch == arch && v.direction == request.direction && v.dtype == request.dtype &&
                            v.head_dim >= request.head_dim && (v.mask == MaskClass::band || !request.band) &&
                            covers(v.features, features) && smem_bytes(v) <= device.smem_per_cta;
        if (serves && (!best || rank(v) < rank(*best))) best = &v;
    }
    for (const Variant& v : rows) {
        if (best && suits_better(v, *best, request) && smem_bytes(v) <= device.smem_per_cta) best = &v;
    }
    if (!best) {
        refusal = fmt::format("no kernel for {} {} with head_dim {}, {} mask{}, in {} bytes of shared memory",
                              request.direction == Direction::forward ? "forward" : "backward", name(request.dtype),
                              request.head_dim, request.band ? "band" : "full", options_text(request), device.smem_per_cta);
        return nullptr;
    }
    // Tiles are counted in 32 bits. So many need more memory than there is, unless most of them belong to no sequence.
    constexpr int64_t kMostTiles = (int64_t{1} << 31) - (1 << 16);
    const auto tiles = [&](int64_t seqlen, int block) { return request.heads * ((seqlen + block - 1) / block); };
    const int64_t most = std::max(tiles(request.seqlen_q, best->block_m), tiles(request.seqlen_k, best->block_n));
    if (most > kMostTiles) {
        refusal = fmt::format("sequences of up to {} queries and {} keys would take {} tiles in {} heads of all sequences, {} are possible on "
                              "CUDA; max_seqlen_q and max_seqlen_k need be no more than the longest sequences",
                              request.seqlen_q, request.seqlen_k, most, request.heads, kMostTiles);
        return nullptr;
    }
    return best;
}

int smem_bytes(const Variant& v) { return v.arch == Arch::sm80 ? sm80::smem_bytes(v) : 0; }

std::string to_string(const Variant& v) {
    return fmt::format("sm{} {} {} d{} {} {} {}x{}, {} stages, {} warps{}", static_cast<int>(v.arch),
                       v.direction == Direction::forward ? "forward" : "backward", name(v.dtype), v.head_dim,
                       v.mask == MaskClass::full ? "full" : "band", name(v.features),
                       v.block_m, v.block_n, v.stages, v.warps, v.keys == Keys::few ? ", few keys" : "");
}

}  // namespace strobe::cuda
