"""``moe_combine``: one program gathers some columns of a token's rows and adds them in the order of the slots.

Bound by memory: at 4096 tokens of 7168 columns and top_k 8 it reads 470 MB and writes 59 MB (123 us at 4.3 TB/s). The
slots are unrolled, so that a thread has top_k loads of 16 bytes in flight: 16 KB a program of 128 threads, against some
23 KB that a unit needs. One token gets many small programs.
"""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import cdiv, chip_of, run


def tile(dims, chip):
    """Columns of a program and its warps. 16 bytes of bf16 a thread and slot, 4 warps where that fills the chip.
    bench/results/h200.jsonl: the bandwidth of a copy; other chips are unmeasured."""
    return (1024, 4) if dims["t"] * dims["d"] >= chip.units * 2048 else (256, 2)


@triton.jit
def term(y, row_of, weights, slot, rows, d, col, WHOLE: tl.constexpr):
    """A slot's weighted values; zeros where it is dropped, NaN where it names a row that is none."""
    row = tl.broadcast_to(tl.load(row_of + slot), col.shape).to(tl.int64)
    real = (row >= 0) & (row < rows)
    v = tl.load(y + row * d + col, mask=real if WHOLE else real & (col < d), other=0.0).to(tl.float32)
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + slot)
    return v * tl.where(real, weight, tl.where(row == -1, 0.0, float("nan")))


@triton.jit(do_not_specialize=["rows"])
def kernel(y, row_of, weights, out, rows, d, TOP_K: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr):
    parts = tl.cdiv(d, COLS)
    token, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    col = part * COLS + tl.arange(0, COLS)
    acc = tl.zeros((COLS,), tl.float32)
    if TOP_K <= 16:
        for j in tl.static_range(TOP_K):
            acc += term(y, row_of, weights, token * TOP_K + j, rows, d, col, WHOLE)
    else:
        for j in range(TOP_K):
            acc += term(y, row_of, weights, token * TOP_K + j, rows, d, col, WHOLE)
    tl.store(out + token * d + col, acc.to(out.dtype.element_ty), mask=col < d)


def launch(y, row_of, weights, out, workspace):
    (t, top_k), d = row_of.shape, y.shape[1]
    cols, warps = tile({"t": t, "d": d}, chip_of(y))
    run(kernel, (t * cdiv(d, cols),), y, row_of, weights, out, t * top_k, d, TOP_K=top_k, COLS=cols, WHOLE=d % cols == 0,
        num_warps=warps)
