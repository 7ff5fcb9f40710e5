"""``attention_merge``: one program takes some rows, reads both results once and writes their weighted sum."""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import cdiv, chip_of, next_power_of_2, run


def tile(dims, chip):
    """Rows and columns of a program and its warps. 16 bytes a thread and load, 2 x 4 loads in flight where the
    rows are many; half of that where they are few, so that a decode step fills the chip. bench/results/h200.jsonl: 85 to 99 % of
    a copy's bandwidth in prefill; other tiles and chips are unmeasured."""
    d, rows = dims["d"], dims["rows"]
    cols = min(max(next_power_of_2(d), 16), 1024)
    return (4096 // cols if rows * d > chip.units * 16384 else max(2048 // cols, 1)), cols, 4


@triton.jit
def weights(a, b):
    """lse of two results, and the weight of each in their sum; an lse of -inf or +inf is a result without keys."""
    a, b = tl.where(a == float("inf"), float("-inf"), a), tl.where(b == float("inf"), float("-inf"), b)
    top = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == float("-inf"), 0.0, top)
    lse = top + tl.log(tl.exp(a - base) + tl.exp(b - base))
    base = tl.where(lse == float("-inf"), 0.0, lse)
    return lse, tl.exp(a - base), tl.exp(b - base), a != float("-inf"), b != float("-inf")


@triton.jit
def kernel(out_a, lse_a, out_b, lse_b, out, lse, rows, q, h, d, ROWS: tl.constexpr, COLS: tl.constexpr):
    columns = tl.maximum(tl.cdiv(d, COLS), 1)
    pid = tl.program_id(0)
    row = (pid // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = pid % columns * COLS + tl.arange(0, COLS)
    token, head = row // h, row % h
    at = (token // q * h + head) * q + token % q  # of lse: [... h q]
    total, w_a, w_b, has_a, has_b = weights(tl.load(lse_a + at, mask=row < rows, other=float("-inf")),
                                            tl.load(lse_b + at, mask=row < rows, other=float("-inf")))
    tl.store(lse + at, total, mask=row < tl.where(pid % columns == 0, rows, 0))
    at = row[:, None] * d + col[None, :]
    inside = (row < rows)[:, None] & (col < d)[None, :]
    a = tl.load(out_a + at, mask=inside & has_a[:, None], other=0.0).to(tl.float32)  # nothing is read beside an empty lse
    b = tl.load(out_b + at, mask=inside & has_b[:, None], other=0.0).to(tl.float32)
    tl.store(out + at, (a * w_a[:, None] + b * w_b[:, None]).to(tl.bfloat16), mask=inside)


def launch(out_a, lse_a, out_b, lse_b, out, lse, workspace):
    q, h, d = out.shape[-3:]
    rows = lse.numel()
    n_rows, cols, warps = tile({"rows": rows, "d": d}, chip_of(out))
    grid = (cdiv(rows, n_rows) * max(cdiv(d, cols), 1),)
    run(kernel, grid, out_a, lse_a, out_b, lse_b, out, lse, rows, q, h, d, ROWS=n_rows, COLS=cols, num_warps=warps)
