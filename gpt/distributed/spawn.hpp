// Several processes of this program on this machine, without a launcher.
#pragma once

namespace strobe::gpt {

/// Starts this program `count` times with its own arguments, as the ranks of one group, passes signals on to them and waits for
/// all. When one fails the others get some seconds to end, too. Returns the first exit status that is not 0.
int run_as_processes(int count);

}  // namespace strobe::gpt
