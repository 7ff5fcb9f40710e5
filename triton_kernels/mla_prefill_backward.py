"""``mla_prefill_backward``: first dq, a program a tile of queries, then dk and dv, a program a tile of keys.

Both compute the scores anew: 1152 products a pair where one kernel with atomics does 832, and the same bits each time.
"""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import LOG2E, chip_of, run
from kernomics.triton_kernels.mla_prefill import boxes, group_of, keys_seen, place, refuse, rows, span

LARGE = "sm90", "sm100", "sm103"  # operands of products in shared memory, tiles by TMA


def tile(dims, chip):
    """``(queries, keys, edge, warps, stages)`` of dq and of dk and dv, and whether one program does both dk and dv.

    bench/results/h200.jsonl: 20 to 23 % of the bf16 peak; other tiles and chips are unmeasured.
    dk and dv are 320 f32 a key: 160 registers a thread for 64 keys in 4 warps, hence steps of 32 queries,
    and of 16 at the edge, where addresses take more. Where operands fill registers too, dk and dv are two programs.
    """
    known = dims["t"] > 0 and dims["t"] % 16 == dims["s"] % 16 == 0  # otherwise addresses take more
    if chip.family in LARGE:  # dq: 160 KiB; dk, dv: 80 KiB, two programs a multiprocessor
        return (128, 64, 64, 8, 2), (32, 64, 16, 4 if known else 8, 2, True)
    if chip.amd:
        alone = chip.family == "gfx942" and known
        return (64, 32, 32, 4, 2), (32, 128, 32 if alone and dims["causal"] else 16, 4, 1, alone or chip.family == "gfx950")
    if chip.family == "sm120":
        return (64, 16, 16, 4, 2), (16, 128, 16, 8, 2, False)
    return (64, 16, 16, 4, 2), (16, 64, 16, 4, 3, False)


def workspace(dims, chip):
    """delta of every head and query, f32."""
    return 4 * dims["h"] * dims["t"]


@triton.jit(do_not_specialize=["t", "s", "b"])  # ptxas 12.8 dies on the kernel of one token
def queries(dout, dlse, q, k, v, out, lse, cu_q, cu_k, dq, delta, k_low, k_high, v_all, t, s, h, b, group, scale, width,
            CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, STAGES: tl.constexpr,
            TMA: tl.constexpr):
    head, index, row0 = place(cu_q, t, b, h, group, BM, CAUSAL)
    q0, tq = span(cu_q, index, t)
    if (row0 < 0) | (row0 >= tq):
        return
    k0, tk = span(cu_k, index, s)
    some, whole = keys_seen(row0, tq, tk, CAUSAL, BM, BN)

    row, lane, low = row0 + tl.arange(0, BM), tl.arange(0, BM), tl.arange(0, 128)
    inside = row < tq
    q_low = rows(q, q0 + row0, head * 192, h * 192, inside, BM, 128, False)
    q_high = rows(q, q0 + row0, head * 192 + 128, h * 192, inside, BM, 64, False)
    do = rows(dout, q0 + row0, head * 128, h * 128, inside, BM, 128, False)
    o = rows(out, q0 + row0, head * 128, h * 128, inside, BM, 128, False)
    at = head.to(tl.int64) * t + q0 + row
    d = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1) - tl.load(dlse + at, mask=inside, other=0.0)
    tl.store(delta + at, d, mask=inside)
    top = tl.load(lse + at, mask=inside, other=float("inf")) * 1.4426950408889634  # p = 0 for rows that are none
    dq_low, dq_high = tl.zeros((BM, 128), tl.float32), tl.zeros((BM, 64), tl.float32)
    col = tl.arange(0, EDGE)
    for n in tl.range(whole, some, EDGE, num_stages=STAGES):  # by pointers: rows of another sequence may hold NaN
        inside_n = n + col < tk
        low_n = rows(k, k0 + n, head * 192, h * 192, inside_n, EDGE, 128, False)
        high_n = rows(k, k0 + n, head * 192 + 128, h * 192, inside_n, EDGE, 64, False)
        x = tl.dot(q_high, high_n.T, tl.dot(q_low, low_n.T))
        dp = tl.dot(do, rows(v, k0 + n, head * 128, h * 128, inside_n, EDGE, 128, False).T)
        seen = inside_n[None, :]
        if CAUSAL:
            seen = (n + col)[None, :] <= (tk - tq + row)[:, None]
        ds = tl.exp2(x * scale - top[:, None]) * (dp - d[:, None])
        ds = tl.where(seen, ds, 0.0).to(tl.bfloat16)
        dq_low = tl.dot(ds, low_n, dq_low)
        dq_high = tl.dot(ds, high_n, dq_high)
    for n in tl.range(0, whole, BN, num_stages=STAGES):
        low_n = rows(k_low, k0 + n, head * 192, h * 192, None, BN, 128, TMA)
        high_n = rows(k_high, k0 + n, head * 192 + 128, h * 192, None, BN, 64, TMA)
        x = tl.dot(q_high, high_n.T, tl.dot(q_low, low_n.T))
        dp = tl.dot(do, rows(v_all, k0 + n, head * 128, h * 128, None, BN, 128, TMA).T)
        ds = (tl.exp2(x * scale - top[:, None]) * (dp - d[:, None])).to(tl.bfloat16)
        dq_low = tl.dot(ds, low_n, dq_low)
        dq_high = tl.dot(ds, high_n, dq_high)
    factor = scale * 0.6931471805599453
    dq += (q0 + row0).to(tl.int64) * width * 3 + head * 192 + lane[:, None] * (width * 3)
    tl.store(dq + low[None, :], (dq_low * factor).to(tl.bfloat16), mask=inside[:, None])
    tl.store(dq + 128 + tl.arange(0, 64)[None, :], (dq_high * factor).to(tl.bfloat16), mask=inside[:, None])


@triton.jit
def keys(dout, q, k, v, lse, cu_q, cu_k, dk, dv, delta, q_low, q_high, dout_all, t, s, h, b, group, scale, width,
         CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, STAGES: tl.constexpr,
         DK: tl.constexpr, DV: tl.constexpr, TMA: tl.constexpr):
    head, index, row0 = place(cu_k, s, b, h, group, BN, False)  # with causal the first tile has most queries
    k0, tk = span(cu_k, index, s)
    if (row0 < 0) | (row0 >= tk):
        return
    q0, tq = span(cu_q, index, t)
    some, whole = 0, 0  # queries from `some` on see a key of this tile, those from `whole` on see them all
    if CAUSAL:
        some = tl.minimum(tl.maximum(row0 - tk + tq, 0), tq)
        whole = some + tl.cdiv(tl.minimum(tl.maximum(row0 + BN - 1 - tk + tq, 0), tq) - some, EDGE) * EDGE
    end = whole + tl.maximum(tq - whole, 0) // BM * BM
    before, after = (whole - some) // EDGE, tl.cdiv(tl.maximum(tq - end, 0), EDGE)

    row, lane, low = row0 + tl.arange(0, BN), tl.arange(0, BN), tl.arange(0, 128)
    inside = row < tk
    k_low = rows(k, k0 + row0, head * 192, h * 192, inside, BN, 128, False)
    k_high = rows(k, k0 + row0, head * 192 + 128, h * 192, inside, BN, 64, False)
    v_all = rows(v, k0 + row0, head * 128, h * 128, inside, BN, 128, False)
    lse += head.to(tl.int64) * t + q0
    delta += head.to(tl.int64) * t + q0
    dk_low, dk_high = tl.zeros((BN, 128), tl.float32), tl.zeros((BN, 64), tl.float32)
    dv_all = tl.zeros((BN, 128), tl.float32)
    col = tl.arange(0, EDGE)
    for i in tl.range(0, before + after, num_stages=STAGES):  # by pointers: rows of another sequence may hold NaN
        m = tl.where(i < before, some + i * EDGE, end + (i - before) * EDGE)
        inside_m = m + col < tq
        low_m = rows(q, q0 + m, head * 192, h * 192, inside_m, EDGE, 128, False)
        high_m = rows(q, q0 + m, head * 192 + 128, h * 192, inside_m, EDGE, 64, False)
        do = rows(dout, q0 + m, head * 128, h * 128, inside_m, EDGE, 128, False)
        x = tl.dot(k_high, high_m.T, tl.dot(k_low, low_m.T))
        top = tl.load(lse + m + col, mask=inside_m, other=float("inf")) * 1.4426950408889634  # p = 0 where no query is
        p = tl.exp2(x * scale - top[None, :])
        if CAUSAL:
            seen = row[:, None] <= (tk - tq + m + col)[None, :]
            p = tl.where(seen, p, 0.0)
        if DV:
            dv_all = tl.dot(p.to(tl.bfloat16), do, dv_all)
        if DK:
            ds = p * (tl.dot(v_all, do.T) - tl.load(delta + m + col, mask=inside_m, other=0.0)[None, :])
            if CAUSAL:  # 0 * NaN of a query that sees no key
                ds = tl.where(seen, ds, 0.0)
            ds = ds.to(tl.bfloat16)
            dk_low = tl.dot(ds, low_m, dk_low)
            dk_high = tl.dot(ds, high_m, dk_high)
    col = tl.arange(0, BM)
    for m in tl.range(whole, end, BM, num_stages=STAGES):
        low_m = rows(q_low, q0 + m, head * 192, h * 192, None, BM, 128, TMA)
        high_m = rows(q_high, q0 + m, head * 192 + 128, h * 192, None, BM, 64, TMA)
        do = rows(dout_all, q0 + m, head * 128, h * 128, None, BM, 128, TMA)
        x = tl.dot(k_high, high_m.T, tl.dot(k_low, low_m.T))  # [keys, queries]
        p = tl.exp2(x * scale - (tl.load(lse + m + col) * 1.4426950408889634)[None, :])
        if DV:
            dv_all = tl.dot(p.to(tl.bfloat16), do, dv_all)
        if DK:
            ds = (p * (tl.dot(v_all, do.T) - tl.load(delta + m + col)[None, :])).to(tl.bfloat16)
            dk_low = tl.dot(ds, low_m, dk_low)
            dk_high = tl.dot(ds, high_m, dk_high)
    if DK:
        factor = scale * 0.6931471805599453
        dk += (k0 + row0).to(tl.int64) * width * 3 + head * 192 + lane[:, None] * (width * 3)
        tl.store(dk + low[None, :], (dk_low * factor).to(tl.bfloat16), mask=inside[:, None])
        tl.store(dk + 128 + tl.arange(0, 64)[None, :], (dk_high * factor).to(tl.bfloat16), mask=inside[:, None])
    if DV:
        dv += (k0 + row0).to(tl.int64) * width * 2 + head * 128 + lane[:, None] * (width * 2)
        tl.store(dv + low[None, :], dv_all.to(tl.bfloat16), mask=inside[:, None])


def launch(dout, dlse, q, k, v, out, lse, cu_q, cu_k, dq, dk, dv, workspace, softmax_scale, causal):
    import torch

    (t, h, _), s, b, chip = q.shape, k.shape[0], cu_q.shape[0] - 1, chip_of(q)
    delta = lse if workspace is None else workspace.view(torch.float32)  # no queries, no delta
    for_dq, for_dk = tile({"t": t, "s": s, "h": h, "b": b, "causal": causal}, chip)
    sizes = t, s, h, b
    tma = chip.family in LARGE and t > 0 and s > 0 and h > 0 and all(x.data_ptr() % 16 == 0 for x in (q, k, v, dout))

    bm, bn, edge, warps, stages = for_dq
    k_low, k_high, v_all = k, k, v
    if tma:
        k_low, k_high, v_all = boxes(k, h * 192, (bn, 128)), boxes(k, h * 192, (bn, 64)), boxes(v, h * 128, (bn, 128))
    grid = ((t // bm + b) * h if t and b else 0,)
    run(queries, grid, dout, dlse, q, k, v, out, lse, cu_q, cu_k, dq, delta, k_low, k_high, v_all, *sizes,
        group_of(h, s // max(1, b)), softmax_scale * LOG2E, h * 64, CAUSAL=causal, BM=bm, BN=bn, EDGE=edge,
        STAGES=stages, TMA=tma, num_warps=warps, num_stages=stages)

    bm, bn, edge, warps, stages, together = for_dk
    q_low, q_high, dout_all = q, q, dout
    if tma:
        q_low, q_high, dout_all = boxes(q, h * 192, (bm, 128)), boxes(q, h * 192, (bm, 64)), boxes(dout, h * 128, (bm, 128))
    grid = ((s // bn + b) * h if s and b else 0,)
    for parts in ({"DK": True, "DV": True},) if together else ({"DK": True, "DV": False}, {"DK": False, "DV": True}):
        run(keys, grid, dout, q, k, v, lse, cu_q, cu_k, dk, dv, delta, q_low, q_high, dout_all, *sizes,
            group_of(h, t // max(1, b)), softmax_scale * LOG2E, h * 64, CAUSAL=causal, BM=bm, BN=bn, EDGE=edge,
            STAGES=stages, TMA=tma, num_warps=warps, num_stages=stages, **parts)
    refuse(cu_q, cu_k, t, s, b, chip, dq, dk, dv)
