"""``fp8_grouped_wgrad``: one program sums one tile of one group's gradient over the group's rows.

Rows are the summed index, so both tiles lie across it, which FP8 products of sm90 do not take: codes become f16, which
holds every e4m3 value, and multiply as such. Up to some 600 rows a group the f32 gradients, 4 bytes each, take longer to
write (H200: 4.3 TB/s against 790 TFLOP/s).
"""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import cdiv, chip_of, codes, e4m3_decode, next_power_of_2, run
from kernomics.triton_kernels.gemm import groups_of, place


def tile(dims, chip):
    """Rows of a step (a divisor of 128), rows and columns of a gradient's tile, warps, stages. bench/tiles/h200.jsonl: the
    quickest of seven for 8 rows a group, of eight for 128 to 4096. Other chips are unmeasured.

    Several tiles to a multiprocessor, so that one's loads run beside another's stores: small ones for few rows. Where 16 does
    not divide rows, elements come one by one, with an address each: small tiles.
    """
    if dims["n"] % 16 or dims["k"] % 16:
        return (16, 64, 64, 8, 2) if chip.amd else (32, 64, 64, 4, 2)
    if dims["t"] <= 48 * dims["e"]:
        return 32, 64, 64, 4, 2
    if chip.family == "sm90":
        return 64, 64, 128, 4, 2
    if chip.family in ("sm100", "sm103"):
        return 64, 128, 128, 8, 3
    return 64 if chip.amd else 32, 128, 128, 8, 2


@triton.jit
def f16(x, NATIVE: tl.constexpr):
    """Codes as f16 numbers: value, or where not NATIVE value/256."""
    return x.to(tl.float16) if NATIVE else e4m3_decode(x)


@triton.jit
def kernel(dy, dy_scale, x, x_scale, offsets, dw, t, e, n, k, E: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr, NATIVE: tl.constexpr):
    n_tiles, k_tiles = tl.cdiv(n, BN), tl.cdiv(k, BK)
    group = tl.program_id(0) // (n_tiles * k_tiles)
    i, j = place(tl.program_id(0) % (n_tiles * k_tiles), n_tiles, k_tiles, 8)
    _, _, _, wrong = groups_of(offsets, e, t, E)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    start, stop = tl.where(wrong, 0, start), tl.where(wrong, 0, stop)
    row, col = i * BN + tl.arange(0, BN), j * BK + tl.arange(0, BK)
    each = tl.arange(0, BT)
    dy_at, x_at = each[:, None] * n + row[None, :], each[:, None] * k + col[None, :]
    acc = tl.zeros((BN, BK), tl.float32)
    for c in range(start // BT, tl.cdiv(stop, BT)):
        first = c * BT  # scale blocks count from the start of the tensor, and so do steps
        block = (first // 128).to(tl.int64)
        a_scale = tl.load(dy_scale + block * n + row, mask=row < n, other=0.0)
        b_scale = tl.load(x_scale + block * k + col, mask=col < k, other=0.0)
        if not NATIVE:
            a_scale *= 65536.0
        inside = ((first + each >= start) & (first + each < stop))[:, None]
        a = tl.load(dy + first.to(tl.int64) * n + dy_at, mask=inside & (row < n)[None, :], other=0.0)
        b = tl.load(x + first.to(tl.int64) * k + x_at, mask=inside & (col < k)[None, :], other=0.0)
        d = tl.dot(tl.trans(f16(a, NATIVE)), f16(b, NATIVE))
        acc += d * a_scale[:, None] * b_scale[None, :]
    acc += tl.where(wrong, float("nan"), 0.0)
    tl.store(dw + (group.to(tl.int64) * n + row)[:, None] * k + col[None, :], acc, mask=(row < n)[:, None] & (col < k)[None, :])


def launch(dy, dy_scale, x, x_scale, offsets, dw, workspace):
    (e, n, k), t, chip = dw.shape, dy.shape[0], chip_of(dy)
    bt, bn, bk, warps, stages = tile({"t": t, "n": n, "k": k, "e": e}, chip)
    run(kernel, (e * cdiv(n, bn) * cdiv(k, bk),), codes(dy, chip.e4m3), dy_scale, codes(x, chip.e4m3), x_scale,
        offsets, dw, t, e, n, k, E=next_power_of_2(e + 1), BT=bt, BN=bn, BK=bk, NATIVE=chip.e4m3, num_warps=warps,
        num_stages=stages)
