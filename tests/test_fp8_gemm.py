"""Laws of the FP8 products: scales factor out, NaN codes spread, rows stand alone."""

import numpy as np
import pytest

import kernomics as kx
from conftest import judge
from kernomics import _cpu
from kernomics.contract import Case
from kernomics.numpy_ops import sample

OP = kx.OPS["fp8_gemm"]


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("m", [1, 2, 5, 20])
def test_powers_of_two_in_the_scales_factor_out(isa, m):
    """Whatever the size of the scales, bits of the result stay: products neither overflow nor lose digits on the way."""
    _cpu.use_isa(isa)
    inputs, _ = sample(OP, Case(m=m, n=140, k=300))
    want = kx.fp8_gemm(**inputs, out_dtype="f32")
    for a, b in ((40, 40), (-40, -30), (100, -100), (-90, 20), (80, 20)):
        scaled = inputs | {"a_scale": np.ldexp(inputs["a_scale"], a), "b_scale": np.ldexp(inputs["b_scale"], b)}
        assert np.array_equal(kx.fp8_gemm(**scaled, out_dtype="f32"), np.ldexp(want, a + b)), (a, b)


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("m", [1, 2, 5, 20])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_spread(isa, m, code):
    """A NaN code makes its row of a, or its row of b, NaN and nothing else, wherever in the row it stands."""
    _cpu.use_isa(isa)
    inputs, _ = sample(OP, Case(m=m, n=37, k=301))
    clean = kx.fp8_gemm(**inputs)
    for column in (0, 5, 127, 128, 288, 300):
        for name, row, axis in (("a", m - 1, 0), ("b", 36, 1), ("b", 3, 1)):
            bad = inputs | {name: inputs[name].copy()}
            bad[name].view(np.uint8)[row, column] = code
            out = kx.fp8_gemm(**bad).astype(np.float32)
            odd = np.isnan(np.take(out, row, axis))
            assert odd.all(), (name, row, column)
            rest = np.delete(out, row, axis)
            assert np.array_equal(rest, np.delete(clean.astype(np.float32), row, axis))


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("m", [1, 2, 3])
def test_scales_of_any_size(isa, m):
    """Scales near the ends of f32 change no more than the result's size; an infinite one meets zero codes as NaN."""
    _cpu.use_isa(isa)
    inputs, scalars = sample(OP, Case(m=m, n=140, k=300, out_dtype="f32"))
    for up in (110, -110):
        scaled = inputs | {"a_scale": np.ldexp(inputs["a_scale"], up), "b_scale": np.ldexp(inputs["b_scale"], -up)}
        judge(OP, (kx.fp8_gemm(**scaled, **scalars),), (OP.define(**inputs, **scalars),), inputs | scalars)
    for name in ("a", "b"):
        bad = inputs | {f"{name}_scale": inputs[f"{name}_scale"].copy(), name: inputs[name].copy()}
        bad[f"{name}_scale"][0, 1] = np.inf
        bad[name].view(np.uint8)[0, 130] = 0
        with np.errstate(invalid="ignore"):
            got, want = kx.fp8_gemm(**bad, **scalars), OP.define(**bad, **scalars)
        assert np.isnan(want).any()
        assert np.array_equal(np.isfinite(got), np.isfinite(want)) and np.isnan(got[np.isnan(want)]).all()


@pytest.mark.parametrize("isa", _cpu.isas())
def test_every_code_of_weights(isa):
    """Each of the 256 codes is decoded to its value, in the streaming and in the panel path."""
    _cpu.use_isa(isa)
    one = np.zeros((20, 512), np.uint8)
    one[:, 0] = 0x38  # 1.0 picks column 0
    weights = np.zeros((256, 512), np.uint8)
    weights[:, 0] = np.arange(256)
    for m in (1, 2, 3, 20):
        args = {"a": one[:m].view(kx.numerics.FP8), "a_scale": np.ones((m, 4), np.float32),
                "b": weights.view(kx.numerics.FP8), "b_scale": np.ones((2, 4), np.float32)}
        got = kx.fp8_gemm(**args, out_dtype="f32")
        assert np.array_equal(got, np.broadcast_to(kx.numerics.e4m3_decode(np.arange(256, dtype=np.uint8)), (m, 256)),
                              equal_nan=True)


def test_against_unquantized():
    """DeepGEMM's public rule: within 1e-3 of the product of the values before quantization."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((33, 1024), np.float32), rng.standard_normal((200, 1024), np.float32)
    y = kx.fp8_gemm(*kx.fp8_quantize(a), *kx.fp8_quantize(b, block=(128, 128)))
    assert kx.numerics.cos_diff(y.astype(np.float64), a.astype(np.float64) @ b.T.astype(np.float64)) < 1e-3


def test_odd_shapes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        case = Case(m=int(rng.integers(1, 40)), n=int(rng.integers(1, 300)), k=int(rng.integers(1, 600)))
        inputs, scalars = sample(OP, case, seed=int(rng.integers(99)))
        judge(OP, (kx.fp8_gemm(**inputs),), (OP.define(**inputs, **scalars),), inputs | scalars)


@pytest.mark.parametrize("isa", _cpu.isas())
def test_every_code_of_activations(isa):
    """Each of the 256 codes is decoded to its value at every place of a row."""
    _cpu.use_isa(isa)
    codes = np.arange(256, dtype=np.uint8)
    a, b = np.zeros((256, 256), np.uint8), np.zeros((256, 256), np.uint8)
    a[codes, codes] = codes
    b[codes, codes] = 0x38  # 1.0
    scale = np.ones((2, 2), np.float32)
    want = np.zeros((256, 256), np.float32)
    want[codes, codes] = kx.numerics.e4m3_decode(codes)
    want[np.isnan(want).any(1)] = np.nan
    for m in (1, 2, 5, 64):
        for i in range(0, 256, m):
            rows = a[i:i + m].view(kx.numerics.FP8)
            got = kx.fp8_gemm(rows, scale[:1].repeat(len(rows), 0), b.view(kx.numerics.FP8), scale, out_dtype="f32")
            assert np.array_equal(got, want[i:i + m], equal_nan=True), (m, i)
