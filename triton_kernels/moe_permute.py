"""``moe_permute``: rows by a stable counting sort of the copies, then each token's row read once and written top_k times.

A copy's row is the number of copies that come before it: those of lower experts, and earlier ones of its own. Dropped
copies count as one expert more, so that they own the rows that must be zero, and every row is written exactly once.

Up to 2048 copies one launch does it all: each program compares its token's copies with all others (128 tokens of top_k
8: 1024 ids of 4 KB and 64 comparisons a thread) and moves a part of the row. More copies take three launches: counts
of some 128 blocks, rows from the counts of all blocks, and the move, which at 4096 tokens of 7168 columns writes 470 MB
(109 us at 4.3 TB/s) and hides the other two.
"""

import torch
import triton
import triton.language as tl
from kernomics.triton_kernels.common import cdiv, chip_of, next_power_of_2, run

FEW = 2048  # copies that one launch compares with each other; 2048 x 2048 comparisons are 1 us of the chip
MOST_BINS = 4096  # of a histogram in shared memory
BLOCK = 32  # copies, or experts, of a program that compares
SUB = 256  # copies that the programs of the larger case compare with each other


def tile(dims, chip):
    """Bytes of a row that one program moves. One 16-byte load a thread of 128, two where rows fill the chip.
    bench/results/h200.jsonl: 77 to 81 % of a copy's bandwidth in prefill; other tiles and chips are unmeasured."""
    return 4096 if dims["t"] * dims["row"] > chip.units * 8192 else 2048


def bins(e):
    """Places of a histogram: experts, the dropped copies, what lies past the last copy; no fewer than threads."""
    return max(next_power_of_2(e + 2), 256)


def blocks(copies):
    """(Blocks of copies, times SUB copies in each): about 128 programs."""
    per = cdiv(copies, SUB * 128)
    return cdiv(copies, SUB * per), per


def at_once(copies, e):
    """Whether one launch does it all."""
    return copies <= FEW and e < 2**19


def by_counts(copies, e):
    """Whether the rows come from counts of blocks, in two launches, or from comparing every copy with every other in one."""
    return copies > FEW and e + 2 <= MOST_BINS


def workspace(dims, chip):
    """Rows of the copies, tail included, and counts of each block."""
    copies, e = dims["t"] * dims["top_k"], dims["e"]
    return 0 if at_once(copies, e) else 4 * (copies + counts_of(copies, e))


def counts_of(copies, e):
    return blocks(copies)[0] * bins(e) if by_counts(copies, e) else 0


# ---------------------------------------------------------------- rows of the copies


@triton.jit
def bin_of(experts, i, copies, e):
    """Expert of copy i: e for a dropped copy, e + 1 past the last."""
    v = tl.load(experts + i, mask=i < copies, other=-1)
    return tl.where(i < copies, tl.where((v >= 0) & (v < e), v, e), e + 1)


@triton.jit
def rank(experts, key, copies, e, KEY: tl.constexpr, CHUNK: tl.constexpr):
    """Number of copies before each of ``key``; copy i of expert v has the key ``v * copies + i``."""
    n = tl.zeros(key.shape, tl.int32)
    for first in range(0, copies, CHUNK):
        j = first + tl.arange(0, CHUNK)
        other = bin_of(experts, j, copies, e).to(KEY) * copies + j
        n += tl.sum((other[None, :] < key[:, None]).to(tl.int32), axis=1)
    return n


@triton.jit
def keep(bin, row, i, inside, e, top_k, row_of, place, token_of):
    """Store the rows of copies i, those of dropped ones in ``place`` only."""
    tl.store(row_of + i, tl.where(bin < e, row, -1), mask=inside)
    if place is not None:
        tl.store(place + i, row, mask=inside)
    if token_of is not None:
        tl.store(token_of + row, tl.where(bin < e, i // top_k, -1), mask=inside)


@triton.jit
def compare(pid, experts, offsets, row_of, place, token_of, copies, e, top_k, KEY: tl.constexpr,
            BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Rows of a block of copies; the programs after those of the copies give the offsets."""
    programs = tl.cdiv(copies, BLOCK)
    if pid < programs:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        bin = bin_of(experts, i, copies, e)
        keep(bin, rank(experts, bin.to(KEY) * copies + i, copies, e, KEY, CHUNK), i, i < copies, e, top_k, row_of, place,
             token_of)
    else:
        v = (pid - programs) * BLOCK + tl.arange(0, BLOCK)
        tl.store(offsets + v, rank(experts, v.to(KEY) * copies, copies, e, KEY, CHUNK), mask=v <= e)


@triton.jit(do_not_specialize=["copies", "e", "top_k"])
def compare_kernel(experts, offsets, row_of, place, token_of, copies, e, top_k, KEY: tl.constexpr,
                   BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    compare(tl.program_id(0), experts, offsets, row_of, place, token_of, copies, e, top_k, KEY, BLOCK, CHUNK)


@triton.jit
def count(pid, experts, counts, copies, e, per, SUB: tl.constexpr, BINS: tl.constexpr):
    """How many copies of each expert a block has."""
    n = tl.zeros((BINS,), tl.int32)
    for s in range(per):
        n += tl.histogram(bin_of(experts, (pid * per + s) * SUB + tl.arange(0, SUB), copies, e), BINS)
    tl.store(counts + pid * BINS + tl.arange(0, BINS), n)


@triton.jit(do_not_specialize=["copies", "e", "per"])
def count_kernel(experts, counts, copies, e, per, SUB: tl.constexpr, BINS: tl.constexpr):
    count(tl.program_id(0), experts, counts, copies, e, per, SUB, BINS)


@triton.jit(do_not_specialize=["copies", "e", "top_k", "blocks", "per"])
def rows_kernel(experts, counts, offsets, row_of, place, token_of, copies, e, top_k, blocks, per,
                SUB: tl.constexpr, BINS: tl.constexpr, AT_ONCE: tl.constexpr, CHUNK: tl.constexpr):
    """Rows of a block's copies: those of lower experts, those of earlier blocks, and those before in the block."""
    pid = tl.program_id(0)
    v = tl.arange(0, BINS)
    total, earlier = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    for first in range(0, blocks, AT_ONCE):
        b = first + tl.arange(0, AT_ONCE)
        n = tl.load(counts + b[:, None] * BINS + v[None, :], mask=(b < blocks)[:, None], other=0)
        total += tl.sum(n, axis=0)
        earlier += tl.sum(tl.where((b < pid)[:, None], n, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    if pid == 0:
        tl.store(offsets + v, start, mask=v <= e)
    start += earlier
    for s in range(per):
        first = (pid * per + s) * SUB
        i = first + tl.arange(0, SUB)
        bin = bin_of(experts, i, copies, e)
        row = tl.gather(start, bin, axis=0)
        for c in range(0, SUB, CHUNK):
            j = first + c + tl.arange(0, CHUNK)
            same = (bin_of(experts, j, copies, e)[None, :] == bin[:, None]) & (j[None, :] < i[:, None])
            row += tl.sum(same.to(tl.int32), axis=1)
        keep(bin, row, i, i < copies, e, top_k, row_of, place, token_of)
        if s + 1 < per:
            start += tl.histogram(bin, BINS)


# ---------------------------------------------------------------- the move


@triton.jit
def move(x, x_sorted, token, row, real, inside, part, d, COLS: tl.constexpr):
    """Columns ``part`` of a token's row to rows ``row`` of the result, zeros where not ``real``."""
    col = part * COLS + tl.arange(0, COLS)[None, :]
    v = tl.load(x + token.to(tl.int64) * d + col, mask=col < d, other=0)
    at = row.to(tl.int64)[:, None] * d + col
    tl.store(x_sorted + at, tl.where(real[:, None], v, 0), mask=inside[:, None] & (col < d))


@triton.jit(do_not_specialize=["t", "copies", "e", "top_k", "parts"])
def few_kernel(x, experts, x_sorted, offsets, row_of, t, d, copies, e, top_k, parts, K: tl.constexpr,
               COLS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """All in one: programs of a token and a part of its row, then those of the offsets."""
    pid = tl.program_id(0)
    if pid < t * parts:
        token, part, slot = pid // parts, pid % parts, tl.arange(0, K)
        i, inside = token * top_k + slot, slot < top_k
        bin = bin_of(experts, i, copies, e)
        row = rank(experts, bin * copies + i, copies, e, tl.int32, CHUNK)
        if part == 0:
            tl.store(row_of + i, tl.where(bin < e, row, -1), mask=inside)
        move(x, x_sorted, token, row, bin < e, inside, part, d, COLS)
    else:
        v = (pid - t * parts) * BLOCK + tl.arange(0, BLOCK)
        tl.store(offsets + v, rank(experts, v * copies, copies, e, tl.int32, 128), mask=v <= e)


@triton.jit(do_not_specialize=["e", "top_k", "parts"])
def move_kernel(x, place, x_sorted, offsets, d, e, top_k, parts, K: tl.constexpr, COLS: tl.constexpr):
    token, part, slot = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.arange(0, K)
    inside = slot < top_k
    row = tl.load(place + token.to(tl.int64) * top_k + slot, mask=inside, other=0)
    move(x, x_sorted, token, row, row < tl.load(offsets + e), inside, part, d, COLS)


# ---------------------------------------------------------------- launches


def comparison(copies, e):
    """Grid and constexprs of ``compare``."""
    wide = (e + 4) * max(copies, 1024) >= 2**31
    return cdiv(copies, BLOCK) + cdiv(e + 1, BLOCK), {
        "KEY": tl.int64 if wide else tl.int32, "BLOCK": BLOCK, "CHUNK": 128}


def launch_count(experts, counts, e):
    (copies, (count, per)) = experts.numel(), blocks(experts.numel())
    run(count_kernel, (count,), experts, counts, copies, e, per, SUB=SUB, BINS=bins(e), num_warps=4)


def launch_rows(experts, counts, offsets, row_of, place, token_of, e):
    """Rows of the copies, the offsets, and which token a row holds: after the counts, or by comparing."""
    copies, top_k = experts.numel(), experts.shape[1]
    if by_counts(copies, e):
        count, per = blocks(copies)
        run(rows_kernel, (count,), experts, counts, offsets, row_of, place, token_of, copies, e, top_k, count, per,
            SUB=SUB, BINS=bins(e), AT_ONCE=max(1, min(16, 8192 // bins(e))), CHUNK=32, num_warps=8)
    else:
        grid, options = comparison(copies, e)
        run(compare_kernel, (grid,), experts, offsets, row_of, place, token_of, copies, e, top_k, num_warps=4, **options)


def launch(x, experts, x_sorted, offsets, row_of, workspace, n_experts):
    (t, d), top_k, e = x.shape, experts.shape[1], n_experts
    copies, size = t * top_k, x.element_size()
    whole = all(n * size % 4 == 0 for n in (d, x.storage_offset(), x_sorted.storage_offset()))
    word = torch.int32 if whole else {1: torch.uint8, 2: torch.int16}[size]  # bits, four bytes at a time where rows allow it
    d, size = d * size // word.itemsize, word.itemsize
    x, x_sorted = x.reshape(-1).view(word).view(t, d), x_sorted.view(word)  # a single row may have any stride
    k = next_power_of_2(max(top_k, 1))
    cols = min(tile({"t": t, "row": d * size}, chip_of(x)) // size, max(16, 32768 // k))
    parts = cdiv(d, cols)
    if at_once(copies, e):
        tokens = t if copies else 0
        parts = max(parts, 1)  # no columns: rows all the same
        chunk = 64 if copies <= 64 else max(16, min(1024, 8192 // k))
        run(few_kernel, (tokens * parts + cdiv(e + 1, BLOCK),), x, experts, x_sorted, offsets, row_of, tokens, d, copies,
            e, top_k, parts, K=k, COLS=cols, BLOCK=BLOCK, CHUNK=chunk, num_warps=4)
        return
    words = workspace.view(torch.int32)
    place, counts = words[:copies], words[copies:]
    if by_counts(copies, e):
        launch_count(experts, counts, e)
    launch_rows(experts, counts, offsets, row_of, place, None, e)
    run(move_kernel, (t * parts,), x, place, x_sorted, offsets, d, e, top_k, parts, K=k, COLS=cols, num_warps=4)
