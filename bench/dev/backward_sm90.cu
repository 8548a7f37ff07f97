// Development driver of the Hopper backward kernels: checks dq, dk, dv against an fp64 reference on the GPU by the rule
// "error <= 2 x error of the naive computation in the working precision", repeats runs to catch races, and times the grid
// of the FlashAttention papers. build_backward_sm90.sh builds it from rows of src/variants.def.
// Usage: backward_sm90 [check] [race] [time] [deterministic] [beyond] [once] [d64] [d96] ...
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "backward_fixture.cuh"

using namespace strobe;
using namespace strobe::backward_dev;

namespace {

template <DType kType>
bool check_typed(const Case& c) {
    Fixture f(c);
    if (!f.row) return true;
    BackwardParams& p = f.p;
    const int64_t nq = f.rows_q * c.heads, nk = f.rows_k * c.heads_k;
    const auto reference = [&] {
        Reference r;
        r.lse = static_cast<double*>(f.take(nq * 8)), r.delta = static_cast<double*>(f.take(nq * 8));
        r.out = static_cast<double*>(f.take(nq * c.dim * 8)), r.dq = static_cast<double*>(f.take(nq * c.dim * 8));
        r.dk = static_cast<double*>(f.take(nk * c.dim * 8)), r.dv = static_cast<double*>(f.take(nk * c.dim * 8));
        return r;
    };
    const Reference exact = reference(), naive = reference();
    const dim3 grid_q(p.size.seqlen_q, c.heads, c.batch), grid_k(p.size.seqlen_k, c.heads_k, c.batch);
    const int smem_q = static_cast<int>(p.size.seqlen_k * 8), smem_k = static_cast<int>(p.size.seqlen_q * 16);
    reference_rows<kType, false><<<grid_q, 128, smem_q>>>(p, exact);
    reference_rows<kType, true><<<grid_q, 128, smem_q>>>(p, naive);
    reference_columns<kType, false><<<grid_k, 128, smem_k>>>(p, exact);
    reference_columns<kType, true><<<grid_k, 128, smem_k>>>(p, naive);
    export_forward<kType><<<grid_q, 128>>>(p, exact);
    CHECK_CUDA(cudaDeviceSynchronize());
    f.poison_outputs();
    f.run();
    CHECK_CUDA(cudaDeviceSynchronize());
    double* result = static_cast<double*>(f.take(9 * 8));
    CHECK_CUDA(cudaMemset(result, 0, 72));
    const float initial = c.accumulate ? 1.0f : 0.0f;
    const auto compare_one = [&](const TensorRef& t, bool keys, const double* e, const double* n, double* out) {
        const dim3 grid = keys ? grid_k : grid_q;
        if (c.accumulate) compare<DType::f32><<<grid, 128>>>(p, t, keys, e, n, initial, out);
        else compare<kType><<<grid, 128>>>(p, t, keys, e, n, initial, out);
    };
    compare_one(p.dq, false, exact.dq, naive.dq, result);
    compare_one(p.dk, true, exact.dk, naive.dk, result + 3);
    compare_one(p.dv, true, exact.dv, naive.dv, result + 6);
    double h[9];
    CHECK_CUDA(cudaMemcpy(h, result, 72, cudaMemcpyDeviceToHost));
    bool ok = true;
    std::string text;
    for (int i = 0; i < 3; ++i) {
        const double* x = h + 3 * i;
        const double atol = 1e-5 * std::max(1.0, x[2]);
        const bool good = x[0] <= 2 * x[1] + atol;
        ok = ok && good;
        char line[128];
        std::snprintf(line, sizeof line, "  %s %.2e/%.2e%s", i == 0 ? "dq" : i == 1 ? "dk" : "dv", x[0], x[1], good ? "" : " BAD");
        text += line;
    }
    std::printf("%-4s %-34s d%-3d%s\n", ok ? "ok" : "FAIL", c.name, c.dim, text.c_str());
    std::fflush(stdout);
    return ok;
}

bool check(const Case& c) { return c.dtype == DType::bf16 ? check_typed<DType::bf16>(c) : check_typed<DType::f16>(c); }

/// dk and dv (and dq in deterministic mode, and with whole heads) must come out bit-equal every time.
bool race(const Case& c, int repeats) {
    Fixture f(c);
    if (!f.row) return true;
    const auto grab = [&] {
        std::vector<std::vector<char>> r;
        for (const TensorRef* t : {&f.p.dk, &f.p.dv, &f.p.dq}) {
            if (t == &f.p.dq && !c.deterministic && !sm90::takes_whole_heads(f.row->variant, f.p)) continue;
            std::vector<char> v((t == &f.p.dq ? f.rows_q * c.heads : f.rows_k * c.heads_k) * c.dim * 2);
            CHECK_CUDA(cudaMemcpy(v.data(), t->data, v.size(), cudaMemcpyDeviceToHost));
            r.push_back(std::move(v));
        }
        return r;
    };
    f.run();
    const auto first = grab();
    int bad = 0;
    for (int i = 0; i < repeats; ++i) {
        f.poison_outputs();
        f.run();
        bad += grab() != first;
    }
    std::printf("%-4s race %-29s d%-3d %d of %d runs differ\n", bad ? "FAIL" : "ok", c.name, c.dim, bad, repeats);
    std::fflush(stdout);
    return bad == 0;
}

double visible_pairs(const Case& c) {
    const auto one = [&](int64_t sq, int64_t sk) {
        const BandMask mask{c.left, c.right, sk - sq, sq, sk};
        double n = 0;
        for (int64_t i = 0; i < sq; ++i) n += mask.key_range(i, i + 1).size();
        return n;
    };
    if (c.lens_q.empty()) {
        const bool causal = c.right == 0 && c.left < 0;
        return c.batch * (causal ? 0.5 * c.seqlen_q * c.seqlen_k : one(c.seqlen_q, c.seqlen_k));
    }
    double n = 0;
    for (size_t b = 0; b < c.lens_q.size(); ++b) n += one(c.lens_q[b], c.lens_k[b]);
    return n;
}

/// Median milliseconds, L2 flushed before every run.
double milliseconds(const Case& c, int runs) {
    Fixture f(c);
    if (!f.row) return 0;
    static Buffer flush(128 << 20);
    cudaEvent_t a, b;
    CHECK_CUDA(cudaEventCreate(&a));
    CHECK_CUDA(cudaEventCreate(&b));
    for (int i = 0; i < 3; ++i) f.run();
    std::vector<float> times;
    for (int i = 0; i < runs; ++i) {
        CHECK_CUDA(cudaMemsetAsync(flush.data, i, flush.bytes));
        CHECK_CUDA(cudaEventRecord(a));
        f.run();
        CHECK_CUDA(cudaEventRecord(b));
        CHECK_CUDA(cudaEventSynchronize(b));
        float ms;
        CHECK_CUDA(cudaEventElapsedTime(&ms, a, b));
        times.push_back(ms);
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

double tflops(const Case& c, double ms) { return 10.0 * visible_pairs(c) * c.heads * c.dim / (ms * 1e9); }

std::vector<Case> check_cases() {
    std::vector<Case> cases;
    for (DType t : {DType::bf16, DType::f16}) {
        for (int d : {64, 128, 96, 192, 256, 40, 80, 136, 200}) {
            const bool narrow = t == DType::f16;
            cases.push_back({"one tile", 1, 1, 1, 64, 128, d, t});
            cases.push_back({"whole heads full 256", 33, 8, 8, 256, 256, d, t});
            cases.push_back({"whole heads causal 203x250", 33, 8, 8, 203, 250, d, t, -1, 0});
            cases.push_back({"full 256", 2, 2, 2, 256, 256, d, t});
            cases.push_back({"causal 512", 1, 2, 2, 512, 512, d, t, -1, 0});
            if (narrow) continue;
            cases.push_back({"ragged 113x203", 2, 3, 3, 113, 203, d, t});
            cases.push_back({"causal 113x203", 2, 3, 3, 113, 203, d, t, -1, 0});
            cases.push_back({"causal 203x113 (empty rows)", 2, 3, 3, 203, 113, d, t, -1, 0});
            cases.push_back({"causal gqa 700x100 (unseen tiles)", 3, 4, 2, 700, 100, d, t, -1, 0});
            cases.push_back({"window (20, 5) gqa 300x250", 33, 16, 8, 300, 250, d, t, 20, 5});
            cases.push_back({"window (70, 30) 500x700", 1, 2, 2, 500, 700, d, t, 70, 30});
            cases.push_back({"gqa 6/2 causal 300", 2, 6, 2, 300, 300, d, t, -1, 0});
            cases.push_back({"mqa full 1023x1024 bhsd", 1, 4, 1, 1023, 1024, d, t});
            cases.back().bhsd = true;
            Case v{"varlen causal", 5, 2, 2, 0, 0, d, t, -1, 0};
            v.lens_q = {1, 300, 0, 129, 64}, v.lens_k = {17, 300, 33, 0, 200};
            cases.push_back(v);
            v.name = "varlen full seqused", v.right = -1;
            v.used_q = {1, 250, 0, 100, 0}, v.used_k = {10, 300, 33, 0, 129};
            cases.push_back(v);
            Case u{"seqused fixed length, dlse", 3, 2, 1, 200, 260, d, t};
            u.used_q = {200, 77, 0}, u.used_k = {131, 260, 64}, u.dlse = true;
            cases.push_back(u);
            Case g{"accumulate f32 out, dlse, causal", 2, 2, 2, 190, 320, d, t, -1, 0};
            g.accumulate = g.f32_out = g.dlse = true;
            cases.push_back(g);
            Case o{"positions (ring block)", 1, 2, 2, 256, 256, d, t, -1, 0};
            o.positions = true, o.q_position = 300, o.k_position = 200;
            cases.push_back(o);
            Case z{"deterministic causal 700", 2, 2, 2, 700, 700, d, t, -1, 0};
            z.deterministic = true;
            cases.push_back(z);
            z.name = "deterministic full 700", z.right = -1;
            cases.push_back(z);
            z.name = "deterministic window gqa", z.left = 200, z.right = 10, z.heads = 4;
            cases.push_back(z);
            // Work tiles that do not fill the machine are shared.
            cases.push_back({"shared, full 1000x1030", 1, 3, 3, 1000, 1030, d, t});
            cases.push_back({"shared, gqa 6/2 full 700x515", 1, 6, 2, 700, 515, d, t});
            cases.push_back({"shared by eight, 2048x257", 1, 1, 1, 2048, 257, d, t});
            cases.push_back({"shared, one key tile, 2050x77", 2, 4, 4, 2050, 77, d, t});
            Case h{"shared, accumulate f32 out", 1, 2, 2, 1100, 400, d, t};
            h.accumulate = h.f32_out = true;
            cases.push_back(h);
            // Sequences in the order of their lengths; at head dim 128, keys and heads enough for the main kernel to do the rows
            // of some heads itself.
            if (d != 64 && d != 128 && d != 80) continue;
            cases.push_back({"many heads, shared, full 2048", 2, 14, 14, 2048, 2048, d, t});
            cases.push_back({"many heads, full 2048", 2, 12, 12, 2048, 2048, d, t});
            cases.push_back({"many heads, causal 2081x2112 gqa", 2, 24, 12, 2081, 2112, d, t, -1, 0});
            Case m{"many heads, varlen causal", 10, 6, 6, 0, 0, d, t, -1, 0};
            m.lens_q = {2050, 0, 300, 64, 1, 700, 129, 2048, 33, 500}, m.lens_k = {2049, 40, 0, 290, 128, 513, 1, 2100, 400, 0};
            cases.push_back(m);
            m.name = "many heads, varlen seqused, dlse", m.right = -1, m.dlse = true;
            m.used_q = {2000, 0, 150, 64, 0, 690, 1, 2048, 32, 100}, m.used_k = {2049, 40, 0, 0, 128, 512, 1, 70, 333, 0};
            cases.push_back(m);
        }
    }
    return cases;
}

/// The words of the command line: commands, and the head dims they are for.
struct Wanted {
    std::vector<std::string> words;

    bool command(const char* name) const { return std::find(words.begin(), words.end(), name) != words.end(); }
    bool dim(int d) const {
        bool any = false;
        for (const std::string& w : words) {
            if (w.size() < 2 || w[0] != 'd' || !std::isdigit(static_cast<unsigned char>(w[1]))) continue;
            any = true;
            if (w == "d" + std::to_string(d)) return true;
        }
        return !any;
    }
    std::vector<int> dims() const {
        std::vector<int> some;
        for (int d : {64, 128, 96, 192, 256}) {
            if (dim(d)) some.push_back(d);
        }
        return some;
    }
};

/// 16k tokens, a hidden size of about 2048.
Case usual_case(int dim, int64_t seqlen, int64_t right) {
    const int heads = dim == 96 ? 21 : dim == 192 ? 11 : 2048 / dim;
    return {"", static_cast<int>(16384 / seqlen), heads, heads, seqlen, seqlen, dim, DType::bf16, -1, right};
}

bool check_all(const Wanted& wanted) {
    bool ok = true;
    for (const Case& c : check_cases()) {
        if (wanted.dim(c.dim)) ok = check(c) && ok;
    }
    return ok;
}

bool race_all(const Wanted& wanted) {
    bool ok = true;
    for (int d : wanted.dims()) {
        ok = race({"whole heads full 128", 40, 8, 8, 128, 128, d}, 100) && ok;
        ok = race({"whole heads causal 256", 33, 8, 8, 256, 256, d, DType::bf16, -1, 0}, 100) && ok;
        ok = race({"full 1024", 2, 4, 4, 1024, 1024, d}, 100) && ok;
        ok = race({"causal 1024 gqa", 2, 4, 2, 1024, 1024, d, DType::bf16, -1, 0}, 100) && ok;
        ok = race({"causal 2048, 32 heads", 2, 16, 16, 2048, 2048, d, DType::bf16, -1, 0}, 50) && ok;
        Case z{"deterministic causal 1024", 2, 4, 2, 1024, 1024, d, DType::bf16, -1, 0};
        z.deterministic = true;
        ok = race(z, 50) && ok;
    }
    return ok;
}

/// A line for each head dim and mask, a column for each length: `column` prints it.
template <typename Column>
void print_grid(const Wanted& wanted, const char* what, Column column) {
    for (int d : wanted.dims()) {
        for (int64_t right : {-1, 0}) {
            std::printf("%s d%-3d %-6s", what, d, right ? "full" : "causal");
            for (int64_t s : {512, 1024, 2048, 4096, 8192, 16384}) {
                column(usual_case(d, s, right));
                std::fflush(stdout);
            }
            std::printf("\n");
        }
    }
}

void time_all(const Wanted& wanted) {
    print_grid(wanted, "TFLOP/s", [](const Case& c) { std::printf(" %6.0f", tflops(c, milliseconds(c, c.seqlen_q >= 8192 ? 7 : 15))); });
}

void time_deterministic(const Wanted& wanted) {
    print_grid(wanted, "deterministic", [](Case c) {
        const int runs = c.seqlen_q >= 8192 ? 5 : 9;
        const double free = tflops(c, milliseconds(c, runs));
        c.deterministic = true;
        const double ordered = tflops(c, milliseconds(c, runs));
        std::printf(" %4.0f (%.2f)", ordered, ordered / free);
    });
}

/// One launch for each head dim, for a profiler.
void run_once(const Wanted& wanted) {
    for (int d : wanted.dims()) {
        Fixture f({"", 4, 2048 / d, 2048 / d, 4096, 4096, d});
        if (f.row) f.run();
    }
    CHECK_CUDA(cudaDeviceSynchronize());
}

/// What the usual grid has not: groups of query heads, sequences of different lengths, a window.
void time_others() {
    for (int64_t right : {-1, 0}) {
        for (bool det : {false, true}) {
            std::printf("GQA 64/8 d128 %s%s", right ? "full" : "causal", det ? " deterministic" : "");
            for (int64_t s : {1024, 2048, 4096, 8192, 16384}) {
                Case c{"", static_cast<int>(16384 / s), 64, 8, s, s, 128, DType::bf16, -1, right};
                c.deterministic = det;
                std::printf(" %6.0f", tflops(c, milliseconds(c, 5)));
                std::fflush(stdout);
            }
            std::printf("\n");
        }
    }
    std::vector<int> lens;
    for (int i = 0, total = 0; total < 32768; ++i) {
        int n = static_cast<int>(std::exp(std::log(8.0) + (std::log(8192.0) - std::log(8.0)) * ((i * 37 % 64) + 0.5) / 64));
        n = std::min(n, 32768 - total);
        lens.push_back(n);
        total += n;
    }
    for (int64_t right : {-1, 0}) {
        Case c{"", static_cast<int>(lens.size()), 16, 16, 0, 0, 128, DType::bf16, -1, right};
        c.lens_q = c.lens_k = lens;
        std::printf("varlen %zu sequences %s %6.0f\n", lens.size(), right ? "full" : "causal", tflops(c, milliseconds(c, 9)));
    }
    for (int d : {64, 128}) {
        std::printf("cross attention, 77 keys, 2x8, 2x32 heads d%d, us:", d);
        for (int heads : {8, 32}) {
            for (int64_t rows : {1024, 4096}) std::printf(" %6.1f", 1e3 * milliseconds({"", 2, heads, heads, rows, 77, d}, 21));
        }
        std::printf("\n");
    }
    const Case w{"", 1, 16, 16, 16384, 16384, 128, DType::bf16, 1023, 0};
    std::printf("window 1024 causal 16k %6.0f\n", tflops(w, milliseconds(w, 9)));
}

}  // namespace

int main(int argc, char** argv) {
    const Wanted wanted{{argv + 1, argv + argc}};
    bool ok = true;
    if (wanted.command("check")) ok = check_all(wanted) && ok;
    if (wanted.command("race")) ok = race_all(wanted) && ok;
    if (wanted.command("time")) time_all(wanted);
    if (wanted.command("deterministic")) time_deterministic(wanted);
    if (wanted.command("once")) run_once(wanted);
    if (wanted.command("beyond")) time_others();
    std::printf(ok ? "ALL OK\n" : "SOME FAILED\n");
    return ok ? 0 : 1;
}
