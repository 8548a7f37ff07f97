#include "gpt/distributed/data_parallel.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "gpt/bf16.hpp"

namespace strobe::gpt {

namespace {

size_t local_elements(const std::vector<Bucket>& buckets) {
    return static_cast<size_t>(buckets.back().local + buckets.back().piece);
}

}  // namespace

DataParallel::DataParallel(ProcessGroup& group, Backend& backend, const Weights& weights, const ParameterArena& gradients,
                           const OptimizerOptions& options, Precision moments)
    : backend_(backend),
      weights_(weights),
      gradients_(gradients),
      options_(options),
      precision_(moments),
      rank_(group.rank()),
      buckets_(plan_buckets(weights.layout, group.size())),
      m_(local_elements(buckets_) * size_of(moments), backend.memory()),
      v_(local_elements(buckets_) * size_of(moments), backend.memory()),
      segments_(2 * sizeof(AdamWSegment), backend.memory()),
      squared_norm_(sizeof(double), backend.memory()),
      rates_(sizeof(AdamWRates), backend.memory()),
      communicator_(make_communicator(group, backend)) {
    options.validate();
    constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
    const AdamWSegment segments[] = {{0, kAll, false}, {0, kAll, true}};
    backend.memory().copy(segments_.at<void>(0), segments, sizeof segments);
}

// There is time while the backward goes on, but for what it finishes last.
void DataParallel::ready(int64_t from) {
    const Pace pace = from > 0 ? Pace::calm : Pace::swift;
    communicator_->as_one([&] {
        for (; reduced_ < buckets_.size() && buckets_[reduced_].begin >= from; ++reduced_)
            communicator_->reduce_scatter(gradients_.data() + buckets_[reduced_].begin, buckets_[reduced_].piece, pace);
    });
}

// The operators' clock sees what of the communication they have to wait for.
void DataParallel::join(const char* what) {
    Exec& exec = backend_.exec();
    const Work work{.part = what};
    if (!exec.times) return communicator_->join();
    if (exec.clock) {
        exec.clock->begin();
        communicator_->join();
        return exec.clock->end(OpKind::communication, work);
    }
    const auto start = std::chrono::steady_clock::now();
    communicator_->join();
    exec.times->add(OpKind::communication, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), work);
}

void DataParallel::set_rates(int64_t step, float learning_rate) {
    const AdamWRates rates = adamw_rates(learning_rate, options_.beta1, options_.beta2, options_.weight_decay, step);
    backend_.memory().put(rates_.at<void>(0), &rates, sizeof rates);
}

void DataParallel::update(double* loss_sum) {
    ready(0);
    reduced_ = 0;
    communicator_->all_reduce(loss_sum, 1);
    join("gradients");
    Exec& exec = backend_.exec();
    auto* square = squared_norm_.at<double>(0);
    for (const Bucket& b : buckets_)
        run(exec, SquaredNorm{.size = b.piece, .values = gradients_.data() + own(b), .result = square, .add = &b != buckets_.data()});
    communicator_->all_reduce(square, 1);
    join("norm");
    // New values go out in so many groups of buckets: enough for AdamW to hide all but the last, and few starts.
    constexpr size_t kGroups = 8;
    const bool narrows = weights_.precision != Precision::fp32;
    const size_t at_once = (buckets_.size() + kGroups - 1) / kGroups;
    for (size_t begin = 0; begin < buckets_.size(); begin += at_once) {
        const auto group = std::span(buckets_).subspan(begin, std::min(at_once, buckets_.size() - begin));
        for (const Bucket& b : group)
            run(exec, AdamW{.segments = {segments_.at<AdamWSegment>(0) + b.decay, 1}, .size = b.piece,
                            .values = weights_.values.at(own(b)), .grads = gradients_.data() + own(b), .m = local(m_, b),
                            .v = local(v_, b), .rates = rates_.at<AdamWRates>(0), .beta1 = options_.beta1, .beta2 = options_.beta2,
                            .eps = options_.eps, .squared_norm = options_.clip_norm > 0.0f ? square : nullptr,
                            .clip_norm = options_.clip_norm, .narrow = narrows ? weights_.all().offset(own(b)) : Buffer()});
        communicator_->as_one([&] {
            for (const Bucket& b : group) {
                communicator_->all_gather(weights_.all().offset(b.begin), b.piece);
                // Norms read the masters.
                if (narrows && !b.decay) communicator_->all_gather(weights_.values.at(b.begin), b.piece);
            }
        });
    }
    join("values");
}

double DataParallel::gradient_norm() const {
    double square = 0.0;
    backend_.memory().copy(&square, squared_norm_.at<double>(0), sizeof square);
    return std::sqrt(square);
}

void DataParallel::gather_values() {
    if (!weights_.has_lower_halves()) return;
    communicator_->as_one([&] {
        for (const Bucket& b : buckets_) communicator_->all_gather(weights_.values.at(b.begin), b.piece);
    });
    communicator_->join();
}

// Through the host, where bf16 becomes fp32: saving is rare.
const ParameterArena& DataParallel::gather(const Arena& moments) {
    std::vector<float> numbers;
    std::vector<uint16_t> bits;
    Memory& memory = backend_.memory();
    for (const Bucket& b : buckets_) {
        const auto count = static_cast<size_t>(b.piece);
        float* to = gradients_.data() + own(b);
        if (precision_ == Precision::fp32) {
            memory.copy(to, local(moments, b).data, count * sizeof(float));
        } else {
            numbers.resize(count);
            bits.resize(count);
            memory.copy(bits.data(), local(moments, b).data, count * sizeof(uint16_t));
            std::transform(bits.begin(), bits.end(), numbers.begin(), widen_bf16);
            memory.copy(to, numbers.data(), count * sizeof(float));
        }
        communicator_->all_gather(gradients_.data() + b.begin, b.piece);
    }
    communicator_->join();
    return gradients_;
}

void DataParallel::scatter(const ParameterArena& whole, const Arena& moments) {
    std::vector<uint16_t> bits;
    Memory& memory = backend_.memory();
    for (const Bucket& b : buckets_) {
        const auto count = static_cast<size_t>(b.piece);
        const float* from = whole.data() + own(b);
        if (precision_ == Precision::fp32) {
            memory.copy(local(moments, b).data, from, count * sizeof(float));
        } else {
            bits.resize(count);
            std::transform(from, from + count, bits.begin(), round_bf16);
            memory.copy(local(moments, b).data, bits.data(), count * sizeof(uint16_t));
        }
    }
}

void DataParallel::set_moments(const ParameterArena& first, const ParameterArena& second) {
    scatter(first, m_);
    scatter(second, v_);
}

}  // namespace strobe::gpt
