// mla_decode on Hopper; times: bench/results/h200.jsonl.
//
// A block holds 64 query rows (tokens by heads of one sequence, packed) and walks tiles of 64 keys, each read once: 64 x 576,
// whose first 512 columns are the values. Of a tile 4.7 MFLOP of Q K and 4.2 of P V, 2200 cycles of the tensor cores, against 74
// KB (42 of an FP8 cache): 3500 cycles of memory where all multiprocessors load (2000). With bf16 keys up to 64 rows, a
// rank's 8 or 16 heads too, wait for memory and pay nothing for the padding; 128 heads wait for tensor cores, and two blocks of a
// cluster copy each half of a tile for both: 17 bytes a cycle from L2 instead of 34, of which it has about 32.
//
// Four warpgroups, which meet at barriers alone: copies; scores and weights; two for 256 columns of the output each, 128
// registers a thread. Scores of the next tile and their softmax run under the values of this one. Shared memory: queries 72 KB, a
// ring of two tiles 144 KB, given back in thirds (each output's values, the rotated part); weights take the place of the rotated
// part. 37 KB and more are on their way to a multiprocessor at any time: 1 us of its share of the bandwidth (sent into L2 two
// tiles ahead they came 5 to 20 % later). Keys that are pages' whole tiles come by tensor map; others by 16-byte copies of each
// thread. FP8: codes become bf16, exactly; the scales multiply the scores, four products a tile, and the weights, in registers.
//
// Up to 32 rows of an FP8 cache: mla_decode_few.cuh. Parts of the work: mla_decode_plan.h. Each block finds its part; blocks
// that share an item wait for each other at the end and join it together.
#include <atomic>
#include <random>

#include "mla_decode.cuh"
#include "mla_decode_few.cuh"

namespace kn::cuda {

static constexpr int PANEL = 64 * 128;      // bytes of 64 rows of 64 bf16
static constexpr int TILE = 9 * PANEL;      // 64 rows of 576
static constexpr int THIRDS = 3;            // of a tile: panels 0-3 and 4-7, a warpgroup's values each, and 8

enum class Cache { paged_tma, paged, fp8 };  // bf16 with 64 keys a copy; bf16 with any page; 656-byte tokens

// Zeros for the values of a key (and its `scales`, a row of MLA_KEYS for each 128 values), if any is infinite or NaN or `always`;
// whether it was so. A warp.
__device__ inline bool clear_odd(unsigned char* tile, float* scales, int key, bool always, int lane) {
    uint4* chunk[2];
    float* const scale = scales && lane < 4 ? scales + lane * MLA_KEYS + key : nullptr;
    bool odd = always || (scale && is_odd(*scale));
    for (int i = 0; i < 2; ++i) {
        const int c = lane + 32 * i;
        chunk[i] = reinterpret_cast<uint4*>(tile + c / 8 * PANEL + key * 128 + ((c % 8 ^ key % 8) << 4));
        if (always) continue;
        const uint32_t word[4] = {chunk[i]->x, chunk[i]->y, chunk[i]->z, chunk[i]->w};
        for (uint32_t w : word) odd |= (w & 0x7f80) == 0x7f80 || (w & 0x7f800000) == 0x7f800000;
    }
    if (!__any_sync(0xffffffff, odd)) return false;
    for (uint4* c : chunk) *c = uint4{0, 0, 0, 0};
    if (scale) *scale = 0;
    return true;
}

// What the outputs' warpgroups are told with the weights of a tile.
struct MlaNote {
    bool stop, begins, ends;  // no more tiles; the segment's first and last one
    bool whole;               // the rows go to the output
    int rows;                 // of these 64 that there are
    int64_t row;              // the first one's place there
};

// All tiles of a part in turn, for a warp that copies; in shared memory, as registers are short.
struct MlaTiles {
    MlaWalk walk;
    MlaSegment s;
    int t, end;        // tiles [t, end) of the segment are left
    int token[2][16];  // of this and the next tile's keys that the warp copies

    __device__ void next(const MlaArgs& a) {
        while (++t >= end) {
            if (!walk.next(a.line, s)) {
                s.seq = -1;
                return;
            }
            t = s.first - 1;
            end = last_tile<1>(a, s);
        }
    }
};

struct MlaShared : MlaSteps {  // the scores' first thread steps, as registers are short
    uint64_t full[2][THIRDS], empty[2][THIRDS], weights[2], queries;  // barriers of a slot's thirds, its weights, and the queries
    float rescale[2][MLA_ROWS], finish[2][MLA_ROWS];                  // factors of the outputs before a tile, and at the end
    float scales[2][4][MLA_KEYS];                                     // of 128 codes of a key
    int odd[2];               // the tile's page is none
    float odd_key[MLA_KEYS];  // NaN: of a key with a value that is none
    MlaNote note[2];
    MlaTiles tiles[4];        // of each warp that copies
};
static constexpr int MLA_SHARED = 1024 + 3 * TILE + int(sizeof(MlaShared));

// Sixteen codes as bf16, which holds them exactly.
__device__ __forceinline__ void widen(const uint4& codes, uint4 (&to)[2]) {
    const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t out[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t pair[2];
        widen_e4m3(word[i], pair[0], pair[1]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float2 v = unpack_f16(pair[k]);
            out[2 * i + k] = pack_bf16(v.x, v.y);
        }
    }
    to[0] = {out[0], out[1], out[2], out[3]};
    to[1] = {out[4], out[5], out[6], out[7]};
}

template <int CLUSTER> __device__ __forceinline__ void free_third(uint64_t* bar, int lane, int rank) {
    if (lane >= CLUSTER) return;
    if (CLUSTER == 1 || lane == rank) barrier_arrive(bar);
    else barrier_arrive_remote(bar, lane);
}

// One warp: tiles by tensor map. Of a cluster each block copies half of the rows to both.
template <int CLUSTER>
__device__ void load_mapped(const MlaArgs& a, const CUtensorMap* map, unsigned char* slots, MlaShared& m, int lane, int rank) {
    constexpr int ROWS = MLA_KEYS / CLUSTER;
    MlaWalk walk = m.start;
    MlaSegment s;
    int j = 0;
    while (walk.next(a.line, s)) {
        const int end = last_tile<CLUSTER>(a, s);
        int pages = 0;
        for (int t = s.first; t < end; ++t, ++j) {
            const int ahead = (t - s.first) % 32, slot = j & 1;
            if (ahead == 0) pages = t + lane < end ? a.table[int64_t(s.seq) * a.n + int64_t(t + lane) * MLA_KEYS / a.page] : 0;
            const int page = __shfl_sync(0xffffffff, pages, ahead);
            if (lane == 0) {
                const bool known = page >= 0 && page < a.p;
                const int row = (known ? page * a.page : 0) + int(int64_t(t) * MLA_KEYS % a.page) + rank * ROWS;
#pragma unroll
                for (int third = 0; third < THIRDS; ++third) {
                    const int first = third * 4, panels = third < 2 ? 4 : 1;
                    barrier_wait(&m.empty[slot][third], (j >> 1 & 1) ^ 1);
                    if (third == 0) m.odd[slot] = !known;
                    barrier_expect(&m.full[slot][third], panels * PANEL);
#pragma unroll
                    for (int i = first; i < first + panels; ++i) {
                        unsigned char* const to = slots + slot * TILE + i * PANEL + rank * ROWS * 128;
                        uint64_t* const full = &m.full[slot][third];
                        if constexpr (CLUSTER > 1) tma_load_multicast(to, map, full, i * 64, row, (1 << CLUSTER) - 1, a.policy);
                        else tma_load(to, map, full, i * 64, row, a.policy);
                    }
                }
            }
            __syncwarp();
        }
    }
}

// Steps a copying warp to its next tile and looks its 16 keys up, a lane each, the place of key 4 warp + r + 16 i as token [4 i +
// r]. Without a next tile: false.
__device__ __forceinline__ bool look_up(const MlaArgs& a, MlaTiles& tiles, int j, int warp, int lane) {
    __syncwarp();
    if (lane == 0) tiles.next(a);
    __syncwarp();
    if (tiles.s.seq < 0) return false;
    if (lane < 16) tiles.token[j & 1][lane] = token_of(a, tiles.s, tiles.t * MLA_KEYS + warp * 4 + lane % 4 + lane / 4 * 16);
    __syncwarp();
    return true;
}

// A warpgroup: 16 bytes a thread and copy, eight threads a row of a panel.
__device__ inline void load_gathered(const MlaArgs& a, unsigned char* slots, MlaShared& m, int warp, int lane) {
    const int row = warp * 4 + lane / 8, chunk = lane % 8;
    MlaTiles& tiles = m.tiles[warp];
    bool more = look_up(a, tiles, 0, warp, lane);
    for (int j = 0; more; ++j) {
        more = look_up(a, tiles, j + 1, warp, lane);
        const int slot = j & 1;
        unsigned char* const to = slots + slot * TILE + row * 128 + ((chunk ^ row % 8) << 4);
        int token[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) token[i] = tiles.token[j & 1][4 * i + lane / 8];
#pragma unroll
        for (int third = 0; third < THIRDS; ++third) {
            barrier_wait(&m.empty[slot][third], (j >> 1 & 1) ^ 1);
#pragma unroll 1
            for (int panel = third * 4; panel < (third < 2 ? third * 4 + 4 : 9); ++panel)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const unsigned char* const key = a.cache + int64_t(token[i]) * 1152 + panel * 128 + chunk * 16;
                    cp_async16(to + panel * PANEL + i * 16 * 128, token[i] < 0 ? nans() : key, token[i] != NO_KEY);
                }
            cp_async_arrive(&m.full[slot][third]);
        }
    }
}

// A warpgroup: 128 codes of each key in turn are widened while the next ones come into registers, from L2, whither they were sent
// a tile before.
__device__ inline void load_fp8(const MlaArgs& a, unsigned char* slots, MlaShared& m, int warp, int lane) {
    // Two rows of four chunks are a quarter of a warp: its 16-byte stores go to 8 different banks of 16 bytes.
    const int r = (lane >> 2 & 1) + (lane >> 4 & 1) * 2, row = warp * 4 + r, chunk = (lane & 3) + (lane >> 3 & 1) * 4;
    // Of the first eight values; the others' differs in the 16.
    const int place = chunk / 4 * PANEL + row * 128 + (((chunk & 3) * 2 ^ row % 8) << 4);
    const unsigned char* const mine = a.cache + chunk * 16;
    MlaTiles& tiles = m.tiles[warp];
    uint4 raw[2][4];  // 16 codes of each row, of this and the next turn
    auto fetch = [&](int j, int g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = tiles.token[j & 1][4 * i + r];
            const uint32_t fill = token == NO_KEY ? 0 : ~0u;
            raw[g % 2][i] = token < 0 ? uint4{fill, fill, fill, fill}
                                      : *reinterpret_cast<const uint4*>(mine + int64_t(token) * 656 + g * 128);
        }
    };
    bool more = look_up(a, tiles, 0, warp, lane);
    if (more) {
        fetch(0, 0);
        fetch(0, 1);
    }
    for (int j = 0; more; ++j) {
        const int slot = j & 1;
        const uint32_t parity = (j >> 1 & 1) ^ 1;
        unsigned char* const to = slots + slot * TILE;
        more = look_up(a, tiles, j + 1, warp, lane);
        barrier_wait(&m.empty[slot][2], parity);
#pragma unroll 2
        for (int i = 0; i < 4; ++i) {
            const int token = tiles.token[j & 1][4 * i + r];
            const unsigned char* const key = mine + int64_t(token) * 656;
            unsigned char* const rotated = to + 8 * PANEL + (row + 16 * i) * 128 + ((chunk ^ row % 8) << 4);
            cp_async16(rotated, token < 0 ? nans() : key + 528, token != NO_KEY);
            float* const scale = &m.scales[slot][chunk % 4][row + 16 * i];
            if (chunk < 4) cp_async4(scale, token < 0 ? nans() : key + 512 - chunk * 12, token != NO_KEY);
        }
        cp_async_arrive(&m.full[slot][2]);
#pragma unroll
        for (int g = 0; g < 4; ++g) {
            if (g % 2 == 0) barrier_wait(&m.empty[slot][g / 2], parity);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint4 wide[2];
                widen(raw[g % 2][i], wide);
                *reinterpret_cast<uint4*>(to + place + 2 * g * PANEL + i * 16 * 128) = wide[0];
                *reinterpret_cast<uint4*>(to + (place ^ 16) + 2 * g * PANEL + i * 16 * 128) = wide[1];
            }
            if (g % 2) {  // before more loads leave, for which the fence would wait
                fence_async();
                __syncwarp();
                if (lane == 0) barrier_arrive(&m.full[slot][g / 2]);
            }
            if (g < 2) fetch(j, g + 2);
            else if (more) fetch(j + 1, g - 2);
            if (g == 0 && more) {
#pragma unroll 1
                for (int i = lane; i < 16 * 6; i += 32) {  // six lines a key
                    const int ahead = tiles.token[(j + 1) & 1][i / 6];
                    if (ahead >= 0) prefetch_l2(a.cache + int64_t(ahead) * 656 + i % 6 * 128);
                }
            }
        }
    }
}

template <Cache CACHE, int CLUSTER>
__global__ void __launch_bounds__(512, 1)
    mla_decode_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap cache_map, const MlaArgs a) {
    KN_SHARED(memory);
    unsigned char* const queries = memory + (-shared_address(memory) & 1023);
    unsigned char* const slots = queries + TILE;
    MlaShared& m = *reinterpret_cast<MlaShared*>(slots + 2 * TILE);

    const int thread = int(threadIdx.x), warp = uniform(thread / 32), lane = thread % 32, role = warp / 4, local = thread % 128;
    const int rank = CLUSTER > 1 ? int(cluster_rank()) : 0, part = int(blockIdx.x) / CLUSTER;
    if (thread == 0) {
        for (int slot = 0; slot < 2; ++slot) {
            for (int third = 0; third < THIRDS; ++third) {
                // Arrivals: of one thread, or of all that copy, or of the warps that widen.
                barrier_init(&m.full[slot][third], CACHE == Cache::paged_tma ? 1 : CACHE == Cache::fp8 && third < 2 ? 4 : 128);
                barrier_init(&m.empty[slot][third], (third < 2 ? 4 : 8) * CLUSTER);
            }
            barrier_init(&m.weights[slot], 4);
        }
        barrier_init(&m.queries, 1);
        barrier_init_fence();
    }
    if (warp == 0) {
        m.begin(a.line, a.parts, part, lane);
        __syncwarp();
        if (lane < 4) m.tiles[lane] = {m.start, {}, 0, 0, {}};
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();  // a block's barriers are there before its neighbour arrives at them

    if (role == 0) {  // copies keys
        registers_less<CACHE == Cache::fp8 ? 72 : 96>();
        if constexpr (CACHE == Cache::fp8) load_fp8(a, slots, m, warp, lane);
        else if constexpr (CACHE == Cache::paged) load_gathered(a, slots, m, warp, lane);
        else if (warp == 0) load_mapped<CLUSTER>(a, &cache_map, slots, m, lane, rank);
    } else if (role == 1) {  // scores and weights
        registers_less<CACHE == Cache::fp8 ? 104 : 96>();
        auto load_queries = [&](int turn) {
            const MlaSegment& s = m.segment[turn & 1];
            if (local || s.seq < 0) return;
            barrier_expect(&m.queries, TILE);
            for (int i = 0; i < 9; ++i)
                tma_load(queries + i * PANEL, &q_map, &m.queries, i * 64, s.seq * a.rows + (s.group * CLUSTER + rank) * MLA_ROWS);
        };
        const uint32_t queries_at = shared_address(queries);
        load_queries(0);
        int j = 0;
        for (int turn = 0; m.segment[turn & 1].seq >= 0; ++turn) {
            const MlaSegment& s = m.segment[turn & 1];
            if (local == 0) m.step(a.line, turn + 1);
            const int end = last_tile<CLUSTER>(a, s), row0 = (s.group * CLUSTER + rank) * MLA_ROWS;
            const int fewest = a.seen(s.length, row0);
            float top[2] = {MINUS_INF, MINUS_INF}, sum[2] = {0, 0};
            barrier_wait(&m.queries, turn & 1);
            if (s.first >= end) {
                part_sync(1, 128);  // all have seen these queries
                load_queries(turn + 1);
                if (s.whole())
                    for (int i = local; i < min(MLA_ROWS, a.rows - row0) * 64; i += 128)
                        reinterpret_cast<uint4*>(a.out + (int64_t(s.seq) * a.rows + row0) * 512)[i] = uint4{0, 0, 0, 0};
            }
            for (int t = s.first; t < end; ++t, ++j) {
                const int slot = j & 1;
                unsigned char* const tile = slots + slot * TILE;
                // Anew for each tile: kept, the descriptors of all products would fill the registers.
                const uint64_t q = descriptor(uniform(queries_at), 1024), k = descriptor_at(q, uint32_t(TILE + slot * TILE));
                auto arrived = [&](int third) {
                    barrier_wait(&m.full[slot][third], j >> 1 & 1);
                    if (CACHE != Cache::paged_tma) fence_async();  // threads wrote it, tensor cores read it
                };
                auto multiply = [&](float (&to)[32], int panel, int panels, bool add) {
#pragma unroll
                    for (int i = 0; i < panels * 4; ++i) {
                        const uint32_t at = uint32_t((panel + i / 4) * PANEL + i % 4 * 32);
                        wgmma_bf16<64>(to, descriptor_at(q, at), descriptor_at(k, at), add || i > 0);
                    }
                };
                float d[32];
                hold(d);
                if constexpr (CACHE == Cache::fp8) {
                    arrived(2);
                    wgmma_fence();
                    multiply(d, 8, 1, false);
                    wgmma_commit();
                    wgmma_wait<0>();
                    hold(d);
#pragma unroll 1
                    for (int g = 0; g < 4; ++g) {
                        if (g % 2 == 0) arrived(g / 2);
                        float codes[32];
                        hold(codes);
                        wgmma_fence();
                        multiply(codes, 2 * g, 2, false);
                        wgmma_commit();
                        wgmma_wait<0>();
                        hold(codes);
#pragma unroll
                        for (int i = 0; i < 32; i += 4) {
                            const float2 by = *reinterpret_cast<const float2*>(&m.scales[slot][g][fragment_column(local, i)]);
#pragma unroll
                            for (int r = 0; r < 4; ++r) d[i + r] = fmaf(codes[i + r], r % 2 ? by.y : by.x, d[i + r]);
                        }
                    }
                } else {
#pragma unroll
                    for (int third = 0; third < THIRDS; ++third) {
                        arrived(third);
                        wgmma_fence();
                        multiply(d, third * 4, third < 2 ? 4 : 1, third > 0);
                    }
                    wgmma_commit();
                    wgmma_wait<0>();
                    hold(d);
                }
#pragma unroll
                for (int i = 0; i < 32; ++i) d[i] *= a.factor;
                part_sync(1, 128);  // all warps have read the queries and the tile's last panel
                if (t + 1 == end) load_queries(turn + 1);

                const int base = t * MLA_KEYS;
                if (CACHE == Cache::paged_tma && m.odd[slot]) {
#pragma unroll
                    for (int i = 0; i < 32; ++i) d[i] = __int_as_float(0x7fffffff);
                }
                // A weight of 0 does not hide a value of NaN: zeros beyond the sequence, and in odd keys that a row does not see.
                // The rows that see such a key are NaN.
#pragma unroll 1
                for (int key = max(fewest - base, 0) + warp % 4; key < MLA_KEYS; key += 4)
                    if (CACHE == Cache::paged_tma || base + key < s.length) {
                        float* const scales = CACHE == Cache::fp8 ? m.scales[slot][0] : nullptr;
                        const bool odd = clear_odd(tile, scales, key, base + key >= s.length, lane);
                        if (lane == 0) m.odd_key[key] = odd ? __int_as_float(0x7fffffff) : 0.0f;
                    }
                if (fewest < s.length && base + MLA_KEYS > fewest) {
                    part_sync(1, 128);
#pragma unroll
                    for (int i = 0; i < 32; ++i) {
                        const int key = fragment_column(local, i);
                        if (base + key >= fewest && base + key < s.length) d[i] += m.odd_key[key];
                    }
                }
                if (base + MLA_KEYS > fewest) {
                    const int limit[2] = {a.seen(s.length, row0 + fragment_row(local, 0)),
                                          a.seen(s.length, row0 + fragment_row(local, 2))};
#pragma unroll
                    for (int i = 0; i < 32; ++i)
                        if (base + fragment_column(local, i) >= limit[i >> 1 & 1]) d[i] = MINUS_INF;
                }
                float rescale[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float most = MINUS_INF;
#pragma unroll
                    for (int i = 0; i < 32; i += 4) most = fmaxf(most, fmaxf(d[i + 2 * r], d[i + 2 * r + 1]));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
                    // The maximum follows the scores only where they pass it by 8: weights up to 256 are as exact, and outputs
                    // keep their factor.
                    const float old = top[r];
                    if (most > old + 8) top[r] = most;
                    const float shift = top[r] == MINUS_INF ? 0 : top[r];
                    rescale[r] = old == top[r] ? 1 : exp2_fast(old - shift);
                    sum[r] *= rescale[r];
#pragma unroll
                    for (int i = 0; i < 32; i += 4)
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            const float p = exp2_fast(d[i + 2 * r + c] - shift);
                            sum[r] += p;
                            d[i + 2 * r + c] = p;
                        }
                }
                // Weights take the place of the keys' last panel, which is read.
                unsigned char* const weights = tile + 8 * PANEL;
                const int my_row = warp % 4 * 16 + lane % 16;
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    uint32_t v[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float low = d[c * 8 + 2 * i], high = d[c * 8 + 2 * i + 1];
                        // Each scale of FP8 gives weights of its own, in bf16; f16 rounds 8 times finer than those.
                        v[i] = CACHE == Cache::fp8 ? pack_f16(low, high) : pack_bf16(low, high);
                    }
                    if (CACHE == Cache::fp8) reinterpret_cast<uint4*>(weights)[c * 128 + local] = uint4{v[0], v[1], v[2], v[3]};
                    else stmatrix4(weights + my_row * 128 + ((c * 2 + lane / 16) ^ my_row % 8) * 16, v);
                }
                if (lane % 4 == 0)
                    for (int r = 0; r < 2; ++r) m.rescale[slot][fragment_row(local, 2 * r)] = rescale[r];
                if (t + 1 == end) {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 1);
                        sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 2);
                        const int row = fragment_row(local, 2 * r);
                        if (s.whole() && lane % 4 == 0)
                            m.finish[slot][row] = finish_of(a, (row0 + row) % a.h, sum[r], top[r] + log2f(sum[r]));
                    }
                }
                if (local == 0)
                    m.note[slot] = {false, t == s.first, t + 1 == end, s.whole(), a.rows - row0,
                                    s.whole() ? int64_t(s.seq) * a.rows + row0
                                              : mla_slot(part, s.begins) * a.slot_rows + rank * MLA_ROWS};
                fence_async();
                __syncwarp();
                if (lane == 0) barrier_arrive(&m.weights[slot]);
            }
            if (lane % 4 == 0)
                for (int r = 0; r < 2; ++r) {
                    const int row = row0 + fragment_row(local, 2 * r);
                    if (row >= a.rows) continue;
                    if (s.whole())
                        a.lse[(int64_t(s.seq) * a.h + row % a.h) * a.nq + row / a.h] =
                            sum[r] == 0 ? MINUS_INF : (top[r] + log2f(sum[r])) * LN2;
                    else
                        a.totals[mla_slot(part, s.begins) * a.slot_rows + row - s.group * CLUSTER * MLA_ROWS] = {top[r], sum[r]};
                }
            if (local == 0) mla_note(m.cuts, s);
            part_sync(1, 128);  // all are done with this segment, and see the next
        }
        barrier_wait(&m.empty[j & 1][2], (j >> 1 & 1) ^ 1);
        if (local == 0) m.note[j & 1].stop = true;
        __syncwarp();
        if (lane == 0) barrier_arrive(&m.weights[j & 1]);
    } else {  // outputs: 256 columns each
        registers_more<CACHE == Cache::fp8 ? 168 : 160>();
        const int half = role - 2;
        const uint32_t slots_at = uniform(shared_address(slots));
        const uint64_t bf16_weights = descriptor(slots_at + 8 * PANEL, 1024);
        const uint64_t values = descriptor(slots_at + uint32_t(half * 4 * PANEL), 1024, PANEL);
        float o[2][64];  // 128 columns an instruction: of 512 threads none may name 128 registers in one
        for (int j = 0;; ++j) {
            const int slot = j & 1;
            const uint32_t tile = uint32_t(slot * TILE);
            barrier_wait(&m.weights[slot], j >> 1 & 1);
            if (m.note[slot].stop) break;
            if (CACHE != Cache::paged_tma) fence_async();
            const bool begins = m.note[slot].begins;
            const float by[2] = {m.rescale[slot][fragment_row(local, 0)], m.rescale[slot][fragment_row(local, 2)]};
            if (!begins && __any_sync(0xffffffff, by[0] != 1 || by[1] != 1)) {
#pragma unroll
                for (int i = 0; i < 64; ++i) o[0][i] *= by[i >> 1 & 1], o[1][i] *= by[i >> 1 & 1];
            }
            hold(o[0]);
            hold(o[1]);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const uint32_t at = tile + uint32_t(c * 2 * PANEL);
                if constexpr (CACHE == Cache::fp8) {
                    const uint4* const weights = reinterpret_cast<const uint4*>(slots + slot * TILE + 8 * PANEL) + local;
                    const float* const scales = m.scales[slot][half * 2 + c];
#pragma unroll
                    for (int first = 0; first < 4; first += 2) {
                        uint32_t w[2][4];
#pragma unroll
                        for (int step = 0; step < 2; ++step) {
                            const uint4 p = weights[(first + step) * 128];
                            const uint32_t both[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                const int key = (first + step) * 16 + fragment_column(local, i / 2 * 4);
                                const float2 by = *reinterpret_cast<const float2*>(scales + key);
                                const float2 v = unpack_f16(both[i]);
                                w[step][i] = pack_bf16(v.x * by.x, v.y * by.y);
                            }
                        }
                        hold(w[0]), hold(w[1]);
                        wgmma_fence();
#pragma unroll
                        for (int step = 0; step < 2; ++step)
                            wgmma_bf16<128, true>(o[c], w[step],
                                                  descriptor_at(values, at + uint32_t((first + step) * 2048)),
                                                  !begins || first + step > 0);
                        wgmma_commit();
                        wgmma_wait<0>();  // registers are short: those of the weights serve again
                    }
                } else {
                    wgmma_fence();
#pragma unroll
                    for (int step = 0; step < 4; ++step)
                        wgmma_bf16<128, true>(o[c], descriptor_at(bf16_weights, tile + uint32_t(step * 32)),
                                              descriptor_at(values, at + uint32_t(step * 2048)), !begins || step > 0);
                }
            }
            if (CACHE != Cache::fp8) wgmma_commit();
            wgmma_wait<0>();
            hold(o[0]);
            hold(o[1]);
            const MlaNote note = m.note[slot];
            const float finish[2] = {m.finish[slot][fragment_row(local, 0)], m.finish[slot][fragment_row(local, 2)]};
            __syncwarp();
            free_third<CLUSTER>(&m.empty[slot][half], lane, rank);
            free_third<CLUSTER>(&m.empty[slot][2], lane, rank);
            if (note.ends) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = fragment_row(local, 2 * r);
                    if (row >= note.rows) continue;
                    const int64_t at = (note.row + row) * 512 + half * 256 + fragment_column(local, 0);
                    if (note.whole) {
#pragma unroll
                        for (int i = 2 * r; i < 128; i += 4)
                            *reinterpret_cast<uint32_t*>(a.out + at + i / 4 * 8) =
                                pack_bf16(o[i / 64][i % 64] * finish[r], o[i / 64][i % 64 + 1] * finish[r]);
                    } else {
#pragma unroll
                        for (int i = 2 * r; i < 128; i += 4)
                            *reinterpret_cast<float2*>(a.partial + at + i / 4 * 8) = {o[i / 64][i % 64], o[i / 64][i % 64 + 1]};
                    }
                }
            }
        }
        // The memory of the tiles is free: none is on its way, and all are read.
        mla_end(a, m.start, m.cuts, CLUSTER * MLA_ROWS, rank, CLUSTER, slots, thread - 256);
    }
    if (CLUSTER > 1) cluster_sync();  // none ends while another may copy to it or arrive at its barriers
}

static CUtensorMap bf16_rows(const void* base, int64_t rows, int box) {
    const uint64_t dims[2] = {576, uint64_t(rows)}, strides[1] = {1152};
    const uint32_t boxes[2] = {64, uint32_t(box)};
    return tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, 2, dims, strides, boxes, CU_TENSOR_MAP_SWIZZLE_128B);
}

// The arguments that depend on the rows of a group, and the grid.
static Grid prepare(MlaArgs& a, int64_t most, int group_rows, int threads, size_t shared, int cluster) {
    a.line.groups = int(ceil_div(a.rows, group_rows));
    a.parts = int(max64(most / cluster, 1));
    a.slot_rows = int(min64(a.rows, group_rows));
    a.counts = reinterpret_cast<uint64_t*>(a.partial);
    a.partial = reinterpret_cast<float*>(a.counts + 2 * a.parts);
    a.totals = reinterpret_cast<float2*>(a.partial + int64_t(a.parts) * 2 * a.slot_rows * 512);
    static std::atomic<uint64_t> launches{std::random_device{}()};
    a.launch = ++launches & 0xffffffffff;
    return {dim3(unsigned(a.parts * cluster)), threads, shared, cluster, a.parts > 1};
}

template <Cache CACHE, int CLUSTER> static void run(MlaArgs& a, int64_t most, const void* q, cudaStream_t stream) {
    const Grid grid = prepare(a, most, MLA_ROWS * CLUSTER, 512, MLA_SHARED, CLUSTER);
    a.policy = a.line.groups == 1 ? EVICT_FIRST : EVICT_NORMAL;
    const CUtensorMap queries = bf16_rows(q, int64_t(a.line.b) * a.rows, MLA_ROWS);
    CUtensorMap keys = {};
    if (CACHE == Cache::paged_tma) keys = bf16_rows(a.cache, int64_t(a.p) * a.page, MLA_KEYS / CLUSTER);
    launch<mla_decode_kernel<CACHE, CLUSTER>>("mla_decode_sm90", grid, stream, queries, keys, a);
}

template <int N> static void run_few(MlaArgs& a, int64_t most, const void* q, cudaStream_t stream) {
    const Grid grid = prepare(a, most, N, 384, Few<N>::SHARED, 1);
    const auto* const queries = static_cast<const uint16_t*>(q);
    const int64_t tokens = int64_t(a.p) * a.page;
    if (a.page % MLA_KEYS || tokens == 0) {
        launch<mla_decode_few_kernel<N, false>>("mla_decode_sm90", grid, stream, queries, CUtensorMap{}, CUtensorMap{}, a);
        return;
    }
    const uint64_t dims[2] = {656, uint64_t(tokens)}, strides[1] = {656};
    const uint32_t codes[2] = {128, MLA_KEYS}, scales[2] = {16, MLA_KEYS};
    auto map = [&](const uint32_t* box, CUtensorMapSwizzle swizzle) {
        return tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, a.cache, 2, dims, strides, box, swizzle);
    };
    launch<mla_decode_few_kernel<N, true>>("mla_decode_sm90", grid, stream, queries, map(codes, CU_TENSOR_MAP_SWIZZLE_128B),
                                           map(scales, CU_TENSOR_MAP_SWIZZLE_NONE), a);
}

#ifdef KN_ON_CPU
static __global__ void mla_ways_kernel(const MlaLine line, int parts, MlaWalk* to) {
    const MlaWalk walk = mla_start(line, parts, int(blockIdx.x), int(threadIdx.x));
    if (threadIdx.x == 0) to[blockIdx.x] = walk;
}
std::vector<MlaWalk> mla_ways(const MlaLine& line, int parts) {
    std::vector<MlaWalk> all(static_cast<size_t>(parts));
    launch<mla_ways_kernel>("mla_ways", Grid{dim3(unsigned(parts)), 32}, nullptr, line, parts, all.data());
    return all;
}
#endif

void mla_decode_sm90(const MlaDecode& p, cudaStream_t stream) {
    const int64_t b = p.q.size[0], nq = p.q.size[1], h = p.q.size[2], rows = nq * h;
    const int64_t page = p.kv_cache.size[1], n = p.block_table.size[1];
    if (b * rows == 0) return;
    MlaArgs a = {};
    a.cache = p.kv_cache.as<const unsigned char>();
    a.table = p.block_table.as<const int>();
    a.line = {p.seq_lens.as<const int>(), int(b), 1, n * page};
    a.sink = p.sink.as<const float>();
    a.out = p.out.as<uint16_t>();
    a.lse = p.lse.as<float>();
    a.partial = p.workspace.as<float>();
    a.nq = int(nq), a.h = int(h), a.rows = int(rows), a.p = int(p.kv_cache.size[0]), a.page = int(max64(page, 1)), a.n = int(n);
    a.factor = p.softmax_scale * LOG2E;
    a.causal = p.causal;
    const int64_t blocks = mla_blocks(units(), b, rows, n * page);
    const bool fp8 = p.kv_cache.dtype == Dtype::u8;
    if (fp8 && rows <= 16) run_few<16>(a, blocks, p.q.data, stream);
    else if (fp8 && rows <= 32) run_few<32>(a, blocks, p.q.data, stream);
    else if (fp8) run<Cache::fp8, 1>(a, blocks, p.q.data, stream);
    else if (page % MLA_KEYS || a.p * page == 0) run<Cache::paged, 1>(a, blocks, p.q.data, stream);
    else if (ceil_div(rows, MLA_ROWS) % 2) run<Cache::paged_tma, 1>(a, blocks, p.q.data, stream);
    else run<Cache::paged_tma, 2>(a, blocks, p.q.data, stream);
}

}  // namespace kn::cuda
