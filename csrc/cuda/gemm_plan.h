// Plans of the FP8 products on Hopper: sizes of tiles, their order, the split of k. Host and device call these; tests too.
#pragma once
#include <cstdint>

#include "descriptor.h"

namespace kn::cuda {

__host__ __device__ constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A kernel's shape. A tile is `x` rows of the operand in the 64-row slot of wgmma by `y` rows of the other one: tokens by
// weights, or weights by tokens (`swapped`: few tokens waste no rows of the slot).
struct GemmTile {
    bool swapped;
    int waves;    // x = 128 waves: two warpgroups, each `waves` times 64 rows
    int y;        // multiple of 8
    int cluster;  // blocks that share the x rows, a slice loaded by each for all

    __host__ __device__ constexpr int x() const { return 128 * waves; }
    __host__ __device__ constexpr int tokens() const { return swapped ? y : x(); }
    __host__ __device__ constexpr int weights() const { return swapped ? x() : y; }
    __host__ __device__ constexpr int scales() const {
        return int(up(tokens() + 2, 4) * 4);
    }  // of a stage: tokens', two of weights
    __host__ __device__ constexpr int stage_bytes() const { return (x() + y) * 128 + scales() * 4; }
    // Results in bf16: rows with a chunk of padding, so that they start in other banks.
    __host__ __device__ constexpr int pitch() const { return y * 2 + 16; }
    __host__ __device__ constexpr int staging_bytes() const { return swapped ? 0 : x() * pitch(); }
    // Swapped blocks go two to a multiprocessor: one's first loads run beside the other's last products.
    __host__ __device__ constexpr int budget() const { return swapped ? 112 << 10 : 226 << 10; }
    __host__ __device__ constexpr int stages() const {
        return int(least((budget() - 1024 - 256 - staging_bytes()) / stage_bytes(), 8));
    }
    __host__ __device__ constexpr int shared_bytes(int e = 0) const {
        constexpr int BARRIER = 8, OF_STAGE = 2, OF_STAGING = 4;
        return 1024 + stages() * (stage_bytes() + OF_STAGE * BARRIER) + staging_bytes() + OF_STAGING * BARRIER +
               (e ? (e + 2) * 4 : 0);
    }
};

static constexpr int MOST_EXPERTS = 2048, MOST_SPLITS = 8;
static constexpr GemmTile DENSE_TILES[] = {{true, 1, 8, 1},    {true, 1, 16, 1},  {true, 1, 32, 1},   {true, 1, 64, 1},
                                           {false, 1, 64, 1},  {false, 1, 96, 2}, {false, 1, 128, 2}, {false, 2, 96, 2},
                                           {false, 2, 112, 2}, {false, 2, 128, 2}};
static constexpr int SWAPPED_TILES = 4;  // the first ones
static constexpr GemmTile GROUPED_TILES[] = {{true, 1, 8, 1},  {true, 1, 16, 1},   {true, 1, 32, 1},
                                             {true, 1, 64, 1}, {false, 1, 128, 2}, {false, 2, 128, 2}};

struct GemmPlan {
    int tile;    // its index in the list
    int splits;  // blocks of a cluster that share k; their sums meet in shared memory in order
};

// The tile and split of least expected time in clock cycles of an H200: memory gives 2420 bytes a cycle to all multiprocessors
// together, L2 39 to each when all of them load, up to 43 when few do; a tile's products reach a share of the 8543 FLOP of FP8 a
// cycle and multiprocessor, which together with what a round costs beyond its products (10 steps) is fitted to times of 48
// shapes on an H200. Of the 420 in bench/tiles/h200.jsonl the choice is 1.1 % slower than the best on average, at most 10 %.
static constexpr double SWAPPED_SHARE = 0.34, DENSE_SHARE[] = {0.98, 0.45, 0.50, 0.25, 0.25, 0.59};
constexpr GemmPlan plan_dense(int64_t m, int64_t n, int64_t k, int units) {
    GemmPlan best = {0, 1};
    double least_cycles = -1;
    const int64_t blocks = up(k, 128);
    const double memory = double(n + m) * double(k) / 2420;
    for (int i = 0; i < int(sizeof DENSE_TILES / sizeof *DENSE_TILES); ++i) {
        const GemmTile& t = DENSE_TILES[i];
        if (t.swapped ? t.y < m && t.y < 32 : m <= 32) continue;  // wider ones read weights less often; no slot half empty
        const int64_t tiles = up(m, t.tokens()) * up(up(n, t.weights()), t.cluster) * t.cluster;
        for (int splits = 1; splits <= (t.swapped ? MOST_SPLITS : 1) && splits <= blocks; splits *= 2) {
            const int64_t rounds = up(tiles * splits, units), busy = least(tiles * splits, units);
            const double spare = 39.0 * units / double(busy), rate = spare < 43 ? spare : 43;
            const double share = t.swapped ? SWAPPED_SHARE : DENSE_SHARE[i - SWAPPED_TILES];
            const double products = t.x() * t.y * 256 / 8543.0 / share, loads = (t.x() / t.cluster + t.y) * 128 / rate;
            const double turn = products > loads ? products : loads;
            const double work = double(rounds * up(blocks, splits)) * turn;
            const double cycles = (work > memory ? work : memory) + double(rounds) * 10 * turn +
                                  (splits > 1 ? 2542 : 0);  // splits meet: two cluster barriers
            if (least_cycles < 0 || cycles < least_cycles) {
                least_cycles = cycles;
                best = {i, splits};
            }
        }
    }
    return best;
}

// t tokens of e experts, as many of each as any: the host does not know.
constexpr GemmPlan plan_grouped(int64_t t, int64_t e) {
    const int64_t rows = up(t, e > 0 ? e : 1);
    for (int i = 0; i < SWAPPED_TILES; ++i)
        if (rows <= GROUPED_TILES[i].y) return {i, 1};
    return {rows < 384 ? 4 : 5, 1};
}

struct TilePlace {
    int m, n;  // of the tile, in tiles
};

// Tile `index` of tiles_m x tiles_n: bands of `band` tiles along m, within them column after column, so that tiles of
// one moment share rows and columns in L2.
__host__ __device__ constexpr TilePlace place(int index, int tiles_m, int tiles_n, int band) {
    const int first = index / (band * tiles_n) * band, left = tiles_m - first, height = left < band ? left : band;
    const int inside = index - first * tiles_n;
    return {first + inside % height, inside / height};
}
static constexpr int BAND = 8;

// The k blocks of split `rank`.
__host__ __device__ constexpr int split_start(int blocks, int splits, int rank) { return int(int64_t(blocks) * rank / splits); }

// TilePlace in a ring of barriers: a consumer waits for `parity` of full, a producer for `parity ^ 1` of empty (free at first).
struct Ring {
    int slot = 0;
    uint32_t parity = 0;
    __host__ __device__ constexpr void next(int stages) {
        if (++slot == stages) {
            slot = 0;
            parity ^= 1;
        }
    }
};

}  // namespace kn::cuda
