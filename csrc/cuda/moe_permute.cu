// moe_permute: a stable counting sort of the copies, then each token's row is read once and written top_k times.
//
// A copy's row is the number of copies before it: those of lower experts, and earlier ones of its own. Dropped copies count as
// one expert more, so that they own the rows that must be zero, and every row is written exactly once.
//
// Few copies take one launch: the blocks of a token compare its copies with all others (128 tokens of top_k 8: 64 comparisons a
// thread) and move a part of the row. More take three: counts of blocks, rows from the counts, and the move, which at 4096 tokens
// of 7168 bf16 columns writes 470 MB (123 us with the reads at 4.3 TB/s) and hides the others.
#include "kernels.h"
#include "launch.cuh"
#include "moe_permute_plan.h"

namespace kn::cuda {

// Expert of copy i, e for a dropped one.
__device__ __forceinline__ int bin_of(const int* experts, int64_t i, int e) {
    const int v = __ldg(experts + i);
    return v >= 0 && v < e ? v : e;
}

// ---- few copies

// Copy i of expert v has the key v * copies + i: as many copies come before it as have a lower key.

static constexpr int THREADS = 128, HELD = int(PermutePlan::FEW) / THREADS;  // keys that a thread compares with

// How many of the keys that the block holds lie below each of eight, in rank[0] to rank[7] of shared memory.
__device__ __forceinline__ void rank_keys(const int (&held)[HELD], const int (&key)[8], int* rank) {
    int* sums = rank + 8;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        int below = 0;
#pragma unroll
        for (int i = 0; i < HELD; ++i) below += held[i] < key[c];
        below = __reduce_add_sync(0xffffffff, below);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32 * 8 + c] = below;
    }
    __syncthreads();
    if (threadIdx.x < 8) {
        const int* of_warp = sums + threadIdx.x;
        rank[threadIdx.x] = of_warp[0] + of_warp[8] + of_warp[16] + of_warp[24];
    }
    __syncthreads();
}

// Blocks of a token and a part of its row, then those of eight offsets each. A row has `units` of U.
template <class U>
__global__ void __launch_bounds__(THREADS, 8)
    permute_few(const U* __restrict__ x, const int* __restrict__ experts, U* __restrict__ x_sorted, int* __restrict__ offsets,
                int* __restrict__ row_of, int copies, int top_k, int e, int64_t units, int parts, int blocks) {
    KN_SHARED(memory);
    int* rank = reinterpret_cast<int*>(memory);
    int held[HELD], key[8];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {  // all loads are under way at once
        const int copy = int(threadIdx.x) + i * THREADS;
        held[i] = copy < copies ? bin_of(experts, copy, e) * copies + copy : 0x7fffffff;
    }
    if (int(blockIdx.x) >= blocks) {
        const int v = (int(blockIdx.x) - blocks) * 8;
#pragma unroll
        for (int c = 0; c < 8; ++c) key[c] = (v + c) * copies;
        rank_keys(held, key, rank);
        if (threadIdx.x < 8 && v + int(threadIdx.x) <= e) offsets[v + threadIdx.x] = rank[threadIdx.x];
        return;
    }
    const int token = int(blockIdx.x) / parts, part = int(blockIdx.x) % parts;
    const int64_t place = int64_t(part) * THREADS + threadIdx.x;
    const U value = place < units ? __ldg(x + token * units + place) : U{};
    for (int first = 0; first < top_k; first += 8) {
        const int count = min(8, top_k - first), at = token * top_k + first;
#pragma unroll
        for (int c = 0; c < 8; ++c) key[c] = c < count ? bin_of(experts, at + c, e) * copies + at + c : 0;
        rank_keys(held, key, rank);
        const int dropped = e * copies;  // the least key of those
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            if (c >= count) continue;
            const int row = rank[c];
            if (place < units) x_sorted[row * units + place] = key[c] < dropped ? value : U{};
            if (part == 0 && int(threadIdx.x) == c) row_of[at + c] = key[c] < dropped ? row : -1;
        }
    }
}

// ---- many copies

// counts[block, bin] of the copies of a block.
__global__ void __launch_bounds__(256)
    permute_count(const int* __restrict__ experts, int* __restrict__ counts, int64_t copies, int e, PermutePlan plan) {
    KN_SHARED(memory);
    int* n = reinterpret_cast<int*>(memory);
    const int64_t begin = blockIdx.x * plan.each, end = min(begin + plan.each, copies);
    for (int64_t v = threadIdx.x; v < plan.bins; v += blockDim.x) n[v] = 0;
    __syncthreads();
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) atomicAdd(n + bin_of(experts, i, e), 1);
    __syncthreads();
    for (int64_t v = threadIdx.x; v < plan.bins; v += blockDim.x) counts[blockIdx.x * plan.bins + v] = n[v];
}

// Rows of the copies of a block: place[i] of all, row_of[i] -1 for dropped ones.
__global__ void __launch_bounds__(256)
    permute_rank(const int* __restrict__ experts, const int* __restrict__ counts, int* __restrict__ offsets,
                 int* __restrict__ row_of, int* __restrict__ place, int64_t copies, int e, PermutePlan plan) {
    KN_SHARED(memory);
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32), bins = int(plan.bins);
    int *total = reinterpret_cast<int*>(memory), *earlier = total + bins, *next = earlier + bins, *mine = next + warp * bins,
        *sums = next + plan.warps * bins;
    const int64_t stop = min((blockIdx.x + 1) * plan.each, copies), begin = blockIdx.x * plan.each + warp * plan.share,
                  end = min(begin + plan.share, stop);
    // Copies of each bin: of all blocks, of earlier blocks, and of this warp.
    for (int v = lane; v < bins; v += 32) mine[v] = 0;
    __syncwarp();
    for (int64_t i = begin + lane; i < end; i += 32) atomicAdd(mine + bin_of(experts, i, e), 1);
    for (int v = int(threadIdx.x); v < bins; v += int(blockDim.x)) {
        int all = 0, before = 0;
#pragma unroll 8
        for (int b = 0; b < int(plan.blocks); ++b) {
            const int n = __ldg(counts + int64_t(b) * bins + v);
            all += n;
            before += b < int(blockIdx.x) ? n : 0;
        }
        total[v] = all;
        earlier[v] = before;
    }
    __syncthreads();
    // Where each bin starts: a thread adds up neighbouring bins, warps add those of their lanes, and all add those of the warps.
    const int wide = (bins + int(blockDim.x) - 1) / int(blockDim.x);
    const int low = min(int(threadIdx.x) * wide, bins), high = min(low + wide, bins);
    int sum = 0;
    for (int v = low; v < high; ++v) sum += total[v];
    int upto = sum;
    for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(0xffffffff, upto, by);
        upto += lane >= by ? other : 0;
    }
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    int start = upto - sum;
    for (int w = 0; w < warp; ++w) start += sums[w];
    for (int v = low; v < high; ++v) {
        if (blockIdx.x == 0) offsets[v] = start;
        int row = start + earlier[v];  // of the first copy of each warp
        for (int w = 0; w < plan.warps; ++w) {
            const int n = next[w * bins + v];
            next[w * bins + v] = row;
            row += n;
        }
        start += total[v];
    }
    __syncthreads();
    // In order, 32 copies at a time: those of one bin follow each other by lane.
    for (int64_t first = begin; first < end; first += 32) {
        const int64_t i = first + lane;
        const int bin = i < end ? bin_of(experts, i, e) : -1;
        const unsigned same = __match_any_sync(0xffffffff, bin);
        const int row = bin < 0 ? 0 : mine[bin] + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (bin >= 0) {
            if (lane == __ffs(int(same)) - 1) mine[bin] += __popc(same);
            place[i] = row;
            row_of[i] = bin < e ? row : -1;
        }
        __syncwarp();
    }
}

template <class U>
__global__ void __launch_bounds__(128)
    permute_move(const U* __restrict__ x, const int* __restrict__ place, const int* __restrict__ offsets,
                 U* __restrict__ x_sorted, int top_k, int e, int64_t units, unsigned parts) {
    const int64_t token = blockIdx.x / parts, at = int64_t(blockIdx.x % parts) * blockDim.x + threadIdx.x;
    if (at >= units) return;
    const U value = __ldg(x + token * units + at);
    const int kept = __ldg(offsets + e);
    for (int first = 0; first < top_k; first += 8) {
        int row[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) row[c] = first + c < top_k ? __ldg(place + token * top_k + first + c) : 0;
#pragma unroll
        for (int c = 0; c < 8; ++c)
            if (first + c < top_k) x_sorted[row[c] * units + at] = row[c] < kept ? value : U{};
    }
}

template <class U> static void permute_as(const MoePermute& p, int64_t units, cudaStream_t stream) {
    const int64_t t = p.experts.size[0], top_k = p.experts.size[1], copies = t * top_k, e = p.offsets.size[0] - 1;
    const int* experts = p.experts.as<const int>();
    int *offsets = p.offsets.as<int>(), *row_of = p.row_of.as<int>();
    const U* x = p.x.as<const U>();
    if (permutes_few(copies)) {
        const int64_t parts = max64(1, ceil_div(units, THREADS));  // rows without columns have a place all the same
        const int64_t blocks = copies ? t * parts : 0;
        const Grid grid{dim3(unsigned(blocks + ceil_div(e + 1, 8))), THREADS, (1 + THREADS / 32) * 8 * 4};
        launch<permute_few<U>>("moe_permute", grid, stream, x, experts, p.x_sorted.as<U>(), offsets, row_of, int(copies),
                               int(top_k), int(e), units, int(parts), int(blocks));
        return;
    }
    const int threads = int(max64(32, min64(128, ceil_div(units, 32) * 32)));
    const int64_t parts = ceil_div(units, threads);
    const PermutePlan plan = permute_plan(copies, e);
    int *place = p.workspace.as<int>(), *counts = place + copies;
    const dim3 blocks(unsigned(plan.blocks));
    launch<permute_count>("moe_permute", {blocks, 256, size_t(4 * plan.bins)}, stream, experts, counts, copies, int(e), plan);
    launch<permute_rank>("moe_permute", {blocks, 32 * plan.warps, size_t(plan.shared)}, stream, experts,
                         const_cast<const int*>(counts), offsets, row_of, place, copies, int(e), plan);
    launch<permute_move<U>>("moe_permute", {dim3(unsigned(t * parts)), threads}, stream, x, const_cast<const int*>(place),
                            const_cast<const int*>(offsets), p.x_sorted.as<U>(), int(top_k), int(e), units, unsigned(parts));
}

void moe_permute(const MoePermute& p, cudaStream_t stream) {
    const int64_t bytes = p.x.size[1] * (p.x.dtype == Dtype::f32 ? 4 : p.x.dtype == Dtype::bf16 ? 2 : 1);
    if (bytes % 16 == 0) return permute_as<uint4>(p, bytes / 16, stream);
    if (bytes % 4 == 0) return permute_as<uint32_t>(p, bytes / 4, stream);
    bytes % 2 ? permute_as<uint8_t>(p, bytes, stream) : permute_as<uint16_t>(p, bytes / 2, stream);
}

}  // namespace kn::cuda
