"""Laws of moe_route and its backward."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx

V3 = {"top_k": 8, "n_group": 8, "topk_group": 4, "scaling": 2.5}


def logits(t=40, e=256, seed=0):
    return np.random.default_rng(seed).standard_normal((t, e), np.float32)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), t=st.integers(1, 20), size=st.integers(1, 9), n_group=st.integers(1, 5), seed=st.integers(0, 99),
       score=st.sampled_from(["sigmoid", "softmax"]), group_score=st.sampled_from(["top2", "max"]))
def test_agrees_with_a_loop(backend, data, t, size, n_group, seed, score, group_score):
    """One token after the other, in Python; logits of halves and a bias of quarters make ties frequent."""
    topk_group = data.draw(st.integers(1, n_group))
    top_k = data.draw(st.integers(1, topk_group * size))
    rng = np.random.default_rng(seed)
    x = (rng.integers(-6, 7, (t, n_group * size)) / 2).astype(np.float32)
    bias = (rng.integers(-2, 2, n_group * size) / 4).astype(np.float32)
    weights, ids = kx.moe_route(x, bias, top_k=top_k, n_group=n_group, topk_group=topk_group, score=score,
                                group_score=group_score, renormalize=False, scaling=3.0, backend=backend)
    for row, w, chosen in zip(x.astype(np.float64), weights, ids, strict=True):
        s = 1 / (1 + np.exp(-row)) if score == "sigmoid" else np.exp(row) / np.exp(row).sum()
        choice = s + bias
        # Sums that tie in exact arithmetic only through different terms may rank either way: leave such rows out.
        if np.min(np.diff(np.unique(choice)), initial=1) < 1e-6:
            continue
        best = [np.sort(choice[g * size:(g + 1) * size])[::-1][: 2 if group_score == "top2" else 1] for g in range(n_group)]
        totals = [float(b.sum()) for b in best]
        if np.min(np.diff(np.unique(totals)), initial=1) < 1e-6:
            continue
        kept = sorted(range(n_group), key=lambda g: (-totals[g], g))[:topk_group]
        want = sorted((i for i in range(len(row)) if i // size in kept), key=lambda i: (-choice[i], i))[:top_k]
        assert list(chosen) == want
        np.testing.assert_allclose(w, 3 * s[want], rtol=1e-6)


def test_deepseek_v3_properties(backend):
    bias = np.random.default_rng(1).standard_normal(256).astype(np.float32) / 10
    weights, ids = kx.moe_route(logits(), bias, **V3, backend=backend)
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    np.testing.assert_allclose(weights.sum(1), 2.5, rtol=1e-6)
    for row, chosen in zip(logits(), ids, strict=True):
        assert len(set(chosen)) == 8 and len(set(chosen // 32)) <= 4
        assert (np.diff((1 / (1 + np.exp(-row)) + bias)[chosen]) <= 1e-6).all()


def test_rows_do_not_depend_on_each_other(backend):
    whole = kx.moe_route(logits(), **V3, backend=backend)
    for rows in (slice(0, 1), slice(3, 20)):
        for part, all_rows in zip(kx.moe_route(logits()[rows], **V3, backend=backend), whole, strict=True):
            assert np.array_equal(part, all_rows[rows])


def test_ties_go_to_the_lowest_expert_and_group(backend):
    _, ids = kx.moe_route(np.zeros((3, 256), np.float32), **V3, backend=backend)
    assert np.array_equal(ids, np.tile(np.arange(8), (3, 1)))
    x = np.full((1, 256), -1, np.float32)
    x[0, [5, 40, 41, 70, 71, 100, 250, 255]] = 2  # groups 1, 2 and 7 have two of the best, 0 and 3 one
    _, ids = kx.moe_route(x, **V3, backend=backend)
    assert ids.tolist() == [[5, 40, 41, 70, 71, 250, 255, 0]]


def test_every_position_of_a_vector_ties(backend):
    """Equal logits give equal scores wherever they stand in a row, vector body or tail."""
    for e in (7, 13, 33, 67):
        x = np.full((1, e), 0.337, np.float32)
        _, ids = kx.moe_route(x, top_k=e, backend=backend)
        assert np.array_equal(ids[0], np.arange(e))


def test_excluded_groups_are_out_even_below_zero(backend):
    bias = np.full(16, -2, np.float32)
    bias[:4] = -1  # the best group; its choices are all negative
    _, ids = kx.moe_route(logits(9, 16), bias, top_k=4, n_group=4, topk_group=1, backend=backend)
    assert np.array_equal(np.sort(ids, 1), np.tile(np.arange(4), (9, 1)))


def test_bias_chooses_but_does_not_weigh(backend):
    x = np.float32([[0, 0, 0, 0]])
    weights, ids = kx.moe_route(x, np.float32([0, 9, 0, 1]), top_k=2, backend=backend)
    assert ids.tolist() == [[1, 3]] and weights.tolist() == [[0.5, 0.5]]


def test_nan_rows(backend):
    x = logits(3)
    x[1, 77] = np.nan
    weights, ids = kx.moe_route(x, **V3, backend=backend)
    assert ids[1].tolist() == list(range(8)) and np.isnan(weights[1]).all()
    clean = kx.moe_route(logits(3), **V3, backend=backend)
    assert np.array_equal(ids[::2], clean[1][::2]) and np.array_equal(weights[::2], clean[0][::2])
    bias = np.zeros(256, np.float32)
    bias[200] = np.nan
    weights, ids = kx.moe_route(logits(3), bias, **V3, backend=backend)
    assert np.array_equal(ids, np.tile(np.arange(8), (3, 1))) and np.isnan(weights).all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_minus_infinity_comes_last_with_weight_zero(backend, score):
    x = np.float32([[-np.inf, 1, -np.inf, 2]])
    weights, ids = kx.moe_route(x, top_k=3, score=score, backend=backend)
    assert ids.tolist() == [[3, 1, 0]] and weights[0, 2] == 0 and np.isfinite(weights).all()


@pytest.mark.parametrize("change, name", [({"top_k": 0}, "top_k"), ({"top_k": 257, "topk_group": 8}, "top_k"),
                                          ({"n_group": 7}, "n_group"), ({"n_group": 0}, "n_group"),
                                          ({"topk_group": 9}, "topk_group"), ({"topk_group": 0}, "topk_group"),
                                          ({"top_k": 129}, "topk_group")])
def test_bad_keywords(backend, change, name):
    with pytest.raises(kx.ContractError, match=f"moe_route: {name} is"):
        kx.moe_route(logits(2), **V3 | change, backend=backend)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_backward_is_the_derivative(score, renormalize):
    rng = np.random.default_rng(0)
    x, dweights = rng.standard_normal((3, 12)), rng.standard_normal((3, 4))
    words = {"score": score, "renormalize": renormalize, "scaling": 2.5}

    def forward(x):
        return kx.OPS["moe_route"].define(x, None, top_k=4, n_group=3, topk_group=2, group_score="top2", **words)

    experts = forward(x)[1]
    got = kx.OPS["moe_route_backward"].define(dweights, x, None, experts, **words)
    step, want = 1e-6, np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        assert np.array_equal(forward(up)[1], experts) and np.array_equal(forward(down)[1], experts)
        want[i] = np.sum(dweights * (forward(up)[0] - forward(down)[0])) / (2 * step)
    np.testing.assert_allclose(got, want, atol=1e-8)
    assert score == "softmax" or np.count_nonzero(got) == 12


def test_backward_of_nan_rows_is_nan():
    x = logits(2, 6)
    x[0, 5] = np.nan
    got = kx.moe_route_backward(np.ones((2, 2), np.float32), x, None, np.int32([[0, 1], [0, 1]]), backend="reference")
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()
