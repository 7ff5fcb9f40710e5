// What both kernels of mla_decode on Hopper share: the arguments, the way to a key, the end of an item that several parts know.
#pragma once
#include "kernels.h"
#include "mla_decode_plan.h"
#include "ptx.cuh"

namespace kn::cuda {

static constexpr float MINUS_INF = -__builtin_inff(), LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

struct MlaArgs {
    const unsigned char* cache;
    const int* table;
    MlaLine line;
    const float* sink;
    uint16_t* out;
    float *lse, *partial;
    float2* totals;  // maximum and sum of each row of a slot
    uint64_t* counts;  // of an item's blocks, at its first part: mla_count
    uint64_t launch;   // its number
    int nq, h, rows, p, page, n, parts, slot_rows;
    float factor;  // of the scores, to base 2
    bool causal;
    uint64_t policy;

    // Keys that row `row` sees of a sequence.
    __host__ __device__ int seen(int length, int row) const {
        if (!causal) return length;
        const int all = length - nq + row / h + 1;
        return all > 0 ? all : 0;
    }
};

// Tiles [first, end) of a segment that any row of its group sees.
template <int CLUSTER> __device__ __forceinline__ int last_tile(const MlaArgs& a, const MlaSegment& s) {
    const int row = min((s.group + 1) * MLA_ROWS * CLUSTER, a.rows) - 1;
    return min(s.last, int((int64_t(a.seen(s.length, row)) + MLA_KEYS - 1) / MLA_KEYS));
}


// Where part `part` starts; a whole warp looks.
__device__ inline MlaWalk mla_start(const MlaLine& line, int parts, int part, int lane) {
    int64_t sum = 0;
    int longest = 0;
    for (int i = lane; i < line.b; i += 32) {
        const int n = line.tiles(i) + MLA_GAP;
        sum += n;
        longest = max(longest, n);
    }
    for (int by = 16; by; by /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, by);
        longest = max(longest, __shfl_xor_sync(0xffffffff, longest, by));
    }
    const int64_t size = mla_part(sum * line.groups, longest, parts), begin = part * size;
    int64_t before = 0;
    for (int base = 0; base < line.b; base += 32) {
        const int n = base + lane < line.b ? line.tiles(base + lane) + MLA_GAP : 0;
        int64_t upto = int64_t(n) * line.groups;
        for (int by = 1; by < 32; by *= 2) {
            const int64_t other = __shfl_up_sync(0xffffffff, upto, by);
            if (lane >= by) upto += other;
        }
        upto += before;
        const unsigned past = __ballot_sync(0xffffffff, upto > begin);
        if (past) {
            const int found = __ffs(int(past)) - 1, item = __shfl_sync(0xffffffff, n, found);
            const int64_t start = __shfl_sync(0xffffffff, upto, found) - int64_t(item) * line.groups;
            const int group = int((begin - start) / item);
            return {start + int64_t(group) * item, begin, begin + size, base + found, group, item - MLA_GAP};
        }
        before = __shfl_sync(0xffffffff, upto, 31);
    }
    return {0, begin, begin + size, line.b, 0, 1};
}

__device__ const uint4 NANS = {~0u, ~0u, ~0u, ~0u};  // in e4m3, bf16 and f32
__device__ __forceinline__ const unsigned char* nans() { return reinterpret_cast<const unsigned char*>(&NANS); }
static constexpr int NO_KEY = -1, NO_PAGE = -2;

// The slot of a key in the cache, or which of the above. 2^31 tokens are more than a terabyte.
__device__ __forceinline__ int token_of(const MlaArgs& a, const MlaSegment& s, int key) {
    if (key >= s.length) return NO_KEY;
    const int page = a.table[int64_t(s.seq) * a.n + key / a.page];
    return page >= 0 && page < a.p ? page * a.page + key % a.page : NO_PAGE;
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    const __half2_raw both = __floats2half2_rn(low, high);
    return both.x | uint32_t(both.y) << 16;
}
__device__ __forceinline__ float2 unpack_f16(uint32_t both) {
    return __half22float2(__half2(__half2_raw{uint16_t(both), uint16_t(both >> 16)}));
}

__device__ __forceinline__ bool is_odd(float v) { return (__float_as_uint(v) & 0x7f800000) == 0x7f800000; }  // infinite or NaN

// What a row's values are multiplied with in the end, for a sum of weights whose logarithm to base 2 is `log`.
__device__ __forceinline__ float finish_of(const MlaArgs& a, int head, float sum, float log) {
    if (sum == 0) return 0;
    return a.sink ? 1 / (sum * (1 + exp2_fast(a.sink[head] * LOG2E - log))) : 1 / sum;
}

// An item of which a part knows a piece: one begun before it, one that it leaves unended.
struct MlaCut {
    int seq, group;
    int64_t at, over;  // where the item lies on the line; at = over: no such item
    int first, last;   // the parts that know it

    __device__ void find(const MlaWalk& part) {
        const int64_t size = part.end - part.begin;
        first = int(at / size);
        last = at == over ? first : int((over - 1) / size);
    }
    __device__ bool shared() const { return last > first; }
};

// What a block keeps of its walk; one thread steps, the others read segments and cuts.
struct MlaSteps {
    MlaWalk start, walk;    // of the part; and of the thread that steps
    MlaSegment segment[2];  // this and the next one; sequence -1: no more
    MlaCut cuts[2];

    __device__ void step(const MlaLine& line, int turn) {
        if (!walk.next(line, segment[turn & 1])) segment[turn & 1].seq = -1;
    }
    // By a whole warp: to the start of the part and its first segment.
    __device__ void begin(const MlaLine& line, int parts, int part, int lane) {
        const MlaWalk found = mla_start(line, parts, part, lane);
        if (lane) return;
        start = walk = found;
        step(line, 0);
        cuts[0] = cuts[1] = {};
    }
};

__device__ __forceinline__ void mla_note(MlaCut (&cuts)[2], const MlaSegment& s) {
    if (!s.whole()) cuts[s.begins] = {s.seq, s.group, s.at, s.over, 0, 0};
}

// The count of an item's blocks: how many are done, above them how many need it no more, above those the launch's number. Of
// another launch, or whatever lay in the workspace, it counts nothing; the last one that needs it sets it to 0.
static constexpr int MLA_COUNT = 12;
static constexpr uint64_t MLA_DONE = (1 << MLA_COUNT) - 1;

__device__ inline uint64_t mla_count(uint64_t* count, uint64_t launch, uint64_t add) {
    using Word = unsigned long long;
    Word* const at = reinterpret_cast<Word*>(count);
    // The first block makes the count this launch's, the others add: exchanges by all, a round trip for each that succeeds, took
    // 70 us of 132 blocks (H200).
    for (Word seen = *reinterpret_cast<volatile Word*>(at); seen >> 2 * MLA_COUNT != launch;) {
        const Word mine = (launch << 2 * MLA_COUNT) + add, found = atomicCAS(at, seen, mine);
        if (found == seen) return mine;
        seen = found;
    }
    return atomicAdd(at, Word(add)) + add;
}

// Joins what blocks know of an item, a share of it in each of the `blocks`: 256 threads, a warp QUARTERS times 128 columns of a
// row, with `ways` = 8 all warps part of the pieces each. Turns of some 2 us of latency are what it costs. The sums run in an
// order that shapes and lengths fix.
template <int QUARTERS>
__device__ inline void mla_join(const MlaArgs& a, const MlaCut& cut, int first, int rows, int ways, int block, int blocks,
                                unsigned char* memory, int thread) {
    constexpr int AT_ONCE = 8 / QUARTERS;  // pieces on their way
    const int count = cut.last - cut.first + 1, warp = thread / 32, lane = thread % 32, way = ways == 1 ? 0 : warp;
    float4* const sums = reinterpret_cast<float4*>(memory);  // of each thread
    float* const weights = reinterpret_cast<float*>(memory + 256 * 16) + warp * a.parts;
    for (int unit = ways == 1 ? block * 8 + warp : block; unit < rows * 4 / QUARTERS; unit += blocks * 8 / ways) {
        const int row = unit * QUARTERS / 4, column = unit * QUARTERS % 4 * 128 + lane * 4;
        auto place = [&](int i) { return mla_slot(cut.first + i, i == 0) * a.slot_rows + row; };
        float top = MINUS_INF, total = 0;
        for (int i = lane; i < count; i += 32) top = fmaxf(top, a.totals[place(i)].x);
        for (int by = 16; by; by /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, by));
        for (int i = lane; i < count; i += 32) {
            const float2 of = a.totals[place(i)];
            const float weight = of.y == 0 ? 0 : exp2_fast(of.x - top);
            weights[i] = weight;
            total += of.y == 0 ? 0 : weight * of.y;
        }
        for (int by = 16; by; by /= 2) total += __shfl_xor_sync(0xffffffff, total, by);
        __syncwarp();
        float4 sum[QUARTERS] = {};
        for (int i = way; i < count; i += AT_ONCE * ways) {
            float weight[AT_ONCE];
            float4 o[AT_ONCE][QUARTERS];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                // A part that has seen no key has written nothing; the weight of NaN sums is NaN, or they have made `total` NaN.
                weight[k] = i + k * ways < count ? weights[i + k * ways] : 0;
#pragma unroll
                for (int n = 0; n < QUARTERS; ++n) {
                    const float* const from = a.partial + place(i + k * ways) * 512 + column + n * 128;
                    o[k][n] = weight[k] == 0 ? float4{0, 0, 0, 0} : *reinterpret_cast<const float4*>(from);
                }
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
#pragma unroll
                for (int n = 0; n < QUARTERS; ++n)
                    sum[n] = {fmaf(weight[k], o[k][n].x, sum[n].x), fmaf(weight[k], o[k][n].y, sum[n].y),
                              fmaf(weight[k], o[k][n].z, sum[n].z), fmaf(weight[k], o[k][n].w, sum[n].w)};
        }
        if (QUARTERS == 1 && ways > 1) {
            sums[thread] = sum[0];
            part_sync(2, 256);
            if (warp == 0)
                for (int i = 1; i < ways; ++i) {
                    const float4 o = sums[lane + i * 32];
                    sum[0] = {sum[0].x + o.x, sum[0].y + o.y, sum[0].z + o.z, sum[0].w + o.w};
                }
            part_sync(2, 256);
        }
        if (way == 0) {
            const int head = (first + row) % a.h;
            const float log = top + log2f(total), finish = finish_of(a, head, total, log);
#pragma unroll
            for (int n = 0; n < QUARTERS; ++n) {
                const uint2 result = {pack_bf16(sum[n].x * finish, sum[n].y * finish),
                                      pack_bf16(sum[n].z * finish, sum[n].w * finish)};
                *reinterpret_cast<uint2*>(a.out + (int64_t(cut.seq) * a.rows + first + row) * 512 + column + n * 128) = result;
            }
            if (column == 0)
                a.lse[(int64_t(cut.seq) * a.h + head) * a.nq + (first + row) / a.h] = total == 0 ? MINUS_INF : log * LN2;
        }
        __syncwarp();
    }
}

// The end of a block, for 256 of its threads: it says that its pieces are written and joins its share of their items.
__device__ inline void mla_end(const MlaArgs& a, const MlaWalk& start, MlaCut (&cuts)[2], int group_rows, int rank, int cluster,
                               unsigned char* memory, int thread) {
    const int part = int(blockIdx.x) / cluster;
    part_sync(2, 256);  // all have written
    if (thread == 0) {
        __threadfence();
        for (int i = 0; i < 2; ++i) {
            cuts[i].find(start);
            if (cuts[i].shared()) mla_count(a.counts + cuts[i].first, a.launch, 1);
        }
    }
    part_sync(2, 256);
    for (int i = 0; i < 2; ++i) {
        const MlaCut cut = cuts[i];
        if (!cut.shared()) continue;
        uint64_t* const count = a.counts + cut.first;
        const int blocks = (cut.last - cut.first + 1) * cluster;
        if (thread == 0) wait_count(count, MLA_DONE, uint64_t(blocks));
        part_sync(2, 256);
        const int first = cut.group * group_rows, rows = min(a.slot_rows, a.rows - first);
        const int ways = blocks > 8 * cluster && rows * 2 <= blocks ? 8 : 1, block = (part - cut.first) * cluster + rank;
        // Several turns of a quarter of a row are fewer of whole rows, which take little longer each.
        if (ways == 1 && rows > blocks * 4) mla_join<4>(a, cut, first, rows, ways, block, blocks, memory, thread);
        else mla_join<1>(a, cut, first, rows, ways, block, blocks, memory, thread);
        if (thread == 0 && (mla_count(count, a.launch, MLA_DONE + 1) >> MLA_COUNT & MLA_DONE) == uint64_t(blocks)) *count = 0;
    }
}

}  // namespace kn::cuda
