// One vector type `vf` of W floats per instruction set, and what kernels do with it. Every file that includes
// this is compiled once per ISA with KN_ISA naming its namespace (base, avx2, avx512); everything is static or in
// that namespace and no std template is used, so that no AVX-512 copy of a shared symbol can reach older CPUs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "tensor.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define KN_UNROLL _Pragma("GCC unroll 32")
#define KN_INLINE static inline __attribute__((always_inline))

namespace kn::KN_ISA {

// ---------------------------------------------------------------- scalars

KN_INLINE float bits_to_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
KN_INLINE uint32_t float_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}
KN_INLINE float bf16_to_float(bf16 h) { return bits_to_float(uint32_t(h) << 16); }
KN_INLINE bf16 float_to_bf16(float f) {  // nearest even; NaN stays NaN
    uint32_t u = float_bits(f);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return bf16((u >> 16) | 0x40);
    return bf16((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
KN_INLINE float fp8_to_float(fp8 b) {  // exact, NaN included
    if ((b & 0x7F) == 0x7F) return bits_to_float(0x7FC00000);
    int exponent = (b >> 3) & 15, fraction = b & 7;
    float v = exponent ? bits_to_float(uint32_t(exponent + 120) << 23 | uint32_t(fraction) << 20) : float(fraction) * 0x1p-9f;
    return b & 0x80 ? -v : v;
}
KN_INLINE fp8 float_to_fp8(float x) {  // nearest even, saturating; NaN and Inf give 0x7f
    uint32_t u = float_bits(x), sign = u >> 24 & 0x80;
    u &= 0x7FFFFFFF;
    if (u >= 0x7F800000) return 0x7F;
    if (u >= 0x43E00000) return fp8(sign | 0x7E);               // 448 and above
    if (u < 0x3C800000) {                                       // below 2**-6: subnormal codes, steps of 2**-9
        float steps = bits_to_float(u) + 0x1p14f;               // one ulp at 2**14 is 2**-9: the sum rounds to a step
        return fp8(sign | (float_bits(steps) & 0xF));
    }
    u += 0x7FFFF + (u >> 20 & 1);                               // round to 3 bits; a carry may reach 448 + 32 = NaN
    uint32_t code = (u >> 20) - (120 << 3);
    return fp8(sign | (code > 0x7E ? 0x7E : code));
}
KN_INLINE bool fp8_is_nan(fp8 b) { return (b & 0x7F) == 0x7F; }

// ---------------------------------------------------------------- vectors

#if defined(__AVX512F__)

constexpr int W = 16;
using vf = __m512;
KN_INLINE vf zero() { return _mm512_setzero_ps(); }
KN_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
KN_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
KN_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
KN_INLINE __mmask16 lanes(int64_t n) { return __mmask16(n >= 16 ? 0xFFFF : (1u << n) - 1); }
KN_INLINE vf load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
KN_INLINE void store_n(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
KN_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
KN_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
KN_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
KN_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
KN_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
KN_INLINE vf max2(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
KN_INLINE vf min2(vf a, vf b) { return _mm512_min_ps(a, b); }  // b where either is NaN
KN_INLINE vf abs1(vf a) { return _mm512_abs_ps(a); }
KN_INLINE vf round1(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KN_INLINE vf pow2i(vf n) {  // 2**n of an integral n in [-127, 127]; n = -127 gives 0
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
KN_INLINE float hsum(vf v) { return _mm512_reduce_add_ps(v); }
KN_INLINE float hmax(vf v) { return _mm512_reduce_max_ps(v); }
KN_INLINE vf load_bf16(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
KN_INLINE vf load_bf16_n(const bf16* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16));
}
KN_INLINE __m256i to_bf16(vf v) {
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
KN_INLINE void store_bf16(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, to_bf16(v)); }
KN_INLINE void store_bf16_n(bf16* p, vf v, int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), to_bf16(v)); }
// e4m3 bits placed in an f16 read as value * 2**-8; vcvtph2ps is exact and takes no assist on f16 subnormals,
// where the same trick into f32 makes denormals and an assist for each (20x slower).
constexpr float FP8_UNIT = 256.0f;  // loaded codes times this are the values
KN_INLINE __m512i fp8_in_f16(__m256i b) {  // sign extension puts the sign into bits 15 and 14 after the shift
    return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(b), 7), _mm512_set1_epi16(int16_t(0xBFFF)));
}
KN_INLINE vf load_fp8_n(const fp8* p, int64_t n) {
    __m512i h = fp8_in_f16(_mm256_castsi128_si256(_mm_maskz_loadu_epi8(lanes(n), p)));
    return _mm512_cvtph_ps(_mm512_castsi512_si256(h));
}

// STEP codes at once; NanSeen keeps the largest magnitude, for a load does not honour NaN codes.
constexpr int STEP = 32;
struct Step {
    vf v[STEP / W];
};
struct NanSeen {
    __m256i top = _mm256_setzero_si256();
    bool any() const { return _mm256_movemask_epi8(_mm256_cmpeq_epi8(top, _mm256_set1_epi8(0x7F))); }
};
KN_INLINE Step load_fp8_step(const fp8* p, NanSeen& nan) {
    __m256i b = _mm256_loadu_si256((const __m256i*)p);
    nan.top = _mm256_max_epu8(nan.top, _mm256_and_si256(b, _mm256_set1_epi8(0x7F)));
    __m512i h = fp8_in_f16(b);
    return {{_mm512_cvtph_ps(_mm512_castsi512_si256(h)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1))}};
}

#elif defined(__AVX2__)

constexpr int W = 8;
using vf = __m256;
KN_INLINE vf zero() { return _mm256_setzero_ps(); }
KN_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
KN_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
KN_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
KN_INLINE __m256i lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
KN_INLINE vf load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, lanes(n)); }
KN_INLINE void store_n(float* p, vf v, int64_t n) { _mm256_maskstore_ps(p, lanes(n), v); }
KN_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
KN_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
KN_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
KN_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
KN_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
KN_INLINE vf max2(vf a, vf b) { return _mm256_max_ps(a, b); }
KN_INLINE vf min2(vf a, vf b) { return _mm256_min_ps(a, b); }
KN_INLINE vf abs1(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
KN_INLINE vf round1(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KN_INLINE vf pow2i(vf n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
KN_INLINE float hsum(vf v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
KN_INLINE float hmax(vf v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
KN_INLINE vf bf16_lanes(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
KN_INLINE vf load_bf16(const bf16* p) { return bf16_lanes(_mm_loadu_si128((const __m128i*)p)); }
KN_INLINE vf load_bf16_n(const bf16* p, int64_t n) {
    bf16 t[8] = {};
    std::memcpy(t, p, size_t(n < 8 ? n : 8) * 2);
    return load_bf16(t);
}
KN_INLINE __m128i to_bf16(vf v) {
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    r = _mm256_srli_epi32(r, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
KN_INLINE void store_bf16(bf16* p, vf v) { _mm_storeu_si128((__m128i*)p, to_bf16(v)); }
KN_INLINE void store_bf16_n(bf16* p, vf v, int64_t n) {
    bf16 t[8];
    store_bf16(t, v);
    std::memcpy(p, t, size_t(n < 8 ? n : 8) * 2);
}
constexpr float FP8_UNIT = 256.0f;  // through f16, as with AVX-512
KN_INLINE __m256i fp8_in_f16(__m128i b) {
    return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 7), _mm256_set1_epi16(int16_t(0xBFFF)));
}
KN_INLINE vf load_fp8_n(const fp8* p, int64_t n) {
    fp8 t[16] = {};
    std::memcpy(t, p, size_t(n < 8 ? n : 8));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(fp8_in_f16(_mm_loadu_si128((const __m128i*)t))));
}
constexpr int STEP = 16;
struct Step {
    vf v[STEP / W];
};
struct NanSeen {
    __m128i top = _mm_setzero_si128();
    bool any() const { return _mm_movemask_epi8(_mm_cmpeq_epi8(top, _mm_set1_epi8(0x7F))); }
};
KN_INLINE Step load_fp8_step(const fp8* p, NanSeen& nan) {
    __m128i b = _mm_loadu_si128((const __m128i*)p);
    nan.top = _mm_max_epu8(nan.top, _mm_and_si128(b, _mm_set1_epi8(0x7F)));
    __m256i h = fp8_in_f16(b);
    return {{_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))}};
}

// Another way, where denormal operands cost nothing (AMD Zen; Intel pays an assist for each): the code's bits moved into
// an f32 are value * 2**-120, subnormals as f32 denormals. 13 operations for 32 codes in place of 20 with 4 slow
// vcvtph2ps: fp8_gemm m=1 from memory 18.4 -> 24.8 GB/s (Zen 3, 2 threads). Vector j holds codes 4 i + j.
KN_INLINE void load_fp8_shifted(const fp8* p, vf v[4], __m256i& top) {
    const __m256i b = _mm256_loadu_si256((const __m256i*)p), keep = _mm256_set1_epi32(int32_t(0x87F00000));
    top = _mm256_max_epu8(top, _mm256_and_si256(b, _mm256_set1_epi8(0x7F)));
    v[0] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_srai_epi32(_mm256_slli_epi32(b, 24), 4), keep));
    v[1] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_srai_epi32(_mm256_slli_epi32(b, 16), 4), keep));
    v[2] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_srai_epi32(_mm256_slli_epi32(b, 8), 4), keep));
    v[3] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_srai_epi32(b, 4), keep));
}

#else  // portable: four lanes of the compiler's own vectors

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
KN_INLINE vf zero() { return vf{}; }
KN_INLINE vf set1(float x) { return vf{x, x, x, x}; }
KN_INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, 16);
    return v;
}
KN_INLINE void store(float* p, vf v) { std::memcpy(p, &v, 16); }
KN_INLINE vf load_n(const float* p, int64_t n) {
    float t[4] = {};
    std::memcpy(t, p, size_t(n < 4 ? n : 4) * 4);
    return load(t);
}
KN_INLINE void store_n(float* p, vf v, int64_t n) { std::memcpy(p, &v, size_t(n < 4 ? n : 4) * 4); }
KN_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
KN_INLINE vf add(vf a, vf b) { return a + b; }
KN_INLINE vf sub(vf a, vf b) { return a - b; }
KN_INLINE vf mul(vf a, vf b) { return a * b; }
KN_INLINE vf div(vf a, vf b) { return a / b; }
KN_INLINE vf max2(vf a, vf b) { return a > b ? a : b; }
KN_INLINE vf min2(vf a, vf b) { return a < b ? a : b; }
KN_INLINE vf abs1(vf a) { return (vf)((vi)a & 0x7FFFFFFF); }
KN_INLINE vf round1(vf a) {  // |a| < 2**22
    const vf magic = set1(0x1.8p23f);
    return (a + magic) - magic;
}
KN_INLINE vf pow2i(vf n) { return (vf)((__builtin_convertvector(n, vi) + 127) << 23); }
KN_INLINE float hsum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
KN_INLINE float hmax(vf v) {
    float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}
KN_INLINE vf load_bf16(const bf16* p) {
    return vf{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
}
KN_INLINE vf load_bf16_n(const bf16* p, int64_t n) {
    bf16 t[4] = {};
    std::memcpy(t, p, size_t(n < 4 ? n : 4) * 2);
    return load_bf16(t);
}
KN_INLINE void store_bf16_n(bf16* p, vf v, int64_t n) {
    for (int i = 0; i < (n < 4 ? n : 4); ++i) p[i] = float_to_bf16(v[i]);
}
KN_INLINE void store_bf16(bf16* p, vf v) { store_bf16_n(p, v, 4); }
constexpr float FP8_UNIT = 1.0f;
struct Fp8Table {  // NaN included; a look-up is 19 times as fast as building the float (fp8_gemm m=1)
    float value[256] = {};
    constexpr Fp8Table() {
        for (int b = 0; b < 256; ++b) {
            float v = float(b >> 3 & 15 ? 8 + (b & 7) : b & 7) * 0x1p-9f;
            for (int i = 1; i < (b >> 3 & 15); ++i) v *= 2;
            if ((b & 0x7F) == 0x7F) v = __builtin_nanf("");
            value[b] = b & 0x80 ? -v : v;
        }
    }
};
static constexpr Fp8Table fp8_table;
KN_INLINE vf load_fp8(const fp8* p) {
    const float* v = fp8_table.value;
    return vf{v[p[0]], v[p[1]], v[p[2]], v[p[3]]};
}
KN_INLINE vf load_fp8_n(const fp8* p, int64_t n) {
    vf v = zero();
    for (int i = 0; i < (n < 4 ? n : 4); ++i) v[i] = fp8_table.value[p[i]];
    return v;
}
constexpr int STEP = 8;
struct Step {
    vf v[STEP / W];
};
struct NanSeen {  // the table honours NaN codes
    static constexpr bool any() { return false; }
};
KN_INLINE Step load_fp8_step(const fp8* p, NanSeen&) { return {{load_fp8(p), load_fp8(p + W)}}; }

#endif

// ---------------------------------------------------------------- functions of vectors

// exp(x) within 1.5 ulp for x <= 88; below -87.3 the result is 0, NaN stays NaN.
KN_INLINE vf exp1(vf x) {
    const vf low = set1(-87.33654f);
    vf y = min2(set1(88.3762626f), max2(low, x));  // NaN passes: it is the second operand
    vf n = round1(mul(y, set1(1.44269504f)));
    vf r = fma(n, set1(-0.693359375f), y);         // ln 2 in two parts
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    vf result = mul(p, pow2i(n));
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(result, _mm512_cmp_ps_mask(x, low, _CMP_LT_OQ), zero());
#elif defined(__AVX2__)
    return _mm256_andnot_ps(_mm256_cmp_ps(x, low, _CMP_LT_OQ), result);
#else
    return x < low ? zero() : result;
#endif
}

// f32 rows of FP8 codes times `scale`, exact: a panel with NaN codes is written again one code at a time.
KN_INLINE void decode_fp8(const fp8* src, float scale, float* dst, int64_t n) {
    NanSeen nan;
    const vf s = set1(scale * FP8_UNIT);
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        Step x = load_fp8_step(src + i, nan);
        KN_UNROLL for (int j = 0; j < STEP / W; ++j) store(dst + i + j * W, mul(x.v[j], s));
    }
    bool redo = nan.any();
    for (int64_t j = i; j < n; ++j) redo |= fp8_is_nan(src[j]);
    for (; i < n; i += W) store_n(dst + i, mul(load_fp8_n(src + i, n - i), s), n - i);
    if (__builtin_expect(redo, 0))
        for (i = 0; i < n; ++i) dst[i] = fp8_to_float(src[i]) * scale;
}

KN_INLINE void decode_bf16(const bf16* src, float* dst, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(dst + i, load_bf16(src + i));
    if (i < n) store_n(dst + i, load_bf16_n(src + i, n - i), n - i);
}

KN_INLINE void store_out(void* out, Dtype dtype, int64_t at, vf v, int64_t n) {
    if (dtype == Dtype::bf16)
        store_bf16_n(static_cast<bf16*>(out) + at, v, n);
    else
        store_n(static_cast<float*>(out) + at, v, n);
}

}  // namespace kn::KN_ISA
