"""Run by the native test executable: the portable CUDA kernels beyond the cases of their rooms: every kind of value, sizes on
both sides of their limits, index data out of range."""

import itertools

import numpy as np
from emulator import bits, cuda_kernel, defined, judge, run_tests, start

from kernomics import OPS, _cuda, numpy_ops
from kernomics.numerics import BF16

SCHEDULES = [(4, 0, 1.0), (2, 3, 0.0)]


def run(name, *tensors, **scalars):
    """Results of the op's CUDA kernel, the same with every schedule."""
    op = OPS[name]
    inputs, scalars = named(op, tensors, scalars)
    dims = op.bind(*inputs.values(), *scalars.values())[0]
    assert cuda_kernel(op).refusal("sm80", dims) is None
    results = [start(op, inputs, scalars, schedule) for schedule in SCHEDULES]
    assert len({bits(outs) for outs in results}) == 1, f"{name}: other bits with another schedule"
    return results[0]


def named(op, tensors, scalars):
    return dict(zip(op.tensors, tensors)), {s.name: scalars.get(s.name, s.default) for s in op.scalars}


def judged(name, *tensors, **scalars):
    """Results of the op's CUDA kernel, which its judge accepts."""
    op = OPS[name]
    got = run(name, *tensors, **scalars)
    inputs, given = named(op, tensors, scalars)
    judge(op, got, defined(op, inputs, given), inputs, given, f"{[x if x is None else x.shape for x in tensors]} {scalars}")
    return got


# ---------------------------------------------------------------- quantizers


def test_quotients():
    """Those of bf16 values and of f32 values are true quotients, also beside the middles between codes."""
    rng = np.random.default_rng(0)
    s = rng.uniform(1, 2, 1 << 15).astype(np.float32)
    s[:9] = 1 + np.float32(2.0**-23) * np.array([0, 1, 2, 3, 2**22, 2**23 - 1, 2**23 - 2, 2**23 - 3, 2**22 - 1], np.float32)
    values = 1 + np.arange(128, dtype=np.float32) / 128  # of every bf16 significand
    middles = 1 + np.arange(16, dtype=np.float32) / 16
    near = (middles[:, None, None] * s).view(np.int32) + np.arange(-4, 5, dtype=np.int32)[:, None]
    for is_bf16, v in ((True, np.tile(values[:, None], (1, len(s)))), (False, near.view(np.float32).reshape(-1, len(s))),
                       (False, rng.uniform(1, 2, (100, len(s))).astype(np.float32))):
        for sign, power in ((1, 0), (-1, -50)):
            a, b = (v * np.float32(sign * 2.0**power)).ravel(), np.tile(s, len(v))
            out = np.empty_like(a)
            _cuda.quotients(*map(numpy_ops._view, (a, b, out)), is_bf16)
            assert np.array_equal(out.view(np.int32), (a / b).view(np.int32)), f"bf16: {is_bf16}"
    zeros, out = np.float32([0.0, -0.0]), np.empty(2, np.float32)
    _cuda.quotients(*map(numpy_ops._view, (zeros, np.float32([3, 3]), out)), True)
    assert out.tobytes() == zeros.tobytes()


def test_quantizing_every_bf16():
    """NaN, Inf, -0 and subnormals among others; blocks of values alike, of which some are finite, all, or none."""
    every = np.arange(1 << 16, dtype=np.uint16)
    mixed = np.random.default_rng(1).permutation(every)
    for patterns, block in itertools.product((every, mixed), ((1, 128), (128, 128), (128, 1))):
        for scale, floor in (("f32", 1e-4), ("pow2", 0.0)):
            judged("fp8_quantize", patterns.reshape(512, 128).view(BF16), block=block, scale=scale, floor=floor)


def test_quantizing_f32():
    """Random bits, magnitudes at which a scale is subnormal or zero, and rows of every alignment."""
    rng = np.random.default_rng(2)
    blocks = (1, 128), (128, 128), (128, 1)
    for (m, k), block, scale in itertools.product(((130, 264), (129, 257), (3, 1024)), blocks, ("f32", "pow2")):
        wild = rng.integers(0, 1 << 32, (m, k), np.uint32).view(np.float32)
        tiny = rng.integers(0, 3000, (m, k), np.uint32).view(np.float32) * rng.choice([-1, 1], (m, k)).astype(np.float32)
        for x in (wild, tiny):
            judged("fp8_quantize", x, block=block, scale=scale, floor=0.0)


def test_many_blocks():
    """More blocks than the chip holds warps: each warp takes several."""
    x = np.random.default_rng(3).standard_normal((2200, 128)).astype(BF16)
    judged("fp8_quantize", x)


def test_swiglu_of_every_gate():
    """Gates of every bf16 up to 80, NaN and Inf."""
    rng = np.random.default_rng(4)
    gate = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    gate = rng.permutation(np.append(gate[np.abs(gate.astype(np.float32)) <= 80], np.array([np.nan, np.inf, -np.inf], BF16)))
    n = 136
    gate = gate[: len(gate) // n * n].reshape(-1, n)
    up = rng.standard_normal(gate.shape).astype(BF16)
    judged("swiglu_quantize", np.concatenate([gate, up], axis=1))


# ---------------------------------------------------------------- experts


def test_routing():
    """More groups than lanes, groups of odd sizes, more experts than any other case, more slots than lanes."""
    rng = np.random.default_rng(5)
    sizes = (1024, 40, 64, 5), (96, 7, 48, 4), (1023, 9, 33, 32), (513, 33, 1, 1), (128, 4, 128, 7), (34, 3, 2, 1)
    for e, top_k, n_group, topk_group in sizes:
        for group_score, score in (("top2", "sigmoid"), ("max", "softmax")):
            logits = (2 * rng.standard_normal((9, e))).astype(np.float32)
            logits[1, ::3] = -np.inf
            logits[2] = 0
            bias = (np.round(8 * rng.standard_normal(e)) / 16).astype(np.float32)
            judged("moe_route", logits, bias, top_k=top_k, n_group=n_group, topk_group=topk_group, group_score=group_score,
                   score=score)


def test_routing_of_odd_rows():
    """NaN logits, softmax of infinities: ids 0..top_k-1 and NaN. Biases of both infinities: a group of no rank comes last."""
    logits = np.zeros((4, 8), np.float32)
    logits[0, 7], logits[1, 0], logits[2] = np.nan, np.inf, -np.inf
    weights, experts = judged("moe_route", logits, None, top_k=3, score="softmax")
    assert np.isnan(weights[:3]).all() and not np.isnan(weights[3]).any()
    assert experts.tolist() == [[0, 1, 2]] * 4
    bias = np.float32([np.inf, -np.inf, -np.inf, -np.inf, 0, 0, 0, 0])
    _, experts = run("moe_route", np.zeros((1, 8), np.float32), bias, top_k=6, n_group=4, topk_group=3)
    assert experts.tolist() == [[4, 5, 6, 7, 2, 3]]


def test_permute_plans():
    """Every copy has one warp, blocks fit into shared memory, and the room's workspace holds the counts."""
    workspace = next(k for k in OPS["moe_permute"].kernels if k.name == "cuda").workspace
    counts = 1025, 2047, 2048, 2049, 32768, 131072, 1 << 20, (1 << 31) - 1
    for copies, e in itertools.product(counts, (0, 1, 7, 256, 1023, 1024, 8191)):
        bins, blocks, each, warps, share, shared = _cuda.permute_plan(copies, e)
        assert bins == e + 1 and 1 <= blocks <= 128 and 1 <= warps <= 8
        assert each % 32 == 0 and share % 32 == 0, "32 copies at a time"
        assert blocks * each >= copies and warps * share >= each
        assert 4 * bins * (warps + 2) + 4 * warps <= shared <= 99 * 1024 and 4 * bins <= shared
        assert workspace({"t": copies, "top_k": 1, "e": e}, None) >= 4 * (copies + blocks * bins)
        assert blocks * bins <= max(copies, bins), "blocks read more counts than there are copies"
    assert _cuda.permutes_few(1024) and not _cuda.permutes_few(1025) and workspace({"t": 1024, "top_k": 1, "e": 5}, None) == 0


def test_permuting():
    """Both ways of ranking, ids out of range (dropped), rows of every alignment, more slots than a turn takes, no columns."""
    rng = np.random.default_rng(6)
    sizes = (93, 11, 5, 24), (94, 11, 5, 24), (1500, 2, 8191, 3), (2500, 9, 64, 7), (40, 3, 1, 0), (600, 2, 1, 2), (700, 3, 0, 4)
    for t, top_k, e, d in sizes:
        experts = rng.integers(-1, e, (t, top_k)).astype(np.int32)
        wrong = rng.random((t, top_k)) < 0.05
        experts[wrong] = rng.choice([-(2**31), -7, e, 2**31 - 1], wrong.sum())
        for dtype in map(np.dtype, (np.float32, BF16, numpy_ops.FP8)):
            x = rng.integers(0, 256, t * d * dtype.itemsize, np.uint8).view(dtype).reshape(t, d)
            got = run("moe_permute", x, experts, n_experts=e)
            op = OPS["moe_permute"]
            want = op.define(x=x, experts=np.where((experts < 0) | (experts >= e), -1, experts), n_experts=e)
            over = {m: v for m, v in op.judge(got, want, {}).items() if not v[0] <= v[1]}
            assert not over, f"moe_permute {t} {top_k} {e} {d}: {over}"


def test_combining():
    """Many slots; a row out of range makes its token NaN and no other; a dropped slot's weight does not matter."""
    rng = np.random.default_rng(7)
    t, top_k = 6, 19
    for d, dtype in itertools.product((16, 13), (np.float32, BF16)):
        y = rng.standard_normal((t * top_k, d)).astype(dtype)
        row_of = rng.permutation(t * top_k).reshape(t, top_k).astype(np.int32)
        weights = rng.uniform(0.1, 1, (t, top_k)).astype(np.float32)
        row_of[2, 3], weights[2, 3] = -1, np.nan
        judged("moe_combine", y, row_of, weights)
        (good,) = run("moe_combine", y, row_of, weights)
        for token, row in ((0, t * top_k), (1, -2), (4, 2**31 - 1), (5, -(2**31))):
            row_of[token, 7] = row
        (got,) = run("moe_combine", y, row_of, weights)
        assert np.isnan(got[[0, 1, 4, 5]].astype(np.float32)).all() and got[[2, 3]].tobytes() == good[[2, 3]].tobytes()


run_tests(globals())
