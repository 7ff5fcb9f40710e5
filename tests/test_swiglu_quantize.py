"""Laws of swiglu_quantize."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numerics import BF16, swiglu
from kernomics.numpy_ops import sample

OP = kx.OPS["swiglu_quantize"]


def agree(got, want, inputs):
    for measure, (value, bound) in OP.judge(got, want, inputs).items():
        assert value <= bound, (measure, value, bound)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.integers(0, 20), n=st.integers(1, 300), scale=st.sampled_from(["f32", "pow2"]), seed=st.integers(0, 99))
def test_equals_quantizing_the_bf16_product(backend, t, n, scale, seed):
    x, scalars = sample(OP, Case(t=t, n=n, scale=scale), seed)
    h = swiglu(x["x"]).astype(np.float32).astype(BF16)
    got = kx.swiglu_quantize(**x, scale=scale, backend=backend)
    agree(got, kx.fp8_quantize(h, scale=scale, backend="reference"), x | scalars)


def test_exact_values(backend):
    """Gates of 0 and beyond 20 need no rounding: the codes are exact."""
    gate, up = np.array([[0, 32, 64, -400, 448]], BF16), np.array([[7, 1, -2, 5, 1]], BF16)
    codes, scale = kx.swiglu_quantize(np.concatenate([gate, up], 1), backend=backend)
    assert scale == 1 and np.array_equal(codes.astype(np.float32), [[0, 32, -128, 0, 448]])


def test_the_gate_is_the_first_half(backend):
    """``silu(2) * 8`` is not ``silu(8) * 2``."""
    codes, scale = kx.swiglu_quantize(np.array([[2, 8]], BF16), backend=backend)
    np.testing.assert_allclose(codes.astype(np.float32) * scale, 2 / (1 + np.exp(-2)) * 8, rtol=2**-7)


def test_nan_and_infinity_do_not_disturb_their_block(backend):
    x, _ = sample(OP, Case(t=3, n=140))
    clean = kx.swiglu_quantize(**x, backend=backend)
    x["x"][0, 5], x["x"][1, 139], x["x"][2, 140] = np.nan, np.inf, -np.inf  # gate, gate, up
    h = swiglu(x["x"])
    x["x"][1, 279] = 1
    codes, scale = kx.swiglu_quantize(**x, backend=backend)
    odd = codes.view(np.uint8) & 0x7F == 0x7F
    assert np.array_equal(np.argwhere(odd), [[0, 5], [1, 139], [2, 0]])
    block = np.abs(np.where(np.isfinite(h), h, 0))
    unmoved = block[:, :128].max(1) == np.abs(swiglu(sample(OP, Case(t=3, n=140))[0]["x"]))[:, :128].max(1)
    assert np.array_equal(scale[unmoved, 0], clean[1][unmoved, 0]) and unmoved.any()


@pytest.mark.parametrize("value", [0.0, 3e-5])
def test_floor(backend, value):
    _, scale = kx.swiglu_quantize(np.full((1, 4), value, BF16), backend=backend)
    assert scale == np.float32(1e-4) / np.float32(448)
