"""Laws of mla_index."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numpy_ops import sample

OP = kx.OPS["mla_index"]


def draw(seed=0, **case):
    return sample(OP, Case(**{"t": 6, "h": 5, "s": 43, "ragged": True, **case}), seed)[0]


def agree(got, want, inputs):
    for measure, (value, bound) in OP.judge((got,), (want.astype(np.float64),), inputs).items():
        assert value <= bound, (measure, value, bound)


def test_windows_cut_the_full_scores(backend):
    x = draw()
    full = kx.mla_index(**x | {"start": np.zeros(6, np.int32), "stop": np.full(6, 43, np.int32)}, backend=backend)
    assert np.isfinite(full).all()
    key = np.arange(43)
    inside = (key >= x["start"][:, None]) & (key < x["stop"][:, None])
    assert inside.any() and not inside.all()
    agree(kx.mla_index(**x, backend=backend), np.where(inside, full, -np.inf), x)


def test_bounds_are_clamped(backend):
    x = draw(t=4)
    x["start"], x["stop"] = (np.array(v, np.int32) for v in ([-(2**31), 0, 43, 9], [2**31 - 1, -5, 2**31 - 1, 9]))
    got = kx.mla_index(**x, backend=backend)
    assert np.isfinite(got[0]).all() and (got[1:] == -np.inf).all()


def test_scores_scale_with_k_scale_and_weights(backend):
    x = draw(ragged=False)
    got = kx.mla_index(**x, backend=backend)
    assert np.array_equal(kx.mla_index(**x | {"k_scale": 4 * x["k_scale"]}, backend=backend), 4 * got)
    seen = got != -np.inf
    turned = kx.mla_index(**x | {"weights": -2 * x["weights"]}, backend=backend)
    assert np.array_equal(turned[seen], -2 * got[seen])


def test_heads_add_up(backend):
    x = draw(ragged=False)
    alone = [kx.mla_index(**x | {"q": x["q"][:, [i]], "weights": x["weights"][:, [i]]}, backend=backend) for i in range(5)]
    agree(kx.mla_index(**x, backend=backend), np.sum(alone, axis=0, dtype=np.float64), x)
    order = np.array([3, 1, 4, 0, 2])
    turned = x | {"q": x["q"][:, order], "weights": x["weights"][:, order]}
    agree(kx.mla_index(**turned, backend=backend), kx.mla_index(**x, backend=backend), x)


def test_negative_dots_count_nothing(backend):
    x = draw(h=1, ragged=False)
    got = kx.mla_index(**x, backend=backend)
    flipped = kx.mla_index(**x | {"q": (-x["q"].astype(np.float32)).astype(x["q"].dtype)}, backend=backend)
    seen = got != -np.inf
    assert (got[seen] * flipped[seen] == 0).all() and ((got != 0) | (flipped != 0))[seen].mean() > 0.9


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_give_nan_inside_the_window_only(backend, code):
    x = draw(ragged=False)
    x["k"].view(np.uint8)[40, 3] = code
    x["q"].view(np.uint8)[5, 4, 127] = code
    got = kx.mla_index(**x, backend=backend)
    want = np.zeros((6, 43), bool)
    want[:, 40], want[5] = True, True
    want &= np.arange(43) < x["stop"][:, None]
    assert np.array_equal(np.isnan(got), want)
    assert np.array_equal(got == -np.inf, np.arange(43) >= x["stop"][:, None])


def test_a_row_does_not_depend_on_the_others(backend):
    x = draw()
    rows = np.array([4, 0])
    part = {n: x[n][rows] for n in ("q", "weights", "start", "stop")}
    agree(kx.mla_index(**x | part, backend=backend), kx.mla_index(**x, backend=backend)[rows], x | part)


def test_exact_integers(backend):
    q, k = (np.full((n, 128), v, ml_dtypes.float8_e4m3fn) for n, v in ((2, 3), (4, -0.5)))
    k[1:] = ml_dtypes.float8_e4m3fn(2)
    got = kx.mla_index(q[:, None], k, np.array([1, 1, 2, 0.5], np.float32), np.array([[1], [-1]], np.float32),
                       np.array([0, 1], np.int32), np.array([4, 3], np.int32), backend=backend)
    assert np.array_equal(got, [[0, 768, 1536, 384], [-np.inf, -768, -1536, -np.inf]])


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.integers(0, 9), h=st.integers(0, 20), s=st.integers(0, 150), ragged=st.booleans(), seed=st.integers(0, 9))
def test_any_shape(backend, t, h, s, ragged, seed):
    x = draw(seed, t=t, h=h, s=s, ragged=ragged)
    agree(kx.mla_index(**x, backend=backend), kx.reference.mla_index(**x), x)
