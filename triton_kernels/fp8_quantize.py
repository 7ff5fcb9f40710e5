"""``fp8_quantize``: one program takes a tile of whole blocks, reads it once and writes codes and scales."""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import block_scale, cdiv, chip_of, e4m3_encode, finite_size, quotients, raw, run


def tile(dims, chip):
    """Blocks (rows, columns) of a program and its warps. 16 bytes a thread and load, 2 or 4 loads in flight.
    Rows of 1 x 128: the quickest of fifteen in bench/tiles/h200.jsonl, 84 % of a copy's bandwidth; others are unmeasured."""
    b0, b1 = dims["block0"], dims["block1"]
    if b0 == 1:  # 1024 elements, so that one token fills the chip
        return (1, 8, 4 if dims["m"] * dims["k"] < chip.units * 8192 else 2)
    return (1, 1, 8) if b1 == 128 else (1, 32, 8)


@triton.jit
def kernel(x, codes, scales, m, k, floor, B0: tl.constexpr, B1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
           POW2: tl.constexpr, STEPS: tl.constexpr, NATIVE: tl.constexpr, FAR: tl.constexpr):
    """FAR: the elements of a tile lie up to 2**31 apart; otherwise addresses within it take 32 bits, half the registers."""
    columns = tl.cdiv(tl.cdiv(k, B1), COLS)
    pid = tl.program_id(0)
    i, j = (pid // columns).to(tl.int64), pid % columns
    first = i * (ROWS * B0)
    row = tl.minimum(tl.arange(0, ROWS * B0), m - 1 - first)  # rows from m on are the last: no mask, and the same results
    row = row if FAR else row.to(tl.int32)
    col = j * (COLS * B1) + tl.arange(0, COLS * B1)
    at, inside = row[:, None] * k + col[None, :], (col < k)[None, :]
    x += first * k
    codes += first * k
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.reshape(finite_size(v), (ROWS, B0, COLS, B1)), axis=3), axis=1)
    scale = block_scale(amax, floor, POW2)
    divisor = tl.reshape(tl.broadcast_to(scale[:, None, :, None], (ROWS, B0, COLS, B1)), (ROWS * B0, COLS * B1))
    tl.store(codes + at, e4m3_encode(quotients(v, divisor, STEPS), NATIVE), mask=inside)
    row, col = i * ROWS + tl.arange(0, ROWS), j * COLS + tl.arange(0, COLS)
    inside = (row < tl.cdiv(m, B0))[:, None] & (col < tl.cdiv(k, B1))[None, :]
    tl.store(scales + row[:, None] * tl.cdiv(k, B1) + col[None, :], scale, mask=inside)


def launch(x, codes, scales, workspace, block, scale, floor):
    (m, k), (b0, b1), chip = x.shape, block, chip_of(x)
    rows, cols, warps = tile({"m": m, "k": k, "block0": b0, "block1": b1}, chip)
    grid = (cdiv(m, rows * b0) * cdiv(k, cols * b1),)
    run(kernel, grid, x, raw(codes), scales, m, k, floor, B0=b0, B1=b1, ROWS=rows, COLS=cols, POW2=scale == "pow2",
        STEPS=1 if x.element_size() == 2 else 2, NATIVE=chip.e4m3, FAR=rows * b0 * k >= 2**31, num_warps=warps)
