"""``moe_experts``: the expert block in five launches, six where a step has more than 2048 copies; none moves a row of x.

1. x quantized, once per token, beside the rows of the copies (few copies) or the counts of their blocks (many)
2. rows from the counts (many copies only)
3. grouped product, rows of x gathered through the token of each row, to bf16
4. SwiGLU, quantized or rounded to bf16, of the rows that an expert has
5. grouped product to bf16
6. each token's rows added up

A decode step reads the weights of its experts: 44 MB each in e4m3 at 7168 x 2048, 82 us for 8 at 4.3 TB/s, against which
launches 1, 4 and 6 are latency; so quantization and rows share one launch. With bf16 activations launch 1 has rows only.
"""

import torch
import triton
import triton.language as tl
from kernomics.triton_kernels import moe_combine, moe_permute
from kernomics.triton_kernels.common import FLOOR, cdiv, chip_of, quantize, raw, run
from kernomics.triton_kernels.gemm import grouped
from kernomics.triton_kernels.swiglu_quantize import swiglu


def tile(dims, chip):
    """Rows and blocks of 128 columns of a program of launches 1 and 4. Unmeasured by themselves."""
    return (1, 8) if dims["rows"] * dims["columns"] < chip.units * 16384 else (4, 8)


def pieces(dims, chip=None):
    """Bytes of the workspace's pieces. The first product's result and the second's share one: the SwiGLU lies between."""
    t, d, n, e, top_k = (dims[x] for x in ("t", "d", "n", "e", "top_k"))
    copies = t * top_k
    return {
        "offsets": 4 * (e + 1), "row_of": 4 * copies, "token_of": 4 * copies, "counts": 4 * moe_permute.counts_of(copies, e),
        "codes": t * d, "scales": 4 * t * cdiv(d, 128), "act": 2 * copies * n,
        "act_scales": 4 * copies * cdiv(n, 128), "product": 2 * copies * max(2 * n, d)}


def workspace(dims, chip):
    return sum(cdiv(size, 256) * 256 for size in pieces(dims).values())


@triton.jit(do_not_specialize=["t", "copies", "e", "top_k", "indexers", "per"])
def prepare_kernel(x, codes, scales, experts, counts, offsets, row_of, token_of, t, d, copies, e, top_k, indexers, per, floor,
                   ROWS: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr, COUNT: tl.constexpr, SUB: tl.constexpr,
                   BINS: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Launch 1: the first ``indexers`` programs look at the ids, the others quantize x."""
    pid = tl.program_id(0)
    if pid < indexers:
        if COUNT:
            moe_permute.count(pid, experts, counts, copies, e, per, SUB, BINS)
        else:
            moe_permute.compare(pid, experts, offsets, row_of, None, token_of, copies, e, top_k, KEY, BLOCK, CHUNK)
    else:
        columns = tl.cdiv(tl.cdiv(d, 128), BLOCKS)
        row = ((pid - indexers) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        first = (pid - indexers) % columns * BLOCKS
        col = first * 128 + tl.arange(0, BLOCKS * 128)
        v = tl.load(x + row[:, None] * d + col[None, :], mask=(row < t)[:, None] & (col < d)[None, :], other=0.0)
        quantize(v.to(tl.float32), codes, scales, row, t, first, d, floor, ROWS, BLOCKS, False, NATIVE)


@triton.jit(do_not_specialize=["e"])
def activate_kernel(h, offsets, act, scales, n, e, floor, ROWS: tl.constexpr, BLOCKS: tl.constexpr, FP8: tl.constexpr,
                    NATIVE: tl.constexpr):
    """Launch 4. Rows past the last expert's stay as they are: nobody reads them."""
    columns = tl.cdiv(tl.cdiv(n, 128), BLOCKS)
    i, first = (tl.program_id(0) // columns).to(tl.int64) * ROWS, tl.program_id(0) % columns * BLOCKS
    rows = tl.load(offsets + e)
    if i < rows:
        row, col = i + tl.arange(0, ROWS), first * 128 + tl.arange(0, BLOCKS * 128)
        inside = (row < rows)[:, None] & (col < n)[None, :]
        at = h + row[:, None] * (2 * n) + col[None, :]
        gate, up = tl.load(at, mask=inside, other=0.0), tl.load(at + n, mask=inside, other=0.0)
        v = swiglu(gate.to(tl.float32), up.to(tl.float32))
        if FP8:
            quantize(v, act, scales, row, rows, first, n, floor, ROWS, BLOCKS, False, NATIVE)
        else:
            tl.store(act + row[:, None] * n + col[None, :], v.to(tl.bfloat16), mask=inside)


def block(x, w13, w13_scale, w2, w2_scale, weights, experts, out, workspace, fp8):
    """All launches; scales are None for bf16 weights, ``fp8`` quantizes the activations."""
    (t, d), (e, _, n), top_k, chip = x.shape, w2.shape, experts.shape[1], chip_of(x)
    copies, at, part = t * top_k, 0, {}
    for name, size in pieces({"t": t, "d": d, "n": n, "e": e, "top_k": top_k}).items():
        part[name], at = workspace[at:at + size], at + cdiv(size, 256) * 256

    def piece(name, dtype, *shape):
        count = dtype.itemsize
        for size in shape:
            count *= size
        return part[name][:count].view(dtype).view(shape)

    i32, f32, bf16, e4m3 = torch.int32, torch.float32, torch.bfloat16, torch.float8_e4m3fn
    offsets, row_of, token_of = piece("offsets", i32, e + 1), piece("row_of", i32, t, top_k), piece("token_of", i32, copies)
    counts = part["counts"].view(i32)
    if copies:
        a, a_scale = (piece("codes", e4m3, t, d), piece("scales", f32, t, cdiv(d, 128))) if fp8 else (x, None)
        by_counts = moe_permute.by_counts(copies, e)
        if fp8:
            rows, blocks = tile({"rows": t, "columns": d}, chip)
            programs, per = moe_permute.blocks(copies)
            grid, options = moe_permute.comparison(copies, e)
            indexers = programs if by_counts else grid
            run(prepare_kernel, (indexers + cdiv(t, rows) * cdiv(cdiv(d, 128), blocks),), x, raw(a), a_scale,
                experts, counts, offsets, row_of, token_of, t, d, copies, e, top_k, indexers, per, FLOOR, ROWS=rows,
                BLOCKS=blocks, NATIVE=chip.e4m3, COUNT=by_counts, SUB=moe_permute.SUB,
                BINS=moe_permute.bins(e) if by_counts else 2, num_warps=4, **options)
        elif by_counts:
            moe_permute.launch_count(experts, counts, e)
        if by_counts or not fp8:
            moe_permute.launch_rows(experts, counts, offsets, row_of, None, token_of, e)
        h = piece("product", bf16, copies, 2 * n)
        grouped(a, a_scale, w13, w13_scale, offsets, h, rows=token_of)
        rows, blocks = tile({"rows": copies, "columns": n}, chip)
        act = piece("act", e4m3 if fp8 else bf16, copies, n)
        act_scale = piece("act_scales", f32, copies, cdiv(n, 128)) if fp8 else None
        run(activate_kernel, (cdiv(copies, rows) * cdiv(cdiv(n, 128), blocks),), h, offsets,
            raw(act) if fp8 else act, act_scale, n, e, FLOOR, ROWS=rows, BLOCKS=blocks, FP8=fp8, NATIVE=chip.e4m3, num_warps=4)
        grouped(act, act_scale, w2, w2_scale, offsets, piece("product", bf16, copies, d))
    moe_combine.launch(piece("product", bf16, copies, d), row_of, weights, out, None)


def launch(x, w13, w13_scale, w2, w2_scale, weights, experts, out, workspace, activations):
    block(x, w13, w13_scale, w2, w2_scale, weights, experts, out, workspace, activations == "fp8")
