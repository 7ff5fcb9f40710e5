#include "mla_index.h"

#include "attention.h"
#include "kernels.h"

namespace kn::KN_ISA {

constexpr int64_t CHUNK = 20 * SB;  // keys of a work item
static thread_local struct {
    alignas(64) float q[128 * LQ];  // slabs of LANES heads
    alignas(64) float w[LQ];
    alignas(64) float keys[SB * 144];
    alignas(64) float s[SB * LQ];
} scratch;

// Scores of one token against keys [s0, s1) of its window; heads in lanes, 64 at a time, added in that order.
static void score(const MlaIndex& p, int64_t t, int64_t s0, int64_t s1) {
    const int64_t h = p.q.size[1];
    float* out = p.out.as<float>() + t * p.k.size[0];
    for (int64_t s = s0; s < s1; ++s) out[s] = 0;
    alignas(64) float lines[W][144];
    for (int64_t h0 = 0; h0 < h; h0 += LQ) {
        const int64_t heads = min64(LQ, h - h0), padded = ceil_div(heads, W) * W;
        for (int64_t r0 = 0; r0 < padded; r0 += W) {
            for (int64_t i = 0; i < W; ++i) {
                if (r0 + i < heads)
                    decode_fp8(p.q.as<fp8>() + (t * h + h0 + r0 + i) * 128, 1.0f, lines[i], 128);
                else
                    std::memset(lines[i], 0, sizeof lines[i]);
            }
            float* slab = scratch.q + r0 / LANES * 128 * LANES + r0 % LANES;
            for (int64_t q = 0; q < 128; q += W) transpose(lines[0] + q, 144, slab + q * LANES, LANES);
        }
        for (int64_t i = 0; i < padded; ++i) scratch.w[i] = i < heads ? p.weights.as<float>()[t * h + h0 + i] : 0;
        for (int64_t b0 = s0; b0 < s1; b0 += SB) {
            const int64_t keys = min64(SB, s1 - b0);
            for (int64_t j = 0; j < keys; ++j) decode_fp8(p.k.as<fp8>() + (b0 + j) * 128, 1.0f, scratch.keys + j * 144, 128);
            for (int64_t r0 = 0; r0 < padded; r0 += LANES)
                block<144, 1>(keys, ceil_div(min64(LANES, padded - r0), W), 128, scratch.keys, scratch.q + r0 / LANES * 128 * LANES,
                              LANES, scratch.s + r0, LQ, false);
            for (int64_t j = 0; j < keys; ++j) {
                vf sum = zero();
                for (int64_t r = 0; r < padded; r += W)
                    sum = fma(max2(zero(), load(scratch.s + j * LQ + r)), load(scratch.w + r), sum);  // relu keeps NaN
                out[b0 + j] += hsum(sum);
            }
        }
    }
    for (int64_t s = s0; s < s1; ++s) out[s] *= p.k_scale.as<float>()[s];
}

void mla_index(const MlaIndex& p) {
    const int64_t t = p.q.size[0], s = p.k.size[0], chunks = ceil_div(s, CHUNK);
    Queue queue;
    parallel(p.threads, [&](int, int) {
        for (int64_t n; (n = queue.take()) < t * chunks;) {
            const int64_t row = n / chunks, c0 = n % chunks * CHUNK, c1 = min64(s, c0 + CHUNK);
            const int64_t lo = min64(max64(p.start.as<int32_t>()[row], c0), c1), hi = max64(min64(p.stop.as<int32_t>()[row], c1), lo);
            float* out = p.out.as<float>() + row * s;
            for (int64_t i = c0; i < lo; ++i) out[i] = MINUS_INF;
            if (lo < hi) score(p, row, lo, hi);
            for (int64_t i = hi; i < c1; ++i) out[i] = MINUS_INF;
        }
    });
}

}  // namespace kn::KN_ISA
