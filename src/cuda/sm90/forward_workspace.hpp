// Workspace of the sm90 forward kernel. No CUDA headers: the registry asks from plain C++.
#pragma once

#include <cstddef>

#include "core/params.hpp"

namespace strobe::sm90 {

/// A counter through which tiles of unequal length find idle workers. Where all tiles are equal they are dealt
/// statically; without a workspace all are, which is slower for causal masks and varlen batches but not wrong.
inline size_t forward_workspace_bytes(const ForwardParams& p) {
    const SeqlenParams& s = p.seqlens;
    const bool unequal = p.mask.is_band() || s.cu_seqlens_q || s.cu_seqlens_k || s.seqused_q || s.seqused_k;
    return unequal ? 16 : 0;
}

}  // namespace strobe::sm90
