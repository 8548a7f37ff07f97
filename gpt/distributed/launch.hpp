// Which process of a run this is, as the program that started it says in the environment: torchrun, Open MPI's mpirun, Slurm's
// srun, or strobe itself (--processes).
#pragma once

#include <functional>
#include <string>

namespace strobe::gpt {

struct Launch {
    int rank = 0, size = 1;
    int local_rank = 0, local_size = 1;  // on this machine
    std::string address = "127.0.0.1";   // of rank 0's machine
    int port = 0;                        // where rank 0 waits for the others
    int listening_fd = -1;               // rank 0: a socket that listens there already
    double timeout_seconds = 120.0;      // for all to come together

    bool on_one_machine() const { return local_size == size; }
};

using Environment = std::function<const char*(const char*)>;

/// A single process where nothing says otherwise. Throws std::invalid_argument that names the variable and its value.
///
/// torchrun: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. mpirun: OMPI_COMM_WORLD_RANK, _SIZE,
/// _LOCAL_RANK, _LOCAL_SIZE. srun: SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE. The latter two
/// need no MASTER_ADDR on one machine (srun: nor on several), and no MASTER_PORT. STROBE_RENDEZVOUS_SECONDS: the time-out.
Launch read_launch(const Environment& environment);
/// Of this process.
Launch read_launch();

}  // namespace strobe::gpt
