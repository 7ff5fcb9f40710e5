// The quantizer's rule (fp8_quantize's definition), shared by every kernel that quantizes: bit-equal everywhere.
#pragma once
#include "simd.h"

namespace kn::KN_ISA {

KN_INLINE vf finite_abs(vf x) {  // |x|, 0 for NaN and Inf
    vf a = abs1(x);
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, set1(3.4028234664e38f), _CMP_LE_OQ), a);
#elif defined(__AVX2__)
    return _mm256_and_ps(_mm256_cmp_ps(a, set1(3.4028234664e38f), _CMP_LE_OQ), a);
#else
    return a <= set1(3.4028234664e38f) ? a : zero();
#endif
}

KN_INLINE float amax_finite(const float* v, int64_t n) {
    vf top = zero();
    for (int64_t j = 0; j < n; j += W) top = max2(finite_abs(load_n(v + j, n - j)), top);
    return hmax(top);
}

KN_INLINE float block_scale(float amax, bool pow2, float floor) {
    float s = (amax > floor ? amax : floor) / 448.0f;
    if (pow2 && s > 0) {
        int e;
        float fraction = frexpf(s, &e);
        s = ldexpf(1.0f, fraction == 0.5f ? e - 1 : e);
    }
    return s == 0 ? 1.0f : s;
}

KN_INLINE void load_values(const TensorView& x, int64_t at, float* v, int64_t n) {
    if (x.dtype == Dtype::bf16)
        for (int64_t j = 0; j < n; j += W) store_n(v + j, load_bf16_n(x.as<bf16>() + at + j, n - j), n - j);
    else
        std::memcpy(v, x.as<float>() + at, size_t(n) * 4);
}

// e4m3 codes of v[j] / scale[j]: true f32 division, nearest even, saturating, NaN and Inf as 0x7f.
KN_INLINE void encode_lanes(vf x, fp8* dst, int64_t n) {
#if defined(__AVX512F__)
    __m512i u = _mm512_castps_si512(x), a = _mm512_and_si512(u, _mm512_set1_epi32(0x7FFFFFFF));
    __m512i sign = _mm512_and_si512(_mm512_srli_epi32(u, 24), _mm512_set1_epi32(0x80));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(a, 20), _mm512_set1_epi32(1));
    __m512i code = _mm512_srli_epi32(_mm512_add_epi32(a, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFFF))), 20);
    code = _mm512_sub_epi32(code, _mm512_set1_epi32(120 << 3));
    code = _mm512_min_epi32(code, _mm512_set1_epi32(0x7E));
    // Below 2**-6 the sum with 2**14, whose ulp is 2**-9, rounds to a subnormal step.
    __m512i small = _mm512_and_si512(_mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_set1_ps(0x1p14f))),
                                     _mm512_set1_epi32(0xF));
    code = _mm512_mask_mov_epi32(code, _mm512_cmplt_epi32_mask(a, _mm512_set1_epi32(0x3C800000)), small);
    code = _mm512_or_si512(code, sign);
    code = _mm512_mask_mov_epi32(code, _mm512_cmpge_epi32_mask(a, _mm512_set1_epi32(0x7F800000)), _mm512_set1_epi32(0x7F));
    _mm_mask_storeu_epi8(dst, lanes(n), _mm512_cvtepi32_epi8(code));
#elif defined(__AVX2__)
    __m256i u = _mm256_castps_si256(x), a = _mm256_and_si256(u, _mm256_set1_epi32(0x7FFFFFFF));
    __m256i sign = _mm256_and_si256(_mm256_srli_epi32(u, 24), _mm256_set1_epi32(0x80));
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(a, 20), _mm256_set1_epi32(1));
    __m256i code = _mm256_srli_epi32(_mm256_add_epi32(a, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFFF))), 20);
    code = _mm256_min_epi32(_mm256_sub_epi32(code, _mm256_set1_epi32(120 << 3)), _mm256_set1_epi32(0x7E));
    __m256i small = _mm256_and_si256(_mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_set1_ps(0x1p14f))),
                                     _mm256_set1_epi32(0xF));
    code = _mm256_blendv_epi8(code, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3C800000), a));
    code = _mm256_or_si256(code, sign);
    code = _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7F), _mm256_cmpgt_epi32(a, _mm256_set1_epi32(0x7F7FFFFF)));
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    fp8 t[16];
    _mm_storeu_si128((__m128i*)t, _mm_packus_epi16(h, h));
    if (n >= W)
        std::memcpy(dst, t, W);
    else
        std::memcpy(dst, t, size_t(n));
#else
    for (int j = 0; j < (n < W ? n : W); ++j) dst[j] = float_to_fp8(x[j]);
#endif
}

KN_INLINE void encode_fp8(const float* v, float scale, fp8* dst, int64_t n) {
    for (int64_t j = 0; j < n; j += W) encode_lanes(div(load_n(v + j, n - j), set1(scale)), dst + j, n - j);
}
KN_INLINE void encode_fp8_by(const float* v, const float* scale, fp8* dst, int64_t n) {
    for (int64_t j = 0; j < n; j += W) encode_lanes(div(load_n(v + j, n - j), load(scale + j)), dst + j, n - j);
}

// Up to 128 values of one scale block as FP8 would give them back: quantized and decoded in place.
KN_INLINE void through_fp8(float* v, int64_t n) {
    fp8 codes[128];
    const float s = block_scale(amax_finite(v, n), false, 1e-4f);
    encode_fp8(v, s, codes, n);
    decode_fp8(codes, s, v, n);
}

// bf16(silu(gate) * up) of n columns as f32.
KN_INLINE void swiglu(const bf16* gate, const bf16* up, float* out, int64_t n) {
    for (int64_t j = 0; j < n; j += W) {
        const vf g = load_bf16_n(gate + j, n - j);
        const vf y = mul(div(g, add(set1(1.0f), exp1(sub(zero(), g)))), load_bf16_n(up + j, n - j));
        bf16 h[W];
        store_bf16(h, y);
        store_n(out + j, load_bf16(h), n - j);
    }
}

}  // namespace kn::KN_ISA
