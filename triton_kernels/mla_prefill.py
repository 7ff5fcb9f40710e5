"""``mla_prefill``: a program takes a tile of queries of one head and walks over their keys, softmax on the way.

A pair of query and key costs 640 FLOPs and one exponential, a key 640 bytes: a tile of 128 queries does 128 FLOPs a
byte, so at 790 TFLOP/s keys arrive at 6 TB/s. Memory gives less, hence the order of the programs: those that run at
the same time share few heads, whose keys and values stay in L2.
"""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import LOG2E, chip_of, run
from triton.tools.tensor_descriptor import TensorDescriptor

L2 = 16 << 20  # bytes of keys and values that programs running together may share: a third of the L2 of an H200


def tile(dims, chip):
    """Queries and keys of a tile, warps, stages. On sm90 the quickest of nine tiles in bench/tiles/h200.jsonl; elsewhere
    unmeasured.

    Two programs of 64 queries a multiprocessor, or two warpgroups of one, do products while the other's exponentials run.
    A thread holds 64 sums, 64 scores, 32 rounded p; elsewhere addresses or operands fill registers, so 32 keys.
    """
    t, b, h = dims["t"], dims["b"], dims["h"]
    large = chip.family in ("sm90", "sm100", "sm103")
    if t <= 16 * b:  # decode: bound by memory, 40 KiB in flight a program
        return (16, 64, 4, 2)
    if (t // 128 + b) * h < chip.units:  # too few tiles of 128: half of the work each; two fit a multiprocessor
        return (64, 64, 4, 3 if chip.family == "sm90" else 2) if large else (64, 32, 4, 2)
    if chip.family == "sm90":
        return (128, 64, 8, 3) if t >= 4096 * b else (64, 64, 4, 2)
    if chip.family == "sm120":
        return 64, 32, 4, 2
    return (128, 128, 8, 2) if large else (128, 32, 4 if chip.amd else 8, 2)


@triton.jit
def sequence(cu, b, end, tile, BLOCK: tl.constexpr):
    """The sequence that owns a tile, and the tile's first row in it. Sequence i owns the tiles from
    ``cu[i] // BLOCK + i`` on: at least ``cdiv(length, BLOCK)`` of them, ``end // BLOCK + b`` in all."""
    count = 0
    for i in range(0, b, 128):
        at = i + tl.arange(0, 128)
        first = tl.minimum(tl.maximum(tl.load(cu + at, mask=at < b, other=0), 0), end) // BLOCK + at
        count += tl.sum(((first <= tile) & (at < b)).to(tl.int32))
    index = tl.maximum(count - 1, 0)
    start = tl.minimum(tl.maximum(tl.load(cu + index), 0), end)
    return index, (tile - start // BLOCK - index) * BLOCK


@triton.jit
def place(cu, end, b, h, group, ROWS: tl.constexpr, LAST: tl.constexpr):
    """Head, sequence and first row of this program: programs go by groups of heads, in a group by tiles, where the
    ``LAST`` may come first, then by heads."""
    tiles, pid = end // ROWS + b, tl.program_id(0)
    first = pid // (tiles * group) * group
    heads = tl.minimum(group, h - first)
    tile = (pid - first * tiles) // heads
    index, row = sequence(cu, b, end, tiles - 1 - tile if LAST else tile, ROWS)
    return first + (pid - first * tiles) % heads, index, row


@triton.jit
def span(cu, index, end):
    """First row and length of a sequence, inside ``[0, end]`` whatever the offsets are."""
    start = tl.minimum(tl.maximum(tl.load(cu + index), 0), end)
    return start, tl.minimum(tl.maximum(tl.load(cu + index + 1), start), end) - start


@triton.jit
def keys_seen(row0, tq, tk, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Of a tile of queries: keys that its last query sees, and those in whole tiles that every query sees."""
    some, all_see = tk, tk
    if CAUSAL:
        some = tl.minimum(tl.maximum(tk - tq + tl.minimum(row0 + BM, tq), 0), tk)
        all_see = tl.minimum(tl.maximum(tk - tq + row0 + 1, 0), tk)
    return some, all_see // BN * BN


@triton.jit
def step(acc, top, total, s, v, scale):
    """A tile of scores ``s`` and values enters the softmax: the new sums, maximum (of ``s * scale``) and total."""
    new = tl.maximum(top, tl.max(s, axis=1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s * scale - base[:, None])
    fade = tl.exp2(top - base)
    acc = tl.dot(p.to(tl.bfloat16), v, acc * fade[:, None])
    return acc, new, total * fade + tl.sum(p, axis=1)


@triton.jit
def rows(x, at, column, stride, inside, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """Rows from ``at`` on, ``[ROWS, COLS]`` from a column on; rows not ``inside`` are 0."""
    if TMA:
        y = x.load([at, column])
    else:
        x += at.to(tl.int64) * stride + column
        x += tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLS)[None, :]
        y = tl.load(x) if inside is None else tl.load(x, mask=inside[:, None], other=0.0)
    return y


@triton.jit
def kernel(q, k, v, k_low, k_high, v_all, cu_q, cu_k, out, lse, t, s, h, b, group, scale, width,
           CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
           STAGES: tl.constexpr, TMA: tl.constexpr):
    head, index, row0 = place(cu_q, t, b, h, group, BM, CAUSAL)  # with causal the last tile has most keys
    q0, tq = span(cu_q, index, t)
    if (row0 < 0) | (row0 >= tq):
        return
    k0, tk = span(cu_k, index, s)
    some, whole = keys_seen(row0, tq, tk, CAUSAL, BM, BN)

    row = row0 + tl.arange(0, BM)
    inside = row < tq
    q_low = rows(q, q0 + row0, head * 192, h * 192, inside, BM, 128, False)
    q_high = rows(q, q0 + row0, head * 192 + 128, h * 192, inside, BM, 64, False)
    if NEGATIVE:  # the maximum of the scores is that of the products
        q_low, q_high = (-q_low.to(tl.float32)).to(tl.bfloat16), (-q_high.to(tl.float32)).to(tl.bfloat16)
    acc = tl.zeros((BM, 128), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for n in tl.range(0, whole, BN, num_stages=STAGES):
        x = tl.dot(q_low, rows(k_low, k0 + n, head * 192, h * 192, None, BN, 128, TMA).T)
        x = tl.dot(q_high, rows(k_high, k0 + n, head * 192 + 128, h * 192, None, BN, 64, TMA).T, x)
        acc, top, total = step(acc, top, total, x, rows(v_all, k0 + n, head * 128, h * 128, None, BN, 128, TMA), scale)
    col = tl.arange(0, EDGE)
    for n in tl.range(whole, some, EDGE, num_stages=STAGES):  # by pointers: rows of another sequence may hold NaN
        inside_n = n + col < tk
        x = tl.dot(q_low, rows(k, k0 + n, head * 192, h * 192, inside_n, EDGE, 128, False).T)
        x = tl.dot(q_high, rows(k, k0 + n, head * 192 + 128, h * 192, inside_n, EDGE, 64, False).T, x)
        seen = inside_n[None, :]
        if CAUSAL:
            seen = (n + col)[None, :] <= (tk - tq + row)[:, None]
        x = tl.where(seen, x * scale, float("-inf"))
        acc, top, total = step(acc, top, total, x, rows(v, k0 + n, head * 128, h * 128, inside_n, EDGE, 128, False), 1.0)
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    at = tl.arange(0, BM)
    out += (q0 + row0).to(tl.int64) * width + head * 128 + at[:, None] * width + tl.arange(0, 128)[None, :]
    tl.store(out, acc.to(tl.bfloat16), mask=inside[:, None])
    # Without keys the maximum is -inf and so is the logarithm of 0.
    tl.store(lse + head.to(tl.int64) * t + q0 + row, top * 0.6931471805599453 + tl.log(total), mask=inside)


@triton.jit
def refuse_kernel(cu_q, cu_k, x, y, z, t, s, b, x_size, y_size, z_size, BLOCK: tl.constexpr):
    """Results are NaN where offsets do not start at 0, fall, or do not end at ``t`` and ``s``."""
    wrong = (tl.load(cu_q) != 0) | (tl.load(cu_k) != 0) | (tl.load(cu_q + b) != t) | (tl.load(cu_k + b) != s)
    for i in range(0, b, BLOCK):
        at = i + tl.arange(0, BLOCK)
        inside = at < b
        falls = tl.load(cu_q + at, mask=inside, other=0) > tl.load(cu_q + at + 1, mask=inside, other=0)
        falls |= tl.load(cu_k + at, mask=inside, other=0) > tl.load(cu_k + at + 1, mask=inside, other=0)
        wrong |= tl.max(falls.to(tl.int32), axis=0) > 0
    if wrong:
        fill(x, x_size, BLOCK)
        fill(y, y_size, BLOCK)
        if z is not None:
            fill(z, z_size, BLOCK)


@triton.jit
def fill(x, size, BLOCK: tl.constexpr):
    """NaN everywhere, by all programs."""
    for i in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = i + tl.arange(0, BLOCK)
        tl.store(x + at, tl.full((BLOCK,), float("nan"), x.dtype.element_ty), mask=at < size)


def refuse(cu_q, cu_k, t, s, b, chip, *results):
    """Two or three results become NaN where the offsets are wrong. A launch of its own: the registers of the others are full."""
    sizes = [x.numel() for x in results]
    pad = [None] * (3 - len(results))
    if max(sizes):
        run(refuse_kernel, (chip.units,), cu_q, cu_k, *results, *pad, t, s, b, *sizes, *[0] * len(pad), BLOCK=1024, num_warps=4)


def group_of(h, length):
    """Heads of a group: those whose keys and values, or queries and their gradients, L2 holds."""
    return max(1, min(h, L2 // (640 * max(1, length))))


def boxes(x, columns, size):
    """``x`` as a matrix ``[rows, columns]`` that is copied in boxes of ``size``."""
    return TensorDescriptor(x, [x.shape[0], columns], [columns, 1], list(size))


def launch(q, k, v, cu_q, cu_k, out, lse, workspace, softmax_scale, causal):
    (t, h, _), s, b, chip = q.shape, k.shape[0], cu_q.shape[0] - 1, chip_of(q)
    bm, bn, warps, stages = tile({"t": t, "s": s, "h": h, "b": b}, chip)
    group = group_of(h, s // max(1, b))
    grid = ((t // bm + b) * h if t and b else 0,)
    tma = chip.tma and s > 0 and h > 0 and k.data_ptr() % 16 == v.data_ptr() % 16 == 0
    bn = bn if tma or not chip.tma else min(bn, 64)  # by pointers 128 would spill
    k_low, k_high, v_all = k, k, v
    if tma:
        k_low, k_high, v_all = boxes(k, h * 192, (bn, 128)), boxes(k, h * 192, (bn, 64)), boxes(v, h * 128, (bn, 128))
    run(kernel, grid, q, k, v, k_low, k_high, v_all, cu_q, cu_k, out, lse, t, s, h, b, group, abs(softmax_scale) * LOG2E,
        h * 128, CAUSAL=causal, NEGATIVE=softmax_scale < 0, BM=bm, BN=bn, EDGE=min(bn, 32 if softmax_scale < 0 else 64),
        STAGES=stages, TMA=tma, num_warps=warps, num_stages=stages)
    refuse(cu_q, cu_k, t, s, b, chip, out, lse)
