"""Laws of moe_experts and moe_experts_bf16."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numerics import BF16
from kernomics.numpy_ops import sample

OP, OP_BF16 = kx.OPS["moe_experts"], kx.OPS["moe_experts_bf16"]


def agree(op, got, want, inputs):
    for measure, (value, bound) in op.judge((got,), (np.asarray(want).astype(np.float64),), inputs).items():
        assert value <= bound, (measure, value, bound)


def draw(seed=0, **case):
    x, scalars = sample(OP, Case(**{"t": 12, "d": 200, "n": 70, "e": 5, "top_k": 3, **case}), seed)
    return x | scalars


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.integers(0, 25), d=st.integers(1, 200), n=st.integers(1, 150), e=st.integers(1, 6), seed=st.integers(0, 99),
       data=st.data())
def test_equals_the_chain_of_public_ops(backend, t, d, n, e, seed, data):
    x = draw(seed, t=t, d=d, n=n, e=e, top_k=data.draw(st.integers(0, e)))
    codes, scale = kx.fp8_quantize(x["x"], backend=backend)
    codes, offsets, row_of = kx.moe_permute(codes, x["experts"], n_experts=e, backend=backend)
    scale, _, _ = kx.moe_permute(scale, x["experts"], n_experts=e, backend=backend)
    h = kx.fp8_grouped_gemm(codes, scale, x["w13"], x["w13_scale"], offsets, backend=backend)
    codes, scale = kx.swiglu_quantize(h, backend=backend)
    y = kx.fp8_grouped_gemm(codes, scale, x["w2"], x["w2_scale"], offsets, backend=backend)
    want = kx.moe_combine(y.astype(np.float32), row_of, x["weights"], backend=backend)
    agree(OP, kx.moe_experts(**x, backend=backend), want, x)


@pytest.mark.parametrize("activations", ["fp8", "bf16"])
def test_halves_of_the_tokens(backend, activations):
    """The tokens of a batch do not see each other."""
    x = draw(activations=activations)
    whole = OP.define(**x)
    for rows in (slice(0, 5), slice(5, 12)):
        half = x | {name: x[name][rows] for name in ("x", "weights", "experts")}
        agree(OP, kx.moe_experts(**half, backend=backend), whole[rows], half)


@pytest.mark.parametrize("activations", ["fp8", "bf16"])
def test_minus_one_contributes_nothing(backend, activations):
    """Dropping a slot is giving it weight 0; its own weight does not matter."""
    x = draw(activations=activations)
    x["experts"] = np.abs(x["experts"])
    dropped, zero = x["experts"].copy(), x["weights"].copy()
    dropped[::2, 1], dropped[3], zero[::2, 1], zero[3] = -1, -1, 0, 0
    weights = np.where(dropped < 0, np.nan, x["weights"]).astype(np.float32)
    got = kx.moe_experts(**x | {"experts": dropped, "weights": weights}, backend=backend)
    assert not got[3].any()
    agree(OP, got, OP.define(**x | {"weights": zero}), x | {"weights": zero})


def test_experts_out_of_use_are_not_read(backend):
    x = draw()
    x["experts"] = np.where(x["experts"] == 2, -1, x["experts"])
    x["w13"].view(np.uint8)[2] = x["w2"].view(np.uint8)[2] = 0x7F
    assert np.isfinite(kx.moe_experts(**x, backend=backend).astype(np.float32)).all()


def test_nan_stays_in_its_row(backend):
    x = draw()
    x["experts"] = np.abs(x["experts"])
    x["x"][4, 150] = np.nan
    odd = np.isnan(kx.moe_experts(**x, backend=backend).astype(np.float32))
    assert odd[4].all() and odd.sum() == odd.shape[1]


def test_slots_may_be_permuted_and_repeated(backend):
    """The same expert in two slots counts with the sum of both weights."""
    x = draw(top_k=2)
    twice = x | {"experts": x["experts"][:, [0, 0]]}
    once = x | {"experts": x["experts"][:, [0, 0]] * np.int32([1, 0]) - np.int32([0, 1]),
                "weights": x["weights"].sum(1, keepdims=True) * np.float32([1, 0])}
    agree(OP, kx.moe_experts(**twice, backend=backend), OP.define(**once), twice)
    turned = x | {name: np.ascontiguousarray(x[name][:, ::-1]) for name in ("experts", "weights")}
    agree(OP, kx.moe_experts(**turned, backend=backend), OP.define(**x), x)


def test_bf16_weights_of_fp8_values(backend):
    """Weights that bf16 holds exactly give the same by either op."""
    x = draw(activations="bf16")
    for name in ("w13", "w2"):
        x[f"{name}_scale"] = np.exp2(np.round(np.log2(x[f"{name}_scale"])))
    plain = {name: x[name] for name in ("x", "weights", "experts")}
    for name in ("w13", "w2"):
        _, rows, columns = x[name].shape
        scale = np.repeat(np.repeat(x[f"{name}_scale"], 128, 1), 128, 2)[:, :rows, :columns]
        plain[name] = (x[name].astype(np.float32) * scale).astype(BF16)
    agree(OP_BF16, kx.moe_experts_bf16(**plain, backend=backend), OP.define(**x), plain)


@pytest.mark.parametrize("activations", ["fp8", "bf16"])
@pytest.mark.parametrize("name, change", [("w13_scale", 1.02), ("w2_scale", 1.02), ("w2_scale", 0.98)])
def test_a_fault_of_two_percent_in_one_expert_is_seen(activations, name, change):
    x = draw(activations=activations)
    x["experts"] = np.abs(x["experts"])
    right = kx.moe_experts(**x, backend="reference")
    agree(OP, right, OP.define(**x), x)
    for i in range(5):
        scale = x[name].copy()
        scale[i] *= np.float32(change)
        wrong = kx.moe_experts(**x | {name: scale}, backend="reference")
        measures = OP.judge((wrong,), (OP.define(**x),), x)
        assert any(not value <= bound for value, bound in measures.values()), (i, measures)


@pytest.mark.parametrize("wrong", [-2, 5])
def test_bad_ids(backend, wrong):
    x = draw()
    x["experts"][1, 1] = wrong
    with pytest.raises(kx.ContractError, match="moe_experts: experts is"):
        kx.moe_experts(**x, backend=backend)
