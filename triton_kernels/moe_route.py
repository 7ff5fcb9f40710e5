"""``moe_route``: one program takes whole tokens, their choices in registers; no sort.

An f32 is turned into an integer of the same order, so that a warp finds the largest choice in one instruction
(``redux.sync``) and the lowest expert that has it in another: top_k rounds of two. The scores are not kept: those of
the chosen experts come from their logits again, by the same code.

128 tokens of 256 experts are 132 KB: the time is that of a launch and of one token's chain of some 30 reductions
(about 2 us), so each token gets a program of one warp until the chip is full.
"""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import cdiv, chip_of, next_power_of_2, run

LOWEST = tl.constexpr(-(2**31))  # below every choice: out


def tile(dims, chip):
    """Tokens of a program and its warps. A warp of 32 lanes holds 8 choices a lane of 256; 4 tokens hide each
    other's reductions once there are more than 8 programs a unit. bench/results/h200.jsonl: 2.8 us of 128 tokens, 7.4 of 4096;
    other tiles and chips are unmeasured."""
    wide = next_power_of_2(dims["e"])
    rows = 4 if dims["t"] > chip.units * 8 and wide <= 256 else 1
    return rows, min(max(wide // 1024, 1), 8)


@triton.jit
def exp(x):
    """``e**x`` to an ulp or two for every x; 0 below -88, where f32 has no normal numbers, and Inf above 88."""
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950408889634, -high) + x * 1.925963e-8  # the rounding of high, and of log2(e)
    y = tl.exp2(high)
    y = tl.fma(y, low * 0.6931471805599453, y)
    return tl.where(x < -88.0, 0.0, tl.where(x > 88.0, float("inf"), y))


@triton.jit
def score_of(x, most, total, SIGMOID: tl.constexpr):
    if SIGMOID:
        return 1.0 / (1.0 + exp(-x))
    else:
        return exp(x - most) / total


@triton.jit
def ordered(x):
    """f32 as int32 in the same order; -Inf lies above LOWEST."""
    b = x.to(tl.int32, bitcast=True)
    return b ^ ((b >> 31) & 0x7FFFFFFF)


@triton.jit
def largest(key, index):
    """The largest key of each row, and the lowest index that has it."""
    best = tl.max(key, axis=1)
    return best, tl.min(tl.where(key == best[:, None], index, 0x7FFFFFFF), axis=1)


@triton.jit(do_not_specialize=["t"])
def kernel(logits, bias, weights, experts, t, scaling, E: tl.constexpr, TOP_K: tl.constexpr, N_GROUP: tl.constexpr,
           TOPK_GROUP: tl.constexpr, SIGMOID: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr,
           ROWS: tl.constexpr, G: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    SIZE: tl.constexpr = E // N_GROUP  # experts of a group; in registers a group has P places, and there are G groups
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < t)[:, None]
    place = tl.arange(0, G * P)
    index = (place if SIZE == P else place // P * SIZE + place % P)[None, :]
    inside = (place < N_GROUP * P if SIZE == P else (place < N_GROUP * P) & (place % P < SIZE))[None, :]
    x = tl.load(logits + row[:, None] * E + index, mask=live & inside, other=float("-inf")).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + index, mask=inside, other=0.0)
    most, total = tl.full((ROWS, 1), 0.0, tl.float32), tl.full((ROWS, 1), 1.0, tl.float32)
    if not SIGMOID:
        most = tl.max(x, axis=1)[:, None]
        total = tl.sum(exp(x - most), axis=1)[:, None]
    choice = score_of(x, most, total, SIGMOID)
    if bias is not None:
        choice += shift
    odd = tl.max(((choice != choice) & inside).to(tl.int32), axis=1)[:, None] > 0
    key = tl.where(inside, ordered(choice), LOWEST)
    if TOPK_GROUP < N_GROUP:
        groups = tl.reshape(choice, (ROWS, G, P))
        at = tl.arange(0, P)[None, None, :]
        groups = tl.where(at < SIZE, groups, float("-inf"))
        rank = tl.max(groups, axis=2)
        if TOP2 and SIZE > 1:
            first = tl.min(tl.where(groups == rank[:, :, None], at, P), axis=2)
            rank += tl.max(tl.where(at == first[:, :, None], float("-inf"), groups), axis=2)
        group = tl.arange(0, G)[None, :]
        rank = tl.where(group < N_GROUP, ordered(tl.where(rank == rank, rank, float("-inf"))), LOWEST)
        out = tl.full((ROWS, G), 1, tl.int32)
        for _ in range(TOPK_GROUP):
            best, g = largest(rank, group)
            out = tl.where(group == g[:, None], 0, out)
            rank = tl.where(group == g[:, None], LOWEST, rank)
        out = tl.reshape(tl.broadcast_to(out[:, :, None], (ROWS, G, P)), (ROWS, G * P))
        key = tl.where(out == 0, key, LOWEST)
    slot = tl.arange(0, K)[None, :]
    ids = tl.broadcast_to(slot, (ROWS, K))
    for j in range(TOP_K):
        best, i = largest(key, index)
        ids = tl.where(slot == j, i[:, None], ids)
        key = tl.where(index == i[:, None], LOWEST, key)
    ids = tl.where(odd, slot, ids)
    inside = live & (slot < TOP_K)
    x = tl.load(logits + row[:, None] * E + ids, mask=inside, other=float("-inf")).to(tl.float32)
    s = tl.where(inside, score_of(x, most, total, SIGMOID), 0.0)
    if RENORMALIZE:
        s = s / (tl.sum(s, axis=1) + 1e-20)[:, None]
    s = tl.where(odd, float("nan"), s * scaling)
    at = row[:, None] * TOP_K + slot
    tl.store(weights + at, s, mask=inside)
    tl.store(experts + at, ids, mask=inside)


def launch(logits, bias, weights, experts, workspace, top_k, n_group, topk_group, score, group_score, renormalize, scaling):
    t, e = logits.shape
    rows, warps = tile({"t": t, "e": e}, chip_of(logits))
    up = next_power_of_2
    run(kernel, (cdiv(t, rows),), logits, bias, weights, experts, t, scaling, E=e, TOP_K=top_k, N_GROUP=n_group,
        TOPK_GROUP=topk_group, SIGMOID=score == "sigmoid", TOP2=group_score == "top2", RENORMALIZE=renormalize, ROWS=rows,
        G=up(n_group), P=up(e // n_group), K=up(top_k), num_warps=warps)
