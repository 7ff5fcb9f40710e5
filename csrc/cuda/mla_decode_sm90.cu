// mla_decode on Hopper; unproved: it has run in the emulator alone.
//
// A block holds 64 query rows (tokens by heads of one sequence, packed) and walks blocks of 64 keys: 64 x 576 of K, whose first
// 512 columns are V, read once. Per block of keys 4.7 MFLOP of Q K and 4.2 of P V against 74 KB (42 of an FP8 cache): 2100 cycles
// of tensor cores, 3600 of memory, so that up to 64 rows (a rank's 8 or 16 heads too) wait for memory, 128 heads for tensor
// cores. One warpgroup copies tokens, whatever the page size, into a ring of two tiles (or converts an FP8 cache); of the other
// two each multiplies half of the keys and then half of the 512 columns, 128 registers a thread. The product of the next keys
// runs under the softmax of these. Three launches: shares of the work (mla_decode_plan.h), this, and the merge of sequences that
// lie in several parts.
#include "kernels.h"
#include "mla_decode_plan.h"
#include "ptx.cuh"

namespace kn::cuda {

struct DecodeArgs {
    const uint16_t* q;
    const uint8_t* cache;
    const int *table, *lens;
    const float* sink;
    uint16_t* out;
    float *lse, *sums, *logs;  // sums, logs: of pieces
    int *starts, *firsts;
    int b, h, rows, pages, page, table_n, parts, tiles, queries;
    int keys;     // of a block
    float scale;  // to the base 2
    bool causal;
};

static constexpr float LN2 = 0.69314718055994531f, LOG2E = 1.4426950408889634f;
static constexpr float NOTHING = -INFINITY;

__global__ void __launch_bounds__(32) decode_plan_kernel(const DecodeArgs p) {
    const int lane = int(threadIdx.x);
    int sum = 0;
    for (int base = 0; base < p.b; base += 32) {
        const int i = base + lane, cost = i < p.b ? decode_blocks(p.lens[i], p.keys) + DECODE_FIXED : 0;
        int before = cost;
        for (int by = 1; by < 32; by *= 2) {
            const int other = __shfl_up_sync(0xffffffff, before, by);
            if (lane >= by) before += other;
        }
        if (i < p.b) p.starts[i] = sum + before - cost;
        sum += __shfl_sync(0xffffffff, before, 31);
    }
    if (lane == 0) p.starts[p.b] = sum;
    __threadfence_block();
    __syncwarp();
    const int stretch = decode_stretch(sum, p.parts);
    for (int part = lane; part < p.parts; part += 32) {  // the first sequence that ends behind the part's start
        int low = 0, high = p.b;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (p.starts[middle + 1] > part * stretch) high = middle;
            else low = middle + 1;
        }
        p.firsts[part] = low;
    }
}

// Writes a row's result: a piece's to the workspace, a whole one to the output.
struct RowEnd {
    float log, factor;  // natural logarithm of the sum of weights; what the sums are multiplied with
};
__device__ __forceinline__ RowEnd row_end(float top, float weights) {  // of scores to the base 2
    return weights == 0.0f ? RowEnd{NOTHING, 0.0f} : RowEnd{(top + log2f(weights)) * LN2, 1.0f / weights};
}
__device__ __forceinline__ float sink_factor(const float* sink, int head, float log) {
    if (!sink) return 1.0f;
    return log == NOTHING ? 0.0f : 1.0f / (1.0f + exp2_fast((sink[head] - log) * LOG2E));
}

static constexpr int PANEL = 64 * 128;  // bytes of 64 rows of 64 bf16

// Shared memory: queries [9 panels], two tiles of keys [9 panels each], weights [1 panel; with FP8 one for each of the four
// scales of a key], then a few floats.
template <bool FP8> struct DecodeShape {
    static constexpr int KEYS = decode_keys(FP8), KEY_PANEL = KEYS * 128, TILE = 9 * KEY_PANEL, COPIES = FP8 ? 4 : 1;
    static constexpr int FLOATS = 4 * 64 + (FP8 ? 2 * KEYS * 4 : 0),
                         BYTES = 1024 + 9 * PANEL + 2 * TILE + COPIES * PANEL + FLOATS * 4 + 4 * 8;
};

// 16 codes as bf16, which holds them exactly.
__device__ __forceinline__ void widen16(const uint4& codes, uint4 (&to)[2]) {
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const __half2_raw two =
            __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(words[i / 2] >> (i % 2 * 16) & 0xffff), __NV_E4M3);
        const float2 f = __half22float2(__half2(two));
        out[i] = pack_bf16(f.x, f.y);
    }
    to[0] = make_uint4(out[0], out[1], out[2], out[3]);
    to[1] = make_uint4(out[4], out[5], out[6], out[7]);
}

template <bool FP8> __global__ void __launch_bounds__(384, 1) decode_kernel(const DecodeArgs p) {
    KN_SHARED(memory);
    unsigned char* const base = memory + (-shared_address(memory) & 1023);
    using Shape = DecodeShape<FP8>;
    constexpr int KEYS = Shape::KEYS, TILE = Shape::TILE, KEY_PANEL = Shape::KEY_PANEL, HALF = KEYS / 2;
    unsigned char *const queries = base, *const keys = base + 9 * PANEL, *const weights = keys + 2 * TILE;
    float* const tops = reinterpret_cast<float*>(weights + Shape::COPIES * PANEL);  // [2, 64]: each half's largest score of a row
    float* const totals = tops + 128;                                               // [2, 64]: each half's sum of weights
    float* const scales = totals + 128;                                             // FP8: [2, KEYS, 4], of the codes
    uint64_t *const full = reinterpret_cast<uint64_t*>(tops + Shape::FLOATS), *const empty = full + 2;

    const int thread = int(threadIdx.x), warp = uniform(thread / 32), lane = thread % 32, group = warp / 4;
    const int part = int(blockIdx.x), tile = int(blockIdx.y);
    if (thread == 0) {
        for (int s = 0; s < 2; ++s) {
            barrier_init(full + s, 128);
            barrier_init(empty + s, 8);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const int stretch = decode_stretch(p.starts[p.b], p.parts), behind = (part + 1) * stretch;
    int slot = 0;
    uint32_t parity = 0;
    auto next = [&] {
        slot ^= 1;
        parity ^= uint32_t(slot == 0);
    };

    if (group == 0) {
        registers_less<FP8 ? 72 : 56>();
        const int chunk = thread % 8;
        for (int i = p.firsts[part]; i < p.b && p.starts[i] < behind; ++i) {
            const int seq = p.lens[i];
            const Piece piece = decode_piece(part, stretch, p.starts[i], decode_blocks(seq, KEYS));
            for (int block = piece.first; block < piece.end; ++block, next()) {
                barrier_wait(empty + slot, parity ^ 1);
                unsigned char* const to = keys + slot * TILE;
#pragma unroll 1
                for (int row = thread / 8; row < KEYS; row += 16) {
                    const int key = block * KEYS + row;
                    const bool inside = key < seq && key / p.page < p.table_n;
                    const int page = inside ? p.table[int64_t(i) * p.table_n + key / p.page] : 0;
                    const bool known = page >= 0 && page < p.pages;
                    const uint8_t* const token =
                        p.cache + (inside && known ? (int64_t(page) * p.page + key % p.page) * (FP8 ? 656 : 1152) : 0);
                    unsigned char* const at = to + swizzle128(uint32_t(row * 128 + chunk * 16));
                    if (key < seq && !(inside && known)) {  // no such page: NaN
#pragma unroll 1
                        for (int c = 0; c < 9; ++c)
                            *reinterpret_cast<uint4*>(at + c * KEY_PANEL) = make_uint4(~0u, ~0u, ~0u, ~0u);
                    } else if constexpr (!FP8) {
#pragma unroll
                        for (int c = 0; c < 9; ++c) cp_async16(at + c * KEY_PANEL, token + c * 128 + chunk * 16, inside);
                    } else if (!inside) {
#pragma unroll 1
                        for (int c = 0; c < 9; ++c) *reinterpret_cast<uint4*>(at + c * KEY_PANEL) = make_uint4(0, 0, 0, 0);
                    } else {
                        uint4 codes[4];
#pragma unroll
                        for (int g = 0; g < 4; ++g) codes[g] = __ldg(reinterpret_cast<const uint4*>(token) + g * 8 + chunk);
                        const uint4 rope = __ldg(reinterpret_cast<const uint4*>(token + 528) + chunk);
#pragma unroll
                        for (int g = 0; g < 4; ++g) {
                            uint4 two[2];
                            widen16(codes[g], two);
                            const uint32_t column = uint32_t(g * 8 + chunk) * 32;  // in bytes of bf16
#pragma unroll
                            for (int j = 0; j < 2; ++j)
                                *reinterpret_cast<uint4*>(to + column / 128 * KEY_PANEL +
                                                          swizzle128(uint32_t(row * 128) + column % 128 + j * 16)) = two[j];
                        }
                        *reinterpret_cast<uint4*>(at + 8 * KEY_PANEL) = rope;
                    }
                    if (FP8 && chunk == 0)
                        *reinterpret_cast<float4*>(scales + (slot * KEYS + row) * 4) =
                            inside && known ? __ldg(reinterpret_cast<const float4*>(token + 512)) : make_float4(1, 1, 1, 1);
                }
                fence_async();
                if constexpr (FP8) barrier_arrive(full + slot);
                else cp_async_arrive(full + slot);
            }
        }
        return;
    }

    registers_more<FP8 ? 216 : 224>();
    const int local = (thread - 128) % 128, half = group - 1, mine = thread - 128;
    for (int i = p.firsts[part]; i < p.b && p.starts[i] < behind; ++i) {
        const int seq = p.lens[i], blocks = decode_blocks(seq, KEYS), start = p.starts[i];
        const Piece piece = decode_piece(part, stretch, start, blocks);
        if (piece.first >= piece.end && (blocks || start < part * stretch)) continue;  // one without keys is its first part's
        // Queries, 16 bytes a thread and turn; the part_sync of the sequence before has let go of them.
        for (int c = mine; c < 64 * 72; c += 256) {
            const int row = c / 72, piece16 = c % 72, r = tile * 64 + row;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (r < p.rows) v = __ldg(reinterpret_cast<const uint4*>(p.q + (int64_t(i) * p.rows + r) * 576) + piece16);
            *reinterpret_cast<uint4*>(queries + piece16 / 8 * PANEL + swizzle128(uint32_t(row * 128 + piece16 % 8 * 16))) = v;
        }
        fence_async();
        part_sync(1, 256);

        int limit[2];
        for (int r = 0; r < 2; ++r) {
            const int row = tile * 64 + fragment_row(local, 2 * r);
            limit[r] = p.causal ? seq - p.queries + row / p.h + 1 : seq;
        }
        float top[2] = {NOTHING, NOTHING}, total[2] = {0, 0};
        // Scores of this half's keys, of the tile in the ring's slot `at`. bf16: one sum over 576 columns. FP8: sums of each
        // scale's 128 columns and of the rotated 64, two or three at a time for want of registers.
        constexpr int SUMS = FP8 ? 3 : 1, PART = FP8 ? 64 : 128;  // PART: registers of output columns with one scale
        float o[128 / PART][PART] = {}, s[HALF / 2], d[SUMS][HALF / 2];
        auto multiply = [&](int sum, int at, int first, int end) {  // panels [first, end) of 64 columns
            const uint32_t a = shared_address(queries), b = shared_address(keys + at * TILE) + uint32_t(half * HALF * 128);
#pragma unroll
            for (int k = 4 * first; k < 4 * end; ++k)
                wgmma_bf16<HALF>(d[sum], descriptor(a + uint32_t(k / 4 * PANEL + k % 4 * 32), 1024),
                                 descriptor(b + uint32_t(k / 4 * KEY_PANEL + k % 4 * 32), 1024), k > 4 * first);
        };
        auto hold_sums = [&] {
#pragma unroll
            for (int g = 0; g < SUMS; ++g) hold(d[g]);
        };
        auto finish = [&] {
            wgmma_commit();
            wgmma_wait<0>();
            hold_sums();
        };
        auto start_scores = [&](int at) {
            hold_sums();
            wgmma_fence();
            if constexpr (!FP8) {
                multiply(0, at, 0, 9);
                wgmma_commit();
            } else {
                multiply(0, at, 0, 2);
                multiply(1, at, 2, 4);
                multiply(2, at, 8, 9);
            }
        };
        auto take_scores = [&](int at) {  // to `s`
            if constexpr (!FP8) {
                hold_sums();
#pragma unroll
                for (int c = 0; c < HALF / 2; ++c) s[c] = d[0][c];
            } else {
                const float4* const scale = reinterpret_cast<const float4*>(scales) + at * KEYS + half * HALF;
                finish();
#pragma unroll
                for (int c = 0; c < HALF / 2; ++c) {
                    const float4 w = scale[fragment_column(local, c)];
                    s[c] = fmaf(d[0][c], w.x, fmaf(d[1][c], w.y, d[2][c]));
                }
                hold_sums();
                wgmma_fence();
                multiply(0, at, 4, 6);
                multiply(1, at, 6, 8);
                finish();
#pragma unroll
                for (int c = 0; c < HALF / 2; ++c) {
                    const float4 w = scale[fragment_column(local, c)];
                    s[c] = fmaf(d[0][c], w.z, fmaf(d[1][c], w.w, s[c]));
                }
            }
        };
        auto arrived = [&](int at, uint32_t phase) {
            barrier_wait(full + at, phase);
            fence_async();  // written by threads, read by the tensor cores
        };
        // The product of the next keys runs under the softmax of these; an FP8 cache's sums leave no registers for that.
        constexpr bool AHEAD = !FP8;
        if (AHEAD && piece.first < piece.end) {
            arrived(slot, parity);
            start_scores(slot);
            wgmma_wait<0>();
            take_scores(slot);
        }
        for (int block = piece.first; block < piece.end; ++block) {
            const int here = slot;
            if constexpr (!AHEAD) {
                arrived(slot, parity);
                start_scores(slot);
                take_scores(slot);
            }
            next();
            const bool more = AHEAD && block + 1 < piece.end;
            if (more) {
                arrived(slot, parity);
                start_scores(slot);
            }
            float best[2] = {NOTHING, NOTHING};
#pragma unroll
            for (int c = 0; c < HALF / 2; ++c) {
                const int key = block * KEYS + half * HALF + fragment_column(local, c), r = c / 2 % 2;
                s[c] = key < limit[r] ? s[c] * p.scale : NOTHING;
                best[r] = fmaxf(best[r], s[c]);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffff, best[r], 1));
                best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffff, best[r], 2));
                if (lane % 4 == 0) tops[half * 64 + fragment_row(local, 2 * r)] = best[r];
            }
            part_sync(1, 256);
            float shrink[2], from[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = fragment_row(local, 2 * r);
                const float reached = fmaxf(top[r], fmaxf(tops[row], tops[64 + row]));
                from[r] = reached == NOTHING ? 0.0f : reached;
                shrink[r] = exp2_fast(top[r] - from[r]);
                top[r] = reached;
                total[r] *= shrink[r];
            }
#pragma unroll
            for (int c = 0; c < HALF / 2; c += 2) {
                const int r = c / 2 % 2, column = half * HALF + fragment_column(local, c);
                const float w0 = exp2_fast(s[c] - from[r]), w1 = exp2_fast(s[c + 1] - from[r]);
                total[r] += w0 + w1;
                unsigned char* const to = weights + swizzle128(uint32_t(fragment_row(local, c) * 128 + column * 2));
                if constexpr (FP8) {
                    const float4 u = *reinterpret_cast<const float4*>(scales + (here * KEYS + column) * 4);
                    const float4 v = *reinterpret_cast<const float4*>(scales + (here * KEYS + column + 1) * 4);
                    *reinterpret_cast<uint32_t*>(to) = pack_bf16(w0 * u.x, w1 * v.x);
                    *reinterpret_cast<uint32_t*>(to + PANEL) = pack_bf16(w0 * u.y, w1 * v.y);
                    *reinterpret_cast<uint32_t*>(to + 2 * PANEL) = pack_bf16(w0 * u.z, w1 * v.z);
                    *reinterpret_cast<uint32_t*>(to + 3 * PANEL) = pack_bf16(w0 * u.w, w1 * v.w);
                } else {
                    *reinterpret_cast<uint32_t*>(to) = pack_bf16(w0, w1);
                }
            }
#pragma unroll
            for (int c = 0; c < 128; ++c) o[c / PART][c % PART] *= shrink[c / 2 % 2];
            fence_async();
            part_sync(1, 256);
            const uint32_t a = shared_address(weights), b = shared_address(keys + here * TILE) + uint32_t(half * 4 * KEY_PANEL);
#pragma unroll
            for (int g = 0; g < 128 / PART; ++g) hold(o[g]);
            wgmma_fence();
#pragma unroll
            for (int g = 0; g < 128 / PART; ++g)
#pragma unroll
                for (int k = 0; k < KEYS / 16; ++k)
                    wgmma_bf16<2 * PART, true>(o[g], descriptor(a + uint32_t((FP8 ? 2 * half + g : 0) * PANEL + k * 32), 1024),
                                               descriptor(b + uint32_t(g * 2 * KEY_PANEL + k * 2048), 1024, KEY_PANEL), true);
            wgmma_commit();
            wgmma_wait<0>();
#pragma unroll
            for (int g = 0; g < 128 / PART; ++g) hold(o[g]);
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + here);
            if (more) take_scores(slot);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
            total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
            if (lane % 4 == 0) totals[half * 64 + fragment_row(local, 2 * r)] = total[r];
        }
        part_sync(1, 256);
        const int first_part = decode_first_part(stretch, start), last_part = decode_last_part(stretch, start, blocks);
        const bool whole = blocks == 0 || first_part == last_part;
        const int64_t kept = (int64_t(tile) * 2 * p.parts + decode_slot(part, part < last_part)) * 64;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int in_tile = fragment_row(local, 2 * r), row = tile * 64 + in_tile;
            const RowEnd end = row_end(top[r], totals[in_tile] + totals[64 + in_tile]);
            if (row >= p.rows) continue;
            if (whole) {
                const int head = row % p.h;
                const float factor = end.factor * sink_factor(p.sink, head, end.log);
                if (half == 0 && lane % 4 == 0) p.lse[(int64_t(i) * p.h + head) * p.queries + row / p.h] = end.log;
                uint16_t* const to = p.out + (int64_t(i) * p.rows + row) * 512 + half * 256;
#pragma unroll
                for (int c = 2 * r; c < 128; c += 4)
                    *reinterpret_cast<uint32_t*>(to + fragment_column(local, c)) =
                        pack_bf16(o[c / PART][c % PART] * factor, o[c / PART][c % PART + 1] * factor);
            } else {
                if (half == 0 && lane % 4 == 0) p.logs[kept + in_tile] = end.log;
                float* const to = p.sums + (kept + in_tile) * 512 + half * 256;
#pragma unroll
                for (int c = 2 * r; c < 128; c += 4)
                    *reinterpret_cast<float2*>(to + fragment_column(local, c)) =
                        make_float2(o[c / PART][c % PART] * end.factor, o[c / PART][c % PART + 1] * end.factor);
            }
        }
    }
}

// A warp a row: the pieces of a sequence that lies in several parts, in the order of its keys.
__global__ void __launch_bounds__(128) decode_merge_kernel(const DecodeArgs p) {
    const int i = int(blockIdx.y), row = int(blockIdx.x * 4 + threadIdx.x / 32), lane = int(threadIdx.x % 32);
    const int blocks = decode_blocks(p.lens[i], p.keys), start = p.starts[i], stretch = decode_stretch(p.starts[p.b], p.parts);
    const int first = decode_first_part(stretch, start), last = decode_last_part(stretch, start, blocks);
    if (blocks == 0 || first == last || row >= p.rows) return;
    const int64_t tile = int64_t(row / 64) * 2 * p.parts;
    auto kept = [&](int part) { return (tile + decode_slot(part, part < last)) * 64 + row % 64; };
    float top = NOTHING;
    bool broken = false;
    for (int part = first; part <= last; ++part) {
        const float log = p.logs[kept(part)];
        broken = broken || log != log;
        top = fmaxf(top, log);
    }
    const float from = top == NOTHING ? 0.0f : top;
    float total = 0, sums[16] = {};
    for (int part = first; part <= last; ++part) {
        const float weight = exp2_fast((p.logs[kept(part)] - from) * LOG2E);
        total += weight;
        const float4* const of = reinterpret_cast<const float4*>(p.sums + kept(part) * 512) + lane;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float4 v = of[c * 32];
            sums[4 * c] = fmaf(v.x, weight, sums[4 * c]);
            sums[4 * c + 1] = fmaf(v.y, weight, sums[4 * c + 1]);
            sums[4 * c + 2] = fmaf(v.z, weight, sums[4 * c + 2]);
            sums[4 * c + 3] = fmaf(v.w, weight, sums[4 * c + 3]);
        }
    }
    const int head = row % p.h;
    const float log = broken ? NAN : total == 0.0f ? NOTHING : from + log2f(total) * LN2;
    const float factor = total == 0.0f ? 0.0f : sink_factor(p.sink, head, log) / total;
    if (lane == 0) p.lse[(int64_t(i) * p.h + head) * p.queries + row / p.h] = log;
    uint2* const to = reinterpret_cast<uint2*>(p.out + (int64_t(i) * p.rows + row) * 512) + lane;
#pragma unroll
    for (int c = 0; c < 4; ++c)
        to[c * 32] = make_uint2(pack_bf16(sums[4 * c] * factor, sums[4 * c + 1] * factor),
                                pack_bf16(sums[4 * c + 2] * factor, sums[4 * c + 3] * factor));
}

void mla_decode_sm90(const MlaDecode& p, cudaStream_t stream) {
    const int64_t b = p.q.size[0], queries = p.q.size[1], h = p.q.size[2], rows = queries * h;
    if (b == 0 || rows == 0) return;
    const int tiles = decode_row_tiles(rows), parts = decode_parts(units(), tiles);
    int* const ints = p.workspace.as<int>();
    float* const sums = reinterpret_cast<float*>(ints + decode_ints(b, parts));
    const DecodeArgs args = {p.q.as<const uint16_t>(), p.kv_cache.as<const uint8_t>(), p.block_table.as<const int>(),
                             p.seq_lens.as<const int>(), p.sink.as<const float>(), p.out.as<uint16_t>(), p.lse.as<float>(),
                             sums, sums + int64_t(tiles) * 2 * parts * 64 * 512, ints, ints + b + 1, int(b), int(h), int(rows),
                             int(p.kv_cache.size[0]), int(p.kv_cache.size[1]), int(p.block_table.size[1]), parts, tiles,
                             int(queries), decode_keys(p.kv_cache.dtype == Dtype::u8), p.softmax_scale * LOG2E, p.causal};
    launch<decode_plan_kernel>("mla_decode_sm90", {dim3(1), 32}, stream, args);
    const dim3 grid = {unsigned(parts), unsigned(tiles)};
    if (p.kv_cache.dtype == Dtype::u8)
        launch<decode_kernel<true>>("mla_decode_sm90", {grid, 384, DecodeShape<true>::BYTES}, stream, args);
    else launch<decode_kernel<false>>("mla_decode_sm90", {grid, 384, DecodeShape<false>::BYTES}, stream, args);
    launch<decode_merge_kernel>("mla_decode_sm90", {dim3(unsigned(ceil_div(rows, 4)), unsigned(b)), 128}, stream, args);
}

}  // namespace kn::cuda
