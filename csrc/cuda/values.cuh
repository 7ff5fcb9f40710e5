// Elements as they lie in memory and as f32: 16 bytes at a time, or one element.
#pragma once
#include "ptx.cuh"
#include "tensor.h"

namespace kn::cuda {

__device__ __forceinline__ float low_bf16(uint32_t two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high_bf16(uint32_t two) { return __uint_as_float(two & 0xffff0000); }

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return low_bf16(v); }
__device__ __forceinline__ void narrow(float v, float* to) { *to = v; }
__device__ __forceinline__ void narrow(float v, bf16* to) { *to = bf16(pack_bf16(v, 0)); }

// N values of T: 16 bytes as a word, or one element.
template <class T, int N> struct Part {
    uint4 raw;
    __device__ __forceinline__ void load(const T* from) { raw = __ldg(reinterpret_cast<const uint4*>(from)); }
    __device__ __forceinline__ void zero() { raw = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ float value(int i) const {
        const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
        return sizeof(T) == 4 ? __uint_as_float(w[i & 3]) : i % 2 ? high_bf16(w[i / 2]) : low_bf16(w[i / 2]);
    }
    static __device__ __forceinline__ void store(T* to, const float (&v)[N]) {
        if constexpr (sizeof(T) == 4)
            *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
        else
            *reinterpret_cast<uint4*>(to) =
                make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
};
template <class T> struct Part<T, 1> {
    T raw;
    __device__ __forceinline__ void load(const T* from) { raw = __ldg(from); }
    __device__ __forceinline__ void zero() { raw = 0; }
    __device__ __forceinline__ float value(int) const { return widen(raw); }
    static __device__ __forceinline__ void store(T* to, const float (&v)[1]) { narrow(v[0], to); }
};

}  // namespace kn::cuda
