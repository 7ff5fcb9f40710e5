"""``moe_combine_backward``: one program takes a copy: its dot product, and its row of dy while dout's row is at hand.

Bound by memory: at 4096 tokens of 7168 columns and top_k 8 it reads 529 MB and writes 470 MB (232 us at 4.3 TB/s). Rows
of a permutation are named once. To be right for any others, two small launches find how many copies name a row, and
which is the first: minimum and count of integers, the same in whatever order the copies come. That one adds up all.
"""

import torch
import triton
import triton.language as tl
from kernomics.triton_kernels.common import cdiv, chip_of, next_power_of_2, run

BLOCK = 1024


def tile(dims, chip):
    """Columns of a step, and warps. 16 bytes of bf16 a thread and load, 8 or more programs a unit.
    bench/results/h200.jsonl: 89 % of a copy's bandwidth; other tiles and chips are unmeasured."""
    return min(max(next_power_of_2(dims["d"]), 16), 1024), 4


def workspace(dims, chip):
    """The first copy of each row, and how many name it."""
    return 8 * dims["t"] * dims["top_k"]


@triton.jit(do_not_specialize=["rows"])
def clear_kernel(first, count, rows, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(first + r, 0x7FFFFFFF, mask=r < rows)
    tl.store(count + r, 0, mask=r < rows)


@triton.jit(do_not_specialize=["rows"])
def mark_kernel(row_of, first, count, rows, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of + i, mask=i < rows, other=-1)
    real = (row >= 0) & (row < rows)
    tl.atomic_min(first + row, i, mask=real, sem="relaxed")
    tl.atomic_add(count + row, 1, mask=real, sem="relaxed")


@triton.jit
def next_copy(row_of, row, i, rows, BLOCK: tl.constexpr):
    """The next copy after i that names ``row``; there is one."""
    best = rows
    for start in range(0, rows, BLOCK):
        k = start + tl.arange(0, BLOCK)
        hit = (tl.load(row_of + k, mask=k < rows, other=-1) == row) & (k > i)
        best = tl.minimum(best, tl.min(tl.where(hit, k, rows), axis=0))
    return best


@triton.jit(do_not_specialize=["rows"])
def kernel(dout, y, row_of, weights, first, count, dy, dweights, rows, top_k, d, COLS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    row = tl.load(row_of + i)
    real = (row >= 0) & (row < rows)
    if tl.load(count + i) == 0:  # nobody names row i
        for c in range(0, d, COLS):
            col = c + tl.arange(0, COLS)
            tl.store(dy + i.to(tl.int64) * d + col, tl.zeros((COLS,), dy.dtype.element_ty), mask=col < d)
    if real:
        w = 1.0
        if weights is not None:
            w = tl.load(weights + i)
        mine, named, at = tl.load(first + row) == i, tl.load(count + row), row.to(tl.int64) * d
        token = (i // top_k).to(tl.int64)
        acc = tl.zeros((COLS,), tl.float32)
        for c in range(0, d, COLS):
            col = c + tl.arange(0, COLS)
            g = tl.load(dout + token * d + col, mask=col < d, other=0.0).to(tl.float32)
            acc += g * tl.load(y + at + col, mask=col < d, other=0.0).to(tl.float32)
            if mine & (named == 1):
                tl.store(dy + at + col, (w * g).to(dy.dtype.element_ty), mask=col < d)
        tl.store(dweights + i, tl.sum(acc, axis=0))
        if mine & (named > 1):
            for c in range(0, d, COLS):
                col = c + tl.arange(0, COLS)
                g = w * tl.load(dout + token * d + col, mask=col < d, other=0.0).to(tl.float32)
                k = i
                for _ in range(1, named):
                    k = next_copy(row_of, row, k, rows, BLOCK)
                    other = tl.load(dout + (k // top_k).to(tl.int64) * d + col, mask=col < d, other=0.0).to(tl.float32)
                    if weights is not None:
                        other *= tl.load(weights + k)
                    g += other
                tl.store(dy + at + col, g.to(dy.dtype.element_ty), mask=col < d)
    else:
        tl.store(dweights + i, 0.0)


def launch(dout, y, row_of, weights, dy, dweights, workspace):
    (rows, d), top_k = y.shape, row_of.shape[1]
    if not rows:
        return
    first, count = workspace.view(torch.int32)[:rows], workspace.view(torch.int32)[rows:]
    cols, warps = tile({"d": d}, chip_of(y))
    run(clear_kernel, (cdiv(rows, BLOCK),), first, count, rows, BLOCK=BLOCK, num_warps=4)
    run(mark_kernel, (cdiv(rows, BLOCK),), row_of, first, count, rows, BLOCK=BLOCK, num_warps=4)
    run(kernel, (rows,), dout, y, row_of, weights, first, count, dy, dweights, rows, top_k, d, COLS=cols, BLOCK=BLOCK,
        num_warps=warps)
