// FP8 block-scaled products on Hopper, dense or by groups of rows; times: bench/results/h200.jsonl.
//
// Persistent blocks of three warpgroups. One warp of the first copies tiles of 128 k by tensor map into a ring, another copies
// their scales; the other two warpgroups multiply. Tensor cores keep about 14 bits of a sum, so each 128 products of k are
// promoted to f32 sums in registers, scaled, while the other warpgroup's products run. Many tokens: 256 x 128 tiles, for which
// two blocks of a cluster load each half of the shared rows and hand it to both: 33 bytes a cycle from L2 for 8543 FLOP, where
// 128 x 128 alone would want 66. Results go by way of shared memory to two warps that store them under the next tile's products:
// all blocks end a tile at about the same time and would wait for memory together (k = 512: 194 us, so 148 to 171). Few tokens:
// the weights take the 64-row slot; k is split over the blocks of a cluster until all multiprocessors load, and the sums meet in
// shared memory.
#pragma once
#include "gemm_plan.h"
#include "ptx.cuh"
#include "tensor.h"

namespace kn::cuda {

struct GemmArgs {
    const uint8_t *a, *b;  // codes [m, k], [e n, k]
    const float *a_scale, *b_scale;
    const int* offsets;  // null: dense
    void* c;
    int m, n, k, blocks;  // blocks: of 128 k
    int e, splits;
    bool f32, mapped;  // mapped: rows start at multiples of 16 bytes, copies go by tensor map
};

// A tile's place: tokens [row, end) at most, weights from `col`, expert `g`; `blocks` of k, none for rows past all groups.
struct GemmJob {
    int row, end, col, g, blocks;
    bool valid;
};

template <bool grouped> __device__ GemmJob job_at(const GemmTile& t, const GemmArgs& p, const int* starts, int index, int rank) {
    const int tiles_n = int(up(up(p.n, t.weights()), t.cluster));
    if constexpr (grouped) {
        if (index >= starts[p.e + 1]) return {0, 0, 0, 0, 0, false};
        int low = 0, high = p.e;  // the last group that starts at or before the tile
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (starts[middle] <= index) low = middle;
            else high = middle - 1;
        }
        const int row = p.offsets[low], end = low < p.e ? p.offsets[low + 1] : p.m, tiles_m = int(up(end - row, t.tokens()));
        const TilePlace at = place(index - starts[low], tiles_m, tiles_n, t.swapped ? tiles_m : BAND);
        return {row + at.m * t.tokens(),  end, (at.n * t.cluster + rank) * t.weights(), low < p.e ? low : 0,
                low < p.e ? p.blocks : 0, true};
    } else {
        const int tiles_m = int(up(p.m, t.tokens()));
        if (index >= tiles_m * tiles_n) return {0, 0, 0, 0, 0, false};
        const TilePlace at = place(index, tiles_m, tiles_n, t.swapped ? tiles_m : BAND);
        return {at.m * t.tokens(), p.m, (at.n * t.cluster + rank) * t.weights(), 0, p.blocks, true};
    }
}

// Bytes of rows that no tensor map can address, into swizzled rows of 128 bytes, zeros past the ends; 128 threads.
__device__ inline void copy_rows(unsigned char* to, const uint8_t* from, int64_t first, int64_t rows, int count, int k, int at,
                                 int thread) {
    const uint32_t base = shared_address(to);
#pragma unroll 1
    for (int i = thread; i < count * 128; i += 128) {
        const int64_t row = first + i / 128;
        const int byte = at + i % 128;
        to[swizzle128(base + uint32_t(i)) - base] = row < rows && byte < k ? from[row * k + byte] : 0;
    }
}

// Value `i` of a thread's fragment of a swapped tile, whose rows are weights.
__device__ __forceinline__ void store_swapped(const GemmArgs& p, const GemmJob& job, int row, int local, int i, float v) {
    const int n = job.col + row + fragment_row(local, i), m = job.row + fragment_column(local, i);
    if (n >= p.n || m >= job.end) return;
    if (p.f32) static_cast<float*>(p.c)[int64_t(m) * p.n + n] = v;
    else static_cast<uint16_t*>(p.c)[int64_t(m) * p.n + n] = uint16_t(pack_bf16(v, 0.0f));
}

// `count` rows of a tile in bf16 from `row` of the staging on, those and the columns that are inside; a warp.
template <int Y, int PITCH>
__device__ inline void store_rows(const GemmArgs& p, const GemmJob& job, const unsigned char* staging, int row, int count,
                                  int lane) {
    // Of 16 bytes in a row; rows that a warp copies at once; such copies under way.
    constexpr int CHUNKS = Y / 8, AT_ONCE = 32 / CHUNKS, BATCH = 8;
    uint16_t* const c = static_cast<uint16_t*>(p.c) + int64_t(job.row) * p.n + job.col;
    const int rows = min(count, job.end - job.row - row), columns = p.n - job.col;
    if (p.n % 8 == 0) {
        const int r = lane / CHUNKS, n = lane % CHUNKS * 8;
        if (r >= AT_ONCE || n >= columns) return;
        const unsigned char* from = staging + (row + r) * PITCH + n * 2;
        uint16_t* to = c + int64_t(row + r) * p.n + n;
        const int64_t step = int64_t(AT_ONCE) * p.n;
        int left = rows - r;
#pragma unroll 1
        for (; left > (BATCH - 1) * AT_ONCE; left -= BATCH * AT_ONCE) {
            uint4 v[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) v[i] = *reinterpret_cast<const uint4*>(from + i * AT_ONCE * PITCH);
#pragma unroll
            for (int i = 0; i < BATCH; ++i, to += step) *reinterpret_cast<uint4*>(to) = v[i];
            from += BATCH * AT_ONCE * PITCH;
        }
#pragma unroll 1
        for (; left > 0; left -= AT_ONCE, to += step, from += AT_ONCE * PITCH)
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
        for (int i = lane; i < rows * Y; i += 32) {
            const int m = row + i / Y, n = i % Y;
            if (n < columns) c[int64_t(m) * p.n + n] = *reinterpret_cast<const uint16_t*>(staging + m * PITCH + n * 2);
        }
    }
}

template <bool SWAPPED, int WAVES, int Y, int CLUSTER, bool GROUPED> __global__ void __launch_bounds__(384, SWAPPED ? 2 : 1)
    fp8_gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map, const GemmArgs p) {
    constexpr GemmTile T = {SWAPPED, WAVES, Y, CLUSTER};
    constexpr int STAGES = T.stages(), X = T.x(), SCALES = T.scales();
    static_assert(STAGES >= 3 && X % 8 == 0 && Y % 8 == 0);
    KN_SHARED(memory);
    unsigned char* const tiles = memory + (-shared_address(memory) & 1023);
    float* const scales = reinterpret_cast<float*>(tiles + STAGES * (X + Y) * 128);
    unsigned char* const staging = reinterpret_cast<unsigned char*>(scales + STAGES * SCALES);
    uint64_t* const full = reinterpret_cast<uint64_t*>(staging + T.staging_bytes());
    uint64_t* const empty = full + STAGES;
    uint64_t *const given = empty + STAGES, *const taken = given + 2;  // each warpgroup's results, for the warp that stores
    int* const starts = reinterpret_cast<int*>(taken + 2);  // first tile of each group, of the rows past them, and the end

    const int thread = int(threadIdx.x), warp = uniform(thread / 32), lane = thread % 32, group = warp / 4;
    const int rank = CLUSTER > 1 || p.splits > 1 ? int(cluster_rank()) : 0;
    const int blocks_of = CLUSTER > 1 ? CLUSTER : p.splits;  // of a cluster
    const int first = int(blockIdx.x) / blocks_of, step = int(gridDim.x) / blocks_of;
    const bool stored = !SWAPPED && p.mapped && !p.f32;  // a tile by two warps of the first group, under the next one's products

    if (thread == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + s, p.mapped ? 1 + 32 : 128 + 32);  // the last 32 when their scales have landed
            barrier_init(empty + s, 8 * CLUSTER);
        }
        for (int i = 0; i < 2; ++i) barrier_init(given + i, 4), barrier_init(taken + i, 1);
        barrier_init_fence();
    }
    if (GROUPED && warp == 1) {
        const int tiles_n = int(up(up(p.n, T.weights()), CLUSTER));
        int sum = 0;
        for (int base = 0; base <= p.e; base += 32) {
            const int g = base + lane;
            int rows = 0;
            if (g <= p.e) rows = (g < p.e ? p.offsets[g + 1] : p.m) - p.offsets[g];
            const int count = int(up(rows > 0 ? rows : 0, T.tokens())) * tiles_n;
            int before = count;
            for (int by = 1; by < 32; by *= 2) {
                const int other = __shfl_up_sync(0xffffffff, before, by);
                if (lane >= by) before += other;
            }
            if (g <= p.e) starts[g] = sum + before - count;
            sum += __shfl_sync(0xffffffff, before, 31);
        }
        if (lane == 0) starts[p.e + 1] = sum;
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();  // a block's barriers are there before its neighbour arrives at them

    Ring at;
    if (group == 0) {
        registers_less<SWAPPED ? 40 : WAVES == 2 ? 56 : 88>();
        if (p.mapped ? warp < 2 : true)
            for (int index = first;; index += step) {
                const GemmJob job = job_at<GROUPED>(T, p, starts, index, CLUSTER > 1 ? rank : 0);
                if (!job.valid) break;
                const int from = SWAPPED && p.splits > 1 ? split_start(job.blocks, p.splits, rank) : 0;
                const int to = SWAPPED && p.splits > 1 ? split_start(job.blocks, p.splits, rank + 1) : job.blocks;
                const int64_t weight_row = int64_t(job.g) * p.n + job.col;
                for (int kb = from; kb < to; ++kb, at.next(STAGES)) {
                    barrier_wait(empty + at.slot, at.parity ^ 1);
                    unsigned char* const x = tiles + at.slot * (X + Y) * 128;
                    unsigned char* const y = x + X * 128;
                    const int64_t x_row = SWAPPED ? weight_row : job.row, y_row = SWAPPED ? job.row : weight_row;
                    if (p.mapped && warp == 0) {
                        if (lane == 0) {
                            barrier_expect(full + at.slot, (X + Y) * 128);
                            if constexpr (CLUSTER == 1) {
                                tma_load(x, &x_map, full + at.slot, kb * 128, int(x_row), SWAPPED ? EVICT_FIRST : EVICT_NORMAL);
                            } else {
                                constexpr int SLICE = X / CLUSTER;
                                tma_load_multicast(x + rank * SLICE * 128, &x_map, full + at.slot, kb * 128,
                                                   int(x_row) + rank * SLICE, (1 << CLUSTER) - 1);
                            }
                            tma_load(y, &y_map, full + at.slot, kb * 128, int(y_row));
                        }
                        __syncwarp();
                        continue;
                    }
                    if (!p.mapped) {
                        copy_rows(x, SWAPPED ? p.b : p.a, x_row, SWAPPED ? int64_t(p.e) * p.n : p.m, X, p.k, kb * 128, thread);
                        copy_rows(y, SWAPPED ? p.a : p.b, y_row, SWAPPED ? p.m : int64_t(p.e) * p.n, Y, p.k, kb * 128, thread);
                        fence_async();
                        barrier_arrive(full + at.slot);
                        if (warp > 0) continue;
                    }
                    float* const s = scales + at.slot * SCALES;
                    const float* from_scale = p.a_scale + int64_t(job.row + lane) * p.blocks + kb;
#pragma unroll 2
                    for (int i = lane; i < T.tokens(); i += 32, from_scale += 32 * p.blocks)
                        cp_async4(s + i, job.row + i < job.end ? from_scale : p.a_scale, job.row + i < job.end);
                    if (lane < 2) {
                        const int rows = (p.n + 127) / 128, of = job.col / 128 + lane;
                        cp_async4(s + T.tokens() + lane,
                                  p.b_scale + (of < rows ? (int64_t(job.g) * rows + of) * p.blocks + kb : 0), of < rows);
                    }
                    cp_async_arrive(full + at.slot);
                }
            }
        else if (stored) {
            if constexpr (!SWAPPED) {
                int turn = 0;
                for (int index = first;; index += step, ++turn) {
                    const GemmJob job = job_at<GROUPED>(T, p, starts, index, CLUSTER > 1 ? rank : 0);
                    if (!job.valid) break;
                    barrier_wait(given + warp - 2, turn & 1);
                    store_rows<Y, T.pitch()>(p, job, staging, (warp - 2) * WAVES * 64, WAVES * 64, lane);
                    __syncwarp();
                    if (lane == 0) barrier_arrive(taken + warp - 2);
                }
            }
        }
    } else {
        registers_more<SWAPPED ? 96 : WAVES == 2 ? 224 : 208>();
        const int mine = thread - 128, part = group - 1;  // thread of the 256, warpgroup
        const int local = mine % 128;
        // As numbers that the compiler does not make anew each step.
        const uint32_t ring = uniform(shared_address(tiles));
        const uint32_t arrived = uniform(shared_address(full)), freed = arrived + STAGES * 8;
        const uint64_t x_first = descriptor(ring + uint32_t(part * WAVES * 64 * 128), 1024);
        const uint64_t y_first = descriptor(ring + X * 128, 1024);
        int turn = 0;
        for (int index = first;; index += step, ++turn) {
            const GemmJob job = job_at<GROUPED>(T, p, starts, index, CLUSTER > 1 ? rank : 0);
            if (!job.valid) break;
            float sums[WAVES][Y / 2] = {};
            const int from = SWAPPED && p.splits > 1 ? split_start(job.blocks, p.splits, rank) : 0;
            const int to = SWAPPED && p.splits > 1 ? split_start(job.blocks, p.splits, rank + 1) : job.blocks;
            const int edge = 128 - int(job.col % 128);  // columns before the next scale of weights
            for (int kb = from; kb < to; ++kb, at.next(STAGES)) {
                barrier_wait(arrived + uint32_t(at.slot * 8), at.parity);
                const uint32_t stage = uint32_t(at.slot * (X + Y) * 128);
                const uint64_t x = descriptor_at(x_first, stage), y = descriptor_at(y_first, stage);
                const float* const s = scales + at.slot * SCALES;
                float w0, w1, rows[WAVES][2];
#pragma unroll
                for (int w = 0; w < WAVES; ++w) {
                    float d[Y / 2];
                    hold(d);
                    wgmma_fence();
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        wgmma_e4m3<Y>(d, descriptor_at(x, uint32_t(w * 64 * 128 + i * 32)), descriptor_at(y, uint32_t(i * 32)),
                                      i > 0);
                    wgmma_commit();
                    if (w == 0) {  // under the products, which wait for no more than their operands
                        w0 = s[T.tokens()], w1 = s[T.tokens() + 1];
                        if constexpr (!SWAPPED) {
#pragma unroll
                            for (int v = 0; v < WAVES; ++v)
                                for (int h = 0; h < 2; ++h) rows[v][h] = s[(part * WAVES + v) * 64 + fragment_row(local, 2 * h)];
                        }
                    }
                    wgmma_wait<0>();
                    hold(d);
                    if constexpr (SWAPPED) {
#pragma unroll
                        for (int i = 0; i < Y / 2; i += 4) {
                            const float2 columns = *reinterpret_cast<const float2*>(s + fragment_column(local, i));
                            const float c[2] = {columns.x * w0, columns.y * w0};
#pragma unroll
                            for (int h = 0; h < 4; ++h) sums[w][i + h] = fmaf(d[i + h], c[h % 2], sums[w][i + h]);
                        }
                    }
                    if (w == WAVES - 1) {
                        __syncwarp();
                        if (CLUSTER == 1 ? lane == 0 : lane < CLUSTER) {
                            if (CLUSTER == 1 || lane == rank) barrier_arrive(freed + uint32_t(at.slot * 8));
                            else barrier_arrive_remote(empty + at.slot, lane);
                        }
                    }
                    if constexpr (!SWAPPED) {
                        const float before[2] = {rows[w][0] * w0, rows[w][1] * w0}, after[2] = {rows[w][0] * w1, rows[w][1] * w1};
#pragma unroll
                        for (int i = 0; i < Y / 2; ++i)
                            sums[w][i] =
                                fmaf(d[i], Y == 128 || i / 4 * 8 < edge ? before[i / 2 % 2] : after[i / 2 % 2], sums[w][i]);
                    }
                }
            }
            if constexpr (SWAPPED) {
                if (p.splits == 1) {
#pragma unroll
                    for (int i = 0; i < Y / 2; ++i) store_swapped(p, job, part * 64, local, i, sums[0][i]);
                } else {  // the only tile of this block: the ring is free
                    float* const partial = reinterpret_cast<float*>(tiles);
                    part_sync(1, 256);
#pragma unroll
                    for (int i = 0; i < Y / 2; ++i) partial[i * 256 + mine] = sums[0][i];
                    break;
                }
            } else if (p.f32) {
#pragma unroll
                for (int w = 0; w < WAVES; ++w)
#pragma unroll
                    for (int i = 0; i < Y / 2; ++i) {
                        const int m = job.row + (part * WAVES + w) * 64 + fragment_row(local, i),
                                  n = job.col + fragment_column(local, i);
                        if (m < job.end && n < p.n) static_cast<float*>(p.c)[int64_t(m) * p.n + n] = sums[w][i];
                    }
            } else {
                const int row = part * WAVES * 64 + warp % 4 * 16;
                if (stored) barrier_wait(taken + part, (turn & 1) ^ 1);
#pragma unroll
                for (int w = 0; w < WAVES; ++w)
#pragma unroll
                    for (int c = 0; c < Y; c += 16) {
                        const float* const d = sums[w] + c / 2;
                        const uint32_t v[4] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]),
                                               pack_bf16(d[6], d[7])};
                        stmatrix4(staging + (row + w * 64 + lane % 16) * T.pitch() + (c + lane / 16 * 8) * 2, v);
                    }
                __syncwarp();
                if (!stored) {
                    for (int w = 0; w < WAVES; ++w) store_rows<Y, T.pitch()>(p, job, staging, row + w * 64, 16, lane);
                    __syncwarp();
                } else if (lane == 0) {
                    barrier_arrive(given + part);
                }
            }
        }
    }
    __syncwarp();
    if constexpr (SWAPPED) {
        if (p.splits > 1) {
            cluster_sync();
            if (group > 0) {  // this block adds up and stores its share of the tile's registers
                const GemmJob job = job_at<GROUPED>(T, p, starts, first, 0);
                const int mine = thread - 128, local = mine % 128;
                float* const partial = reinterpret_cast<float*>(tiles);
#pragma unroll 4
                for (int i = rank; i < Y / 2; i += p.splits) {
                    float of[MOST_SPLITS], v = 0;
#pragma unroll
                    for (int r = 0; r < MOST_SPLITS; ++r)  // all on their way at once
                        of[r] = r < p.splits ? cluster_map(partial, r)[i * 256 + mine] : 0;
#pragma unroll
                    for (int r = 0; r < MOST_SPLITS; ++r) v += of[r];
                    store_swapped(p, job, (group - 1) * 64, local, i, v);
                }
            }
            cluster_sync();  // none ends while another reads its sums
        }
    }
    if (CLUSTER > 1) cluster_sync();  // none ends while another may arrive at its barriers
}

inline CUtensorMap rows_map(const void* base, int64_t rows, int64_t k, int box) {
    const uint64_t dims[2] = {uint64_t(k), uint64_t(rows)}, strides[1] = {uint64_t(k)};
    const uint32_t boxes[2] = {128, uint32_t(box)};
    return tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, base, 2, dims, strides, boxes, CU_TENSOR_MAP_SWIZZLE_128B);
}

template <const GemmTile* TILES, int I, bool GROUPED> void launch_gemm(const char* name, const GemmArgs& p, cudaStream_t stream) {
    constexpr GemmTile T = TILES[I];
    const int64_t rows_a = p.m, rows_b = int64_t(p.e) * p.n;
    CUtensorMap x = {}, y = {};
    if (p.mapped) {
        x = T.swapped ? rows_map(p.b, rows_b, p.k, T.x()) : rows_map(p.a, rows_a, p.k, T.x() / T.cluster);
        y = T.swapped ? rows_map(p.a, rows_a, p.k, T.y) : rows_map(p.b, rows_b, p.k, T.y);
    }
    const int of = T.cluster > 1 ? T.cluster : p.splits;
    const size_t shared = size_t(T.shared_bytes(GROUPED ? p.e : 0));
    const bool two = T.swapped && 2 * (shared + 1024) <= 228 << 10;  // on a multiprocessor; over 878 groups it is one
    int64_t clusters = int64_t(units()) * (two ? 2 : 1) / of;
    if (!GROUPED) {
        const int64_t tiles = up(p.m, T.tokens()) * up(up(p.n, T.weights()), T.cluster);
        clusters = p.splits > 1 ? tiles : least(clusters, tiles);
    }
    if (clusters < 1) clusters = 1;
    launch<fp8_gemm_kernel<T.swapped, T.waves, T.y, T.cluster, GROUPED>>(
        name, Grid{dim3(unsigned(clusters * of)), 384, shared, of}, stream, x, y, p);
}

template <const GemmTile* TILES, bool GROUPED, int... I>
void launch_tile(int tile, const char* name, const GemmArgs& p, cudaStream_t stream, std::integer_sequence<int, I...>) {
    ((tile == I ? launch_gemm<TILES, I, GROUPED>(name, p, stream) : void()), ...);
}

}  // namespace kn::cuda
