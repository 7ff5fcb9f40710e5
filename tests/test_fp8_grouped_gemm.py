"""Laws of fp8_grouped_gemm."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numpy_ops import sample

OP = kx.OPS["fp8_grouped_gemm"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.integers(0, 90), e=st.integers(1, 5), n=st.integers(1, 150), k=st.integers(0, 150), seed=st.integers(0, 99))
def test_equals_fp8_gemm_per_expert(backend, t, e, n, k, seed):
    x, _ = sample(OP, Case(t=t, e=e, n=n, k=k), seed)
    c, offsets = kx.fp8_grouped_gemm(**x, backend=backend), x["offsets"]
    alone = np.zeros((t, n))
    for i in range(e):
        rows = slice(offsets[i], offsets[i + 1])
        alone[rows] = kx.fp8_gemm(x["a"][rows], x["a_scale"][rows], x["b"][i], x["b_scale"][i], out_dtype="f32", backend=backend)
    for measure, (value, bound) in OP.judge((c,), (alone,), x).items():
        assert value <= bound, (measure, value, bound)


def test_rows_past_the_end_are_zero_and_not_read(backend):
    x, _ = sample(OP, Case(t=9, e=3, n=20, k=130))
    x["offsets"] = np.int32([0, 4, 4, 6])
    x["a"].view(np.uint8)[6:] = 0x7F
    x["b"].view(np.uint8)[1] = 0x7F  # the empty group's
    c = kx.fp8_grouped_gemm(**x, backend=backend).astype(np.float32)
    assert np.isfinite(c).all() and c[:6].all() and not c[6:].any()


def test_nan_codes_stay_in_their_rows_and_groups(backend):
    x, _ = sample(OP, Case(t=8, e=2, n=5, k=33))
    x["offsets"] = np.int32([0, 3, 8])
    x["a"].view(np.uint8)[1, 7] = 0xFF
    x["b"].view(np.uint8)[1, 4, 32] = 0x7F
    odd = np.zeros((8, 5), bool)
    odd[1], odd[3:, 4] = True, True
    assert np.array_equal(np.isnan(kx.fp8_grouped_gemm(**x, backend=backend).astype(np.float32)), odd)


@pytest.mark.parametrize("offsets", [[1, 2, 4], [0, 3, 2], [0, 2, 5], [0, -1, 4]])
def test_bad_offsets(backend, offsets):
    x, _ = sample(OP, Case(t=4, e=2, n=5, k=6))
    with pytest.raises(kx.ContractError, match="fp8_grouped_gemm: offsets is"):
        kx.fp8_grouped_gemm(**x | {"offsets": np.int32(offsets)}, backend=backend)
