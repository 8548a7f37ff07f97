// In the place of the file of the same name: copies are done at once, barriers are the emulation's.
#pragma once

#include <cstring>

#include "emulation.hpp"

namespace strobe::gpt::cuda {

inline void copy_ahead(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void end_of_copies() {}
template <int Groups>
void wait_for_copies() {}
inline void barrier_of(int barrier, int threads) {
    emulation::barrier(static_cast<unsigned>(barrier), static_cast<unsigned>(threads));
}

}  // namespace strobe::gpt::cuda
