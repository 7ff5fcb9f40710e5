"""Laws of attention_merge."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numerics import judge_attention, norm_error
from kernomics.numpy_ops import sample

BF16 = ml_dtypes.bfloat16


def draw(seed=0, **case):
    inputs, _ = sample(kx.OPS["attention_merge"], Case(**{"lead": (2,), "q": 3, "h": 5, "d": 33, **case}), seed)
    return list(inputs.values())


def value(x):
    return np.asarray(x).astype(np.float64)


def test_commutes(backend):
    a, b = draw()[:2], draw(seed=1)[:2]
    for x, y in zip(kx.attention_merge(*a, *b, backend=backend), kx.attention_merge(*b, *a, backend=backend)):
        assert np.array_equal(x, y)


def test_associates(backend):
    a, b, c = (draw(seed=i)[:2] for i in range(3))

    def merge(x, y):
        return kx.attention_merge(*x, *y, backend=backend)

    (out, lse), (out2, lse2) = merge(merge(a, b), c), merge(a, merge(b, c))
    np.testing.assert_allclose(lse, lse2, rtol=1e-6, atol=1e-6)
    assert norm_error(value(out), value(out2)) <= 4 * 2.0**-8


@pytest.mark.parametrize("empty", [-np.inf, np.inf])
@pytest.mark.parametrize("junk", [0, np.nan, np.inf])
def test_a_half_without_keys_changes_nothing(backend, empty, junk):
    out, lse, *_ = draw()
    lse = np.where(np.isinf(lse), 1, lse).astype(np.float32)
    nothing = np.full(out.shape, junk, BF16), np.full(lse.shape, empty, np.float32)
    for halves in ((out, lse, *nothing), (*nothing, out, lse)):
        merged = kx.attention_merge(*halves, backend=backend)
        assert np.array_equal(merged[0], out) and np.array_equal(merged[1], lse)


@pytest.mark.parametrize("a", [-np.inf, np.inf])
@pytest.mark.parametrize("b", [-np.inf, np.inf])
def test_two_halves_without_keys(backend, a, b):
    out = np.full((3, 2, 5), np.nan, BF16)
    merged, lse = kx.attention_merge(out, np.full((2, 3), a, np.float32), out, np.full((2, 3), b, np.float32), backend=backend)
    assert (value(merged) == 0).all() and (lse == -np.inf).all()


def test_equal_weights_give_the_mean_whatever_their_size(backend):
    for size in (-1e4, -80.0, 0.0, 80.0, 1e4):
        lse = np.full((2, 3), size, np.float32)
        merged, total = kx.attention_merge(np.full((3, 2, 5), 1, BF16), lse, np.full((3, 2, 5), 4, BF16), lse, backend=backend)
        assert (value(merged) == 2.5).all()
        np.testing.assert_allclose(total, size + np.log(2), rtol=1e-6)


def test_nan_spreads_over_its_row_alone(backend):
    out, lse, other, other_lse = draw()
    want = kx.attention_merge(out, lse, other, other_lse, backend=backend)
    lse[1, 4, 2] = np.nan
    merged, total = kx.attention_merge(out, lse, other, other_lse, backend=backend)
    assert np.isnan(value(merged[1, 2, 4])).all() and np.isnan(total[1, 4, 2])
    rest = np.ones(total.shape, bool)
    rest[1, 4, 2] = False
    assert np.array_equal(total[rest], want[1][rest])
    assert np.array_equal(merged[rest.transpose(0, 2, 1)], want[0][rest.transpose(0, 2, 1)])


def test_heads_and_queries_are_not_confused(backend):
    out = np.arange(6).reshape(3, 2, 1).astype(BF16)  # [q h d]
    lse = np.zeros((2, 3), np.float32)
    lse[1, 0] = -np.inf  # head 1, query 0
    merged, _ = kx.attention_merge(out, lse, np.zeros_like(out), np.zeros_like(lse), backend=backend)
    assert value(merged).ravel().tolist() == [0, 0, 1, 1.5, 2, 2.5]
    merged, _ = kx.attention_merge(out + BF16(1), lse, np.zeros_like(out), np.full_like(lse, -np.inf), backend=backend)
    assert value(merged).ravel().tolist() == [1, 0, 3, 4, 5, 6]


def test_any_number_of_leading_dims(backend):
    x = draw(lead=(2, 1, 3, 2))
    flat = kx.attention_merge(*(v.reshape(12, *v.shape[4:]) for v in x), backend=backend)
    for many, one in zip(kx.attention_merge(*x, backend=backend), flat):
        assert np.array_equal(many.reshape(one.shape), one)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lead=st.lists(st.integers(0, 3), max_size=2), q=st.integers(0, 5), h=st.integers(0, 9), d=st.integers(0, 70),
       seed=st.integers(0, 9))
def test_any_shape(backend, lead, q, h, d, seed):
    x = draw(seed, lead=tuple(lead), q=q, h=h, d=d)
    got, want = kx.attention_merge(*x, backend=backend), kx.reference.attention_merge(*x)
    for measure, (error, bound) in judge_attention(*got, *want).items():
        if "cos" not in measure:  # of one or two values it is rounding itself
            assert error <= bound, (measure, error, bound)
