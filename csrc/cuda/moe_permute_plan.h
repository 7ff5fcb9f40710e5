// How the copies of moe_permute are shared out. Host code too: tests call it.
#pragma once
#include "tensor.h"

namespace kn::cuda {

struct PermutePlan {
    static constexpr int64_t FEW = 1024;  // copies that blocks compare with each other, each for its own token
    static constexpr int BLOCKS = 128, WARPS = 8, SHARED = 96 << 10;  // at most; sm_89 gives a block 99 KiB

    int64_t bins;    // experts, then dropped copies
    int64_t blocks;  // that count
    int64_t each;    // copies of a block
    int warps;       // of a block that ranks; each ranks `share` neighbouring copies
    int64_t share;
    int64_t shared;  // bytes of a block that ranks: for every bin a total, earlier copies, and a row for each warp; sums of warps
};

constexpr bool permutes_few(int64_t copies) { return copies <= PermutePlan::FEW; }

constexpr PermutePlan permute_plan(int64_t copies, int64_t e) {
    PermutePlan p{};
    p.bins = e + 1;
    // Every block reads the counts of all: no more blocks than it takes to keep these reads below those of the copies' bins.
    const int64_t least = max64(1024, p.bins);
    p.blocks = max64(1, min64(PermutePlan::BLOCKS, copies / least));
    p.each = ceil_div(ceil_div(copies, p.blocks), 32) * 32;
    p.warps = int(max64(1, min64(PermutePlan::WARPS, PermutePlan::SHARED / 4 / p.bins - 2)));
    p.share = ceil_div(ceil_div(p.each, p.warps), 32) * 32;
    p.shared = 4 * (p.bins * (p.warps + 2) + 32);
    return p;
}

}  // namespace kn::cuda
