// Training by several processes, each with the whole model and a share of every step's rows (the optimizer's states sharded as
// in ZeRO, Rajbhandari et al. 2020, stage 1). Each owns one piece of every bucket of the parameters: it alone gets the sum of
// their gradients, holds their moments and updates them, and sends the new values to the others. Gradients are summed while the
// backward still goes on; new values travel while AdamW updates the next bucket.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "gpt/distributed/communicator.hpp"
#include "gpt/distributed/shards.hpp"
#include "gpt/model.hpp"
#include "gpt/train/optimizer.hpp"

namespace strobe::gpt {

/// Has the optimizer's calls; all processes make them alike.
class DataParallel final : public GradientSink {
public:
    /// Of weights whose layout was made for as many shards as there are processes.
    DataParallel(ProcessGroup& group, Backend& backend, const Weights& weights, const ParameterArena& gradients,
                 const OptimizerOptions& options, Precision moments = Precision::fp32);

    /// Gradients from element `from` of the arena on are what this process has to add to them.
    void ready(int64_t from) override;

    void set_rates(int64_t step, float learning_rate);
    /// Behind the last pass of a step; asks for operators and communication on fixed memory and nothing else. `loss_sum` becomes
    /// the sum over the processes.
    void update(double* loss_sum);
    /// Of the last update, before clipping, over all processes. Waits for it.
    double gradient_norm() const;

    /// The masters become whole where only the own pieces are kept up to date.
    void gather_values();
    /// A moment of all parameters, put together in the gradients' memory, which the next step overwrites.
    const ParameterArena& gather_first_moments() { return gather(m_); }
    const ParameterArena& gather_second_moments() { return gather(v_); }
    /// From whole arenas in host memory.
    void set_moments(const ParameterArena& first, const ParameterArena& second);

    const Communicator& communicator() const { return *communicator_; }
    /// Bytes of this process's moments.
    size_t moment_bytes() const { return m_.size_bytes() + v_.size_bytes(); }

private:
    int64_t own(const Bucket& bucket) const { return bucket.begin + rank_ * bucket.piece; }
    Buffer local(const Arena& moments, const Bucket& bucket) const {
        return Buffer(moments.at<void>(0), precision_).offset(bucket.local);
    }
    void join(const char* what);
    const ParameterArena& gather(const Arena& moments);
    void scatter(const ParameterArena& whole, const Arena& moments);

    Backend& backend_;
    const Weights& weights_;
    const ParameterArena& gradients_;
    OptimizerOptions options_;
    Precision precision_;  // of the moments
    int rank_;
    std::vector<Bucket> buckets_;
    size_t reduced_ = 0;   // buckets whose sum has been asked for
    Arena m_, v_;          // of the own pieces, one behind the other
    Arena segments_;       // AdamW's: [decay]
    Arena squared_norm_, rates_;
    std::unique_ptr<Communicator> communicator_;
};

}  // namespace strobe::gpt
