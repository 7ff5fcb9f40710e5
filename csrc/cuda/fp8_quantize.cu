// fp8_quantize: values are read once, wait in registers for their block's scale, and leave as codes. Unproved.
//
// Bound by memory: 3 bytes an element of bf16, 65536 x 7168 is 1.41 GB, 330 us at 4.3 TB/s; an element takes about nine
// instructions, half of what the chip issues in that time. Rows: eight lanes a block, 32 bytes a lane in flight. Tiles of 128 x 128: 512
// threads hold one, so that neither blocks of 128 x 128 nor columns are read twice.
#include "kernels.h"
#include "quantize.cuh"

namespace kn::cuda {

template <class T>
__global__ void __launch_bounds__(128) quantize_rows(const T* __restrict__ x, fp8* __restrict__ codes, float* __restrict__ scale,
                                                     int64_t blocks, int64_t k, bool pow2, float floor) {
    const int lane = int(threadIdx.x % 32), part = lane % 8;
    const bool aligned = k % 8 == 0;
    for (int64_t first = (int64_t(blockIdx.x) * 4 + threadIdx.x / 32) * 4; first < blocks; first += int64_t(gridDim.x) * 16) {
        const int64_t block = first + lane / 8;
        const Place b = place_of(block, blocks, k);
        const int64_t at = b.row * k + b.column;
        Eight<T> values[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) values[i].load(x + at + 64 * i + 8 * part, b.size - 64 * i - 8 * part, aligned);
        quantize_part(values, codes + at, scale + block, b.size, aligned, pow2, floor);
    }
}

// A tile of 128 x 128: blocks of that size, or (COLUMNS) of 128 x 1. Thread t holds eight columns of the rows t / 16 + 32 i.
template <class T, bool COLUMNS>
__global__ void __launch_bounds__(512, 1) quantize_tiles(const T* __restrict__ x, fp8* __restrict__ codes, float* __restrict__ scale,
                                                      int64_t m, int64_t k, bool pow2, float floor) {
    KN_SHARED(memory);
    uint32_t* tops = reinterpret_cast<uint32_t*>(memory);  // of each warp; COLUMNS: [16, 128]
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const int64_t across = (k + 127) / 128, band = blockIdx.x / across, tile = blockIdx.x % across;
    const int64_t column = tile * 128 + threadIdx.x % 16 * 8, row = band * 128 + threadIdx.x / 16;
    const bool aligned = k % 8 == 0;
    Eight<T> values[4];
    int count[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        count[i] = row + 32 * i < m ? int(min(max(k - column, int64_t(0)), int64_t(8))) : 0;
        values[i].load(x + (row + 32 * i) * k + column, count[i], aligned);
    }
    if constexpr (COLUMNS) {
        float* scales = reinterpret_cast<float*>(tops + 16 * 128);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            uint32_t top = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) top = values[i].size(j) < INFINITE ? max(top, values[i].size(j)) : top;
            top = max(top, __shfl_xor_sync(0xffffffff, top, 16));
            if (lane < 16) tops[warp * 128 + lane * 8 + j] = top;
        }
        __syncthreads();
        if (threadIdx.x < 128) {
            uint32_t top = 0;
#pragma unroll
            for (int w = 0; w < 16; ++w) top = max(top, tops[w * 128 + threadIdx.x]);
            const float s = block_scale(top, pow2, floor);
            scales[threadIdx.x] = s;
            if (tile * 128 + threadIdx.x < k) scale[band * k + tile * 128 + threadIdx.x] = s;
        }
        __syncthreads();
        Divisor d[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) d[j] = divisor<T>(scales[threadIdx.x % 16 * 8 + j]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float q[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) q[j] = quotient(finite_or_nan(values[i].value(j)), d[j]);
            const uint2 eight = make_uint2(four_codes(q[0], q[1], q[2], q[3]), four_codes(q[4], q[5], q[6], q[7]));
            store_codes(codes + (row + 32 * i) * k + column, eight, count[i], aligned);
        }
    } else {
        auto block_top = [&](uint32_t top) {
            top = lanes_max(top);
            if (lane == 0) tops[warp] = top;
            __syncthreads();
            return lanes_max<16>(tops[lane % 16]);
        };
        uint32_t top = block_top(max(max(values[0].largest(), values[1].largest()), max(values[2].largest(), values[3].largest())));
        const bool finite = top < INFINITE;
        if (!finite) {
            __syncthreads();
            top = block_top(max(max(values[0].largest_finite(), values[1].largest_finite()),
                                max(values[2].largest_finite(), values[3].largest_finite())));
        }
        const float s = block_scale(top, pow2, floor);
        const Divisor d = divisor<T>(s);
        if (threadIdx.x == 0) scale[blockIdx.x] = s;
#pragma unroll
        for (int i = 0; i < 4; ++i) store_codes(codes + (row + 32 * i) * k + column, encode(values[i], d, finite), count[i], aligned);
    }
}

template <class T> static void quantize_as(const Fp8Quantize& p, cudaStream_t stream) {
    const int64_t m = p.x.size[0], k = p.x.size[1], across = ceil_div(k, 128);
    const T* x = p.x.as<const T>();
    fp8* codes = p.codes.as<fp8>();
    float* scale = p.scale.as<float>();
    if (p.block0 == 1) return launch_blocks<quantize_rows<T>>("fp8_quantize", m * across, stream, x, codes, scale, m * across, k, p.pow2, p.floor);
    const dim3 tiles(unsigned(ceil_div(m, 128) * across));
    if (p.block1 == 1)
        launch<quantize_tiles<T, true>>("fp8_quantize", {tiles, 512, 17 * 128 * 4}, stream, x, codes, scale, m, k, p.pow2, p.floor);
    else
        launch<quantize_tiles<T, false>>("fp8_quantize", {tiles, 512, 16 * 4}, stream, x, codes, scale, m, k, p.pow2, p.floor);
}

void fp8_quantize(const Fp8Quantize& p, cudaStream_t stream) {
    p.x.dtype == Dtype::bf16 ? quantize_as<bf16>(p, stream) : quantize_as<float>(p, stream);
}

}  // namespace kn::cuda
