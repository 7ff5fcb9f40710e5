"""Laws of moe_permute and its backward."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.numerics import BF16, FP8


def draw(t, d, e, top_k, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-99, 100, (t, d)).astype(np.float32), rng.integers(-1, e, (t, top_k)).astype(np.int32)


shapes = given(t=st.integers(0, 60), d=st.integers(1, 40), e=st.integers(0, 20), top_k=st.integers(0, 5), seed=st.integers(0, 99))
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@shapes
def test_combine_undoes_permute(backend, t, d, e, top_k, seed):
    """Unweighted, a token comes back times its copies that were not dropped."""
    x, experts = draw(t, d, e, top_k, seed)
    x_sorted, _, row_of = kx.moe_permute(x, experts, n_experts=e, backend=backend)
    copies = np.sum(experts >= 0, axis=1, keepdims=True)
    assert np.array_equal(kx.moe_combine(x_sorted, row_of, backend=backend), copies * x)


@few
@shapes
def test_sorted_stable_and_complete(backend, t, d, e, top_k, seed):
    x, experts = draw(t, d, e, top_k, seed)
    x_sorted, offsets, row_of = kx.moe_permute(x, experts, n_experts=e, backend=backend)
    assert [v.dtype for v in (x_sorted, offsets, row_of)] == [np.float32, np.int32, np.int32]
    kept = experts >= 0
    assert np.array_equal(row_of >= 0, kept)
    assert np.array_equal(np.sort(row_of[kept]), np.arange(offsets[-1]))  # every row once
    assert not x_sorted[offsets[-1]:].any()
    assert offsets[0] == 0 and np.array_equal(np.diff(offsets), np.bincount(experts[kept], minlength=e)[:e])
    for i in range(e):
        rows = row_of[experts == i]  # in the order of tokens, then slots
        assert np.array_equal(rows, np.arange(offsets[i], offsets[i + 1]))
    token = np.nonzero(kept)[0]
    assert np.array_equal(x_sorted[row_of[kept]], x[token])


@pytest.mark.parametrize("dtype", [np.float32, BF16, FP8])
def test_bits_travel(backend, dtype):
    """NaN payloads, signed zeros and infinities arrive as they were."""
    x = np.random.default_rng(0).integers(0, 256, (7, 9 * np.dtype(dtype).itemsize)).astype(np.uint8).view(dtype)
    x_sorted, _, row_of = kx.moe_permute(x, np.int32([[1], [0], [1], [0], [2], [2], [0]]), n_experts=3, backend=backend)
    assert x_sorted.dtype == x.dtype and x_sorted[row_of[:, 0]].tobytes() == x.tobytes()


def test_scales_travel_with_their_rows(backend):
    """FP8 rows and their scales, permuted by two calls, give the permuted values."""
    x, experts = draw(12, 200, 4, 2)
    codes, scale = kx.fp8_quantize(x, backend=backend)
    (codes, _, row_of), (scale, _, again) = (kx.moe_permute(v, experts, n_experts=4, backend=backend) for v in (codes, scale))
    assert np.array_equal(row_of, again)
    values = codes.astype(np.float32) * np.repeat(scale, 128, axis=1)[:, :200]
    np.testing.assert_allclose(values[row_of[experts >= 0]], x[np.nonzero(experts >= 0)[0]], atol=99 / 14)


@pytest.mark.parametrize("wrong", [-2, 4, 2**31 - 1])
def test_bad_ids(backend, wrong):
    x, experts = draw(5, 3, 4, 2)
    experts[3, 1] = wrong
    with pytest.raises(kx.ContractError, match="moe_permute: experts is"):
        kx.moe_permute(x, experts, n_experts=4, backend=backend)


@few
@shapes
def test_backward_is_the_transpose(t, d, e, top_k, seed):
    """``<permute(x), g> = <x, backward(g)>``, exact in these integers."""
    x, experts = draw(t, d, e, top_k, seed)
    x_sorted, _, row_of = kx.moe_permute(x, experts, n_experts=e, backend="reference")
    g, _ = draw(t * top_k, d, 1, 0, seed + 1)
    dx = kx.moe_permute_backward(g, row_of, backend="reference")
    assert np.sum(x_sorted.astype(np.float64) * g) == np.sum(x.astype(np.float64) * dx)
