"""moe_balance by hand."""

import numpy as np
import pytest

import kernomics as kx


def test_by_hand():
    """Counts 6, 2, 4, 0, 8 have mean 4: down, up, as it was, up, down."""
    got = kx.moe_balance(np.int32([6, 2, 4, 0, 8]), np.float32([0, 0, 0.25, 1, -1]), rate=0.5)
    assert got.dtype == np.float32 and got.tolist() == [-0.5, 0.5, 0.25, 1.5, -1.5]


def test_a_mean_between_integers_moves_every_bias():
    assert kx.moe_balance(np.int32([1, 2]), np.float32([0, 0]), rate=1.0).tolist() == [1, -1]


def test_large_counts_are_compared_exactly():
    """Means of float32 would call these equal."""
    counts = np.int32([2**30 + 1, 2**30, 2**30 - 1])
    assert kx.moe_balance(counts, np.zeros(3, np.float32), rate=1.0).tolist() == [-1, 0, 1]


def test_default_rate_and_inputs_unchanged():
    bias = np.float32([0, 0])
    assert kx.moe_balance(np.int32([0, 4]), bias).tolist() == [np.float32(1e-3), -np.float32(1e-3)]
    assert not bias.any()


def test_balances_a_router():
    """Applied step by step, the rule evens out a router that prefers some experts."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((512, 16)) + np.linspace(0, 2, 16)).astype(np.float32)
    bias, spread = np.zeros(16, np.float32), []
    for _ in range(200):
        _, ids = kx.moe_route(x, bias, top_k=2, backend="reference")
        counts = np.bincount(ids.ravel(), minlength=16).astype(np.int32)
        spread.append(counts.max() / counts.mean())
        bias = kx.moe_balance(counts, bias, rate=5e-3)
    assert spread[0] > 2.5 and max(spread[-10:]) < 1.3


def test_bad_counts():
    with pytest.raises(kx.ContractError, match="moe_balance: counts is -1"):
        kx.moe_balance(np.int32([3, -1]), np.float32([0, 0]))
