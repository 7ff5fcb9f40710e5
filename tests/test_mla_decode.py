"""Laws of mla_decode."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numerics import judge_attention, norm_error, pack_fp8_cache, unpack_fp8_cache
from kernomics.numpy_ops import sample

BF16 = ml_dtypes.bfloat16


def draw(seed=0, **case):
    """Inputs and scalars of a case, ready for ``mla_decode(**...)``."""
    case = {"softmax_scale": 0.1, **case}
    inputs, scalars = sample(kx.OPS["mla_decode"], Case(**case), seed)
    return inputs | scalars


def agree(got, want):
    for measure, (value, bound) in judge_attention(*got, *want).items():
        assert value <= bound, (measure, value, bound)


def value(x):
    return np.asarray(x).astype(np.float64)


CASE = dict(b=3, q=2, h=5, lens=(40, 3, 17), page=7, p=12, n=7)
both_caches = pytest.mark.parametrize("kv_cache", ["bf16", "u8"])


@both_caches
def test_page_order_does_not_matter(backend, kv_cache):
    x = draw(**CASE, kv_cache=kv_cache)
    out, lse = kx.mla_decode(**x, backend=backend)
    assert np.isfinite(value(out)).all() and np.isfinite(lse).all()  # the poison of unused slots stays out
    place = np.random.default_rng(1).permutation(12)  # page i moves to place[i]
    table, used = x["block_table"], (x["block_table"] >= 0) & (x["block_table"] < 12)
    x["kv_cache"] = x["kv_cache"][np.argsort(place)]
    x["block_table"] = np.where(used, place[np.where(used, table, 0)], table).astype(np.int32)
    out2, lse2 = kx.mla_decode(**x, backend=backend)
    assert np.array_equal(out, out2) and np.array_equal(lse, lse2)


@both_caches
@pytest.mark.parametrize("page", [1, 16, 64])
def test_page_size_does_not_matter(backend, kv_cache, page):
    x = draw(**CASE, kv_cache=kv_cache)
    want = kx.mla_decode(**x, backend=backend)
    count = -(-40 // page)
    cache = np.zeros((3, count * page, x["kv_cache"].shape[2]), x["kv_cache"].dtype)
    for i, length in enumerate(x["seq_lens"]):
        cache[i, :length] = x["kv_cache"][x["block_table"][i, : -(-length // 7)]].reshape(-1, cache.shape[2])[:length]
    x["kv_cache"] = cache.reshape(3 * count, page, -1)
    x["block_table"] = np.arange(3 * count, dtype=np.int32).reshape(3, count)
    agree(kx.mla_decode(**x, backend=backend), want)


@both_caches
@pytest.mark.parametrize("pages", [0, 1, 3, 5])
def test_halves_merged_by_lse_give_the_whole(backend, kv_cache, pages):
    x = draw(b=1, q=1, h=9, lens=(75,), page=16, p=5, n=5, kv_cache=kv_cache)
    out, lse = kx.mla_decode(**x, backend=backend)
    halves = []
    for table, length in ((np.s_[:, :pages], min(75, 16 * pages)), (np.s_[:, pages:], max(0, 75 - 16 * pages))):
        half = x | {"block_table": x["block_table"][table], "seq_lens": np.array([length], np.int32)}
        halves += kx.mla_decode(**half, backend=backend)
    merged, merged_lse = kx.attention_merge(*halves, backend=backend)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-5, atol=1e-5)
    assert norm_error(value(merged), value(out)) <= 4 * 2.0**-8  # four roundings to bf16


@both_caches
def test_several_queries_are_decodes_one_by_one(backend, kv_cache):
    x = draw(**CASE | {"q": 3}, kv_cache=kv_cache)
    out, lse = kx.mla_decode(**x, backend=backend)
    for i in range(3):
        lens = np.maximum(x["seq_lens"] - 2 + i, 0)
        one = kx.mla_decode(**x | {"q": x["q"][:, i : i + 1], "seq_lens": lens}, backend=backend)
        agree(one, (value(out[:, i : i + 1]), lse[:, :, i : i + 1]))


def test_without_causal_every_query_sees_every_key(backend):
    x = draw(**CASE, causal=False)
    x["q"][:, 1] = x["q"][:, 0]
    out, lse = kx.mla_decode(**x, backend=backend)
    agree((out[:, 1:], lse[:, :, 1:]), (value(out[:, :1]), lse[:, :, :1]))
    agree(kx.mla_decode(**x | {"q": x["q"][:, :1], "causal": True}, backend=backend), (value(out[:, :1]), lse[:, :, :1]))


def test_sequences_and_heads_are_independent(backend):
    x = draw(b=3, q=2, h=19, lens=(40, 3, 17), page=7, p=12, n=7)
    out, lse = kx.mla_decode(**x, backend=backend)
    heads = np.array([18, 0, 7])
    agree(kx.mla_decode(**x | {"q": x["q"][:, :, heads]}, backend=backend), (value(out[:, :, heads]), lse[:, heads]))
    some = np.array([2, 0, 2])
    part = {n: x[n][some] for n in ("q", "block_table", "seq_lens")}
    agree(kx.mla_decode(**x | part, backend=backend), (value(out[some]), lse[some]))


@both_caches
def test_no_keys(backend, kv_cache):
    x = draw(b=2, q=3, h=5, lens=(0, 2), page=4, p=1, n=1, kv_cache=kv_cache, sink="f32")
    out, lse = kx.mla_decode(**x, backend=backend)
    assert (value(out[0]) == 0).all() and (lse[0] == -np.inf).all()
    assert (value(out[1, 0]) == 0).all() and (lse[1, :, 0] == -np.inf).all()  # three queries, two keys
    assert np.isfinite(lse[1, :, 1:]).all() and value(out[1, 1:]).any()


@both_caches
def test_sink_scales_out_and_leaves_lse(backend, kv_cache):
    x = draw(**CASE, kv_cache=kv_cache)
    out, lse = kx.mla_decode(**x, backend=backend)
    sink = np.array([-np.inf, np.inf, 0, 3, -2], np.float32)
    sunk, same_lse = kx.mla_decode(**x | {"sink": sink}, backend=backend)
    assert np.array_equal(lse, same_lse)
    weight = 1 / (1 + np.exp(sink[:, None] - value(lse)))
    agree((sunk, lse), (value(out) * weight.transpose(0, 2, 1)[..., None], lse))
    assert np.array_equal(sunk[:, :, 0], out[:, :, 0]) and (value(sunk[:, :, 1]) == 0).all()


@pytest.mark.parametrize("byte, code", [(5, 0x7F), (511, 0xFF), (515, 0xFF), (529, 0xFF)], ids=["7f", "ff", "scale", "rope"])
def test_nan_in_the_fp8_cache_gives_nan(backend, byte, code):
    x = draw(b=2, q=1, h=5, lens=(33, 20), page=16, p=5, n=3, kv_cache="u8")
    want = kx.mla_decode(**x, backend=backend)
    token = x["kv_cache"][x["block_table"][0, 1], 4]
    token[byte] = code
    if byte >= 512:
        token[byte - 1] = 0xFF  # little-endian: sign and exponent of f32 and bf16 come last
    out, lse = kx.mla_decode(**x, backend=backend)
    assert np.isnan(value(out[0])).all() and np.isnan(lse[0]).all()
    agree((out[1], lse[1]), (value(want[0][1]), want[1][1]))


def test_nan_in_the_bf16_cache_gives_nan(backend):
    x = draw(b=1, q=2, h=5, lens=(33,), page=16, p=4, n=3)
    x["kv_cache"][x["block_table"][0, 2], 0, 570] = np.nan  # the last token, which query 0 does not see
    out, lse = kx.mla_decode(**x, backend=backend)
    assert np.isnan(value(out[0, 1])).all() and np.isnan(lse[0, :, 1]).all()
    assert np.isfinite(lse[0, :, 0]).all()


def test_both_caches_of_the_same_values_agree(backend):
    x = draw(**CASE, kv_cache="u8")
    rng = np.random.default_rng(3)
    latent, rope = (rng.standard_normal((84, d)).astype(BF16) for d in (512, 64))
    packed = pack_fp8_cache(latent, rope).reshape(12, 7, 656)  # power-of-two scales: the values are bf16 numbers
    plain = unpack_fp8_cache(packed).astype(BF16)
    assert np.array_equal(value(plain), unpack_fp8_cache(packed))
    agree(kx.mla_decode(**x | {"kv_cache": packed}, backend=backend), kx.mla_decode(**x | {"kv_cache": plain}, backend=backend))


def test_equal_scores_give_the_mean(backend):
    x = draw(**CASE | {"q": 1})
    x["q"][:] = 0
    out, lse = kx.mla_decode(**x, backend=backend)
    np.testing.assert_allclose(np.exp(lse[:, 0, 0]), x["seq_lens"], rtol=1e-5)


def test_large_scores_do_not_overflow(backend):
    x = draw(b=1, q=1, h=3, lens=(50,), page=64, p=1, n=1, softmax_scale=50.0)
    out, lse = kx.mla_decode(**x, backend=backend)
    want = kx.reference.mla_decode(**x)
    assert np.isfinite(value(out)).all()
    np.testing.assert_allclose(lse, want[1], rtol=1e-5)


def test_strided_queries(backend):
    x = draw(**CASE)
    wide = np.zeros((*x["q"].shape[:3], 600), BF16)
    wide[..., :576] = x["q"]
    agree(kx.mla_decode(**x | {"q": wide[..., :576]}, backend=backend), kx.mla_decode(**x, backend=backend))


@pytest.mark.parametrize("name, place, bad, says", [
    ("seq_lens", 1, -1, "-1 for sequence 1"), ("seq_lens", 0, 50, "0 to 49"), ("block_table", (1, 0), 12, r"12 at \[1, 0\]"),
    ("block_table", (0, 5), -1, r"-1 at \[0, 5\]"),
])
def test_bad_index_data_raises(backend, name, place, bad, says):
    x = draw(**CASE)
    x[name][place] = bad
    with pytest.raises(kx.ContractError, match=says):
        kx.mla_decode(**x, backend=backend)


def test_a_strided_cache_raises(backend):
    x = draw(**CASE)
    x["kv_cache"] = np.repeat(x["kv_cache"], 2, axis=0)[::2]
    with pytest.raises(kx.ContractError, match="kv_cache is strided"):
        kx.mla_decode(**x, backend=backend)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(st.integers(0, 90), max_size=3), q=st.integers(0, 3), h=st.integers(1, 20), page=st.integers(1, 70),
    causal=st.booleans(), kv_cache=st.sampled_from(["bf16", "u8"]), sink=st.sampled_from([None, "f32"]), seed=st.integers(0, 9),
)
def test_any_shape(backend, lens, q, h, page, causal, kv_cache, sink, seed):
    pages = [-(-x // page) for x in lens]
    x = draw(seed, b=len(lens), q=q, h=h, lens=tuple(lens), page=page, p=sum(pages) + 1, n=max(pages, default=0) + 1,
             causal=causal, kv_cache=kv_cache, sink=sink)
    agree(kx.mla_decode(**x, backend=backend), kx.reference.mla_decode(**x))
