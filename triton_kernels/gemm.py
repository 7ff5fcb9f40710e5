"""Block-scaled matrix products: one tile's sums, dense and grouped kernels over tiles, and the sum of split sums.

``c = a @ b.T`` with rows of a (tokens) and rows of b (weights), both contiguous along k. An operand is e4m3 with f32
scales, one per row and 128 of k for a, one per 128 x 128 for b; or bf16 without. e4m3 x e4m3 multiplies as it is where
the chip can, else as f16 decoded from bytes; bf16 x e4m3 multiplies as bf16, which holds every e4m3 value.
A fresh ``tl.dot`` per 128 of k (or less) and an f32 sum with the scales: FP8 tensor cores keep about 14 bits.

On sm90 a 128 x 128 x 128 step takes the tensor cores 512 cycles and its 16384 additions 128 more, in which they would wait:
two steps a turn let the compiler put one's additions under the other's product. Its 32 KiB of operands come from L2 at about
39 bytes a cycle and multiprocessor, 840 cycles, so L2 is the limit to expect, at 60 % of the peak; a tile of 128 x 256 would
need 48 KiB for twice the work, but its sums and a step's product exceed the registers. An H200 reaches 41 to 70 % of its
measured ceiling at 4096 rows (bench/results/h200.jsonl, bench/tiles/h200.jsonl).
"""

import functools

import torch
import triton
import triton.language as tl
from kernomics.triton_kernels.common import cdiv, chip_of, codes, e4m3_decode, next_power_of_2, run, to_bf16
from triton.tools.tensor_descriptor import TensorDescriptor

# ---------------------------------------------------------------- one tile


@triton.jit
def as_dot(x, other_bf16: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """An operand as ``tl.dot`` takes it: e4m3, or f16 that holds value/256, or bf16 (for NATIVE value, else value/256)."""
    if not FP8:
        return x
    elif other_bf16:
        return to_bf16(x if NATIVE else e4m3_decode(x))
    else:
        return x if NATIVE else e4m3_decode(x)


@triton.jit
def tile_of(x, at, row, cells, col, k, TMA: tl.constexpr, EVEN: tl.constexpr):
    """BK columns from ``at`` of a tile's rows: ``x`` is a descriptor and ``row`` the tile's first row, or ``x`` points to
    column 0 of some row and ``cells`` are the elements counted from there."""
    if TMA:
        return x.load([row, at])
    elif EVEN:
        return tl.load(x + at + cells)
    else:
        return tl.load(x + at + cells, mask=col[None, :] < k - at, other=0.0)


@triton.jit
def product(a, a_scale, b, b_scale, a_first, a_limit, a_row, b_first, b_limit, b_block, k, first, last,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, SWAP: tl.constexpr, A_FP8: tl.constexpr,
            B_FP8: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr, TMA_A: tl.constexpr, TMA_B: tl.constexpr,
            FAR: tl.constexpr = False):
    """f32 sums ``[BM, BN]`` (``[BN, BM]`` if SWAP) over the steps ``[first, last)`` of BK columns.

    ``a_first``, ``b_first``: rows of a and b that the tile starts at; rows from ``a_limit`` or ``b_limit`` on are those before
    it. With ``a_row`` the tile's rows of a are those instead, whose elements count in 64 bits if FAR. ``b_block``: the tile's
    row of ``b_scale``; BN divides 128. ``a``, ``b`` are pointers, or descriptors (TMA) of tiles. EVEN: BK divides k. UNROLL
    steps a turn: the compiler lets a step's additions run beside the next step's product.
    """
    blocks = tl.cdiv(k, 128)
    col = tl.arange(0, BK)
    if a_row is not None:
        if FAR:
            a_row = a_row.to(tl.int64)
        a_from, a_scale_from = a, a_scale
    else:  # 32-bit offsets within a tile: half the registers
        a_row = tl.minimum(tl.arange(0, BM), a_limit - 1 - a_first)
        a_from = a if TMA_A else a + a_first.to(tl.int64) * k
        a_scale_from = a_scale + a_first.to(tl.int64) * blocks if A_FP8 else a_scale
    a_cells = a_row[:, None] * k + col[None, :]
    b_from = b if TMA_B else b + b_first.to(tl.int64) * k
    b_cells = tl.minimum(tl.arange(0, BN), b_limit - 1 - b_first)[:, None] * k + col[None, :]
    if A_FP8:
        a_scale_at = a_scale_from + a_row * blocks
    if B_FP8:
        b_scale_at = b_scale + b_block.to(tl.int64) * blocks
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for i in tl.range(first, last, loop_unroll_factor=UNROLL):
        at = i * BK
        factor = 1.0
        if B_FP8:
            factor = tl.load(b_scale_at + at // 128)
        if A_FP8:
            factor = tl.load(a_scale_at + at // 128) * factor
        if B_FP8 and not NATIVE:
            factor *= 65536.0 if A_FP8 else 256.0
        x = as_dot(tile_of(a_from, at, a_first, a_cells, col, k, TMA_A, EVEN), not B_FP8, A_FP8, NATIVE)
        w = as_dot(tile_of(b_from, at, b_first, b_cells, col, k, TMA_B, EVEN), not A_FP8, B_FP8, NATIVE)
        if SWAP:
            if A_FP8:
                acc += tl.dot(w, tl.trans(x)) * factor[None, :]
            elif B_FP8:
                acc += tl.dot(w, tl.trans(x)) * factor
            else:
                acc = tl.dot(w, tl.trans(x), acc)
        else:
            if A_FP8:
                acc += tl.dot(x, tl.trans(w)) * factor[:, None]
            elif B_FP8:
                acc += tl.dot(x, tl.trans(w)) * factor
            else:
                acc = tl.dot(x, tl.trans(w), acc)
    return acc


@triton.jit
def place(item, m_tiles, n_tiles, GROUP: tl.constexpr):
    """(row, column) of tile ``item``: down GROUP rows, then to the next column, so that tiles in flight share operands in L2."""
    width = GROUP * n_tiles
    first = item // width * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    within = item % width
    return first + within % size, within // size


# ---------------------------------------------------------------- kernels


@triton.jit
def put(out, acc, bias, first, last, col, n, BM: tl.constexpr, SWAP: tl.constexpr):
    """``acc + bias`` to BM rows of ``out`` from ``first`` on, those before ``last``, and to the columns that are inside."""
    if SWAP:
        acc = tl.trans(acc)
    if bias is not None:
        acc += tl.load(bias + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    row = tl.arange(0, BM)
    n = tl.where(first < last, n, 0)  # n, which the compiler does not know: it would keep addresses from tile to tile
    tl.store(out + first.to(tl.int64) * n + (row[:, None] * n + col[None, :]), acc.to(out.dtype.element_ty),
             mask=(row < last - first)[:, None] & (col < n)[None, :])


@triton.jit
def dense_item(item, a, a_scale, b, b_scale, bias, out, m, n, k, per_part, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, UNROLL: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr, A_FP8: tl.constexpr,
               B_FP8: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr):
    """One tile of one part of k of ``dense_kernel``."""
    m_tiles, n_tiles = tl.cdiv(m, BM), tl.cdiv(n, BN)
    part = item // (m_tiles * n_tiles)
    i, j = place(item % (m_tiles * n_tiles), m_tiles, n_tiles, GROUP)
    first = part * per_part
    last = tl.minimum(first + per_part, tl.cdiv(k, BK))
    acc = product(a, a_scale, b, b_scale, i * BM, m, None, j * BN, n, j * BN // 128, k, first, last, BM, BN, BK, UNROLL,
                  SWAP, A_FP8, B_FP8, NATIVE, EVEN, TMA, TMA)
    put(out + part.to(tl.int64) * m * n, acc, bias, i * BM, m, j * BN + tl.arange(0, BN), n, BM, SWAP)


@triton.jit
def dense_kernel(a, a_scale, b, b_scale, bias, out, m, n, k, per_part, parts, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, UNROLL: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr, A_FP8: tl.constexpr,
                 B_FP8: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, LOOP: tl.constexpr):
    """``out = a @ b.T + bias``, one tile a program, or with LOOP each num_programs-th; where ``parts`` of ``per_part`` steps of
    k are not one, ``out[part]`` is the sum over that part, in f32."""
    if LOOP:
        items = tl.cdiv(m, BM) * tl.cdiv(n, BN) * parts
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):  # else it needs more registers
            dense_item(item, a, a_scale, b, b_scale, bias, out, m, n, k, per_part, BM, BN, BK, UNROLL, GROUP, SWAP, A_FP8, B_FP8,
                       NATIVE, EVEN, TMA)
    else:
        dense_item(tl.program_id(0), a, a_scale, b, b_scale, bias, out, m, n, k, per_part, BM, BN, BK, UNROLL, GROUP, SWAP, A_FP8,
                   B_FP8, NATIVE, EVEN, TMA)


@triton.jit
def sum_kernel(parts, bias, out, n, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """``out = sum of parts + bias``, in the order of the parts."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(PARTS):
        acc += tl.load(parts + (at + p * size), mask=inside, other=0.0)
    if bias is not None:
        acc += tl.load(bias + at % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def groups_of(offsets, e, t, E: tl.constexpr):
    """Indices below E, starts and stops of the groups, and whether the offsets break the contract."""
    ids = tl.arange(0, E)
    start = tl.load(offsets + ids, mask=ids <= e, other=0)
    stop = tl.load(offsets + ids + 1, mask=ids < e, other=0)
    wrong = (ids < e) & ((stop < start) | (start < 0) | (stop > t)) | (ids == 0) & (start != 0)
    return ids, start, stop, tl.max(wrong.to(tl.int32), axis=0) > 0


@triton.jit
def grouped_kernel(a, a_scale, b, b_scale, offsets, rows, out, t, a_rows, e, n, k, BM: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, UNROLL: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr,
                   SWAP: tl.constexpr, A_FP8: tl.constexpr, B_FP8: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr,
                   TMA: tl.constexpr, FAR: tl.constexpr):
    """See ``grouped``. Every program counts the tiles of all groups from the offsets and takes each num_programs-th tile."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    ids, start, stop, wrong = groups_of(offsets, e, t, E)
    tiles = tl.where((ids < e) & (not wrong), tl.cdiv(stop - start, BM), 0)
    n_tiles, steps = tl.cdiv(n, BN), tl.where(a_rows > 0, tl.cdiv(k, BK), 0)
    ends = tl.cumsum(tiles, axis=0) * n_tiles  # a group's last tile + 1

    # Rows that no group has.
    fill = tl.where(wrong, float("nan"), 0.0).to(out.dtype.element_ty)
    free = tl.where(wrong, 0, tl.load(offsets + e))
    for item in tl.range(pid, (t - free) * tl.cdiv(n, 1024), programs):
        col = item % tl.cdiv(n, 1024) * 1024 + tl.arange(0, 1024)
        row = (free + item // tl.cdiv(n, 1024)).to(tl.int64)
        tl.store(out + row * n + col, tl.broadcast_to(fill, (1024,)), mask=col < n)

    for item in tl.range(pid, tl.sum(tiles, axis=0) * n_tiles, programs, disable_licm=True):  # else it spills
        group = tl.sum((ends <= item).to(tl.int32), axis=0)
        before = tl.sum(tl.where(ends <= item, tiles, 0), axis=0) * n_tiles
        first, last = tl.load(offsets + group), tl.load(offsets + group + 1)
        i, j = place(item - before, tl.cdiv(last - first, BM), n_tiles, GROUP)
        a_row = None
        if rows is not None:
            row = first + i * BM + tl.arange(0, BM)
            from_row = tl.load(rows + row, mask=row < last, other=-1)
            found = (from_row >= 0) & (from_row < a_rows)
            a_row = tl.where(found, from_row, 0)
            kind = tl.where(found, 1.0, tl.where(from_row == -1, 0.0, float("nan")))  # a number: masks fill scalar registers
        blocks = tl.cdiv(n, 128)
        acc = product(a, a_scale, b, b_scale, first + i * BM, last, a_row, group * n + j * BN, group * n + n,
                      group * blocks + j * BN // 128, k, 0, steps, BM, BN, BK, UNROLL, SWAP, A_FP8, B_FP8, NATIVE, EVEN,
                      TMA and rows is None, TMA, FAR)
        if rows is not None:
            kind = kind[None, :] if SWAP else kind[:, None]
            acc = tl.where(kind == 1.0, acc, kind)
        put(out, acc, None, first + i * BM, last, j * BN + tl.arange(0, BN), n, BM, SWAP)


# ---------------------------------------------------------------- launches


def kinds(a, b, chip):
    """Operands as the kernels take them, and their constexprs."""
    a_fp8, b_fp8 = a.element_size() == 1, b.element_size() == 1
    a, b = codes(a, chip.e4m3) if a_fp8 else a, codes(b, chip.e4m3) if b_fp8 else b
    return a, b, {"A_FP8": a_fp8, "B_FP8": b_fp8, "NATIVE": chip.e4m3}


def tiled(a, b, rows, options, chip):
    """TMA descriptors of a and b in place of pointers, and whether they are: addresses and rows must be multiples of 16 bytes."""
    k = b.shape[-1]
    if not (options["TMA"] and chip.tma and k * a.element_size() % 16 == 0 and k * b.element_size() % 16 == 0
            and (a.data_ptr() | b.data_ptr()) % 16 == 0 and 0 not in a.shape and 0 not in b.shape):
        return a, b, False
    if rows is None:
        a = TensorDescriptor.from_tensor(a, [options["BM"], options["BK"]])
    return a, TensorDescriptor.from_tensor(b.view(-1, k), [options["BN"], options["BK"]]), True


def e4m3_on_sm90(dims, chip):
    """Whether the tiles are those that bench/tiles/h200.jsonl has times of."""
    return chip.family == "sm90" and dims["a_bytes"] == dims["b_bytes"] == 1 and dims["k"] % 16 == 0


def options_of(bm, dims, chip):
    """Options of a kernel that takes tiles of ``bm`` rows of a: 16, 32, 64 or 128. Unmeasured but on sm90
    (bench/tiles/h200.jsonl): e4m3, groups of rows among them, and groups of 1 and 32 rows of bf16 with e4m3, each within
    1 % of the quickest of sixteen.

    Up to 32 rows, where weights are all the traffic, weights lie on the long side of the matrix instruction and no more than
    16 or 32 of its columns are tokens; so they do where they are decoded, as that side may come from registers (on AMD all
    operands do, and the other way takes fewer scalar registers). From 64 rows on the tile is as large as the registers hold
    its sums and a step's product. Operands decoded in registers take steps of 64 where those of 128 would spill, as do large
    ones of bf16 where shared memory is short. Where 16 does not divide k, rows start anywhere and their elements come one by
    one through registers, with an address each: tiles of 64 x 64 a step leave room for those.
    """
    if dims["k"] % 16:
        return {"BM": min(bm, 64), "BN": 64, "BK": 64, "GROUP": 8, "UNROLL": 1, "TMA": False, "SWAP": bm <= 32, "num_warps": 8,
                "num_stages": 1}
    decoded = dims["a_bytes"] != dims["b_bytes"] or dims["a_bytes"] == 1 and not chip.e4m3
    options = {"BM": bm, "BN": 64 if bm <= 32 else 128, "BK": 128, "GROUP": 8, "UNROLL": 1, "TMA": False,
               "SWAP": bm <= 32 or dims["a_bytes"] > dims["b_bytes"] and not chip.amd, "num_warps": 4 if bm <= 32 else 8}
    if decoded and (bm >= 64 or chip.amd and (bm >= 32 or dims["a_bytes"] == 2 and not chip.e4m3)):
        options["BK"] = 64
    if dims["a_bytes"] == 2 and (bm == 128 and chip.shared < 128 << 10 or bm == 64 and chip.family == "sm80"):
        options["BK"] = 64
    if chip.amd:
        return options | {"num_stages": 2}
    if chip.family == "sm90" and dims["a_bytes"] > dims["b_bytes"] and bm <= 64:
        warps, stages = (8, 3) if bm == 64 else (4, 4)
        return options | {"BN": 64 if bm == 16 else 128, "BK": 128, "num_warps": warps, "num_stages": stages}
    if bm <= 32:
        return options | {"TMA": bm == 16 and e4m3_on_sm90(dims, chip), "num_stages": 4 if chip.shared < 128 << 10 else 5}
    if bm == 64 and e4m3_on_sm90(dims, chip):
        return options | {"TMA": True, "num_warps": 4, "num_stages": 4}
    if bm == 64:
        return options | {"num_stages": 3 if chip.shared < 128 << 10 else 4}
    if chip.family == "sm90" and not decoded:
        return options | {"UNROLL": 2 if dims["a_bytes"] == 1 else 1, "TMA": dims["a_bytes"] == 1, "num_stages": 3}
    stage = bm * options["BK"] * (dims["a_bytes"] + dims["b_bytes"])
    return options | {"TMA": chip.family in ("sm100", "sm103"), "num_stages": min(4, (chip.shared - 2048) // stage)}


def per_unit(options, dims, chip):
    """Programs that a multiprocessor holds at a time, by its registers and shared memory."""
    stage = options["BK"] * (options["BM"] * dims["a_bytes"] + options["BN"] * dims["b_bytes"])
    return max(1, min(3 if options["BM"] <= 32 else 2 if options["BM"] == 64 else 1,
                      chip.shared // (stage * options["num_stages"])))


def grouped_tile(dims, chip):
    """Options of ``grouped``. dims: t, e, n, k and a_bytes, b_bytes, the bytes of one element.

    Groups are taken as even but for small ones, whose sizes scatter (rows of random experts).
    """
    each = dims["t"] / max(min(dims["e"], dims["t"]), 1)
    if e4m3_on_sm90(dims, chip):
        return options_of(16 if each <= 11 else 64 if each <= 128 else 128, dims, chip)
    most = 64 if chip.family in ("sm100", "sm103") and dims["a_bytes"] > dims["b_bytes"] else 128  # 128 spills there
    few = 11 if chip.amd else 24  # 32 rows from anywhere would spill scalar registers on AMD
    return options_of(16 if each <= 11 else 32 if each <= few else 64 if each <= 64 else most, dims, chip)


def grouped(a, a_scale, b, b_scale, offsets, out, rows=None, options=None):
    """One launch: ``out[r] = (a * a_scale)[rows[r]] @ (b[i] * b_scale[i]).T`` for ``offsets[i] <= r < offsets[i + 1]``.

    Works on tensors alone (no host reads, no allocation; CUDA-graph capturable; also on device "meta").

    Parameters
    ----------
    a, a_scale : e4m3 ``[s, k]`` with f32 ``[s, ceil(k/128)]``; or bf16 ``[s, k]`` and None
    b, b_scale : e4m3 ``[e, n, k]`` with f32 ``[e, ceil(n/128), ceil(k/128)]``; or bf16 ``[e, n, k]`` and None.
        a may be bf16 with either b; a in e4m3 wants b in e4m3
    offsets : i32 ``[e + 1]``, read on the device. Group i is rows ``offsets[i]:offsets[i + 1]`` of out; it may be empty and
        starts anywhere. Rows past ``offsets[e]`` become zero. Offsets that do not start at 0, decrease or end past t make all
        of out NaN (nothing is read or written outside)
    out : bf16 (or f32) ``[t, n]``; every element is written
    rows : None: row r of out takes row r of a (then s = t). Or i32 ``[t]``: it takes row ``rows[r]`` of a; for -1 it becomes
        zeros, for any other index outside ``[0, s)`` NaN. Entries past ``offsets[e]`` are not read
    options : of ``grouped_tile``, which chooses by default from shapes and chip

    All tensors are contiguous. The same inputs give the same bits.
    """
    (t, n), (e, _, k), chip = out.shape, b.shape, chip_of(a)
    dims = {"t": t, "e": e, "n": n, "k": k, "a_bytes": a.element_size(), "b_bytes": b.element_size()}
    options = dict(options or grouped_tile(dims, chip))
    a_rows, (a, b, kind) = a.shape[0], kinds(a, b, chip)
    groups, bm = min(e, t), options["BM"]
    most = (groups + (t - groups) // bm) * cdiv(n, options["BN"])  # tiles, however the rows fall into groups
    programs = min(max(most, cdiv(t * cdiv(n, 1024), 4)), per_unit(options, dims, chip) * chip.units)
    a, b, options["TMA"] = tiled(a, b, rows, options, chip)
    run(grouped_kernel, (programs,), a, a_scale, b, b_scale, offsets, rows, out, t, a_rows, e, n, k,
        E=next_power_of_2(e + 1), FAR=rows is not None and a_rows * k >= 2**31, EVEN=k % options["BK"] == 0, **kind,
        **options)


STEP = {16: 260, 32: 280, 64: 380, 128: 500}  # ns of a step by BM, see dense_tile
# Tiles of e4m3 by descriptor on sm90, as options; and in ns what a step takes alone, what of a step each program of a
# multiprocessor takes where several are, and what a tile takes beyond its steps: fitted to bench/tiles/h200.jsonl, 30 shapes of 1
# to 4096 rows, where the choice is 0.3 % slower than the best of those tried on average, 6 % at most.
HOPPER = [({"BM": bm, "BN": bn, "BK": 128, "GROUP": group, "UNROLL": unroll, "TMA": True, "SWAP": bm == 16, "num_warps": warps,
            "num_stages": stages}, times) for bm, bn, group, unroll, warps, stages, times in [
    (16, 64, 8, 1, 4, 6, (438, 89, 1712)), (64, 64, 8, 1, 4, 5, (571, 111, 908)),
    (64, 128, 8, 1, 4, 4, (737, 458, 629)), (128, 128, 16, 2, 8, 3, (868, 910, 894))]]


def hopper_tile(dims, chip):
    """``dense_tile`` for e4m3 of any but 17 to 32 rows on sm90, where 16 divides k. Of the same fit: weights come at 3172 bytes
    a ns, and parts cost a second launch and 1.4 ns for each 1000 sums."""
    m, n, k, found = dims["m"], dims["n"], dims["k"], []
    steps = cdiv(k, 128)
    for options, (alone, each, ends) in HOPPER:
        if (options["BM"] == 16) != (m <= 16):
            continue
        tiles, slots = cdiv(m, options["BM"]) * cdiv(n, options["BN"]), chip.units * per_unit(options, dims, chip)
        for parts in range(1, max(1, min(16, steps // 4)) + 1):
            per_part, rounds = max(cdiv(steps, parts), 1), cdiv(tiles * parts, slots)
            step = max(alone, each * max(min(tiles * parts, slots) / chip.units, 1))
            ns = max(n * k / 3172, rounds * per_part * step) + rounds * ends + (4641 + 0.00141 * parts * m * n) * (parts > 1)
            found.append((ns, len(found), options | {"PARTS": max(cdiv(steps, per_part), 1), "per_part": per_part}))
    return min(found)[2]


def dense_tile(dims, chip):
    """Options of ``dense``, with PARTS of k. dims: m, n, k and a_bytes, b_bytes, the bytes of one element.

    The smallest estimate. But for those of ``hopper_tile`` its figures are guesses for an H100 or H200, unmeasured: a step's
    time is that of its bytes at 60 to a ns and multiprocessor (of L2), or for few rows of 32 KiB in flight at 1 us of latency;
    weights come at 32 bytes to a ns and multiprocessor (4.3 TB/s over 132), partial sums go and come at 20; a second launch
    takes 1500 ns.
    """
    return dict(estimated_tile(*(dims[name] for name in ("m", "n", "k", "a_bytes", "b_bytes")), chip))


@functools.lru_cache(1 << 14)  # a tenth of a millisecond, twice a call
def estimated_tile(m, n, k, a_bytes, b_bytes, chip):
    dims, best = {"m": m, "n": n, "k": k, "a_bytes": a_bytes, "b_bytes": b_bytes}, None
    if e4m3_on_sm90(dims, chip) and not 16 < m <= 32:
        return hopper_tile(dims, chip)
    for bm in (16,) if m <= 16 else (32,) if m <= 32 else (64,) if m <= 64 else (128, 64):
        options = options_of(bm, dims, chip)
        tiles, steps = cdiv(m, options["BM"]) * cdiv(n, options["BN"]), cdiv(k, options["BK"])
        slots = chip.units * (per_unit(options, dims, chip) if bm <= 32 else 1)
        for parts in range(1, max(1, min(16, steps // 4)) + 1):
            per_part = max(cdiv(steps, parts), 1)
            ns = max(n * k * dims["b_bytes"] / (32 * chip.units), cdiv(tiles * parts, slots) * per_part * STEP[bm])
            ns += (1500 + 8 * parts * m * n / (20 * chip.units)) * (parts > 1)
            if best is None or ns < best[0]:
                best = ns, options | {"PARTS": max(cdiv(steps, per_part), 1), "per_part": per_part}
    return best[1]


def dense_workspace(dims, chip):
    parts = dense_tile(dims, chip)["PARTS"]
    return 4 * parts * dims["m"] * dims["n"] if parts > 1 else 0


def dense(a, a_scale, b, b_scale, bias, out, workspace):
    """``out = (a * a_scale) @ (b * b_scale).T + bias``, operands as in ``grouped``; one launch, or two where k is split."""
    (m, n), k, chip = out.shape, a.shape[1], chip_of(a)
    dims = {"m": m, "n": n, "k": k, "a_bytes": a.element_size(), "b_bytes": b.element_size()}
    options = dense_tile(dims, chip)
    a, b, kind = kinds(a, b, chip)
    parts, per_part = options.pop("PARTS"), options.pop("per_part")
    partial = workspace[:4 * parts * m * n].view(torch.float32) if parts > 1 else out
    items = cdiv(m, options["BM"]) * cdiv(n, options["BN"]) * parts
    programs = per_unit(options, dims, chip) * chip.units
    # More tiles than programs at a time: the next tile's first copies leave while the last one's results are written.
    options["LOOP"] = items > programs
    if options["LOOP"] and chip.family == "sm80" and options["BM"] == 64 and options["BN"] == 128:
        options["maxnreg"] = 128  # it would take 174 and the place of a multiprocessor's second program
    a, b, options["TMA"] = tiled(a, b, None, options, chip)
    run(dense_kernel, (min(items, programs),), a, a_scale, b, b_scale, None if parts > 1 else bias, partial, m, n, k, per_part,
        parts, EVEN=k % options["BK"] == 0, **kind, **options)
    if parts > 1:
        run(sum_kernel, (cdiv(m * n, 1024),), partial, bias, out, n, m * n, PARTS=parts, BLOCK=1024)
