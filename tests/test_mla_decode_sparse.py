"""Laws of mla_decode_sparse."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numerics import judge_attention, norm_error, pack_fp8_cache
from kernomics.numpy_ops import sample

BF16 = ml_dtypes.bfloat16


def draw(seed=0, op="mla_decode_sparse", **case):
    """Inputs and scalars of a case, ready for the op."""
    case = {"softmax_scale": 0.1, **case}
    inputs, scalars = sample(kx.OPS[op], Case(**case), seed)
    return inputs | scalars


def agree(got, want):
    for measure, (value, bound) in judge_attention(*got, *want).items():
        assert value <= bound, (measure, value, bound)


def value(x):
    return np.asarray(x).astype(np.float64)


CASE = dict(b=2, q=3, h=5, top_k=19, keys=(11, 19), page=7, p=9)
both_caches = pytest.mark.parametrize("kv_cache", ["bf16", "u8"])


@both_caches
@pytest.mark.parametrize("sink", [None, "f32"])
def test_all_indices_equal_the_dense_decode(backend, kv_cache, sink):
    x = draw(op="mla_decode", b=2, q=3, h=6, lens=(40, 17), page=7, p=12, n=7, causal=False, kv_cache=kv_cache, sink=sink)
    want = kx.mla_decode(**x, backend=backend)
    indices = np.full((2, 3, 45), -1, np.int32)
    for i, length in enumerate(x["seq_lens"]):
        token = np.arange(length)
        indices[i, :, :length] = x["block_table"][i, token // 7] * 7 + token % 7
    got = kx.mla_decode_sparse(x["q"], x["kv_cache"], indices, softmax_scale=0.1, sink=x["sink"], backend=backend)
    agree(got, want)


@both_caches
def test_order_and_invalid_indices_do_not_matter(backend, kv_cache):
    x = draw(**CASE, kv_cache=kv_cache)
    want = kx.mla_decode_sparse(**x, backend=backend)
    assert np.isfinite(value(want[0])).all()  # tokens that no index names are poison
    rng = np.random.default_rng(1)
    junk = rng.choice(np.array([-1, -(2**31), 63, 2**31 - 1], np.int32), (2, 3, 4))
    x["indices"] = rng.permuted(np.concatenate([x["indices"], junk], axis=2), axis=2)
    agree(kx.mla_decode_sparse(**x, backend=backend), want)


@both_caches
def test_duplicate_indices_count_twice(backend, kv_cache):
    x = draw(**CASE, kv_cache=kv_cache)
    out, lse = kx.mla_decode_sparse(**x, backend=backend)
    twice = kx.mla_decode_sparse(**x | {"indices": np.tile(x["indices"], 2)}, backend=backend)
    agree(twice, (value(out), value(lse) + np.log(2)))


@both_caches
def test_a_key_named_three_times_weighs_three_times(backend, kv_cache):
    latent, rope = np.zeros((2, 512)), np.zeros((2, 64))
    latent[1] = 1  # e4m3 holds 1 / scale exactly, scale being a power of two
    tokens = pack_fp8_cache(latent, rope) if kv_cache == "u8" else np.concatenate([latent, rope], axis=1).astype(BF16)
    q, indices = np.zeros((1, 1, 3, 576), BF16), np.array([[[0, 1, 0, 0]]], np.int32)
    out, lse = kx.mla_decode_sparse(q, tokens[None], indices, softmax_scale=0.1, backend=backend)
    assert (value(out) == 0.25).all()
    np.testing.assert_allclose(lse, np.log(4), rtol=1e-6)


def test_halves_merged_by_lse_give_the_whole(backend):
    x = draw(b=2, q=1, h=9, top_k=70, page=16, p=8)
    out, lse = kx.mla_decode_sparse(**x, backend=backend)
    halves = []
    for part in (np.s_[:, :, :33], np.s_[:, :, 33:]):
        halves += kx.mla_decode_sparse(**x | {"indices": x["indices"][part]}, backend=backend)
    merged, merged_lse = kx.attention_merge(*halves, backend=backend)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-5, atol=1e-5)
    assert norm_error(value(merged), value(out)) <= 4 * 2.0**-8


@both_caches
def test_no_keys(backend, kv_cache):
    x = draw(b=2, q=2, h=5, top_k=9, keys=(0, 4), page=4, p=2, kv_cache=kv_cache, sink="f32")
    out, lse = kx.mla_decode_sparse(**x, backend=backend)
    assert (value(out[0]) == 0).all() and (lse[0] == -np.inf).all() and np.isfinite(lse[1]).all()


def test_sink_scales_out_and_leaves_lse(backend):
    x = draw(**CASE)
    out, lse = kx.mla_decode_sparse(**x, backend=backend)
    sink = np.array([-np.inf, np.inf, 0, 3, -2], np.float32)
    sunk, same_lse = kx.mla_decode_sparse(**x | {"sink": sink}, backend=backend)
    assert np.array_equal(lse, same_lse)
    weight = 1 / (1 + np.exp(sink[:, None] - value(lse)))
    agree((sunk, lse), (value(out) * weight.transpose(0, 2, 1)[..., None], lse))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_give_nan_where_they_are_named(backend, code):
    x = draw(b=1, q=1, h=5, top_k=18, page=9, p=2, kv_cache="u8")  # names every token
    x["q"], x["indices"] = np.repeat(x["q"], 2, axis=1), np.arange(18, dtype=np.int32).reshape(1, 2, 9)
    x["kv_cache"][0, 3, 77] = code
    out, lse = kx.mla_decode_sparse(**x, backend=backend)
    assert np.isnan(value(out[0, 0])).all() and np.isnan(lse[0, :, 0]).all()
    assert np.isfinite(value(out[0, 1])).all() and np.isfinite(lse[0, :, 1]).all()


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(st.integers(0, 70), max_size=3), q=st.integers(0, 3), h=st.integers(1, 20), page=st.integers(1, 70),
    kv_cache=st.sampled_from(["bf16", "u8"]), sink=st.sampled_from([None, "f32"]), seed=st.integers(0, 9),
)
def test_any_shape(backend, keys, q, h, page, kv_cache, sink, seed):
    x = draw(seed, b=len(keys), q=q, h=h, keys=tuple(keys), top_k=max(keys, default=0) + 2, page=page, p=2,
             kv_cache=kv_cache, sink=sink)
    agree(kx.mla_decode_sparse(**x, backend=backend), kx.reference.mla_decode_sparse(**x))
