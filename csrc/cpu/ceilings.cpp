#include "ceilings.h"

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace kn::KN_ISA {

// A chain takes a new FMA every 4 to 8 cycles (base: a product, then a sum), and a core starts two each cycle.
#if defined(__AVX2__)
constexpr int CHAINS = 12;
#else
constexpr int CHAINS = 14;  // with the two constants all 16 registers
#endif
constexpr int STREAMS = 4;  // places of a thread's share that it reads in turn

void ceiling_fma(const CeilingFma& p) {
    parallel(p.threads, [&](int index, int threads) {
        const vf a = set1(0.999f), b = set1(0.001f);  // x * a + b tends to 1: neither infinite nor subnormal
        vf x[CHAINS];
        KN_UNROLL for (int i = 0; i < CHAINS; ++i) x[i] = set1(float(i));
        for (int64_t step = 0; step < p.iterations; ++step) {
            KN_UNROLL for (int i = 0; i < CHAINS; ++i) x[i] = fma(x[i], a, b);
        }
        double sum = 0;
        KN_UNROLL for (int i = 0; i < CHAINS; ++i) sum += hsum(x[i]);
        p.sums[index] = sum;
        if (index == 0) *p.flops = double(threads) * double(p.iterations) * (2 * CHAINS * W);
    });
}

void ceiling_read(const CeilingRead& p) {
    const float* x = p.buffer.as<float>();
    parallel(p.threads, [&](int index, int threads) {
        constexpr int64_t step = 4 * W;
        const Range r = share(p.buffer.size[0], index, threads, STREAMS * step);
        const int64_t part = (r.end - r.begin) / (STREAMS * step) * step;
        vf acc[STREAMS][2];
        KN_UNROLL for (int s = 0; s < STREAMS; ++s)
            KN_UNROLL for (int j = 0; j < 2; ++j) acc[s][j] = zero();
        for (int64_t i = r.begin; i < r.begin + part; i += step) {
            KN_UNROLL for (int s = 0; s < STREAMS; ++s)
                KN_UNROLL for (int j = 0; j < 4; ++j) acc[s][j % 2] = add(acc[s][j % 2], load(x + s * part + i + j * W));
        }
        double sum = 0;
        for (int s = 0; s < STREAMS; ++s) sum += hsum(acc[s][0]) + hsum(acc[s][1]);
        for (int64_t i = r.begin + STREAMS * part; i < r.end; ++i) sum += x[i];
        p.sums[index] = sum;
    });
}

}  // namespace kn::KN_ISA
