"""Laws of mla_prefill and its backward."""

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


def draw(seed=0, t_lens=(3, 7, 1), s_lens=(13, 4, 3), op="mla_prefill", **case):
    """Inputs and scalars of a case, ready for the op."""
    dims = {"b": len(t_lens), "t": sum(t_lens), "s": sum(s_lens), "t_lens": t_lens, "s_lens": s_lens}
    inputs, scalars = sample(kx.OPS[op], Case(**{"softmax_scale": 0.1, "h": 3, **case, **dims}), seed)
    return inputs | scalars


def offsets(*lens):
    return np.cumsum((0, *lens)).astype(np.int32)


def agree(got, want):
    for measure, (value, bound) in judge_attention(*got, *want).items():
        assert value <= bound, (measure, value, bound)


def value(x):
    return np.asarray(x).astype(np.float64)


def test_prefill_equals_query_by_query(backend):
    x = draw(t_lens=(7,), s_lens=(12,))
    out, lse = kx.mla_prefill(**x, backend=backend)
    for i in range(7):
        seen = 12 - 7 + i + 1
        part = {"q": x["q"][i : i + 1], "k": x["k"][:seen], "v": x["v"][:seen], "cu_q": offsets(1), "cu_k": offsets(seen)}
        agree(kx.mla_prefill(**x | part, backend=backend), (value(out[i : i + 1]), lse[:, i : i + 1]))


def test_prefill_equals_decode_step_by_step(backend):
    t, h, page = 21, 4, 8
    x = draw(t_lens=(t,), s_lens=(t,), h=h)
    x["k"] = np.repeat(x["k"][:, :1], h, axis=1)  # one latent for all heads, whose first 128 values are key and value
    x["v"] = x["k"][:, :, :128].copy()
    out, lse = kx.mla_prefill(**x, backend=backend)
    cache = np.zeros((3 * page, 576), BF16)
    cache[:t, :128], cache[:t, 512:] = x["k"][:, 0, :128], x["k"][:, 0, 128:]
    q = np.zeros((1, t, h, 576), BF16)
    q[0, :, :, :128], q[0, :, :, 512:] = x["q"][:, :, :128], x["q"][:, :, 128:]
    table = np.arange(3, dtype=np.int32)[None]
    for i in range(t):
        step, step_lse = kx.mla_decode(q[:, i : i + 1], cache.reshape(3, page, 576), table, np.array([i + 1], np.int32),
                                       softmax_scale=0.1, backend=backend)
        agree((step[0, :, :, :128], step_lse[0]), (value(out[i : i + 1]), lse[:, i : i + 1]))
    whole, whole_lse = kx.mla_decode(q, cache.reshape(3, page, 576), table, np.array([t], np.int32), softmax_scale=0.1,
                                     backend=backend)
    agree((whole[0, :, :, :128], whole_lse[0]), (value(out), lse))


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_and_heads_are_independent(backend, causal):
    x = draw(causal=causal)
    out, lse = kx.mla_prefill(**x, backend=backend)
    for i in range(3):
        tokens, keys = slice(*x["cu_q"][i : i + 2]), slice(*x["cu_k"][i : i + 2])
        for head in range(3):
            part = {"q": x["q"][tokens, head : head + 1], "k": x["k"][keys, head : head + 1], "v": x["v"][keys, head : head + 1]}
            part |= {"cu_q": offsets(tokens.stop - tokens.start), "cu_k": offsets(keys.stop - keys.start)}
            one = kx.mla_prefill(**x | part, backend=backend)
            agree(one, (value(out[tokens, head : head + 1]), lse[head : head + 1, tokens]))


def test_key_chunks_merged_by_lse_give_the_whole(backend):
    x = draw(t_lens=(9,), s_lens=(31,), causal=False)
    out, lse = kx.mla_prefill(**x, backend=backend)
    parts = []
    for keys in (slice(0, 20), slice(20, 31)):
        part = {"k": x["k"][keys], "v": x["v"][keys], "cu_k": offsets(keys.stop - keys.start)}
        parts += kx.mla_prefill(**x | part, backend=backend)
    merged, merged_lse = kx.attention_merge(*parts, backend=backend)  # as they come: [t h 128], [h t]
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-5, atol=1e-5)
    assert norm_error(value(merged), value(out)) <= 4 * 2.0**-8


def test_chunked_prefill_equals_the_whole(backend):
    x = draw(t_lens=(30,), s_lens=(30,))
    out, lse = kx.mla_prefill(**x, backend=backend)
    for start, stop in ((0, 13), (13, 30)):
        part = {"q": x["q"][start:stop], "k": x["k"][:stop], "v": x["v"][:stop]}
        part |= {"cu_q": offsets(stop - start), "cu_k": offsets(stop)}
        agree(kx.mla_prefill(**x | part, backend=backend), (value(out[start:stop]), lse[:, start:stop]))


def test_key_order_does_not_matter_without_causal(backend):
    x = draw(t_lens=(5,), s_lens=(40,), causal=False)
    order = np.random.default_rng(0).permutation(40)
    agree(kx.mla_prefill(**x | {"k": x["k"][order], "v": x["v"][order]}, backend=backend), kx.mla_prefill(**x, backend=backend))


def test_no_keys(backend):
    x = draw(t_lens=(3, 6, 2), s_lens=(0, 4, 2))
    out, lse = kx.mla_prefill(**x, backend=backend)
    assert (value(out[:5]) == 0).all() and (lse[:, :5] == -np.inf).all()  # no keys at all; two queries before the first key
    assert np.isfinite(lse[:, 5:]).all()


def test_a_later_nan_key_is_not_seen(backend):
    x = draw(t_lens=(4,), s_lens=(4,))
    want = kx.mla_prefill(**x, backend=backend)
    x["k"][3] = np.nan
    out, lse = kx.mla_prefill(**x, backend=backend)
    agree((out[:3], lse[:, :3]), (value(want[0][:3]), want[1][:, :3]))
    assert np.isnan(value(out[3])).all() and np.isnan(lse[:, 3]).all()


def test_a_nan_value_gives_nan_where_it_is_seen(backend):
    x = draw(t_lens=(2,), s_lens=(5,))
    x["v"][1, :, 7] = np.nan
    out, lse = kx.mla_prefill(**x, backend=backend)
    assert np.isnan(value(out[:, :, 7])).all() and np.isfinite(lse).all()
    assert np.isfinite(np.delete(value(out), 7, axis=2)).all()


def test_large_scores_do_not_overflow(backend):
    x = draw(t_lens=(20,), s_lens=(20,), softmax_scale=40.0)
    out, lse = kx.mla_prefill(**x, backend=backend)
    assert np.isfinite(value(out)).all()
    np.testing.assert_allclose(lse, kx.reference.mla_prefill(**x)[1], rtol=1e-5, atol=2e-3)


def test_strided_inputs(backend):
    x = draw()
    kv = np.concatenate([x["k"], x["v"]], axis=2)  # one projection, as models make it
    strided = {"k": kv[:, :, :192], "v": kv[:, :, 192:], "q": np.asfortranarray(x["q"])}
    agree(kx.mla_prefill(**x | strided, backend=backend), kx.mla_prefill(**x, backend=backend))


@pytest.mark.parametrize("name, place, bad, says", [
    ("cu_q", 0, 1, "from 1 to 11"), ("cu_q", -1, 12, "from 0 to 12"), ("cu_k", 1, 18, "17 after 18 at 2"),
    ("cu_k", -1, 19, "from 0 to 19"),
])
def test_bad_offsets_raise(backend, name, place, bad, says):
    x = draw()
    x[name][place] = bad
    with pytest.raises(kx.ContractError, match=says):
        kx.mla_prefill(**x, backend=backend)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 90)), max_size=3), h=st.integers(1, 6), causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape(backend, lens, h, causal, seed):
    x = draw(seed, tuple(a for a, _ in lens), tuple(c for _, c in lens), h=h, causal=causal)
    agree(kx.mla_prefill(**x, backend=backend), kx.reference.mla_prefill(**x))


# ---------------------------------------------------------------- backward


@pytest.mark.parametrize("causal", [True, False])
def test_the_backward_is_the_derivative(causal):
    rng = np.random.default_rng(0)
    scalars, cu_q, cu_k, h = {"softmax_scale": 0.1, "causal": causal}, offsets(3, 0, 6, 2), offsets(5, 4, 3, 0), 2
    q, k, v, dout = (rng.standard_normal((n, h, d)) for n, d in ((11, 192), (12, 192), (12, 128), (11, 128)))
    dlse = rng.standard_normal((h, 11))
    out, lse = kx.OPS["mla_prefill"].define(q, k, v, cu_q, cu_k, **scalars)

    def loss(q, k, v):
        out, lse = kx.OPS["mla_prefill"].define(q, k, v, cu_q, cu_k, **scalars)
        return np.sum(dout * out) + np.sum((dlse * lse)[lse > -np.inf])

    gradients = kx.OPS["mla_prefill_backward"].define(dout, dlse, q, k, v, out, lse, cu_q, cu_k, **scalars)
    for i, gradient in enumerate(gradients):
        for _ in range(3):
            step = [np.zeros(x.shape) for x in (q, k, v)]
            step[i] = rng.standard_normal(step[i].shape)
            up, down = (loss(*(x + side * 1e-5 * d for x, d in zip((q, k, v), step))) for side in (1, -1))
            np.testing.assert_allclose(np.sum(gradient * step[i]), (up - down) / 2e-5, rtol=1e-7, atol=1e-7)


def test_unseen_keys_and_keyless_queries_have_no_gradient():
    x = draw(op="mla_prefill_backward", t_lens=(3, 2), s_lens=(0, 6))
    x["cu_q"] = offsets(5, 0)  # now no query belongs to the keys
    x["lse"][:], x["out"][:] = -np.inf, 0
    for gradient in kx.mla_prefill_backward(**x, backend="reference"):
        assert (value(gradient) == 0).all()


def test_the_gradient_is_linear_in_dout_and_dlse():
    x = draw(op="mla_prefill_backward")
    reference = kx.reference.mla_prefill_backward
    parts = reference(**x | {"dlse": 0 * x["dlse"]}), reference(**x | {"dout": 0 * x["dout"]})
    for whole, by_out, by_lse in zip(reference(**x), *parts):
        np.testing.assert_allclose(whole, by_out + by_lse, atol=1e-12)
    assert not parts[1][2].any()  # lse does not depend on v
