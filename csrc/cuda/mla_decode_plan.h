// How mla_decode shares its work on Hopper: host and device call these; tests too.
//
// Every sequence costs its blocks of keys and DECODE_FIXED more for its queries and its end. The costs of all sequences stand in
// a row; each part takes an equal stretch of it, so that one sequence may lie in many parts and many sequences in one.
#pragma once
#include <cstdint>

#include "descriptor.h"

namespace kn::cuda {

static constexpr int DECODE_ROWS = 64, DECODE_FIXED = 5;

// Keys of a block: four scaled copies of the weights leave room for fewer of an FP8 cache.
__host__ __device__ constexpr int decode_keys(bool fp8) { return fp8 ? 48 : 64; }
__host__ __device__ constexpr int decode_blocks(int64_t seq_len, int keys) {
    return seq_len <= 0 ? 0 : int((seq_len + keys - 1) / keys);
}
__host__ __device__ constexpr int decode_row_tiles(int64_t rows) { return int((rows + DECODE_ROWS - 1) / DECODE_ROWS); }
// Parts of each row tile: together they fill the chip.
__host__ __device__ constexpr int decode_parts(int units, int row_tiles) {
    return row_tiles > 0 && units > row_tiles ? units / row_tiles : 1;
}
__host__ __device__ constexpr int decode_stretch(int total, int parts) { return total > parts ? (total + parts - 1) / parts : 1; }

// The blocks [first, end) that `part` does of a sequence of `blocks` whose cost starts at `start`.
struct Piece {
    int first, end;
};
__host__ __device__ constexpr Piece decode_piece(int part, int stretch, int start, int blocks) {
    const int64_t low = int64_t(part) * stretch - start - DECODE_FIXED, high = low + stretch;
    return {int(low < 0 ? 0 : low < blocks ? low : blocks), int(high < 0 ? 0 : high < blocks ? high : blocks)};
}
// The parts that do a sequence's blocks: the first and the last.
__host__ __device__ constexpr int decode_first_part(int stretch, int start) { return (start + DECODE_FIXED) / stretch; }
__host__ __device__ constexpr int decode_last_part(int stretch, int start, int blocks) {
    return (start + DECODE_FIXED + (blocks ? blocks - 1 : 0)) / stretch;
}
// Where a part keeps its piece of a sequence that others share: at most one that goes on in the next part, and one that ends
// here.
__host__ __device__ constexpr int decode_slot(int part, bool goes_on) { return 2 * part + int(goes_on); }

// The workspace: starts of costs [b + 1] and first sequences of parts [parts], then for each row tile and slot its sums [64, 512]
// and logarithms [64].
__host__ __device__ constexpr int64_t decode_ints(int64_t b, int parts) { return (b + 1 + parts + 3) / 4 * 4; }
__host__ __device__ constexpr int64_t decode_workspace(int64_t b, int64_t rows, int units) {
    const int tiles = decode_row_tiles(rows), parts = decode_parts(units, tiles);
    return 4 * (decode_ints(b, parts) + int64_t(tiles) * 2 * parts * DECODE_ROWS * (512 + 1));
}

}  // namespace kn::cuda
