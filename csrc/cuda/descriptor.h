// Where bytes lie in shared memory, as the tensor cores and the copy engine of Hopper see it. Host code too: tests call it.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#ifndef __host__
#define __host__
#define __device__
#endif
#endif

namespace kn::cuda {

// Address of a byte under the 128-byte swizzle: the 16-byte chunk's index (bits 4 to 6) is xored with the row's (bits 7 to 9).
__host__ __device__ constexpr uint32_t swizzle128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// A wgmma operand under the 128-byte swizzle that starts at `address`, a shared-memory address.
//
// Rows of k: a row is 128 bytes of k; eight rows are an atom of 1024 bytes; `stride` bytes lie between atoms. k moves on by its
// bytes added to `address`; `leading` is not used.
// Rows of m or n (bf16 alone): a row is 64 elements of m or n at one k; eight k are an atom; `stride` bytes lie between
// atoms along k, `leading` bytes between panels of 64 elements.
__host__ __device__ constexpr uint64_t descriptor(uint32_t address, uint32_t stride, uint32_t leading = 16) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4 & 0x3fff) << 16 | uint64_t(stride >> 4 & 0x3fff) << 32 |
           uint64_t(1) << 62;
}

// The same operand `bytes` on (a multiple of 16).
__host__ __device__ constexpr uint64_t descriptor_at(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Accumulators of a 64 x N tile: d[i] of thread `t` of a warpgroup lies at (row, column).
__host__ __device__ constexpr int fragment_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + (i >> 1 & 1) * 8; }
__host__ __device__ constexpr int fragment_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + (i & 1); }

}  // namespace kn::cuda
