// Every operator of the GPU against the CPU's.
#include "gpt/bf16.hpp"
#include "gpt/step_inputs.hpp"
#include "gpt/tests/cuda/twin.hpp"

namespace strobe::gpt::test {

namespace {

class CudaOps : public testing::TestWithParam<Precision> {
protected:
    CudaOps() {
        cpu.reserve_scratch(size_t{64} << 20);
        gpu.reserve_scratch(size_t{64} << 20);
    }

    Backend cpu{Device::cpu, 2}, gpu{Device::cuda};
    Twins twins{gpu, GetParam()};
    Exec &host = cpu.exec(), &device = gpu.exec();

    void norm(NormKind kind, int64_t rows, int64_t hidden);
    void linear(int64_t rows, int64_t in, int64_t out, int64_t stride, bool biased);
    void gelu_in_products(int64_t rows, int64_t in, int64_t out);
    void activation(ActivationKind kind, int64_t rows, int64_t ffn);
    void attention(const std::vector<int32_t>& lengths, int64_t heads, int64_t heads_k, int64_t head_dim);
    void decoding_attention(int32_t keys, int64_t heads, int64_t heads_k, int64_t head_dim, int64_t poisoned_key = -1);
    void cross_entropy(int64_t rows, int64_t vocab, int64_t stride);
};

void CudaOps::norm(NormKind kind, int64_t rows, int64_t hidden) {
    SCOPED_TRACE(testing::Message() << rows << " x " << hidden);
    const size_t count = size_t(rows * hidden), columns = size_t(hidden);
    const bool biased = kind == NormKind::layernorm;
    Twin x = twins.normal(count, 1), branch = twins.normal(count, 2), sum = twins.filled(count, -7.0f);
    Twin out = twins.filled(count, -7.0f);
    Twin weight = twins.normal_f32(columns, 3), bias = twins.normal_f32(columns, 4);
    Twin mean = twins.filled_f32(size_t(rows), -7.0f), rstd = twins.filled_f32(size_t(rows), -7.0f);
    const auto forward = [&](auto at) {
        return NormForward{.kind = kind, .rows = rows, .hidden = hidden, .eps = 1e-5f, .x = at(x), .branch = at(branch),
                           .sum = at(sum), .weight = at(weight), .bias = biased ? at(bias) : Buffer(), .out = at(out),
                           .mean = at(mean).f32(), .rstd = at(rstd).f32()};
    };
    const auto here = [](Twin& t) { return Buffer(t.host.data()); };
    const auto there = [](Twin& t) { return t.device; };
    run(host, forward(here));
    run(device, forward(there));
    twins.expect_same(sum, "sum");
    twins.expect_same(out, "out");
    twins.expect_same(rstd, "rstd");

    // The backward reads the same sums on both sides.
    Twin in = twins.normal(count, 5), dout = twins.normal(count, 6), dx = twins.normal(count, 7);
    Twin dweight = twins.normal_f32(columns, 8), dbias = twins.normal_f32(columns, 9);
    NormForward again = forward(here);
    again.x = in.host.data(), again.branch = {}, again.sum = {};
    run(host, again);
    again = forward(there);
    again.x = in.device, again.branch = {}, again.sum = {};
    run(device, again);
    const auto backward = [&](auto at) {
        return NormBackward{.kind = kind, .rows = rows, .hidden = hidden, .x = at(in), .weight = at(weight),
                            .mean = at(mean).f32(), .rstd = at(rstd).f32(), .dout = at(dout), .dx = at(dx),
                            .dweight = at(dweight).f32(), .dbias = biased ? at(dbias).f32() : nullptr};
    };
    Twin repeated = twins.filled(count, -7.0f);
    repeated.host = out.host;
    NormBackward with_out = backward(there);
    with_out.out = repeated.device;
    with_out.bias = biased ? bias.device : Buffer();
    Twin dsum = twins.normal_f32(columns, 9);
    if (biased) with_out.dsum = dsum.device.f32();
    run(host, backward(here));
    run(device, with_out);
    if (biased)
        for (size_t i = 0; i < count; ++i) dsum.host[i % columns] += dx.host[i];
    twins.expect_same(dsum, "sums of dx", GetParam() == Precision::fp32 ? 1e-4 : 1e-2);
    twins.expect_same(dx, "dx");
    twins.expect_same(dweight, "dweight", 1e-4);
    if (biased) twins.expect_same(dbias, "dbias", 1e-4);
    twins.expect_same(repeated, "the norm again");
    run(host, backward(here));
    run(device, backward(there));
    twins.expect_same(dx, "dx without");
}

void CudaOps::linear(int64_t rows, int64_t in, int64_t out, int64_t stride, bool biased) {
    SCOPED_TRACE(testing::Message() << rows << " x " << in << " x " << out << " at " << stride);
    Twin x = twins.normal(size_t(rows * in), 1), weight = twins.normal(size_t(out * in), 2, 0.1);
    Twin bias = twins.normal(size_t(out), 3);
    Twin y = twins.filled(size_t(rows * stride), 0.0f), dy = twins.normal(size_t(rows * stride), 4);
    Twin dx = twins.filled(size_t(rows * in), -7.0f);
    Twin dweight = twins.normal_f32(size_t(out * in), 5), dbias = twins.normal_f32(size_t(out), 6);
    const auto forward = [&](auto at) {
        return LinearForward{.rows = rows, .in = in, .out = out, .x = at(x), .weight = at(weight),
                             .bias = biased ? at(bias) : Buffer(), .y = at(y), .y_stride = stride};
    };
    const auto backward = [&](auto at) {
        return LinearBackward{.rows = rows, .in = in, .out = out, .x = at(x), .weight = at(weight), .dy = at(dy),
                              .dx = at(dx), .dweight = at(dweight).f32(), .dbias = biased ? at(dbias).f32() : nullptr,
                              .dy_stride = stride};
    };
    const auto here = [](Twin& t) { return Buffer(t.host.data()); };
    const auto there = [](Twin& t) { return t.device; };
    run(host, forward(here));
    run(device, forward(there));
    run(host, backward(here));
    run(device, backward(there));
    twins.expect_same(y, "y");
    twins.expect_same(dx, "dx");
    twins.expect_same(dweight, "dweight", 1e-4);
    if (biased) twins.expect_same(dbias, "dbias", 1e-4);

    // Overwritten, in the precision under test.
    Twin narrow = twins.filled(size_t(out * in), -7.0f);
    LinearBackward overwriting = backward(here);
    overwriting.overwrite = true;
    run(host, overwriting);
    narrow.host = dweight.host;
    overwriting = backward(there);
    overwriting.overwrite = true, overwriting.dweight = narrow.device;
    run(device, overwriting);
    twins.expect_same(narrow, "dweight, overwritten", GetParam() == Precision::fp32 ? 1e-4 : 4e-3);
    if (biased) twins.expect_same(dbias, "dbias beside it", 1e-4);

    // A bias of some columns alone, and one ahead of the product.
    Twin some = twins.normal_f32(size_t(out), 6), ahead = twins.filled_f32(size_t(in), -7.0f);
    for (int64_t i = 0; i < rows * out; ++i)
        if (i % out < (out + 2) / 3) some.host[size_t(i % out)] += dy.host[size_t(i / out * stride + i % out)];
    LinearBackward partial = backward(there);
    partial.dbias = some.device.f32(), partial.dbias_columns = (out + 2) / 3;
    run(device, partial);
    twins.expect_same(some, "dbias of some columns", 1e-4);
    Doubles through(size_t(in), 0.0);
    for (int64_t i = 0; i < out * in; ++i)
        through[size_t(i % in)] += double(some.host[size_t(i / in)]) * weight.host[size_t(i)];
    ahead.host.assign(through.begin(), through.end());
    run(device, BiasBackward{.in = in, .out = out, .weight = weight.device, .sums = some.device.f32(),
                             .dx = ahead.device.f32()});
    twins.expect_same(ahead, "the gradient of a bias ahead", 1e-4);

    // With a residual: elsewhere, then in the place of y.
    Twin residual = twins.normal(size_t(rows * stride), 8), sum = twins.filled(size_t(rows * stride), 0.0f);
    run(host, forward(here));
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < out; ++c)
            sum.host[size_t(r * stride + c)] = y.host[size_t(r * stride + c)] + residual.host[size_t(r * stride + c)];
    LinearForward added = forward(there);
    added.y = sum.device;
    added.residual = residual.device;
    run(device, added);
    twins.expect_same(sum, "y and residual");
    if (stride != out) return;  // what lies between rows is nobody's
    added.y = residual.device;
    run(device, added);
    residual.host = sum.host;
    twins.expect_same(residual, "y in the place of the residual");
}

void CudaOps::gelu_in_products(int64_t rows, int64_t in, int64_t out) {
    Twin x = twins.normal(size_t(rows * in), 1), weight = twins.normal(size_t(out * in), 2, 0.1);
    Twin bias = twins.normal(size_t(out), 3);
    Twin before = twins.filled(size_t(rows * out), -7.0f), y = twins.filled(size_t(rows * out), -7.0f);
    run(host, LinearForward{.rows = rows, .in = in, .out = out, .x = x.host.data(), .weight = weight.host.data(),
                            .bias = bias.host.data(), .y = before.host.data()});
    run(host, ActivationForward{.kind = ActivationKind::gelu, .rows = rows, .ffn = out, .x = before.host.data(),
                                .y = y.host.data()});
    run(device, LinearForward{.rows = rows, .in = in, .out = out, .x = x.device, .weight = weight.device,
                              .bias = bias.device, .y = y.device, .gelu_input = before.device});
    twins.expect_same(before, "gelu's input");
    twins.expect_same(y, "gelu");

    // Backward of a product that reads gelu's result: (rows, out) -> (rows, in).
    Twin saved = twins.normal(size_t(rows * out), 4), down = twins.normal(size_t(in * out), 5, 0.1);
    Twin dy = twins.normal(size_t(rows * in), 6);
    Twin dx = twins.filled(size_t(rows * out), -7.0f), dweight = twins.filled_f32(size_t(in * out), 0.0f);
    run(host, LinearBackward{.rows = rows, .in = out, .out = in, .x = y.host.data(), .weight = down.host.data(),
                             .dy = dy.host.data(), .dx = dx.host.data(), .dweight = dweight.host.data(),
                             .dbias = nullptr});
    run(host, ActivationBackward{.kind = ActivationKind::gelu, .rows = rows, .ffn = out, .x = saved.host.data(),
                                 .dy = dx.host.data(), .dx = dx.host.data()});
    run(device, LinearBackward{.rows = rows, .in = out, .out = in, .x = y.device, .weight = down.device,
                               .dy = dy.device, .dx = dx.device, .dweight = dweight.device.f32(), .dbias = nullptr,
                               .gelu_input = saved.device});
    twins.expect_same(dx, "gradient of gelu's input");
}

void CudaOps::activation(ActivationKind kind, int64_t rows, int64_t ffn) {
    const int64_t columns = kind == ActivationKind::gelu ? ffn : 2 * ffn;
    Twin x = twins.normal(size_t(rows * columns), 1, 3.0), y = twins.filled(size_t(rows * ffn), -7.0f);
    Twin dy = twins.normal(size_t(rows * ffn), 2);
    run(host, ActivationForward{.kind = kind, .rows = rows, .ffn = ffn, .x = x.host.data(), .y = y.host.data()});
    run(device, ActivationForward{.kind = kind, .rows = rows, .ffn = ffn, .x = x.device, .y = y.device});
    twins.expect_same(y, "y");
    run(host, ActivationBackward{.kind = kind, .rows = rows, .ffn = ffn, .x = x.host.data(), .dy = dy.host.data(),
                                 .dx = x.host.data()});
    run(device, ActivationBackward{.kind = kind, .rows = rows, .ffn = ffn, .x = x.device, .dy = dy.device,
                                   .dx = x.device});
    twins.expect_same(x, "dx, in place");
}

void CudaOps::attention(const std::vector<int32_t>& lengths, int64_t heads, int64_t heads_k, int64_t head_dim) {
    SCOPED_TRACE(testing::Message() << lengths.size() << " sequences, " << heads << "/" << heads_k << " heads of "
                                    << head_dim);
    std::vector<int32_t> borders{0};
    int32_t longest = 0, shortest = lengths.front();
    for (const int32_t n : lengths) {
        borders.push_back(borders.back() + n);
        longest = std::max(longest, n), shortest = std::min(shortest, n);
    }
    const int64_t rows = borders.back(), q = heads * head_dim, kv = heads_k * head_dim, stride = q + 2 * kv;
    const int32_t* borders_there = twins.upload(borders);
    Twin qkv = twins.normal(size_t(rows * stride), 1), out = twins.filled(size_t(rows * q), -7.0f);
    Twin dout = twins.normal(size_t(rows * q), 2);
    Twin dqkv = twins.filled(size_t(rows * stride), -7.0f), lse = twins.filled_f32(size_t(rows * heads), -7.0f);
    const auto forward = [&](auto at, const int32_t* cu) {
        return AttentionForward{.shape = {.batch = int64_t(lengths.size()), .num_heads = heads, .num_heads_k = heads_k,
                                          .head_dim = head_dim, .total_q = rows, .total_k = rows,
                                          .max_seqlen_q = longest, .max_seqlen_k = longest, .cu_seqlens_q = cu,
                                          .cu_seqlens_k = cu, .uniform = longest == shortest},
                                .q_stride = stride, .k_stride = stride, .v_stride = stride, .out_stride = q,
                                .q = at(qkv), .k = at(qkv).offset(q), .v = at(qkv).offset(q + kv), .out = at(out),
                                .lse = at(lse).f32()};
    };
    const auto backward = [&](auto at, const int32_t* cu) {
        return AttentionBackward{.forward = forward(at, cu), .dout_stride = q, .dqkv_stride = stride, .dout = at(dout),
                                 .dq = at(dqkv), .dk = at(dqkv).offset(q), .dv = at(dqkv).offset(q + kv)};
    };
    const auto here = [](Twin& t) { return Buffer(t.host.data()); };
    const auto there = [](Twin& t) { return t.device; };
    run(host, forward(here, borders.data()));
    run(device, forward(there, borders_there));
    twins.expect_same(out, "out");
    run(host, backward(here, borders.data()));
    run(device, backward(there, borders_there));
    twins.expect_same(dqkv, "dqkv");
}

// A single query over a cache of more rows than it has keys; the GPU is told the cache's rows. With a poisoned key the
// last head of the keys has a NaN there, which must reach that head's queries and no others.
void CudaOps::decoding_attention(int32_t keys, int64_t heads, int64_t heads_k, int64_t head_dim, int64_t poisoned_key) {
    SCOPED_TRACE(testing::Message() << keys << " keys, " << heads << "/" << heads_k << " heads of " << head_dim
                                    << ", NaN " << poisoned_key);
    const std::vector<int32_t> borders{0, 1, 0, keys};
    const int64_t q = heads * head_dim, kv = heads_k * head_dim, capacity = keys + 37;
    Twin query = twins.normal(size_t(q + 8), 1), v = twins.normal(size_t(capacity * kv), 3);
    Twin out = twins.filled(size_t(q), -7.0f);
    Floats numbers = random_floats(size_t(capacity * kv), 2);
    if (poisoned_key >= 0) numbers[size_t((poisoned_key + 1) * kv - 1)] = NAN;
    Twin k = twins.of(std::move(numbers));
    const auto forward = [&](auto at, const int32_t* cu, int64_t told) {
        return AttentionForward{.shape = {.batch = 1, .num_heads = heads, .num_heads_k = heads_k, .head_dim = head_dim,
                                          .total_q = 1, .total_k = told, .max_seqlen_q = 1, .max_seqlen_k = told,
                                          .cu_seqlens_q = cu, .cu_seqlens_k = cu + 2},
                                .q_stride = q + 8, .k_stride = kv, .v_stride = kv, .out_stride = q, .q = at(query),
                                .k = at(k), .v = at(v), .out = at(out), .lse = nullptr};
    };
    run(host, forward([](Twin& t) { return Buffer(t.host.data()); }, borders.data(), keys));
    run(device, forward([](Twin& t) { return t.device; }, twins.upload(borders), capacity));
    if (poisoned_key < 0) return twins.expect_same(out, "out");
    const Floats actual = twins.fetch(out);
    const int64_t clean = (heads - heads / heads_k) * head_dim;
    for (int64_t i = 0; i < q; ++i) EXPECT_EQ(std::isnan(actual[size_t(i)]), i >= clean) << i;
    for (int64_t i = 0; i < clean; ++i) EXPECT_NEAR(actual[size_t(i)], out.host[size_t(i)], twins.tolerance()) << i;
}

void CudaOps::cross_entropy(int64_t rows, int64_t vocab, int64_t stride) {
    SCOPED_TRACE(testing::Message() << "vocabulary of " << vocab << " at " << stride);
    Twin logits = twins.normal(size_t(rows * stride), 1, 4.0), losses = twins.filled_f32(size_t(rows), -7.0f);
    std::vector<int32_t> targets;
    for (int64_t r = 0; r < rows; ++r) targets.push_back(r % 4 == 2 ? kIgnoreTarget : int32_t(r * 7919 % vocab));
    targets.front() = int32_t(vocab - 1);
    const std::vector<float> scale{0.125f};
    run(host, CrossEntropy{.rows = rows, .vocab = vocab, .targets = targets.data(), .logits = logits.host.data(),
                           .losses = losses.host.data(), .stride = stride});
    const int32_t* targets_there = twins.upload(targets);
    run(device, CrossEntropy{.rows = rows, .vocab = vocab, .targets = targets_there, .logits = logits.device,
                             .losses = losses.device.f32(), .stride = stride});
    twins.expect_same(losses, "losses", 2e-5);
    run(host, CrossEntropy{.rows = rows, .vocab = vocab, .targets = targets.data(), .logits = logits.host.data(),
                           .losses = losses.host.data(), .gradient_scale = scale.data(), .stride = stride});
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = vocab; c < stride; ++c) logits.host[size_t(r * stride + c)] = 0.0f;
    run(device, CrossEntropy{.rows = rows, .vocab = vocab, .targets = targets_there, .logits = logits.device,
                             .losses = losses.device.f32(), .gradient_scale = twins.upload(scale), .stride = stride});
    twins.expect_same(losses, "losses beside the gradient", 2e-5);
    twins.expect_same(logits, "dlogits, zero behind the vocabulary");
    Twin sum = twins.filled_f32(2, 0.0f);  // room for a double
    double expected = 0.0, actual = 0.0;
    run(host, LossSum{.rows = rows, .losses = losses.host.data(), .sum = &expected, .add = false});
    auto* there = static_cast<double*>(sum.device.data);
    for (const bool add : {false, true})
        run(device, LossSum{.rows = rows, .losses = losses.device.f32(), .sum = there, .add = add});
    gpu.memory().copy(&actual, there, sizeof actual);
    EXPECT_NEAR(actual, 2.0 * expected, 1e-4 * std::abs(expected));
}

}  // namespace

TEST_P(CudaOps, norms) {
    for (const NormKind kind : {NormKind::layernorm, NormKind::rmsnorm})
        for (const auto& [rows, hidden] : std::vector<std::pair<int64_t, int64_t>>{
                 {5, 37}, {37, 96}, {1, 256}, {70, 512}, {130, 768}, {1029, 1024}, {301, 2048}, {65, 2560}, {301, 1600},
                 {33, 8192}, {3, 16392},
                 // Several rows to each block, the last ones not to all.
                 {2309, 2048}, {4999, 768}, {1301, 5120}})
            norm(kind, rows, hidden);
}

TEST_P(CudaOps, products) {
    linear(19, 24, 40, 40, true);
    linear(1, 64, 192, 192, true);
    linear(1, 2056, 77, 77, false);
    linear(1, 4096, 520, 520, true);
    linear(300, 256, 768, 768, true);
    linear(257, 128, 257, 320, false);
    linear(640, 384, 1152, 1152, true);
    linear(5003, 16, 1152, 1152, true);
}

TEST_P(CudaOps, gelu_in_products) {
    gelu_in_products(33, 24, 36);
    gelu_in_products(256, 192, 768);
}

TEST_P(CudaOps, activations) {
    activation(ActivationKind::gelu, 7, 301);
    activation(ActivationKind::gelu, 64, 512);
    activation(ActivationKind::swiglu, 7, 301);
    activation(ActivationKind::swiglu, 64, 512);
}

TEST_P(CudaOps, attention) {
    attention({128, 128, 128}, 4, 4, 64);
    attention({200, 1, 77, 300}, 4, 4, 64);
    attention({65, 129}, 6, 2, 64);
    attention({256, 256}, 2, 2, 128);
    attention({33, 100}, 3, 1, 32);
}

TEST_P(CudaOps, decoding) {
    for (const int32_t keys : {1, 2, 63, 64, 1000, 5003}) {
        decoding_attention(keys, 4, 4, 64);
        decoding_attention(keys, 6, 2, 128);
    }
    decoding_attention(300, 3, 1, 40);
    decoding_attention(700, 2, 2, 256);
    decoding_attention(1, 4, 2, 64, 0);
    decoding_attention(300, 4, 2, 64, 299);
    decoding_attention(1000, 6, 2, 128, 500);
}

TEST_P(CudaOps, cross_entropy) {
    cross_entropy(9, 77, 77);
    cross_entropy(30, 257, 320);
    cross_entropy(12, 50304, 50304);
    cross_entropy(6, 50257, 50304);
}

TEST_P(CudaOps, embedding) {
    for (const int64_t hidden : {int64_t{21}, int64_t{256}}) {
        const ModelConfig config = [&] {
            ModelConfig c = gpt2_config(1, 64, 1, 600, 50);
            return c;
        }();
        Batch batch;
        Random random(3);
        batch.cu_seqlens = {0, 600, 650, 1000};
        // Most tokens are one of three, so that rows of the table have many pieces; token 49 comes once.
        for (int i = 0; i < 1000; ++i) batch.tokens.push_back(int32_t(random.below(i % 3 == 0 ? 48 : 3)));
        batch.tokens[500] = 49;
        StepInputs inputs(config, gpu, 1024);
        inputs.load(batch, 1.0f);
        std::vector<int32_t> positions;
        for (const int n : {600, 50, 350})
            for (int i = 0; i < n; ++i) positions.push_back(i);
        Twin table = twins.normal(size_t(50 * hidden), 1), position_table = twins.normal(size_t(600 * hidden), 2);
        Twin out = twins.filled(size_t(1000 * hidden), -7.0f), dout = twins.normal(size_t(1000 * hidden), 3);
        Twin dtable = twins.normal_f32(size_t(50 * hidden), 4), dpositions = twins.normal_f32(size_t(600 * hidden), 5);
        run(host, EmbeddingForward{.rows = 1000, .hidden = hidden, .tokens = batch.tokens.data(),
                                   .positions = positions.data(), .table = table.host.data(),
                                   .position_table = position_table.host.data(), .out = out.host.data()});
        run(device, EmbeddingForward{.rows = 1000, .hidden = hidden, .tokens = inputs.tokens(),
                                     .positions = inputs.positions(), .table = table.device,
                                     .position_table = position_table.device, .out = out.device});
        twins.expect_same(out, "out");
        run(host, EmbeddingBackward{.rows = 1000, .hidden = hidden, .tokens = batch.tokens.data(),
                                    .positions = positions.data(), .dout = dout.host.data(),
                                    .dtable = dtable.host.data(), .dposition_table = dpositions.host.data()});
        run(device, EmbeddingBackward{.rows = 1000, .hidden = hidden, .tokens = inputs.tokens(),
                                      .positions = inputs.positions(), .dout = dout.device,
                                      .dtable = dtable.device.f32(), .dposition_table = dpositions.device.f32(),
                                      .token_groups = inputs.token_groups(),
                                      .position_groups = inputs.position_groups()});
        twins.expect_same(dtable, "dtable", 1e-4);
        twins.expect_same(dpositions, "dpositions", 1e-4);
        // Into a table of the precision under test: one rounding more, relative to each entry.
        Twin narrow = twins.normal(size_t(50 * hidden), 4);
        std::copy_n(narrow.host.begin(), narrow.host.size(), dtable.host.begin());
        run(host, EmbeddingBackward{.rows = 1000, .hidden = hidden, .tokens = batch.tokens.data(),
                                    .positions = positions.data(), .dout = dout.host.data(),
                                    .dtable = dtable.host.data(), .dposition_table = {}});
        run(device, EmbeddingBackward{.rows = 1000, .hidden = hidden, .tokens = inputs.tokens(),
                                      .positions = inputs.positions(), .dout = dout.device, .dtable = narrow.device,
                                      .dposition_table = {}, .token_groups = inputs.token_groups()});
        narrow.host = dtable.host;
        twins.expect_same(narrow, "dtable in the same precision", GetParam() == Precision::fp32 ? 1e-4 : 4e-3);
    }
}

TEST_P(CudaOps, rope) {
    const std::vector<int32_t> positions{0, 1, 2, 30, 511, 5};
    for (const int64_t dim : {int64_t{10}, int64_t{64}}) {
        const int64_t stride = 3 * dim + (dim == 64 ? 64 : 7);
        const std::vector<float> table = rope_table(512, dim, 10000.0f);
        const float* table_there = twins.upload(table);
        Twin x = twins.normal(size_t(6 * stride), 1);
        const auto args = [&](Buffer at, const int32_t* p, const float* t) {
            return Rope{.rows = 6, .heads = 3, .head_dim = dim, .row_stride = stride, .x = at, .positions = p, .cos = t,
                        .sin = t + table.size() / 2, .inverse = false};
        };
        run(host, args(x.host.data(), positions.data(), table.data()));
        run(device, args(x.device, twins.upload(positions), table_there));
        twins.expect_same(x, "turned");
    }
}

TEST_P(CudaOps, cache_append) {
    Twin qkv = twins.normal(5 * 48, 1), k = twins.filled(20 * 12, 3.0f), v = twins.filled(20 * 12, 3.0f);
    const std::vector<int32_t> positions{9, 10, 11, 2, 19};
    const auto args = [](Buffer x, Buffer kc, Buffer vc, const int32_t* at) {
        return CacheAppend{.rows = 5, .columns = 12, .stride = 48, .positions = at, .k = x.offset(24),
                           .v = x.offset(36), .k_cache = kc, .v_cache = vc};
    };
    run(host, args(qkv.host.data(), k.host.data(), v.host.data(), positions.data()));
    run(device, args(qkv.device, k.device, v.device, twins.upload(positions)));
    twins.expect_same(k, "keys", 0.0);
    twins.expect_same(v, "values", 0.0);
}

TEST_P(CudaOps, adamw_and_norm) {
    constexpr int64_t kSize = 65536 + 64;
    const std::vector<AdamWSegment> segments{{0, 4480, true}, {4480, 30016, false}, {34496, kSize - 34496, true}};
    const AdamWSegment* segments_there = twins.upload(segments);
    Twin w = twins.normal_f32(kSize, 1), m = twins.filled_f32(kSize, 0.0f), v = twins.filled_f32(kSize, 0.0f);
    Twin narrow = twins.filled(kSize, 0.0f);
    Twin square = twins.filled_f32(2, 0.0f);
    auto* square_there = static_cast<double*>(square.device.data);
    for (int step = 1; step <= 3; ++step) {
        Twin g = twins.normal_f32(kSize, 10 + uint64_t(step));
        double expected = 0.0, actual = 0.0;
        run(host, SquaredNorm{.size = kSize, .values = g.host.data(), .result = &expected});
        run(device, SquaredNorm{.size = kSize, .values = g.device.f32(), .result = square_there});
        gpu.memory().copy(&actual, square_there, sizeof actual);
        EXPECT_NEAR(actual, expected, 1e-6 * expected);
        const std::vector<AdamWRates> rates{adamw_rates(0.01f, 0.9f, 0.95f, 0.1f, step)};
        const auto args = [&](auto at, const AdamWSegment* s, const AdamWRates* r, const double* norm) {
            return AdamW{.segments = {s, segments.size()}, .size = kSize, .values = at(w).f32(), .grads = at(g).f32(),
                         .m = at(m), .v = at(v), .rates = r, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f,
                         .squared_norm = norm, .clip_norm = 100.0f};
        };
        run(host, args([](Twin& t) { return Buffer(t.host.data()); }, segments.data(), rates.data(), &expected));
        AdamW there = args([](Twin& t) { return t.device; }, segments_there, twins.upload(rates), square_there);
        if (GetParam() == Precision::bf16) there.narrow = narrow.device;
        run(device, there);
        twins.expect_same(w, "values", 2e-6);
        twins.expect_same(m, "first moments", 2e-6);
        twins.expect_same(v, "second moments", 2e-6);
    }
    if (GetParam() != Precision::bf16) return;
    const Floats masters = twins.fetch(w), narrowed = twins.fetch(narrow);
    for (size_t i = 0; i < masters.size(); ++i) ASSERT_EQ(narrowed[i], to_bf16(masters[i])) << i;
}

// Values in halves are the same values, and gradients in bf16 are fp32 numbers that fit.
TEST_P(CudaOps, adamw_of_halves) {
    if (GetParam() != Precision::bf16) GTEST_SKIP() << "one precision is enough";
    constexpr int64_t kSize = 65536 + 64;
    const std::vector<AdamWSegment> segments{{0, kSize, true}};
    const AdamWSegment* segments_there = twins.upload(segments);
    Twin whole = twins.normal_f32(kSize, 1), m = twins.filled_f32(kSize, 0.0f), v = twins.filled_f32(kSize, 0.0f);
    Twin m_of_halves = twins.filled_f32(kSize, 0.0f), v_of_halves = twins.filled_f32(kSize, 0.0f);
    Twin high = twins.filled(kSize, 0.0f), low = twins.filled(kSize, 0.0f), square = twins.filled_f32(2, 0.0f);
    std::vector<uint16_t> high_bits, low_bits;
    for (const float x : whole.host) {
        const SplitFloat halves = split_float(x);
        high_bits.push_back(halves.high), low_bits.push_back(halves.low);
        ASSERT_EQ(join_float(halves), x);
    }
    const size_t bytes = kSize * sizeof(uint16_t);
    gpu.memory().copy(high.device.data, high_bits.data(), bytes);
    gpu.memory().copy(low.device.data, low_bits.data(), bytes);
    auto* square_there = static_cast<double*>(square.device.data);
    for (int step = 1; step <= 3; ++step) {
        Twin g = twins.normal(kSize, 10 + uint64_t(step)), g_whole = twins.filled_f32(kSize, 0.0f);
        gpu.memory().copy(g_whole.device.data, g.host.data(), kSize * sizeof(float));
        double sum = 0.0, expected = 0.0;
        for (const float x : g.host) expected += double(x) * x;
        run(device, SquaredNorm{.size = kSize, .values = g.device, .result = square_there});
        gpu.memory().copy(&sum, square_there, sizeof sum);
        EXPECT_NEAR(sum, expected, 1e-6 * expected);
        const AdamWRates* rates = twins.upload(std::vector<AdamWRates>{adamw_rates(0.01f, 0.9f, 0.95f, 0.1f, step)});
        AdamW args{.segments = {segments_there, 1}, .size = kSize, .values = whole.device, .grads = g_whole.device,
                   .m = m.device, .v = v.device, .rates = rates, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f};
        run(device, args);
        args.values = low.device, args.narrow = high.device, args.grads = g.device;
        args.m = m_of_halves.device, args.v = v_of_halves.device;
        run(device, args);
    }
    gpu.memory().copy(high_bits.data(), high.device.data, bytes);
    gpu.memory().copy(low_bits.data(), low.device.data, bytes);
    const Floats expected = twins.fetch(whole);
    for (size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(join_float({high_bits[i], low_bits[i]}), expected[i]) << i;
}

// Values that are bf16 alone are those of fp32 that fit, each update rounded up or down by the random bits of its
// element and step.
TEST_P(CudaOps, adamw_of_values_in_bf16) {
    if (GetParam() != Precision::bf16) GTEST_SKIP() << "one precision is enough";
    constexpr int64_t kSize = 65536 + 64;
    const AdamWSegment* segments_there = twins.upload(std::vector<AdamWSegment>{{0, kSize, true}});
    Twin high = twins.normal(kSize, 1), whole = twins.filled_f32(kSize, 0.0f);
    Twin m = twins.filled(kSize, 0.0f), v = twins.filled(kSize, 0.0f), m_of_whole = twins.filled(kSize, 0.0f);
    Twin v_of_whole = twins.filled(kSize, 0.0f);
    double up = 0.0, expected_up = 0.0;
    for (int step = 1; step <= 3; ++step) {
        Twin g = twins.normal(kSize, 10 + uint64_t(step));
        const Floats before = twins.fetch(high);
        gpu.memory().copy(whole.device.data, before.data(), kSize * sizeof(float));
        const AdamWRates rates = adamw_rates(0.001f, 0.9f, 0.95f, 0.1f, step);
        AdamW args{.segments = {segments_there, 1}, .size = kSize, .values = {}, .grads = g.device, .m = m.device,
                   .v = v.device, .rates = twins.upload(std::vector<AdamWRates>{rates}), .beta1 = 0.9f, .beta2 = 0.95f,
                   .eps = 1e-8f};
        EXPECT_THROW(run(device, args), std::invalid_argument) << "no values at all";
        args.narrow = high.device;
        run(device, args);
        args.values = whole.device, args.narrow = {}, args.m = m_of_whole.device, args.v = v_of_whole.device;
        run(device, args);
        const Floats exact = twins.fetch(whole), actual = twins.fetch(high);
        for (size_t i = 0; i < exact.size(); ++i) {
            const float expected =
                widen_bf16(round_bf16_randomly(exact[i], adamw_value_noise(int64_t(i), rates.noise)));
            ASSERT_EQ(actual[i], expected) << i;
            up += std::abs(actual[i]) > std::abs(exact[i]);
            expected_up += 0x1p-16 * (std::bit_cast<uint32_t>(exact[i]) & 0xffffu);
        }
    }
    EXPECT_EQ(twins.fetch(m), twins.fetch(m_of_whole));
    EXPECT_EQ(twins.fetch(v), twins.fetch(v_of_whole));
    EXPECT_NEAR(up, expected_up, 5.0 * std::sqrt(0.25 * 3 * kSize))
        << "as often as the part is large that does not fit";
}

// The same random bits on both devices: all but a few numbers, whose fp32 value differed by its last digit, are rounded
// alike.
TEST_P(CudaOps, adamw_with_moments_in_bf16) {
    if (GetParam() != Precision::bf16) GTEST_SKIP() << "one precision is enough";
    constexpr int64_t kSize = 32768;
    const std::vector<AdamWSegment> segments{{0, 4480, true}, {4480, kSize - 4480, false}};
    const AdamWSegment* segments_there = twins.upload(segments);
    Twin w = twins.normal_f32(kSize, 1), m = twins.filled(kSize, 0.0f), v = twins.filled(kSize, 0.0f);
    std::vector<uint16_t> host_m(kSize), host_v(kSize);
    for (int step = 1; step <= 4; ++step) {
        Twin g = twins.normal_f32(kSize, 10 + uint64_t(step));
        const std::vector<AdamWRates> rates{adamw_rates(0.01f, 0.9f, 0.95f, 0.1f, step)};
        const AdamW here{.segments = segments, .size = kSize, .values = w.host.data(), .grads = g.host.data(),
                         .m = {host_m.data(), Precision::bf16}, .v = {host_v.data(), Precision::bf16},
                         .rates = rates.data(), .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f};
        AdamW there = here;
        there.segments = {segments_there, segments.size()};
        there.values = w.device.f32(), there.grads = g.device.f32();
        there.m = m.device, there.v = v.device, there.rates = twins.upload(rates);
        run(host, here);
        run(device, there);
    }
    const auto expect_alike = [&](const Twin& twin, const std::vector<uint16_t>& bits, const char* what) {
        const Floats actual = twins.fetch(twin);
        int64_t differ = 0, far = 0;
        for (size_t i = 0; i < bits.size(); ++i) {
            const float expected = widen_bf16(bits[i]);
            differ += actual[i] != expected;
            far += std::abs(actual[i] - expected) > 0.02f;  // a few of the last digits of the largest
        }
        EXPECT_LT(differ, kSize / 200) << what;
        EXPECT_EQ(far, 0) << what;
    };
    expect_alike(m, host_m, "first moments");
    expect_alike(v, host_v, "second moments");
    twins.expect_same(w, "values", 1e-3);
}

INSTANTIATE_TEST_SUITE_P(Precisions, CudaOps, testing::Values(Precision::fp32, Precision::bf16),
                         [](const auto& param) { return std::string(to_string(param.param)); });

}  // namespace strobe::gpt::test
