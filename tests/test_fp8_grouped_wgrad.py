"""Laws of fp8_grouped_wgrad."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numpy_ops import sample

OP = kx.OPS["fp8_grouped_wgrad"]


def agree(got, want, x):
    for measure, (value, bound) in OP.judge((got,), (want,), x).items():
        assert value <= bound, (measure, value, bound)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.integers(0, 300), e=st.integers(0, 5), n=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_sum_over_experts_is_one_group(backend, t, e, n, k, seed):
    """Groups partition the rows up to the last offset, wherever scale blocks begin."""
    x, _ = sample(OP, Case(t=t, e=e, n=n, k=k), seed)
    dw = kx.fp8_grouped_wgrad(**x, backend=backend)
    assert dw.shape == (e, n, k) and np.isfinite(dw).all()
    whole = {**x, "offsets": x["offsets"][[0, -1]]}
    agree(kx.fp8_grouped_wgrad(**whole, backend=backend), dw.astype(np.float64).sum(0, keepdims=True), whole)
    for i in np.flatnonzero(np.diff(x["offsets"]) == 0):
        assert not dw[i].any()


def test_one_row_a_group_is_an_outer_product(backend):
    x, _ = sample(OP, Case(t=3, e=3, n=7, k=5))
    x["offsets"] = np.int32([0, 1, 2, 3])
    dy = x["dy"].astype(np.float64) * x["dy_scale"]
    agree(kx.fp8_grouped_wgrad(**x, backend=backend), dy[:, :, None] * (x["x"].astype(np.float64) * x["x_scale"])[:, None], x)


def test_rows_past_the_end_are_not_read(backend):
    x, _ = sample(OP, Case(t=6, e=2, n=5, k=3))
    x["offsets"] = np.int32([0, 2, 4])
    x["dy"].view(np.uint8)[4:] = 0x7F
    assert np.isfinite(kx.fp8_grouped_wgrad(**x, backend=backend)).all()


@pytest.mark.parametrize("offsets", [[1, 2, 4], [0, 3, 2], [0, 2, 5]])
def test_bad_offsets(backend, offsets):
    x, _ = sample(OP, Case(t=4, e=2, n=5, k=6))
    with pytest.raises(kx.ContractError, match="fp8_grouped_wgrad: offsets is"):
        kx.fp8_grouped_wgrad(**x | {"offsets": np.int32(offsets)}, backend=backend)
