// Over the lanes of a warp: sums and maxima of each LANES neighbouring lanes, the same bits in all of them.
#pragma once
#include "launch.cuh"

namespace kn::cuda {

template <int LANES = 32, class T> __device__ __forceinline__ T lanes_max(T v) {
#pragma unroll
    for (int by = LANES / 2; by; by /= 2) {
        const T other = __shfl_xor_sync(0xffffffff, v, by);
        v = other > v ? other : v;
    }
    return v;
}
template <int LANES = 32, class T> __device__ __forceinline__ T lanes_sum(T v) {
#pragma unroll
    for (int by = LANES / 2; by; by /= 2) v += __shfl_xor_sync(0xffffffff, v, by);
    return v;
}

}  // namespace kn::cuda
