// Attention of up to LQ query rows against a stream of key blocks, rows of queries in vector lanes.
//
//   scores S[keys, lanes] = K[keys, KD] * Q^T[KD, lanes]     keys as the broadcast operand: no transposition of K
//   softmax over keys runs down the rows of S, lane by lane: no horizontal step
//   O[lanes, VD] += P^T[lanes, keys] * V[keys, VD]           V rows are the vectors, P the broadcast operand
//
// Keys and values are f32 blocks of SB rows decoded from the cache where it lies; for MLA the value is the first
// 512 columns of the key, so a token is decoded once for both products.
#pragma once
#include "gemm.h"
#include "microkernel.h"
#include "parallel.h"

namespace kn::KN_ISA {

constexpr int64_t LQ = 64;          // query rows at a time
#if defined(__AVX512F__)
constexpr int64_t SB = 96;          // keys at a time: K 227 KB + Q 147 KB + O 135 KB stay in an L2 of 1 MB; +1.5 % over 48
#else
constexpr int64_t SB = 48;          // K 113 KB: all stay in 512 KB
#endif
constexpr int64_t KSTEP = 288;      // depth of S at a time: a slab of Q of 18 KB stays in L1 beside the keys
constexpr float MINUS_INF = -__builtin_inff();

template <int KD, int VD, int LDK, int LDV> struct Attention {
    static constexpr int64_t LDO = VD + 16;
    alignas(64) float q[KD * LQ];       // slabs of LANES query rows: [LQ / LANES][KD][LANES]
    alignas(64) float o[LQ * LDO];
    alignas(64) float s[SB * LQ];       // scores, then weights
    alignas(64) float m[LQ], l[LQ];     // running maximum and sum
    alignas(64) float change[LQ];
    int64_t rows;

    // Take `count` query rows; row(i) is the address of bf16 [KD].
    template <class Row> void begin(int64_t count, const Row& row) {
        rows = count;
        alignas(64) float lines[W][KD + 16];
        for (int64_t r0 = 0; r0 < count; r0 += W) {
            for (int64_t i = 0; i < W; ++i) {
                if (r0 + i < count)
                    decode_bf16(row(r0 + i), lines[i], KD);
                else
                    std::memset(lines[i], 0, sizeof lines[i]);
            }
            float* slab = q + r0 / LANES * KD * LANES + r0 % LANES;
            for (int64_t p = 0; p < KD; p += W) transpose(lines[0] + p, KD + 16, slab + p * LANES, LANES);
        }
        for (int64_t i = 0; i < LQ; ++i) m[i] = MINUS_INF, l[i] = 0;
        std::memset(o, 0, sizeof o);
    }

    // Attend to `keys` <= SB keys k[keys, LDK] and values v[keys, LDV]. Where `limit` is given, row i sees the first
    // limit(i) of them only.
    template <class Limit> void attend(int64_t keys, const float* k, const float* v, float scale, bool masked, const Limit& limit) {
        for (int64_t r0 = 0; r0 < rows; r0 += LANES)
            for (int64_t p = 0; p < KD; p += KSTEP) {
                const int64_t kc = min64(KSTEP, KD - p);
                block<LDK, 1>(keys, ceil_div(min64(LANES, rows - r0), W), kc, k + p, q + r0 / LANES * KD * LANES + p * LANES, LANES,
                              s + r0, LQ, p > 0);
            }
        vf factor = set1(scale);
        if (masked) {  // scaled first: -inf times a negative scale, or 0, is no -inf
            for (int64_t j = 0; j < keys; ++j)
                for (int64_t r = 0; r < rows; r += W) store(s + j * LQ + r, mul(load(s + j * LQ + r), factor));
            factor = set1(1.0f);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = max64(limit(i), 0); j < keys; ++j) s[j * LQ + i] = MINUS_INF;
        }
        bool rescale = false;
        for (int64_t r = 0; r < rows; r += W) {
            vf top = load(m + r);
            for (int64_t j = 0; j < keys; ++j) top = max2(mul(load(s + j * LQ + r), factor), top);  // a NaN score leaves top
            // Rows without a key so far keep -inf: they are shifted by 0 instead, and all their weights are 0.
            const vf shift = max2(top, set1(-3e38f)), old = max2(load(m + r), set1(-3e38f));
            vf sum = zero();
            for (int64_t j = 0; j < keys; ++j) {
                vf p = exp1(sub(mul(load(s + j * LQ + r), factor), shift));
                store(s + j * LQ + r, p);
                sum = add(sum, p);
            }
            const vf scale_old = exp1(sub(old, shift));
            store(change + r, scale_old);
            store(l + r, fma(load(l + r), scale_old, sum));
            store(m + r, top);
        }
        for (int64_t i = 0; i < rows; ++i) rescale |= change[i] != 1.0f;
        if (rescale)
            for (int64_t i = 0; i < rows; ++i)
                if (change[i] != 1.0f)
                    for (int64_t p = 0; p < VD; p += W) store(o + i * LDO + p, mul(load(o + i * LDO + p), set1(change[i])));
        block<1, LQ>(rows, VD / W, keys, s, v, LDV, o, LDO, true);
    }
};

// Write one row: out = o / l, weighed against an attention sink, and lse = m + log l without it. No keys: 0 and -inf.
KN_INLINE void finish_row(const float* o, float m, float l, const float* sink, bf16* out, int64_t d, float* lse) {
    if (l == 0) {
        for (int64_t p = 0; p < d; ++p) out[p] = 0;
        *lse = MINUS_INF;
        return;
    }
    const double log_sum = double(m) + log(double(l));
    float factor = 1.0f / l;
    if (sink) factor *= float(1.0 / (1.0 + exp(double(*sink) - log_sum)));
    for (int64_t p = 0; p < d; p += W) store_bf16(out + p, mul(load(o + p), set1(factor)));
    *lse = float(log_sum);
}

}  // namespace kn::KN_ISA
