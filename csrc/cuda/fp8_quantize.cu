// fp8_quantize: values are read once, wait in registers for their block's scale, and leave as codes.
//
// Bound by memory: 3 bytes an element of bf16, 65536 x 7168 is 1.41 GB, 330 us at 4.3 TB/s; an element takes about twelve
// instructions, 60 % of what the chip issues in that time (a true division would take it over). Rows: eight lanes a block,
// 32 bytes a lane in flight. Tiles of 128 x 128: 512 threads hold one, so that neither blocks nor columns are read twice.
#include "kernels.h"
#include "quantize.cuh"

namespace kn::cuda {

// WHOLE: k is a multiple of 128, blocks follow each other without gaps.
template <class T, bool WHOLE> __global__ void __launch_bounds__(128)
    quantize_rows(const T* __restrict__ x, fp8* __restrict__ codes, float* __restrict__ scale, int64_t blocks, int64_t k,
                  bool pow2, float floor) {
    const int lane = int(threadIdx.x % 32), part = lane % 8;
    const bool aligned = WHOLE || k % 8 == 0;
    for (int64_t first = (int64_t(blockIdx.x) * 4 + threadIdx.x / 32) * 4; first < blocks; first += int64_t(gridDim.x) * 16) {
        const int64_t block = first + lane / 8;
        const Place b = WHOLE ? Place{0, block * 128, block < blocks ? 128 : 0} : place_of<false>(block, blocks, k);
        const int64_t at = b.row * k + b.column;
        Eight<T> values[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) values[i].load(x + at + 64 * i + 8 * part, b.size - 64 * i - 8 * part, aligned);
        quantize_part(values, codes + at, scale + block, b.size, aligned, pow2, floor);
    }
}

// A tile of 128 x 128: blocks of that size, or (COLUMNS) of 128 x 1. Thread t holds eight columns of the rows t / 16 + 32 i.
template <class T, bool COLUMNS, bool ALIGNED>
__global__ void __launch_bounds__(512, ALIGNED && (sizeof(T) == 2 || !COLUMNS) ? 2 : 1)  // two where 64 registers do
    quantize_tiles(const T* __restrict__ x, fp8* __restrict__ codes, float* __restrict__ scale, int64_t m, int64_t k, bool pow2,
                   float floor) {
    KN_SHARED(memory);
    uint32_t* tops = reinterpret_cast<uint32_t*>(memory);  // of each warp; COLUMNS: [16, 128]
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const int64_t across = (k + 127) / 128, band = blockIdx.x / across, tile = blockIdx.x % across;
    const int64_t column = tile * 128 + threadIdx.x % 16 * 8, row = band * 128 + threadIdx.x / 16;
    const int inside = int(min(max(k - column, int64_t(0)), int64_t(8))), rows = int(min(max(m - row, int64_t(0)), int64_t(128)));
    x += row * k + column, codes += row * k + column;
    Eight<T> values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i, x += 32 * k) values[i].load(x, 32 * i < rows ? inside : 0, ALIGNED);
    if constexpr (COLUMNS) {
        Divisor* divisors = reinterpret_cast<Divisor*>(tops + 16 * 128);
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
            divisors[threadIdx.x] = divisor(s);
            if (tile * 128 + threadIdx.x < k) scale[band * k + tile * 128 + threadIdx.x] = s;
        }
        __syncthreads();
        const Divisor* mine = divisors + threadIdx.x % 16 * 8;
#pragma unroll
        for (int i = 0; i < 4; ++i, codes += 32 * k) {
            float q[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) q[j] = any_quotient<T>(values[i].value(j), mine[j]);
            const uint2 eight = make_uint2(four_codes(q[0], q[1], q[2], q[3]), four_codes(q[4], q[5], q[6], q[7]));
            store_codes(codes, eight, 32 * i < rows ? inside : 0, ALIGNED);
        }
    } else {
        auto block_top = [&](uint32_t top) {
            top = lanes_max(top);
            if (lane == 0) tops[warp] = top;
            __syncthreads();
            return lanes_max<16>(tops[lane % 16]);
        };
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) top = max(top, values[i].largest());
        top = block_top(top);
        const bool finite = top < INFINITE;
        if (!finite) {
            __syncthreads();
            top = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) top = max(top, values[i].largest_finite());
            top = block_top(top);
        }
        const float s = block_scale(top, pow2, floor);
        const Divisor d = divisor(s);
        if (threadIdx.x == 0) scale[blockIdx.x] = s;
#pragma unroll
        for (int i = 0; i < 4; ++i, codes += 32 * k)
            store_codes(codes, encode(values[i], d, finite), 32 * i < rows ? inside : 0, ALIGNED);
    }
}

template <class T, bool COLUMNS> static void quantize_by_tiles(const Fp8Quantize& p, cudaStream_t stream) {
    const int64_t m = p.x.size[0], k = p.x.size[1];
    const Grid grid{dim3(unsigned(ceil_div(m, 128) * ceil_div(k, 128))), 512, COLUMNS ? 19 * 128 * 4 : 16 * 4};
    const auto run = k % 8 ? launch<quantize_tiles<T, COLUMNS, false>, const T*, fp8*, float*, int64_t, int64_t, bool, float>
                           : launch<quantize_tiles<T, COLUMNS, true>, const T*, fp8*, float*, int64_t, int64_t, bool, float>;
    run("fp8_quantize", grid, stream, p.x.as<const T>(), p.codes.as<fp8>(), p.scale.as<float>(), m, k, p.pow2, p.floor);
}
template <class T, bool WHOLE> static void quantize_by_rows(const Fp8Quantize& p, cudaStream_t stream) {
    const int64_t k = p.x.size[1], blocks = p.x.size[0] * ceil_div(k, 128);
    launch_blocks<quantize_rows<T, WHOLE>>("fp8_quantize", blocks, stream, p.x.as<const T>(), p.codes.as<fp8>(),
                                           p.scale.as<float>(), blocks, k, p.pow2, p.floor);
}
template <class T> static void quantize_as(const Fp8Quantize& p, cudaStream_t stream) {
    if (p.block0 == 1) return p.x.size[1] % 128 ? quantize_by_rows<T, false>(p, stream) : quantize_by_rows<T, true>(p, stream);
    p.block1 == 1 ? quantize_by_tiles<T, true>(p, stream) : quantize_by_tiles<T, false>(p, stream);
}

void fp8_quantize(const Fp8Quantize& p, cudaStream_t stream) {
    p.x.dtype == Dtype::bf16 ? quantize_as<bf16>(p, stream) : quantize_as<float>(p, stream);
}

}  // namespace kn::cuda
