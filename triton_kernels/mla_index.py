"""``mla_index``: a program keeps a tile of keys and lets the queries of a chunk pass by; heads are summed in registers.

A score of one head costs 256 FLOPs of FP8 and a maximum and a product-and-sum of f32: at the peak of an H200 32 scores
a cycle and multiprocessor, 64 of its 128 lanes. Two or three programs on a multiprocessor overlap one's sums with
another's products. 128 keys x 128 rows of queries read 96 bytes of shared memory a cycle at the peak, of 128.
"""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import cdiv, chip_of, codes, e4m3_decode, next_power_of_2, run

MOST = 64  # queries of a program


def tile(dims, chip):
    """Keys of a tile, heads of a step, queries of a step and of a program, warps, stages. bench/results/h200.jsonl:
    45 to 50 % of the FP8 peak in prefill; other tiles and chips are unmeasured.

    A step takes 128 rows of q on sm90, 64 where operands go through registers. A program takes so many queries that
    two programs a multiprocessor do the work, which fit there together, and at most MOST; each loads its keys anew.
    On AMD loads ahead over two loops, queries and their heads, would spill scalar registers, and a step of one query others.
    """
    t, s, h = dims["t"], dims["s"], dims["h"]
    large = chip.family in ("sm90", "sm100", "sm103")
    heads = min(128 if large else 64, max(16, next_power_of_2(h)))
    step = (128 if large else 64) // heads if h > 0 and (t > 1 or chip.amd) else 1
    programs = 2 * chip.units // (cdiv(s, 128) or 1) or 1
    chunk = min(MOST, next_power_of_2(cdiv(t, programs)))
    return 128, heads, step, max(step, chunk), 4 if large else 8, 3 if large or h <= heads else 1 if chip.amd else 2


@triton.jit
def scores(keys, q, weights, first, h, h0, t, HEADS: tl.constexpr, STEP: tl.constexpr, NATIVE: tl.constexpr):
    """What heads ``h0`` and following of queries ``first`` and following add to ``[keys, STEP]`` scores."""
    row, dim = tl.arange(0, STEP * HEADS), tl.arange(0, 128)
    at = (first + row // HEADS).to(tl.int64) * h + h0 + row % HEADS
    inside = (first + row // HEADS < t) & (h0 + row % HEADS < h)
    x = tl.load(q + at[:, None] * 128 + dim[None, :], mask=inside[:, None], other=0.0)
    w = tl.load(weights + at, mask=inside, other=0.0)
    x = x if NATIVE else e4m3_decode(x)
    dots = tl.maximum(tl.dot(keys, x.T), 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
    return tl.sum(tl.reshape(dots, (keys.shape[0], STEP, HEADS)), axis=2)


@triton.jit(do_not_specialize=["chunk"])
def kernel(q, k, k_scale, weights, start, stop, out, t, s, h, chunk, KEYS: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr,
           LANES: tl.constexpr, ONCE: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr):
    chunks, pid = tl.cdiv(t, chunk), tl.program_id(0)
    t0, k0 = pid % chunks * chunk, pid // chunks * KEYS
    key, lane, each = k0 + tl.arange(0, KEYS), tl.arange(0, LANES), tl.arange(0, STEP)
    # The queries of the chunk whose windows reach this tile lie between the first and the last of them.
    mine = (lane < chunk) & (t0 + lane < t)
    low = tl.maximum(tl.load(start + t0 + lane, mask=mine, other=0), k0)
    high = tl.minimum(tl.load(stop + t0 + lane, mask=mine, other=0), tl.minimum(k0 + KEYS, s))
    first = tl.min(tl.where(low < high, lane // STEP * STEP, chunk))
    last = tl.max(tl.where(low < high, (lane // STEP + 1) * STEP, 0))

    at = key.to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
    keys = tl.load(k + at, mask=(key < s)[:, None], other=0.0)
    scale = tl.load(k_scale + key, mask=key < s, other=0.0)
    if not NATIVE:
        keys = e4m3_decode(keys)
        scale *= 65536.0
    for i in tl.range(first, last, STEP, num_stages=STAGES):
        query = t0 + i + each
        if ONCE:
            sums = scores(keys, q, weights, t0 + i, h, 0, t, HEADS, STEP, NATIVE)
        else:
            sums = tl.zeros((KEYS, STEP), tl.float32)
            for h0 in range(0, h, HEADS):
                sums += scores(keys, q, weights, t0 + i, h, h0, t, HEADS, STEP, NATIVE)
        begin = tl.load(start + query, mask=query < t, other=0)
        end = tl.load(stop + query, mask=query < t, other=0)
        seen = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :])
        sums = tl.where(seen, sums * scale[:, None], float("-inf"))
        inside = (query < t)[None, :] & (key < s)[:, None]
        tl.store(out + query.to(tl.int64)[None, :] * s + key[:, None], sums, mask=inside)
    for i in range(0, chunk, STEP):  # the others
        query = t0 + i + each
        inside = ((query < t) & ((i + each < first) | (i + each >= last)))[:, None] & (key < s)[None, :]
        tl.store(out + query.to(tl.int64)[:, None] * s + key[None, :], float("-inf"), mask=inside)


def launch(q, k, k_scale, weights, start, stop, out, workspace):
    (t, h, _), s, chip = q.shape, k.shape[0], chip_of(q)
    keys, heads, step, chunk, warps, stages = tile({"t": t, "s": s, "h": h}, chip)
    grid = (cdiv(t, chunk) * cdiv(s, keys),)
    run(kernel, grid, codes(q, chip.e4m3), codes(k, chip.e4m3), k_scale, weights, start, stop, out, t, s, h,
        chunk, KEYS=keys, HEADS=heads, STEP=step, LANES=MOST, ONCE=0 < h <= heads, NATIVE=chip.e4m3, STAGES=stages,
        num_warps=warps, num_stages=stages)
