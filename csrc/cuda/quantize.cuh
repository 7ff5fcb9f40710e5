// The quantizer's rule (fp8_quantize's definition) on values in registers: bit-equal with every other backend.
#pragma once
#include "reduce.cuh"
#include "values.cuh"

namespace kn::cuda {

static constexpr uint32_t INFINITE = 0x7f800000;  // bits of an f32; larger ones, without the sign, are NaN

// Eight neighbouring values as they lie in memory: 16-byte loads where rows are `aligned` (multiples of 8 values). Values past
// `count` are zeros and are not read.
template <class T> struct Eight {
    uint32_t w[2 * sizeof(T)];

    __device__ __forceinline__ void load(const T* from, int count, bool aligned) {
#pragma unroll
        for (auto& word : w) word = 0;
        if (aligned) {
            if (count > 0)
#pragma unroll
                for (int i = 0; i < int(sizeof(T) / 2); ++i) {
                    const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + i);
                    w[4 * i] = four.x, w[4 * i + 1] = four.y, w[4 * i + 2] = four.z, w[4 * i + 3] = four.w;
                }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count) put(i, __ldg(from + i));
        }
    }
    __device__ __forceinline__ void put(int i, float v) { w[i] = __float_as_uint(v); }
    __device__ __forceinline__ void put(int i, bf16 v) { w[i / 2] |= uint32_t(v) << i % 2 * 16; }
    __device__ __forceinline__ float value(int i) const {
        if constexpr (sizeof(T) == 4)
            return __uint_as_float(w[i]);
        else
            return i % 2 ? high_bf16(w[i / 2]) : low_bf16(w[i / 2]);
    }
    __device__ __forceinline__ uint32_t size(int i) const { return __float_as_uint(value(i)) & 0x7fffffff; }

    // Bits of the largest magnitude, NaN above Inf above all others.
    __device__ __forceinline__ uint32_t largest() const {
        uint32_t top = w[0] & (sizeof(T) == 4 ? 0x7fffffff : 0x7fff7fff);
#pragma unroll
        for (int i = 1; i < int(2 * sizeof(T)); ++i)
            top = sizeof(T) == 4 ? max(top, w[i] & 0x7fffffff) : __vmaxu2(top, w[i] & 0x7fff7fff);
        return sizeof(T) == 4 ? top : max(top << 16, top & 0xffff0000);
    }
    __device__ __forceinline__ uint32_t largest_finite() const {
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) top = size(i) < INFINITE ? max(top, size(i)) : top;
        return top;
    }
};

// A block's scale from the bits of its amax.
__device__ __forceinline__ float block_scale(uint32_t amax, bool pow2, float floor) {
    uint32_t s = __float_as_uint(__fdiv_rn(fmaxf(__uint_as_float(amax), floor), 448.0f));
    if (pow2 && s) s = s < 0x800000 ? 1u << (32 - __clz(int(s - 1))) : (s + 0x7fffff) & INFINITE;  // subnormals are integers
    return s ? __uint_as_float(s) : 1.0f;
}

// v / s from r = 1 / s, which is rounded to nearest: the bits of a true division, in three instructions for bf16 values and in
// five for f32. The first guess is off by an ulp or two, and each step takes its remainder off: after two the result is the
// rounded quotient (Markstein's theorem). For each of the 2^30 pairs of significands of a bf16 and an f32 one step does; the
// first guess itself gives wrong codes beside the middles between codes. Signs are such that -0 stays -0.
template <class T> __device__ __forceinline__ float quotient(float v, float s, float r) {
    float q = v * r;
    q = __fmaf_rn(-__fmaf_rn(q, s, -v), r, q);
    if constexpr (sizeof(T) == 4) q = __fmaf_rn(-__fmaf_rn(q, s, -v), r, q);
    return q;
}

// A block's scale to divide by. Values and scale are multiplied by `up` first: remainders of tiny ones would underflow.
struct Divisor {
    float s, r, up;
};
__device__ __forceinline__ Divisor divisor(float scale) {
    const float up = scale < 0x1p-60f ? 0x1p64f : 1.0f, s = scale * up;
    return {s, __frcp_rn(s), up};
}
// The same for any value; Inf is NaN.
template <class T> __device__ __forceinline__ float any_quotient(float v, Divisor d) {
    return quotient<T>(fabsf(v) < __uint_as_float(INFINITE) ? v * d.up : __uint_as_float(0x7fc00000), d.s, d.r);
}

// Codes of four quotients; NaN gives 0x7f. Before sm89 no instruction does it, and what the toolkit has for that takes 61 (it goes
// by double) where these take 10. The emulator takes these too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
__device__ __forceinline__ uint32_t four_codes(float a, float b, float c, float d) {
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3) |
           uint32_t(__nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3)) << 16;
}
#else
__device__ __forceinline__ uint32_t one_code(float x) {
    const float size = fminf(fabsf(x), 448.0f);
    const uint32_t bits = __float_as_uint(size);
    const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);  // rounds at bit 20; bias 127 becomes 7
    const uint32_t small = __float_as_uint(size + 0x1p14f) & 0xf;                       // the last bit of 2^14 counts 2^-9
    return x == x ? (size < 0x1p-6f ? small : normal) | (__float_as_uint(x) >> 24 & 0x80) : 0x7f;
}
__device__ __forceinline__ uint32_t four_codes(float a, float b, float c, float d) {
    return one_code(a) | one_code(b) << 8 | one_code(c) << 16 | one_code(d) << 24;
}
#endif

// Codes of eight values of a block; `finite`: none of them is NaN or Inf.
template <class T> __device__ __forceinline__ uint2 encode(const Eight<T>& x, Divisor d, bool finite) {
    float q[8];
    if (finite && d.up == 1) {
#pragma unroll
        for (int i = 0; i < 8; ++i) q[i] = quotient<T>(x.value(i), d.s, d.r);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) q[i] = any_quotient<T>(x.value(i), d);
    }
    return make_uint2(four_codes(q[0], q[1], q[2], q[3]), four_codes(q[4], q[5], q[6], q[7]));
}

__device__ __forceinline__ void store_codes(fp8* to, uint2 codes, int count, bool aligned) {
    if (aligned) {
        if (count > 0) *reinterpret_cast<uint2*>(to) = codes;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) to[i] = fp8((i < 4 ? codes.x : codes.y) >> i % 4 * 8);
    }
}

// ---- blocks of 1 x 128: eight lanes a block, 16 values a lane: the eight at 8 part and those at 64 + 8 part, part = lane % 8.

// Where a block of row-major [m, k] lies; `size` of its values are inside of the row, none for a block past the last.
struct Place {
    int64_t row, column;
    int size;
};
template <bool WHOLE> __device__ __forceinline__ Place place_of(int64_t block, int64_t blocks, int64_t k) {
    const int64_t across = (k + 127) / 128;
    const bool small = (block | across) >> 32 == 0;  // a 64-bit division costs as much as all the rest
    const int64_t row = small ? int64_t(uint32_t(block) / uint32_t(across)) : block / across;
    const int64_t column = (block - row * across) * 128;
    return {row, column, block >= blocks ? 0 : WHOLE ? 128 : int(min(k - column, int64_t(128)))};
}

// Quantizes the two parts of a block that this lane holds; all lanes of a warp come here together.
template <class T>
__device__ __forceinline__ void quantize_part(const Eight<T> (&x)[2], fp8* codes, float* scale, int size, bool aligned, bool pow2,
                                              float floor) {
    const int part = int(threadIdx.x % 8);
    uint32_t top = lanes_max<8>(max(x[0].largest(), x[1].largest()));
    const bool finite = top < INFINITE;
    if (__any_sync(0xffffffff, !finite)) top = lanes_max<8>(max(x[0].largest_finite(), x[1].largest_finite()));
    const float s = block_scale(top, pow2, floor);
    const Divisor d = divisor(s);
    if (part == 0 && size > 0) *scale = s;
#pragma unroll
    for (int i = 0, at = 8 * part; i < 2; ++i, at += 64) store_codes(codes + at, encode(x[i], d, finite), size - at, aligned);
}

// Launches `kernel` with a warp for four blocks, and for sixteen where that still fills the chip.
template <auto kernel, class... Args> void launch_blocks(const char* name, int64_t blocks, cudaStream_t stream, Args... args) {
    const int64_t warps = ceil_div(blocks, 4), turns = warps > int64_t(units()) * 256 ? 4 : 1;
    launch<kernel>(name, Grid{dim3(unsigned(ceil_div(warps, 4 * turns))), 128}, stream, args...);
}

}  // namespace kn::cuda
