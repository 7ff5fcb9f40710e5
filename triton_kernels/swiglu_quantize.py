"""``swiglu_quantize``: one program takes some blocks of 128 columns of some rows, gate and up together."""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import FLOOR, cdiv, chip_of, quantize, raw, run, to_bf16
from triton.language.target_info import is_cuda


def tile(dims, chip):
    """Rows and blocks of 128 columns of a program, and its warps. As fp8_quantize, two loads a value. Many rows:
    within 1 % of the quickest of twelve in bench/tiles/h200.jsonl, 90 % of a copy's bandwidth; others are unmeasured."""
    return (1, 4, 4) if dims["t"] * dims["n"] < chip.units * 4096 else (8, 2, 4)


@triton.jit
def swiglu(gate, up):
    """``silu(gate) * up`` of f32 values, rounded to bf16 and back.

    On NVIDIA the reciprocal in PTX: Triton's division guards ranges that do not occur here."""
    below = 1.0 + tl.exp2(gate * -1.4426950408889634)
    if is_cuda():
        gate *= tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], tl.float32, is_pure=True, pack=1)
    else:
        gate /= below
    return to_bf16(gate * up).to(tl.float32)


@triton.jit
def kernel(x, codes, scales, t, n, floor, ROWS: tl.constexpr, COLS: tl.constexpr, POW2: tl.constexpr, NATIVE: tl.constexpr):
    columns = tl.cdiv(tl.cdiv(n, 128), COLS)
    pid = tl.program_id(0)
    i, j = (pid // columns).to(tl.int64), pid % columns
    row, col = i * ROWS + tl.arange(0, ROWS), j * (COLS * 128) + tl.arange(0, COLS * 128)
    inside = (row < t)[:, None] & (col < n)[None, :]
    gate = tl.load(x + row[:, None] * (2 * n) + col[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row[:, None] * (2 * n) + n + col[None, :], mask=inside, other=0.0).to(tl.float32)
    quantize(swiglu(gate, up), codes, scales, row, t, j * COLS, n, floor, ROWS, COLS, POW2, NATIVE)


def launch(x, codes, scales, workspace, scale):
    (t, n), chip = codes.shape, chip_of(x)
    rows, cols, warps = tile({"t": t, "n": n}, chip)
    grid = (cdiv(t, rows) * cdiv(n, cols * 128),)
    run(kernel, grid, x, raw(codes), scales, t, n, FLOOR, ROWS=rows, COLS=cols, POW2=scale == "pow2", NATIVE=chip.e4m3,
        num_warps=warps)
