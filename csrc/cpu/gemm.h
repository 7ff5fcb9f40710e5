// out[m, n] = x[m, k] * w[n, k]^T with weights kept in their stored form, two ways:
//   stream  few rows of x: each weight is decoded in registers on its way from memory and used at once;
//   panel   many rows: a panel of weights is decoded to f32 once (L2) and multiplied as rows of a register-tiled
//           product, the rows of x lying in vector lanes (packed once: `pack`), so weights are never transposed.
// Both accumulate in f32 in an order that depends on shapes alone, never on the number of threads.
#pragma once
#include "microkernel.h"
#include "parallel.h"

namespace kn::KN_ISA {

constexpr int64_t STREAM_ROWS = 8;   // up to here x is streamed against
constexpr int64_t KC = 256;          // depth of a weight panel: two scale blocks
constexpr int64_t NC = 96;           // rows of a weight panel: 96 x 272 f32 = 104 KB of L2
constexpr int64_t LDP = KC + 16;     // panel stride: 1088 bytes, not a multiple of a page
constexpr int64_t MC = 256;          // rows of x packed at a time
constexpr int64_t LDC = MC + 16;

struct Fp8Weights {
    using T = fp8;
    const fp8* codes;
    const float* scale;  // [n/128, k/128]
    int64_t n, k;
    static constexpr float UNIT = FP8_UNIT;  // `step` yields value / UNIT

    float block_scale(int64_t row, int64_t k0) const { return scale[row / 128 * ceil_div(k, 128) + k0 / 128]; }
    void decode(int64_t row, int64_t k0, int64_t kc, float* dst) const {
        for (int64_t p = 0; p < kc; p += 128)
            decode_fp8(codes + row * k + k0 + p, block_scale(row, k0 + p), dst + p, min64(128, kc - p));
    }
    static Step step(const fp8* p, NanSeen& nan) { return load_fp8_step(p, nan); }
    static vf part(const fp8* p, int64_t n) { return load_fp8_n(p, n); }
    bool row_has_nan(int64_t row, int64_t k0, int64_t kc) const {
        const fp8* p = codes + row * k + k0;
        bool found = false;
        for (int64_t i = 0; i < kc; ++i) found |= fp8_is_nan(p[i]);
        return found;
    }
    bool tail_has_nan(int64_t row, int64_t from, int64_t to) const {
        bool found = false;
        for (int64_t i = from; i < to; ++i) found |= fp8_is_nan(codes[row * k + i]);
        return found;
    }
};

struct Bf16Weights {
    using T = bf16;
    const bf16* codes;
    int64_t n, k;
    static constexpr float UNIT = 1.0f;

    float block_scale(int64_t, int64_t) const { return 1.0f; }
    void decode(int64_t row, int64_t k0, int64_t kc, float* dst) const { decode_bf16(codes + row * k + k0, dst, kc); }
    static Step step(const bf16* p, NanSeen&) {
        Step s;
        KN_UNROLL for (int j = 0; j < STEP / W; ++j) s.v[j] = load_bf16(p + j * W);
        return s;
    }
    static vf part(const bf16* p, int64_t n) { return load_bf16_n(p, n); }
    bool row_has_nan(int64_t, int64_t, int64_t) const { return false; }  // a bf16 NaN decodes to NaN by itself
    bool tail_has_nan(int64_t, int64_t, int64_t) const { return false; }
};

// ---------------------------------------------------------------- stream

#if defined(__AVX512F__)
constexpr int STREAM_ACC = 24;
#else
constexpr int STREAM_ACC = 12;
#endif
constexpr int64_t STREAM_CHUNK = 8192;  // floats of x at a time: 32 KB of L1; more for a single row, which four of weights share
constexpr int64_t STREAM_BLOCK = 128;   // weight rows that share a row of scales
// Lines fetched ahead. With rows read R places apart: fp8_gemm m=1 n=7168 k=2048 from about 41 to 74 % of read bandwidth,
// n=2112 k=7168 from about 50 to 72 % (Sapphire Rapids, 2 threads).
constexpr int64_t AHEAD = 16;

template <int M> constexpr int stream_rows() { return STREAM_ACC / M < 1 ? 1 : STREAM_ACC / M > 4 ? 4 : STREAM_ACC / M; }

// sums[r * apart, j] += row (row + r * apart) of w . x[j] over kc values.
template <int R, int M, class Weights>
KN_INLINE void stream_tile(const Weights& w, int64_t row, int64_t apart, int64_t k0, int64_t kc, const float* x, int64_t ldx,
                           float* sums) {
    constexpr int64_t LINE = 64 / sizeof(typename Weights::T);
    vf acc[R][M];
    KN_UNROLL for (int r = 0; r < R; ++r)
        KN_UNROLL for (int j = 0; j < M; ++j) acc[r][j] = zero();
    NanSeen nan;
    const typename Weights::T* p = w.codes + row * w.k + k0;
    const int64_t next = apart * w.k;
    auto step = [&](int r, int64_t i) __attribute__((always_inline)) {
        Step s = Weights::step(p + r * next + i, nan);
        KN_UNROLL for (int j = 0; j < M; ++j)
            KN_UNROLL for (int q = 0; q < STEP / W; ++q) acc[r][j] = fma(s.v[q], load(x + j * ldx + i + q * W), acc[r][j]);
    };
    int64_t i = 0;
    for (; i + LINE <= kc; i += LINE)
        KN_UNROLL for (int r = 0; r < R; ++r) {
            const int64_t at = i + AHEAD * LINE;  // beyond this part of the row: in the next row
            __builtin_prefetch(p + r * next + (at < kc ? at : at - kc + w.k));
            KN_UNROLL for (int u = 0; u < LINE; u += STEP) step(r, i + u);
        }
    for (; i + STEP <= kc; i += STEP)
        KN_UNROLL for (int r = 0; r < R; ++r) step(r, i);
    bool redo = nan.any();
    if (i < kc) {
        for (int64_t q = i; q < kc; q += W)
            KN_UNROLL for (int r = 0; r < R; ++r) {
                vf v = Weights::part(p + r * next + q, kc - q);
                KN_UNROLL for (int j = 0; j < M; ++j) acc[r][j] = fma(v, load_n(x + j * ldx + q, kc - q), acc[r][j]);
            }
        for (int r = 0; r < R; ++r) redo |= w.tail_has_nan(row + r * apart, k0 + i, k0 + kc);
    }
    KN_UNROLL for (int r = 0; r < R; ++r)
        KN_UNROLL for (int j = 0; j < M; ++j) sums[r * apart * M + j] += hsum(acc[r][j]);
    if (__builtin_expect(redo, 0))  // a NaN code makes every sum of its row NaN
        for (int r = 0; r < R; ++r)
            if (w.row_has_nan(row + r * apart, k0, kc))
                for (int j = 0; j < M; ++j) sums[r * apart * M + j] = bits_to_float(0x7FC00000);
}

// emit(row, sums[M]) for each weight row in [n0, n1); x is f32 [M, k].
template <int M, class Weights, class Emit>
static void stream_m(const Weights& w, int64_t n0, int64_t n1, const float* x, const Emit& emit) {
    constexpr int R = stream_rows<M>();
    constexpr int64_t chunk = M == 1 ? 4 * STREAM_CHUNK : STREAM_CHUNK / M / 128 * 128;
    alignas(64) float scaled[M * chunk];
    alignas(64) float sums[STREAM_BLOCK * M];
    for (int64_t b0 = n0; b0 < n1;) {
        const int64_t b1 = min64(n1, (b0 / STREAM_BLOCK + 1) * STREAM_BLOCK);
        for (int64_t i = 0; i < (b1 - b0) * M; ++i) sums[i] = 0;
        for (int64_t k0 = 0; k0 < w.k; k0 += chunk) {
            const int64_t kc = min64(chunk, w.k - k0);
            // The scales of this block row go into x once for its 128 rows: the inner loop multiplies no scale.
            for (int64_t q = 0; q < kc; q += 128) {
                const vf s = set1(w.block_scale(b0, k0 + q) * Weights::UNIT);
                for (int j = 0; j < M; ++j)
                    for (int64_t i = q; i < min64(q + 128, kc); i += W) {
                        const int64_t left = min64(kc, q + 128) - i;
                        store_n(scaled + j * chunk + i, mul(load_n(x + j * w.k + k0 + i, left), s), left);
                    }
            }
            // R places of the block are read in turn, each running on through memory from row to row.
            const int64_t apart = (b1 - b0) / R;
            for (int64_t i = 0; i < apart; ++i) stream_tile<R, M>(w, b0 + i, apart, k0, kc, scaled, chunk, sums + i * M);
            for (int64_t i = R * apart; i < b1 - b0; ++i) stream_tile<1, M>(w, b0 + i, 0, k0, kc, scaled, chunk, sums + i * M);
        }
        for (int64_t row = b0; row < b1; ++row) emit(row, sums + (row - b0) * M);
        b0 = b1;
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// As stream_m for one to four rows of FP8 weights, decoded by load_fp8_shifted. x is scaled by a power of two chosen so
// that its largest value is near 2**100: products of codes * 2**-120 then keep full precision whatever the scales are.
template <int M, class Emit> static void stream_shifted(const Fp8Weights& w, int64_t n0, int64_t n1, const float* x, const Emit& emit) {
    constexpr int R = 8 / M;  // 8 streams from memory: 24.4 -> 28.5 GB/s over 4 (Zen 3, 2 threads)
    constexpr int64_t chunk = STREAM_CHUNK / M / 128 * 128;
    alignas(64) float scaled[M * chunk];
    alignas(64) float sums[STREAM_BLOCK * M];
    for (int64_t b0 = n0; b0 < n1;) {
        const int64_t b1 = min64(n1, (b0 / STREAM_BLOCK + 1) * STREAM_BLOCK);
        for (int64_t i = 0; i < (b1 - b0) * M; ++i) sums[i] = 0;
        for (int64_t k0 = 0; k0 < w.k; k0 += chunk) {
            const int64_t kc = min64(chunk, w.k - k0), whole = kc / 32 * 32;
            float restore[M];
            for (int j = 0; j < M; ++j) {
                vf top = zero();
                for (int64_t q = 0; q < kc; q += 128) {
                    const vf s = set1(w.block_scale(b0, k0 + q));
                    const float* from = x + j * w.k + k0;
                    float* to = scaled + j * chunk;
                    const int64_t end = min64(q + 128, kc);
                    int64_t i = q;
                    for (; i + 32 <= end; i += 32) {  // in the order in which load_fp8_shifted yields codes: a 4 x 4 transposition
                        vf v[4];
                        KN_UNROLL for (int r = 0; r < 4; ++r)
                            v[r] = mul(_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i + 4 * r)),
                                                            _mm_loadu_ps(from + i + 16 + 4 * r), 1), s);
                        KN_UNROLL for (int r = 0; r < 4; ++r) top = max2(abs1(v[r]), top);
                        const vf a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
                        const vf c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
                        store(to + i, _mm256_shuffle_ps(a, c, 0x44));
                        store(to + i + 8, _mm256_shuffle_ps(a, c, 0xEE));
                        store(to + i + 16, _mm256_shuffle_ps(b, d, 0x44));
                        store(to + i + 24, _mm256_shuffle_ps(b, d, 0xEE));
                    }
                    for (; i < end; i += W) {
                        const vf v = mul(load_n(from + i, end - i), s);
                        top = max2(abs1(v), top);
                        store_n(to + i, v, end - i);
                    }
                }
                int e = 0;
                const float largest = hmax(top);
                if (largest > 0 && largest <= 3.4028234664e38f) frexpf(largest, &e);
                const int shift = e < -26 ? 126 : e > 106 ? -6 : 100 - e;  // both factors are normal numbers
                const float up = ldexpf(1.0f, shift);
                restore[j] = ldexpf(1.0f, 120 - shift);
                for (int64_t i = 0; i < kc; i += W)
                    store_n(scaled + j * chunk + i, mul(load_n(scaled + j * chunk + i, kc - i), set1(up)), kc - i);
            }
            for (int64_t row = b0; row < b1; row += R) {
                const int64_t rows = min64(R, b1 - row);
                const fp8* p[R];  // the last rows of a block may repeat one: its sums are not kept
                for (int64_t r = 0; r < R; ++r) p[r] = w.codes + (row + (r < rows ? r : 0)) * w.k + k0;
                vf acc[R][M];
                KN_UNROLL for (int r = 0; r < R; ++r)
                    KN_UNROLL for (int j = 0; j < M; ++j) acc[r][j] = zero();
                __m256i top = _mm256_setzero_si256();
                for (int64_t i = 0; i < whole; i += 32)
                    KN_UNROLL for (int r = 0; r < R; ++r) {
                        vf v[4];
                        load_fp8_shifted(p[r] + i, v, top);
                        KN_UNROLL for (int j = 0; j < M; ++j)
                            KN_UNROLL for (int q = 0; q < 4; ++q) acc[r][j] = fma(v[q], load(scaled + j * chunk + i + q * W), acc[r][j]);
                    }
                for (int64_t i = whole; i < kc; i += W)
                    for (int r = 0; r < R; ++r) {
                        const vf v = mul(load_fp8_n(p[r] + i, kc - i), set1(FP8_UNIT * 0x1p-120f));
                        for (int j = 0; j < M; ++j) acc[r][j] = fma(v, load_n(scaled + j * chunk + i, kc - i), acc[r][j]);
                    }
                bool redo = _mm256_movemask_epi8(_mm256_cmpeq_epi8(top, _mm256_set1_epi8(0x7F)));
                for (int64_t r = 0; r < rows; ++r) redo |= w.tail_has_nan(row + r, k0 + whole, k0 + kc);
                for (int64_t r = 0; r < rows; ++r) {
                    const bool nan = __builtin_expect(redo, 0) && w.row_has_nan(row + r, k0, kc);
                    for (int j = 0; j < M; ++j)
                        sums[(row - b0 + r) * M + j] += nan ? bits_to_float(0x7FC00000) : hsum(acc[r][j]) * restore[j];
                }
            }
        }
        for (int64_t row = b0; row < b1; ++row) emit(row, sums + (row - b0) * M);
        b0 = b1;
    }
}

#ifndef KN_SHIFTS  // the build under the address sanitizer says true, so that every machine checks this path
#define KN_SHIFTS __builtin_cpu_is("amd")
#endif
template <class Emit> static bool stream_fast(int64_t m, const Fp8Weights& w, int64_t n0, int64_t n1, const float* x, const Emit& emit) {
    if (m < 1 || m > 2 || !KN_SHIFTS) return false;
    m == 1 ? stream_shifted<1>(w, n0, n1, x, emit) : stream_shifted<2>(w, n0, n1, x, emit);
    return true;
}
#endif
template <class Weights, class Emit> static bool stream_fast(int64_t, const Weights&, int64_t, int64_t, const float*, const Emit&) {
    return false;
}

template <class Weights, class Emit>
static void stream(int64_t m, const Weights& w, int64_t n0, int64_t n1, const float* x, const Emit& emit) {
    if (stream_fast(m, w, n0, n1, x, emit)) return;
    switch (m) {
        case 1: return stream_m<1>(w, n0, n1, x, emit);
        case 2: return stream_m<2>(w, n0, n1, x, emit);
        case 3: return stream_m<3>(w, n0, n1, x, emit);
        case 4: return stream_m<4>(w, n0, n1, x, emit);
        case 5: return stream_m<5>(w, n0, n1, x, emit);
        case 6: return stream_m<6>(w, n0, n1, x, emit);
        case 7: return stream_m<7>(w, n0, n1, x, emit);
        case 8: return stream_m<8>(w, n0, n1, x, emit);
    }
}

// ---------------------------------------------------------------- panel

// W x W values of f32 rows (stride `lds`) turned into lanes: dst[p * ldd + i] = src[i * lds + p].
KN_INLINE void transpose(const float* src, int64_t lds, float* dst, int64_t ldd) {
#if defined(__AVX512F__)
    __m512 r[16], t[16];
    KN_UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * lds);
    KN_UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    KN_UNROLL for (int i = 0; i < 16; i += 4) {
        auto d = [](__m512 x) { return _mm512_castps_pd(x); };
        auto f = [](__m512d x) { return _mm512_castpd_ps(x); };
        r[i] = f(_mm512_unpacklo_pd(d(t[i]), d(t[i + 2])));
        r[i + 1] = f(_mm512_unpackhi_pd(d(t[i]), d(t[i + 2])));
        r[i + 2] = f(_mm512_unpacklo_pd(d(t[i + 1]), d(t[i + 3])));
        r[i + 3] = f(_mm512_unpackhi_pd(d(t[i + 1]), d(t[i + 3])));
    }
    KN_UNROLL for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
    }
    KN_UNROLL for (int i = 0; i < 4; ++i) {
        _mm512_storeu_ps(dst + i * ldd, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_ps(dst + (i + 8) * ldd, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD));
        _mm512_storeu_ps(dst + (i + 4) * ldd, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_ps(dst + (i + 12) * ldd, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD));
    }
#else
    for (int p = 0; p < W; ++p)
        for (int i = 0; i < W; ++i) dst[p * ldd + i] = src[i * lds + p];
#endif
}

// Rows of x into lanes: slab s of the packed form is [k, LANES] and holds rows s*LANES.. ; missing rows are zero.
// decode(row, k0, kc, dst) writes f32 values of one row. Packs depths [k0, k1), k0 a multiple of 128.
template <class Decode>
static void pack(int64_t m, int64_t k, int64_t k0, int64_t k1, float* packed, const Decode& decode) {
    alignas(64) float rows[W][128 + 16];
    for (int64_t m0 = 0; m0 < m; m0 += W) {
        float* slab = packed + m0 / LANES * k * LANES + m0 % LANES;
        for (int64_t p = k0; p < k1; p += 128) {
            const int64_t kc = min64(128, k1 - p);
            for (int64_t i = 0; i < W; ++i) {
                if (m0 + i < m)
                    decode(m0 + i, p, kc, rows[i]);
                else
                    std::memset(rows[i], 0, sizeof rows[i]);
            }
            for (int64_t q = 0; q < kc; q += W) {
                if (kc - q >= W) {
                    transpose(rows[0] + q, 128 + 16, slab + (p + q) * LANES, LANES);
                } else {
                    for (int64_t r = q; r < kc; ++r)
                        for (int i = 0; i < W; ++i) slab[(p + r) * LANES + i] = rows[i][r];
                }
            }
        }
    }
}

constexpr int64_t packed_floats(int64_t m, int64_t k) { return ceil_div(m < MC ? m : MC, LANES) * LANES * k; }

struct PanelScratch {
    alignas(64) float panel[NC * LDP];
    alignas(64) float sums[NC * LDC];
};

// emit(row0, rows, sums, m): sums[r * LDC + j] is the product of weight row row0 + r and x row j, m <= MC rows of x.
template <class Weights, class Emit>
static void panel(int64_t m, const Weights& w, int64_t n0, int64_t n1, const float* packed, PanelScratch& s, const Emit& emit) {
    const int64_t k = w.k;
    for (int64_t r0 = n0; r0 < n1; r0 += NC) {
        const int64_t rows = min64(NC, n1 - r0);
        if (k == 0) std::memset(s.sums, 0, sizeof s.sums);
        for (int64_t k0 = 0; k0 < k; k0 += KC) {
            const int64_t kc = min64(KC, k - k0);
            for (int64_t r = 0; r < rows; ++r) {
                const typename Weights::T* next = w.codes + (r0 + r) * k + k0 + KC;  // rows lie too far apart for the hardware's fetcher
                for (int64_t q = 0; q < KC; q += 64 / int64_t(sizeof *next)) __builtin_prefetch(next + q);
                w.decode(r0 + r, k0, kc, s.panel + r * LDP);
            }
            for (int64_t j = 0; j < m; j += LANES)  // a slab of x (32 KB) stays in L1 for all rows of the panel
                block<LDP, 1>(rows, ceil_div(min64(LANES, m - j), W), kc, s.panel, packed + (j / LANES * k + k0) * LANES, LANES,
                              s.sums + j, LDC, k0 > 0);
        }
        emit(r0, rows, s.sums, m);
    }
}

// Write a block of sums, lanes running along x rows, to out[x row, weight row].
KN_INLINE void store_transposed(void* out, Dtype dtype, int64_t ldo, int64_t m0, int64_t m, int64_t row0, int64_t rows,
                                const float* sums, const bf16* bias) {
    alignas(64) float line[NC], shift[NC] = {};
    if (bias) decode_bf16(bias + row0, shift, rows);
    for (int64_t j = 0; j < m; ++j) {
        for (int64_t r = 0; r < rows; ++r) line[r] = sums[r * LDC + j] + shift[r];
        for (int64_t r = 0; r < rows; r += W) store_out(out, dtype, (m0 + j) * ldo + row0 + r, load(line + r), rows - r);
    }
}

// Writes the sums of one weight row to out[m, n].
struct RowWriter {
    void* out;
    Dtype dtype;
    int64_t m, n;
    const bf16* bias;

    void operator()(int64_t row, const float* sums) const {
        const float shift = bias ? bf16_to_float(bias[row]) : 0.0f;
        for (int64_t i = 0; i < m; ++i) {
            if (dtype == Dtype::bf16)
                static_cast<bf16*>(out)[i * n + row] = float_to_bf16(sums[i] + shift);
            else
                static_cast<float*>(out)[i * n + row] = sums[i] + shift;
        }
    }
};

static thread_local PanelScratch panel_scratch;

// out[m, n] = x * w^T (+ bias[n]) on all threads; decode(row, k0, kc, dst) gives f32 values of a row of x,
// kc <= 128 from a multiple of 128. `packed` holds packed_floats(m, k) f32 values (or m * k, if more).
template <class Weights, class Decode>
static void product(int64_t m, const Weights& w, float* packed, const Decode& decode, void* out, Dtype dtype, const bf16* bias,
                    int threads) {
    const int64_t n = w.n, k = w.k;
    if (m <= STREAM_ROWS) {
        for (int64_t i = 0; i < m; ++i)
            for (int64_t q = 0; q < k; q += 128) decode(i, q, min64(128, k - q), packed + i * k + q);
        parallel(threads, [&](int index, int count) {
            const Range r = share(n, index, count, 32);
            stream(m, w, r.begin, r.end, packed, RowWriter{out, dtype, m, n, bias});
        });
        return;
    }
    for (int64_t m0 = 0; m0 < m; m0 += MC) {
        const int64_t rows = min64(MC, m - m0);
        parallel(threads, [&](int index, int count) {
            const Range r = share(k, index, count, 128);
            pack(rows, k, r.begin, r.end, packed, [&](int64_t i, int64_t k0, int64_t kc, float* dst) { decode(m0 + i, k0, kc, dst); });
        });
        parallel(threads, [&](int index, int count) {
            const Range r = share(n, index, count, MR);
            panel(rows, w, r.begin, r.end, packed, panel_scratch, [&](int64_t row0, int64_t some, const float* sums, int64_t mm) {
                store_transposed(out, dtype, n, m0, mm, row0, some, sums, bias);
            });
        });
    }
}

}  // namespace kn::KN_ISA
