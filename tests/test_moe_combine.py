"""Laws of moe_combine and its backward."""

import numpy as np
import pytest

import kernomics as kx
from kernomics.contract import Case
from kernomics.numerics import BF16
from kernomics.numpy_ops import sample

OP = kx.OPS["moe_combine"]


def draw(seed=0, **case):
    return sample(OP, Case(**{"t": 13, "d": 37, "top_k": 3, "y": "f32", "weights": "f32", **case}), seed)[0]


def agree(got, want, inputs):
    for measure, (value, bound) in OP.judge((got,), (np.asarray(want, np.float64),), inputs).items():
        assert value <= bound, (measure, value, bound)


def test_no_weights_are_weights_of_one(backend):
    x = draw()
    ones = x | {"weights": np.ones_like(x["weights"])}
    assert np.array_equal(kx.moe_combine(x["y"], x["row_of"], backend=backend), kx.moe_combine(**ones, backend=backend))


def test_slots_add_up(backend):
    x = draw()
    alone = [kx.moe_combine(x["y"], np.where(np.arange(3) == j, x["row_of"], -1).astype(np.int32), x["weights"], backend=backend)
             for j in range(3)]
    agree(kx.moe_combine(**x, backend=backend), np.sum(alone, axis=0, dtype=np.float64), x)


def test_sum_runs_in_float32_in_slot_order(backend):
    """Each order of these terms gives another float32; bf16 terms are not rounded in between."""
    y = np.float32([[2**24], [1], [-(2**24)]])
    for order, in_float32 in (([0, 1, 2], 0), ([0, 2, 1], 1), ([1, 0, 2], 0)):
        exact = 1  # of the definition, in float64
        assert kx.moe_combine(y, np.int32([order]), backend=backend) == (exact if backend == "reference" else in_float32)
    y = np.array([[256], [1], [1], [1]], BF16)
    assert kx.moe_combine(y, np.int32([[0, 1, 2, 3]]), backend=backend).astype(float) == 260  # 259 rounds to even


def test_dropped_slots_are_not_read(backend):
    x = draw()
    x["row_of"][4] = -1
    unused = np.setdiff1d(np.arange(39), x["row_of"])
    x["y"][unused] = np.nan
    x["weights"][x["row_of"] < 0] = np.nan
    out = kx.moe_combine(**x, backend=backend)
    assert np.isfinite(out).all() and not out[4].any()


def test_nan_reaches_its_token_only(backend):
    x = draw(t=4, top_k=2)
    x["row_of"] = np.arange(8, dtype=np.int32).reshape(4, 2)
    x["y"][5, 3] = np.nan
    out = np.isnan(kx.moe_combine(**x, backend=backend))
    assert out[2, 3] and out.sum() == 1


@pytest.mark.parametrize("wrong", [-2, 39])
def test_bad_rows(backend, wrong):
    x = draw()
    x["row_of"][2, 1] = wrong
    with pytest.raises(kx.ContractError, match="moe_combine: row_of is"):
        kx.moe_combine(**x, backend=backend)


@pytest.mark.parametrize("weighted", [True, False])
def test_backward_is_the_derivative(weighted):
    x = draw(t=3, d=4, top_k=2)
    y, weights = x["y"].astype(np.float64), x["weights"].astype(np.float64) if weighted else None
    row_of = np.int32([[1, 5], [2, 2], [-1, 0]])  # a row twice, one dropped, two unused
    dout = np.random.default_rng(1).standard_normal((3, 4))
    dy, dweights = kx.OPS["moe_combine_backward"].define(dout, y, row_of, weights)

    def loss(y, weights):
        return np.sum(dout * OP.define(y, row_of, weights))

    def slope(at, change):
        out = np.zeros(at.shape)
        for i in np.ndindex(at.shape):
            e = np.zeros(at.shape)
            e[i] = 1
            out[i] = (change(at + e) - change(at - e)) / 2  # linear in each argument: exact for any step
        return out

    np.testing.assert_allclose(dy, slope(y, lambda v: loss(v, weights)), atol=1e-12)
    ones = np.ones((3, 2)) if weights is None else weights
    np.testing.assert_allclose(dweights, slope(ones, lambda v: loss(y, v)), atol=1e-12)
