// What this machine can do at most, for the bench: not ops. The caller takes the time.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace kn::KN_ISA {

// A chain takes a new FMA every 4 to 8 cycles (base: a product and a sum), and two units start one each cycle.
#if defined(__AVX2__)
constexpr int CHAINS = 12;
#else
constexpr int CHAINS = 14;  // with the two constants all 16 registers
#endif
constexpr int STREAMS = 4;  // places of a thread's share read in turn: one alone leaves bandwidth unused

static volatile float sink;  // what is written here is not optimised away

double ceiling_fma(int threads, int64_t iterations) {
    const int64_t steps = iterations / 8;
    int64_t done = 0;
    parallel(threads, [&](int index, int count) {
        const vf a = set1(0.999f), b = set1(0.001f);  // x * a + b tends to 1: neither infinite nor subnormal
        vf x[CHAINS];
        KN_UNROLL for (int i = 0; i < CHAINS; ++i) x[i] = set1(float(i + index));
        for (int64_t step = 0; step < steps; ++step)
            KN_UNROLL for (int j = 0; j < 8; ++j)
                KN_UNROLL for (int i = 0; i < CHAINS; ++i) x[i] = fma(x[i], a, b);
        vf sum = zero();
        KN_UNROLL for (int i = 0; i < CHAINS; ++i) sum = add(sum, x[i]);
        sink = hsum(sum);
        if (index == 0) done = count;
    });
    return double(done) * double(steps) * (8 * CHAINS * W * 2);
}

double ceiling_read(const TensorView& buffer, int threads) {
    const float* p = buffer.as<float>();
    constexpr int64_t STEP_FLOATS = 4 * W;
    double total[MAX_READERS] = {};
    parallel(threads < MAX_READERS ? threads : MAX_READERS, [&](int index, int count) {
        const Range r = share(buffer.size[0], index, count, STREAMS * STEP_FLOATS);
        const int64_t part = (r.end - r.begin) / (STREAMS * STEP_FLOATS) * STEP_FLOATS;
        vf acc[STREAMS][4];
        KN_UNROLL for (int s = 0; s < STREAMS; ++s)
            KN_UNROLL for (int j = 0; j < 4; ++j) acc[s][j] = zero();
        for (int64_t i = r.begin; i < r.begin + part; i += STEP_FLOATS)
            KN_UNROLL for (int s = 0; s < STREAMS; ++s)
                KN_UNROLL for (int j = 0; j < 4; ++j) acc[s][j] = add(acc[s][j], load(p + s * part + i + j * W));
        double sum = 0;
        for (int s = 0; s < STREAMS; ++s)
            for (int j = 0; j < 4; ++j) sum += hsum(acc[s][j]);
        for (int64_t i = r.begin + STREAMS * part; i < r.end; ++i) sum += p[i];
        total[index] = sum;
    });
    double sum = 0;
    for (double x : total) sum += x;
    return sum;
}

}  // namespace kn::KN_ISA
