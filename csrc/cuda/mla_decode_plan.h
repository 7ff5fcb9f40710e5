// The schedule of mla_decode on Hopper: which part of the chip reads which keys. Host and device call these; tests too.
//
// Keys come in tiles of 64. An item is a sequence and a group of its query rows; the tiles of all items lie on a line, each item
// followed by a gap for what it costs beyond its keys. The line is cut into parts of equal length; a part goes through the items
// that it touches.
#pragma once
#include <cstdint>
#ifdef KN_ON_CPU
#include <vector>
#endif

#include "descriptor.h"

namespace kn::cuda {

static constexpr int MLA_KEYS = 64, MLA_ROWS = 64;  // keys of a tile, query rows of a block
static constexpr int MLA_GAP = 2;                   // first loads that nothing hides, and results

struct MlaLine {
    const int* lens;
    int b, groups;  // sequences, groups of query rows of each
    int64_t most;   // keys that a row of the block table has room for

    // The host has checked the lengths, or nobody: they are cut to what the table holds.
    __host__ __device__ int length(int seq) const {
        const int64_t room = most < (int64_t(1) << 31) - 64 ? most : (int64_t(1) << 31) - 64;
        return lens[seq] < 0 ? 0 : lens[seq] < room ? lens[seq] : int(room);
    }
    __host__ __device__ int tiles(int seq) const {  // at least one, whose part gives the results of a sequence without keys
        const int n = length(seq);
        return n > MLA_KEYS ? (n - 1) / MLA_KEYS + 1 : 1;
    }
};

// Length of a part, for a line of `sum` whose longest item is `longest`: up to 4 % more than even where that cuts no item.
__host__ __device__ constexpr int64_t mla_part(int64_t sum, int64_t longest, int parts) {
    const int64_t even = (sum + parts - 1) / parts, whole = longest ? (even + longest - 1) / longest * longest : even;
    return whole * 25 <= even * 26 ? whole : even;
}

// Tiles [first, last) of an item.
struct MlaSegment {
    int seq, group, length, first, last;
    bool begins, ends;  // with the item
    int64_t at, over;   // where the item's tiles lie on the line

    __host__ __device__ bool whole() const { return begins && ends; }
};

// A part's way along the line.
struct MlaWalk {
    int64_t at, begin, end;  // where the item starts on the line, and the part
    int seq, group, tiles;   // the item

    __host__ __device__ bool next(const MlaLine& line, MlaSegment& s) {
        while (seq < line.b && at < end) {
            const int64_t lo = begin > at ? begin - at : 0, hi = end - at < tiles ? end - at : tiles;
            s = {seq, group, line.length(seq), int(lo < tiles ? lo : tiles), int(hi), lo == 0, hi == tiles, at, at + tiles};
            at += tiles + MLA_GAP;
            if (++group == line.groups) {
                group = 0;
                if (++seq < line.b) tiles = line.tiles(seq);
            }
            if (lo < hi) return true;
        }
        return false;
    }
};

// The place in the workspace for what a part knows of an item that others share: of one begun before it, of one that it leaves
// unended.
__host__ __device__ constexpr int64_t mla_slot(int part, bool begins) { return int64_t(part) * 2 + begins; }

// Blocks of 64 query rows that keep `units` multiprocessors busy, none without keys of its own.
__host__ __device__ constexpr int64_t mla_blocks(int64_t units, int64_t b, int64_t rows, int64_t most) {
    const int64_t tiles = most > MLA_KEYS ? (most - 1) / MLA_KEYS + 1 : 1, all = b * ((rows + MLA_ROWS - 1) / MLA_ROWS) * tiles;
    return units < all ? units : all;
}
// The workspace: for each of `units` blocks two slots of an output, a maximum and a sum a row, and a record of 16 bytes.
__host__ __device__ constexpr int64_t mla_workspace(int64_t b, int64_t rows, int units) {
    return b == 0 ? 0 : units * (2 * (rows < MLA_ROWS ? rows : MLA_ROWS) * 514 * 4 + 16);
}

#ifdef KN_ON_CPU
std::vector<MlaWalk> mla_ways(const MlaLine&, int parts);  // where the parts of a line start, as the kernel finds it
#endif

}  // namespace kn::cuda
