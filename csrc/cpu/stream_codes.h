// fp8_gemm of one or two rows with AVX-512 VBMI and BF16: both sides stay codes, which are exact in bf16. A code's two
// bytes come from tables held in registers (vpermi2b), vdpbf16ps multiplies and adds in f32, and scales enter once per
// 128 values. NaN codes are NaN in the table, so nothing is redone. Against f32 products of codes decoded through f16:
// fewer instructions a byte, n=2112 k=7168 from 72 to 80 % of read bandwidth, n=7168 k=2048 from 74 to 77 %
// (Sapphire Rapids, 2 threads). vdpbf16ps runs at half the rate of f32 FMAs there: more rows are better off without.
#pragma once
#include "gemm.h"

#if defined(__AVX512F__)
namespace kn::KN_ISA {

#define KN_CODES __attribute__((target("avx512vbmi,avx512bf16")))

struct CodeTable {
    alignas(64) uint8_t low[128], high[128];  // the bytes of codes 0..127 in bf16
};
constexpr CodeTable code_table() {
    CodeTable t{};
    for (int code = 0; code < 128; ++code) {
        int exponent = code >> 3, fraction = code & 7, bits = 0x7FC0;
        if (code == 0) {
            bits = 0;
        } else if (code != 127) {
            if (exponent == 0)  // subnormal here, normal in bf16
                for (exponent = 1; fraction < 8; fraction <<= 1) --exponent;
            bits = (exponent + 120) << 7 | (fraction & 7) << 4;
        }
        t.low[code] = uint8_t(bits);
        t.high[code] = uint8_t(bits >> 8);
    }
    return t;
}
static constexpr CodeTable CODE_TABLE = code_table();

struct Decoder {
    __m512i low[2], high[2];
};
struct Pair {
    __m512bh first, second;  // of each eight codes the first four, and the others of their 16
};

KN_CODES static inline Decoder load_decoder() {
    const uint8_t *low = CODE_TABLE.low, *high = CODE_TABLE.high;
    return {{_mm512_loadu_si512(low), _mm512_loadu_si512(low + 64)}, {_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64)}};
}
// 64 codes to bf16: the table index is a code's lower seven bits, its sign joins the high byte.
KN_CODES static inline __attribute__((always_inline)) Pair decode_codes(const Decoder& d, __m512i codes) {
    const __m512i low = _mm512_permutex2var_epi8(d.low[0], codes, d.low[1]);
    const __m512i unsigned_high = _mm512_permutex2var_epi8(d.high[0], codes, d.high[1]);
    const __m512i high = _mm512_ternarylogic_epi32(unsigned_high, codes, _mm512_set1_epi8(int8_t(0x80)), 0xF8);  // a | (b & c)
    return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
}

// Rows of x in the order of decode_codes, zeros up to `ldx`, a multiple of 64.
KN_CODES static inline void spread_codes(const fp8* a, int64_t m, int64_t k, int64_t ldx, bf16* x) {
    const Decoder d = load_decoder();
    for (int64_t j = 0; j < m; ++j)
        for (int64_t q = 0; q < k; q += 64) {
            const __mmask64 some = k - q >= 64 ? ~0ull : (1ull << (k - q)) - 1;
            const Pair v = decode_codes(d, _mm512_maskz_loadu_epi8(some, a + j * k + q));
            _mm512_storeu_si512(x + j * ldx + q, (__m512i)v.first);
            _mm512_storeu_si512(x + j * ldx + q + 32, (__m512i)v.second);
        }
}

// Weight rows [n0, n1), read in R places in turn that each run on through memory from row to row.
template <int M>
KN_CODES static void stream_codes(const Fp8Weights& w, int64_t n0, int64_t n1, const bf16* x, int64_t ldx, const float* x_scale,
                                  const RowWriter& write) {
    constexpr int R = 8 / M;
    const Decoder d = load_decoder();
    const int64_t k = w.k, kb = ceil_div(k, 128), apart = ceil_div(n1 - n0, R);
    for (int64_t i = 0; i < apart; ++i) {
        const fp8* p[R];
        const float* scale[R];
        vf sums[R][M];
        KN_UNROLL for (int r = 0; r < R; ++r) {
            const int64_t row = n0 + i + r * apart < n1 ? n0 + i + r * apart : n0 + i;  // beyond the end: not written
            p[r] = w.codes + row * k;
            scale[r] = w.scale + row / 128 * kb;
            KN_UNROLL for (int j = 0; j < M; ++j) sums[r][j] = zero();
        }
        for (int64_t b = 0; b < kb; ++b) {
            vf acc[R][M];
            KN_UNROLL for (int r = 0; r < R; ++r)
                KN_UNROLL for (int j = 0; j < M; ++j) acc[r][j] = zero();
            for (int64_t q = b * 128; q < min64(k, b * 128 + 128); q += 64) {
                const __mmask64 some = k - q >= 64 ? ~0ull : (1ull << (k - q)) - 1;
                KN_UNROLL for (int r = 0; r < R; ++r) {
                    __builtin_prefetch(p[r] + q + AHEAD * 64);
                    const Pair v = decode_codes(d, _mm512_maskz_loadu_epi8(some, p[r] + q));
                    KN_UNROLL for (int j = 0; j < M; ++j) {
                        acc[r][j] = _mm512_dpbf16_ps(acc[r][j], v.first, (__m512bh)_mm512_loadu_si512(x + j * ldx + q));
                        acc[r][j] = _mm512_dpbf16_ps(acc[r][j], v.second, (__m512bh)_mm512_loadu_si512(x + j * ldx + q + 32));
                    }
                }
            }
            KN_UNROLL for (int r = 0; r < R; ++r)
                KN_UNROLL for (int j = 0; j < M; ++j)
                    sums[r][j] = fma(mul(acc[r][j], set1(x_scale[j * kb + b])), set1(scale[r][b]), sums[r][j]);
        }
        for (int r = 0; r < R && i + r * apart < n1 - n0; ++r) {
            float row[M];
            for (int j = 0; j < M; ++j) row[j] = hsum(sums[r][j]);
            write(n0 + i + r * apart, row);
        }
    }
}

// Whether sums of 128 products times a scale stay finite, and so does a code times it.
KN_CODES static inline bool scales_fit(const float* scale, int64_t count) {
    bool fit = true;
    for (int64_t i = 0; i < count; ++i) fit &= std::fabs(scale[i]) < 0x1p100f;
    return fit;
}

// False: the call is for `product`.
KN_CODES static bool stream_codes(int64_t m, const Fp8Weights& w, const fp8* a, const float* a_scale, void* workspace,
                                  const RowWriter& write, int threads) {
    if (m < 1 || m > 2 || w.k < 64 || !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512bf16")) return false;
    const int64_t kb = ceil_div(w.k, 128), ldx = ceil_div(w.k, 64) * 64;
    if (!scales_fit(a_scale, m * kb) || !scales_fit(w.scale, ceil_div(w.n, 128) * kb)) return false;
    bf16* x = static_cast<bf16*>(workspace);
    spread_codes(a, m, w.k, ldx, x);
    parallel(threads, [&](int index, int count) {
        const Range r = share(w.n, index, count, 32);
        m == 1 ? stream_codes<1>(w, r.begin, r.end, x, ldx, a_scale, write) : stream_codes<2>(w, r.begin, r.end, x, ldx, a_scale, write);
    });
    return true;
}

}  // namespace kn::KN_ISA
#endif
