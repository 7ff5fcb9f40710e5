// mla_decode on Hopper for up to 32 query rows and an FP8 cache, where operands are swapped: 64 keys are the rows of a product,
// the query rows its 16 or 32 columns. Times: bench/results/h200.jsonl.
//
// A tile of 64 keys comes as 41 KB, 2000 cycles of memory where all multiprocessors load. Padded to 64 rows the tensor cores need
// 2200 for it, beside its widening in shared memory; here the products take 280 cycles (16 rows) or 550, and codes are widened in
// registers, where wgmma takes its first operand: by the count of instructions a quarter issues 1400 (16 rows) or 1900 in 2000
// cycles.
//
// Three warpgroups: one copies, by tensor map or 16 bytes a thread and time, into a ring of four tiles; two take a step of two
// tiles together: scores of a tile each (keys x rows), the maxima of rows through shared memory, weights of all 128 keys to
// shared memory, then the values of 256 columns each (columns x rows). Four tiles are 164 KB, half of them on their way.
//
// Scores: codes are f16, exactly; so are the queries, each row times a power of two that makes its largest 2^14 to 2^15 (bf16
// values below 2^-29 of it lose bits, 2^-40 of it at most). k runs in another order than in the cache, so that a lane's 16 codes
// are its operands of four products; queries lie in that order. Values: pairs of codes come transposed (ldmatrix), two keys of
// two columns. Weights times scales are f16 too, in a unit that follows the largest scale of 128 keys: what widening to bf16
// would need more, a third of all instructions, goes. A weight below 2^-25 counts as 0 beside it.
#pragma once
#include "mla_decode.cuh"

namespace kn::cuda {

template <int N> struct Few {  // bytes of shared memory; N query rows
    static constexpr int STEPS = 4;                              // slots of the ring
    static constexpr int ROTATED = 4 * 8192, SCALES = 5 * 8192;  // in a slot, behind 4 panels of 128 codes of each key
    static constexpr int SLOT = SCALES + 1024;
    static constexpr int PANEL = N * 128;  // 64 values of each query row, or its weights of 64 keys
    static constexpr int QUERIES = 9 * PANEL;
    static constexpr int INSIDE = 8192 / PANEL < 4 ? 8192 / PANEL : 4;  // panels of weights that take a tile's rotated part
    static constexpr int OUTSIDE = (4 - INSIDE) * PANEL;                // of each of two tiles

    struct State : MlaSteps {
        uint64_t full[STEPS], empty[STEPS];
        int odd[STEPS];  // the tile's page is none
        float most[8][N], sums[8][N];  // of each warp
        alignas(16) uint32_t exponents[8][4];  // of each warp's scales of 128 columns: the largest, above it 255 less the smallest
        float factor[N];               // of a row's scores, to base 2
    };
    static constexpr int SHARED = 1024 + QUERIES + STEPS * SLOT + 2 * OUTSIDE + int(sizeof(State));
    static_assert(SHARED <= 227 << 10 && SLOT % 1024 == 0);
};

// The key that is a row of scores: under the 128-byte swizzle four chunks of a row and of the next then lie in different banks.
__device__ __forceinline__ int few_key(int row) { return (row & ~7) | (row & 1) << 2 | (row >> 1 & 3); }

// One warp: tiles by tensor map, the scales by one of their own.
template <int N>
__device__ void few_load_mapped(const MlaArgs& a, const CUtensorMap* map, const CUtensorMap* scales, unsigned char* slots,
                                typename Few<N>::State& m, int lane) {
    using F = Few<N>;
    MlaWalk walk = m.start;
    MlaSegment s;
    int j = 0;
    while (walk.next(a.line, s)) {
        const int end = last_tile<1>(a, s);
        int pages = 0;
        for (int t = s.first; t < end; ++t, ++j) {
            const int ahead = (t - s.first) % 32, slot = j % F::STEPS;
            if (ahead == 0) pages = t + lane < end ? a.table[int64_t(s.seq) * a.n + int64_t(t + lane) * MLA_KEYS / a.page] : 0;
            const int page = __shfl_sync(0xffffffff, pages, ahead);
            if (lane == 0) {
                const bool known = page >= 0 && page < a.p;
                const int row = (known ? page * a.page : 0) + int(int64_t(t) * MLA_KEYS % a.page);
                unsigned char* const to = slots + slot * F::SLOT;
                barrier_wait(&m.empty[slot], (j / F::STEPS & 1) ^ 1);
                m.odd[slot] = !known;
                barrier_expect(&m.full[slot], F::SLOT);
                for (int i = 0; i < 4; ++i) tma_load(to + i * 8192, map, &m.full[slot], i * 128, row, EVICT_FIRST);
                tma_load(to + F::ROTATED, map, &m.full[slot], 528, row, EVICT_FIRST);
                tma_load(to + F::SCALES, scales, &m.full[slot], 512, row, EVICT_FIRST);
            }
            __syncwarp();
        }
    }
}

// A warpgroup: each warp 16 keys of every tile.
template <int N> __device__ void few_load(const MlaArgs& a, unsigned char* slots, typename Few<N>::State& m, int warp, int lane) {
    using F = Few<N>;
    MlaWalk walk = m.start;
    MlaSegment s;
    int t = 0, end = 0;
    auto step = [&] {
        while (++t >= end) {
            if (!walk.next(a.line, s)) return false;
            t = s.first - 1;
            end = last_tile<1>(a, s);
        }
        return true;
    };
    auto look_up = [&] { return token_of(a, s, t * MLA_KEYS + warp * 16 + lane % 16); };
    bool more = step();
    int next = more ? look_up() : NO_KEY, j = 0;
    for (; more; ++j) {
        const int token = next, slot = j % F::STEPS;
        if ((more = step())) next = look_up();  // under the copies of this tile
        unsigned char* const to = slots + slot * F::SLOT;
        barrier_wait(&m.empty[slot], (j / F::STEPS & 1) ^ 1);
        auto copy = [&](int key, int chunk, int panel, int from) {
            const int at = __shfl_sync(0xffffffff, token, key), row = warp * 16 + key;
            cp_async16(to + panel + row * 128 + (chunk ^ row % 8) * 16, at < 0 ? nans() : a.cache + int64_t(at) * 656 + from,
                       at != NO_KEY);
        };
#pragma unroll 4
        for (int key = 0; key < 16; ++key) copy(key, lane % 8, lane / 8 * 8192, lane * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) copy(i * 4 + lane / 8, lane % 8, F::ROTATED, 528 + lane % 8 * 16);
        if (lane < 16)
            cp_async16(to + F::SCALES + (warp * 16 + lane) * 16, token < 0 ? nans() : a.cache + int64_t(token) * 656 + 512,
                       token != NO_KEY);
        cp_async_arrive(&m.full[slot]);
    }
    if (j > 0) barrier_wait(&m.empty[(j - 1) % F::STEPS], (j - 1) / F::STEPS & 1);  // no thread ends before its copies
}

// A query row to shared memory, in the order in which the keys' lanes hold k; a warp. Without one: zeros.
template <int N>
__device__ void few_query(float factor_of_all, const uint16_t* q, unsigned char* queries, float* factor, int row, bool there,
                          int lane) {
    const uint4 none = {0, 0, 0, 0}, *const from = reinterpret_cast<const uint4*>(q);
    const uint4 low = there ? from[lane * 2] : none, high = there ? from[lane * 2 + 1] : none;
    const uint32_t rotated = there ? reinterpret_cast<const uint32_t*>(q)[256 + lane] : 0;
    const uint32_t pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};  // columns 16 lane and on
    int most = int(max(rotated & 0x7fff, rotated >> 16 & 0x7fff));
#pragma unroll
    for (uint32_t w : pairs) most = max(most, int(max(w & 0x7fff, w >> 16 & 0x7fff)));
    const int exponent = __reduce_max_sync(0xffffffff, most) >> 7;  // biased, of the largest; 255: infinite or NaN
    const int up = exponent == 255 ? 0 : min(141 - exponent, 120);
    const float by = __int_as_float((127 + up) << 23);
    if (lane == 0) *factor = factor_of_all * __int_as_float((127 - up) << 23);
    auto value = [](uint32_t half) { return __uint_as_float(half << 16); };
    unsigned char* const line = queries + row * 128;
    // Of 64 columns a lane of keys holds 16, four for each of four products: two of the first eight k, two of the others.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t w = pairs[i];
        unsigned char* const to = line + lane / 4 * Few<N>::PANEL + (i ^ row % 8) * 16 + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(to) = pack_f16(value(w & 0xffff) * by, value(w >> 16) * by);
    }
    // Of 32 rotated columns it holds 8, four for each of two products.
    const int chunk = lane / 16 * 4 + lane % 4;
    *reinterpret_cast<uint32_t*>(line + 8 * Few<N>::PANEL + (chunk ^ row % 8) * 16 + lane / 4 % 4 * 4) =
        pack_bf16(value(rotated & 0xffff) * by, value(rotated >> 16) * by);
}

// Scores of a tile, keys x rows, of a warpgroup; by[r]: the scales of this thread's keys.
template <int N>
__device__ __forceinline__ void few_scores(float (&d)[N / 2], const unsigned char* tile, uint64_t q, const float4 (&by)[2],
                                           int local) {
    using F = Few<N>;
    uint4 line[2];  // of this thread's two keys
    auto read = [&](int panel, int block) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = few_key(fragment_row(local, 2 * r)), chunk = (block * 4 + local % 4) ^ key % 8;
            line[r] = *reinterpret_cast<const uint4*>(tile + panel + key * 128 + chunk * 16);
        }
    };
    auto word = [&](int r, int i) { return i == 0 ? line[r].x : i == 1 ? line[r].y : i == 2 ? line[r].z : line[r].w; };
    uint32_t w[2][2][4];  // of two products, and of the two before
    float codes[2][N / 2];
    hold(d);
    auto add = [&](int g) {
        hold(codes[g % 2]);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float4& f = by[i >> 1 & 1];
            d[i] = fmaf(codes[g % 2][i], g == 0 ? f.x : g == 1 ? f.y : g == 2 ? f.z : f.w, d[i]);
        }
    };
#pragma unroll
    for (int n = 0; n < 18; ++n) {  // 32 columns of each key; the rotated ones first
        const int g = (n - 2) / 4;
        if (n < 2) read(F::ROTATED, n);
        else if (n % 2 == 0) read(g * 8192, (n - 2) / 2 % 2);
        if (n > 1) wgmma_wait<1>();  // these registers' last products are done
        if (n == 6) hold(d);
        if (n > 2 && n % 4 == 3 && g > 0) add(g - 1);
        if (n >= 2 && n % 4 == 2) hold(codes[g % 2]);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                uint32_t(&to)[4] = w[n % 2][step];
                if (n < 2) to[r] = word(r, step * 2), to[r + 2] = word(r, step * 2 + 1);
                else widen_e4m3(word(r, n % 2 * 2 + step), to[r], to[r + 2]);
            }
        hold(w[n % 2][0]), hold(w[n % 2][1]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const uint64_t at = descriptor_at(q, uint32_t((n < 2 ? 8 : (n - 2) / 2) * F::PANEL + (n % 2 * 2 + step) * 32));
            if (n < 2) wgmma_bf16<N>(d, w[n % 2][step], at, n > 0 || step > 0);
            else wgmma_f16<N>(codes[g % 2], w[n % 2][step], at, n % 4 != 2 || step > 0);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
    add(3);
}

// MAPPED: 64 keys lie in a page.
template <int N, bool MAPPED>
__global__ void __launch_bounds__(384, 1)
    mla_decode_few_kernel(const uint16_t* q, const __grid_constant__ CUtensorMap cache_map,
                          const __grid_constant__ CUtensorMap scales_map, const MlaArgs a) {
    using F = Few<N>;
    constexpr int OWN = N / 4;  // rows of a thread: 8 j + 2 (lane % 4) and the next
    KN_SHARED(memory);
    unsigned char* const queries = memory + (-shared_address(memory) & 1023);
    unsigned char* const slots = queries + F::QUERIES;
    unsigned char* const outside = slots + F::STEPS * F::SLOT;
    auto& m = *reinterpret_cast<typename F::State*>(outside + 2 * F::OUTSIDE);

    const int thread = int(threadIdx.x), warp = uniform(thread / 32), lane = thread % 32, part = int(blockIdx.x);
    if (thread == 0) {
        for (int slot = 0; slot < F::STEPS; ++slot) {
            barrier_init(&m.full[slot], MAPPED ? 1 : 128);
            barrier_init(&m.empty[slot], 8);
        }
        barrier_init_fence();
    }
    if (warp == 0) m.begin(a.line, a.parts, part, lane);
    __syncthreads();
    if (warp < 4) {
        registers_less<72>();
        if (!MAPPED) few_load<N>(a, slots, m, warp, lane);
        else if (warp == 0) few_load_mapped<N>(a, &cache_map, &scales_map, slots, m, lane);
        return;
    }
    registers_more<216>();
    const int local = thread % 128, half = warp / 4 - 1, mine = warp - 4;  // of its warpgroup's threads; which one; of 8 warps
    int j = 0;
    for (int turn = 0; m.segment[turn & 1].seq >= 0; ++turn) {
        const MlaSegment& s = m.segment[turn & 1];
        for (int row = mine; row < N; row += 8)
            few_query<N>(a.factor, q + (int64_t(s.seq) * a.rows + row) * 576, queries, &m.factor[row], row, row < a.rows, lane);
        fence_async();
        part_sync(1, 256);
        if (thread == 128) {
            m.step(a.line, turn + 1);
            mla_note(m.cuts, s);
        }
        const int end = last_tile<1>(a, s), fewest = a.seen(s.length, 0);
        float top[OWN], sum[OWN], o[4][N / 2];
        int highest[4] = {1, 1, 1, 1}, used[2];  // units of outputs: the highest ones so far; those of this warpgroup's columns
#pragma unroll
        for (int c = 0; c < OWN; ++c) top[c] = MINUS_INF, sum[c] = 0;
        for (int t = s.first; t < end; t += 2) {
            const int tiles = min(end - t, 2);  // of this step
            auto slot_of = [&](int which) { return slots + (j + which) % F::STEPS * F::SLOT; };
            auto weights = [&](int which, int g) {  // of 64 keys, times the scales of 128 columns
                return g < F::INSIDE ? slot_of(which) + F::ROTATED + g * F::PANEL
                                     : outside + which * F::OUTSIDE + (g - F::INSIDE) * F::PANEL;
            };
            unsigned char* const tile = slot_of(half);
            float d[N / 2];
            float4 by[2];
            if (half < tiles) {
                barrier_wait(&m.full[(j + half) % F::STEPS], (j + half) / F::STEPS & 1);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    by[r] = *reinterpret_cast<const float4*>(tile + F::SCALES + few_key(fragment_row(local, 2 * r)) * 16);
                few_scores<N>(d, tile, descriptor(shared_address(queries), 1024), by, local);
#pragma unroll
                for (int i = 0; i < N / 2; i += 4) {
                    const float2 f = *reinterpret_cast<const float2*>(&m.factor[fragment_column(local, i)]);
#pragma unroll
                    for (int c = 0; c < 4; ++c) d[i + c] *= c % 2 ? f.y : f.x;
                }
                if (MAPPED && m.odd[(j + half) % F::STEPS]) {
#pragma unroll
                    for (float& v : d) v = __int_as_float(0x7fffffff);
                }
                const int base = (t + half) * MLA_KEYS;
                if (base + MLA_KEYS > fewest) {
                    // A weight of 0 does not hide a value of NaN: zeros beyond the sequence, and in odd keys that a row does not
                    // see. The rows that see such a key are NaN.
                    const int mine = base + warp % 4 * 16, last = MAPPED ? 16 : min(s.length - mine, 16);
#pragma unroll 1
                    for (int key = max(fewest - mine, 0); key < last; ++key) {
                        const int row = warp % 4 * 16 + key;
                        unsigned char* const line = tile + lane / 8 * 8192 + row * 128;
                        uint4* const chunk = reinterpret_cast<uint4*>(line + (lane % 8 ^ row % 8) * 16);
                        const uint32_t word[4] = {chunk->x, chunk->y, chunk->z, chunk->w};
                        bool odd = lane < 4 && is_odd(reinterpret_cast<const float*>(tile + F::SCALES + row * 16)[lane]);
                        for (uint32_t w : word) odd |= (((w & 0x7f7f7f7f) + 0x01010101) & 0x80808080) != 0;
                        if (mine + key < s.length && !__any_sync(0xffffffff, odd)) continue;
                        *chunk = uint4{0, 0, 0, 0};
#pragma unroll
                        for (int r = 0; r < 2; ++r)
                            if (few_key(lane / 4 + 8 * r) == key) {
                                by[r] = float4{0, 0, 0, 0};
#pragma unroll
                                for (int i = 0; i < N / 2; ++i)
                                    if (i / 2 % 2 == r) d[i] = __int_as_float(0x7fffffff);
                            }
                    }
#pragma unroll
                    for (int i = 0; i < N / 2; ++i) {
                        const int key = base + few_key(fragment_row(local, i));
                        if (key >= a.seen(s.length, fragment_column(local, i))) d[i] = MINUS_INF;
                    }
                }
            } else {
#pragma unroll
                for (float& v : d) v = MINUS_INF;
                by[0] = by[1] = float4{0, 0, 0, 0};
            }
            if (half < tiles) {
                // The exponents of the scales that count, 128 columns a lane of four; a NaN makes its rows NaN by its scores.
                uint32_t exponents = 0;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float4& f = by[r];
                    const float scale = lane % 4 == 0 ? f.x : lane % 4 == 1 ? f.y : lane % 4 == 2 ? f.z : f.w;
                    const uint32_t e = max(__float_as_uint(scale) >> 23 & 255, 1u);
                    if (scale != 0 && e < 255) exponents = __vmaxu2(exponents, e | (255 - e) << 16);
                }
                for (int over = 4; over < 32; over *= 2)
                    exponents = __vmaxu2(exponents, __shfl_xor_sync(0xffffffff, exponents, over));
                if (lane < 4) m.exponents[mine][lane] = exponents;
            } else if (lane < 4) {
                m.exponents[mine][lane] = 0;
            }
            auto largest = [&](int c) { return fmaxf(d[c / 2 * 4 + c % 2], d[c / 2 * 4 + c % 2 + 2]); };
#pragma unroll
            for (int c = 0; c < OWN; ++c) {
                float most = largest(c);
                for (int over = 4; over < 32; over *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, over));
                if (lane < 4) m.most[mine][fragment_column(local, c / 2 * 4 + c % 2)] = most;
            }
            part_sync(1, 256);
            float rescale[OWN];
#pragma unroll
            for (int c = 0; c < OWN; c += 2) {
                float2 most = {MINUS_INF, MINUS_INF};
#pragma unroll
                for (int w = 0; w < 8; ++w) {
                    const float2 other = *reinterpret_cast<const float2*>(&m.most[w][fragment_column(local, c * 2)]);
                    most = {fmaxf(most.x, other.x), fmaxf(most.y, other.y)};
                }
#pragma unroll
                for (int e = c; e < c + 2; ++e) {
                    // The maximum follows the scores only where they pass it by 8: weights up to 256 are as exact, and outputs
                    // keep their factor.
                    const float old = top[e], now = e == c ? most.x : most.y;
                    if (now > old + 8) top[e] = now;
                    const float shift = top[e] == MINUS_INF ? 0 : top[e];
                    rescale[e] = old == top[e] ? 1 : exp2_fast(old - shift);
                    sum[e] *= rescale[e];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float& p = d[e / 2 * 4 + e % 2 + 2 * r];
                        p = exp2_fast(p - shift);
                        sum[e] += p;
                    }
                }
            }
            // Weights times scales in f16, in units of 2^(unit - 127); keys whose scale is 2^12 below the largest or less take
            // another pass, in smaller units.
            int unit[4], lowest[4];
            {
                uint32_t all[4] = {0, 0, 0, 0};
#pragma unroll
                for (int w = 0; w < 8; ++w) {
                    const uint4 of = *reinterpret_cast<const uint4*>(m.exponents[w]);
                    all[0] = __vmaxu2(all[0], of.x), all[1] = __vmaxu2(all[1], of.y);
                    all[2] = __vmaxu2(all[2], of.z), all[3] = __vmaxu2(all[3], of.w);
                }
#pragma unroll
                for (int g = 0; g < 4; ++g) {
                    // Not below 2^-80 of the largest unit so far: the outputs, in smaller units, would overflow.
                    unit[g] = max(min(int(all[g] & 0xffff), 253), 1);
                    highest[g] = max(highest[g], unit[g]);
                    unit[g] = max(unit[g], highest[g] - 80);
                    lowest[g] = max(255 - int(all[g] >> 16), highest[g] - 80);
                }
            }
            bool more = true;
            for (int pass = 0; more; ++pass) {
                if (half < tiles) {
                    const int n = lane / 16 * 8 + lane % 8, chunk = warp % 4 * 2 + lane / 8 % 2;  // what this lane addresses
#pragma unroll
                    for (int g = 0; g < 4; ++g) {
                        unsigned char* const to = weights(half, g);
                        const float one = pass > 0 && lowest[g] > unit[g] ? 0 : __int_as_float((254 - unit[g]) << 23);
                        float f[2];
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            f[r] = (g == 0 ? by[r].x : g == 1 ? by[r].y : g == 2 ? by[r].z : by[r].w) * one;
                            if (fabsf(f[r]) < 0x1p-12f || (pass > 0 && fabsf(f[r]) >= 2)) f[r] = 0;
                        }
#pragma unroll
                        for (int i = 0; i < N / 2; i += 8) {
                            uint32_t v[4];
#pragma unroll
                            for (int k = 0; k < 4; ++k) v[k] = pack_f16(d[i + 2 * k] * f[k % 2], d[i + 2 * k + 1] * f[k % 2]);
                            const int row = i * 2 + n;
                            stmatrix4<true>(to + row * 128 + (chunk ^ row % 8) * 16, v);
                        }
                    }
                }
                fence_async();
                part_sync(1, 256);
                if (t > s.first || pass > 0) {
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        const int up = used[k] - (half ? unit[2 + k] : unit[k]);
                        const float by_unit = up < -126 ? 0 : __int_as_float((127 + up) << 23);
                        bool same = up == 0;
#pragma unroll
                        for (int c = 0; c < OWN; ++c) same = same && (pass > 0 || rescale[c] == 1);
                        if (__all_sync(0xffffffff, same)) continue;
#pragma unroll
                        for (int i = 0; i < N / 2; ++i) {
                            const float f = by_unit * (pass > 0 ? 1 : rescale[i / 4 * 2 + i % 2]);
                            o[2 * k][i] *= f, o[2 * k + 1][i] *= f;
                        }
                    }
                }
                used[0] = half ? unit[2] : unit[0], used[1] = half ? unit[3] : unit[1];
#pragma unroll
                for (auto& of : o) hold(of);
#pragma unroll 1
                for (int which = 0; which < tiles; ++which) {
                    const unsigned char* const from = slot_of(which);
                    uint32_t w[2][4][4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {  // columns 256 half + 64 i + 16 (warp % 4) on: a chunk of each key
                        const int panel = half * 2 + i / 2, key = few_key(lane), chunk = (i % 2 * 4 + warp % 4) ^ key % 8;
                        uint32_t raw[2][4];
#pragma unroll
                        for (int k = 0; k < 2; ++k)
                            ldmatrix4_transposed(raw[k], from + panel * 8192 + (k * 32 + key) * 128 + chunk * 16);
                        if (i > 1) wgmma_wait<1>();  // these registers' last products are done
                        // Even bytes are the one column, odd ones the next; low halves the one key, high ones the next.
#pragma unroll
                        for (int step = 0; step < 4; ++step)
#pragma unroll
                            for (int k = 0; k < 2; ++k)
                                widen_e4m3(__byte_perm(raw[step / 2][step % 2 * 2 + k], 0, 0x3120), w[i % 2][step][2 * k],
                                           w[i % 2][step][2 * k + 1]);
                        const uint64_t p = descriptor(shared_address(weights(which, panel)), 1024);
#pragma unroll
                        for (auto& of : w[i % 2]) hold(of);
                        wgmma_fence();
#pragma unroll
                        for (int step = 0; step < 4; ++step)
                            wgmma_f16<N>(o[i], w[i % 2][step], descriptor_at(p, uint32_t(step * 32)),
                                         t > s.first || pass > 0 || which > 0 || step > 0);
                        wgmma_commit();
                    }
                    wgmma_wait<0>();
                }
#pragma unroll
                for (auto& of : o) hold(of);
                more = false;
#pragma unroll
                for (int g = 0; g < 4; ++g) {
                    if (lowest[g] <= unit[g] - 13) unit[g] -= 13, more = true;
                    else lowest[g] = 255;
                }
                if (more) part_sync(1, 256);  // all have used these weights
            }
            if (MAPPED) fence_async();  // threads have read what the copy engine will overwrite
            __syncwarp();
            if (lane == 0)
                for (int which = 0; which < tiles; ++which) barrier_arrive(&m.empty[(j + which) % F::STEPS]);
            j += tiles;
        }
#pragma unroll
        for (int c = 0; c < OWN; ++c) {
            for (int over = 4; over < 32; over *= 2) sum[c] += __shfl_xor_sync(0xffffffff, sum[c], over);
            if (lane < 4) m.sums[mine][fragment_column(local, c / 2 * 4 + c % 2)] = sum[c];
        }
        part_sync(1, 256);
        const bool any = s.first < end;
#pragma unroll
        for (int c = 0; c < OWN; ++c) {
            const int row = fragment_column(local, c / 2 * 4 + c % 2);
            if (row >= a.rows) continue;
            float total = 0;
            for (int w = 0; w < 8; ++w) total += m.sums[w][row];
            const float log = top[c] + log2f(total), finish = finish_of(a, row % a.h, total, log);
            const int64_t at = s.whole() ? int64_t(s.seq) * a.rows + row : mla_slot(part, s.begins) * a.slot_rows + row;
            if (mine == 0 && lane < 4) {
                if (s.whole()) a.lse[(int64_t(s.seq) * a.h + row % a.h) * a.nq + row / a.h] = total == 0 ? MINUS_INF : log * LN2;
                else a.totals[at] = {top[c], total};
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t to = at * 512 + half * 256 + i * 64 + warp % 4 * 16 + lane / 4 * 2;
                const int e = c / 2 * 4 + c % 2;
                const float by = any ? __int_as_float(used[i / 2] << 23) : 0, even = o[i][e] * by, odd = o[i][e + 2] * by;
                if (s.whole())
                    *reinterpret_cast<uint32_t*>(a.out + to) = any ? pack_bf16(even * finish, odd * finish) : 0;
                else if (any)
                    *reinterpret_cast<float2*>(a.partial + to) = {even, odd};
            }
        }
    }
    // The memory of the tiles is free: none is on its way, and all are read.
    mla_end(a, m.start, m.cuts, N, 0, 1, slots, thread - 128);
}

}  // namespace kn::cuda
