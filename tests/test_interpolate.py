"""Laws of an interpolated table: exact where measured, monotone, honest about its error, utilisation held outside."""

import time

import numpy as np
import pytest

from kernomics.cost.interpolate import REACH, Surface, _isotonic, fit


def work(x):
    """Launch, bytes and FLOPs of a product [m, k] x [k, n]."""
    m, n, k = np.asarray(x, dtype=float).T
    return np.stack([np.ones_like(m), m * k + n * k + 2 * m * n, 2 * m * n * k], 1)


RATES = np.array([5e-6, 1 / 4e12, 1 / 1e15])


def seconds(x):
    """A chip whose utilisation changes smoothly with m and n."""
    m, n, _ = np.asarray(x, dtype=float).T
    return work(x) @ RATES * (1 + 0.5 / np.log2(4 + m) + 0.3 / np.log2(4 + n))


def grid(step=2):
    axis = 2 ** np.arange(4, 15, step)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


@pytest.fixture(scope="module")
def surface():
    x = grid()
    return Surface(x, seconds(x), work)


@pytest.fixture(scope="module")
def noisy():
    rng = np.random.default_rng(1)
    x = grid(1)[rng.random(11**3) < 0.5]
    return Surface(x, seconds(x) * np.exp(0.08 * rng.standard_normal(len(x))), work), x


def between(rng, count=2000, low=16, high=16384):
    return np.exp(rng.uniform(np.log(low), np.log(high), (count, 3))).round().astype(int)


def test_measured_points_are_exact(surface, noisy):
    for s, x in ((surface, grid()), noisy):
        want = s.measured[tuple(np.searchsorted(a, x[:, j]) for j, a in enumerate(s.axes))]
        np.testing.assert_array_equal(s.many(x), want)
        point = s.seconds(x[17])
        assert point.exact and point.sigma == 0 and point.outside == 0 and point.seconds == want[17]


def test_points_between_are_near(surface):
    x = between(np.random.default_rng(0))
    error = np.abs(surface.many(x) / seconds(x) - 1)
    assert np.median(error) < 0.03 and np.quantile(error, 0.9) < 0.1


def test_sigma_covers_the_error(noisy):
    x = between(np.random.default_rng(2))
    error = np.abs(np.log(noisy[0].many(x) / seconds(x)))
    assert np.quantile(error, 0.68) < noisy[0].sigma < 0.2


@pytest.mark.parametrize("low, high", [(16, 16384), (1, 16384 * 64)], ids=["inside", "everywhere"])
def test_rises_with_every_dim(surface, low, high):
    rng = np.random.default_rng(3)
    x = between(rng, low=low, high=high)
    y = np.minimum(x + (rng.random(x.shape) * x * (rng.random(x.shape) < 0.5)).astype(int), high)
    assert (surface.many(y) >= surface.many(x) * (1 - 1e-12)).all()


def test_rises_between_noisy_points(noisy):
    rng = np.random.default_rng(4)
    x = between(rng) | 1  # odd: no node
    y = (x * (1 + rng.random(x.shape))).astype(int) | 1
    assert (noisy[0].many(y) >= noisy[0].many(x) * (1 - 1e-12)).all()


def test_many_is_seconds(surface, noisy):
    x = np.concatenate([between(np.random.default_rng(5), 100, 1, 2**21), grid()[:50], [[16384 * 64] * 3]])
    for s in (surface, noisy[0]):
        one = [p.seconds if (p := s.seconds(row)) else np.nan for row in x.tolist()]
        np.testing.assert_allclose(s.many(x), one, rtol=1e-12)


def test_a_spike_counts_for_nothing():
    x = grid(1)
    spiked = seconds(x)
    spike = len(x) // 2
    spiked[spike] *= 200
    clean, spoiled = Surface(x, seconds(x), work), Surface(x, spiked, work)
    assert spoiled.seconds(x[spike]).seconds == spiked[spike]
    y = between(np.random.default_rng(6))
    assert np.abs(np.log(spoiled.many(y) / clean.many(y))).max() < 0.1


def test_seconds_add_up_where_some_stand_out():
    """Of 1331 calls a quarter takes half as long again: those not measured take what is foretold on average."""
    rng = np.random.default_rng(8)
    x = grid(1)
    y = seconds(x) * np.where(rng.random(len(x)) < 1 / 4, 1.5, 1.0) * np.exp(0.03 * rng.standard_normal(len(x)))
    seen = rng.random(len(x)) < 0.4
    found = Surface(x[seen], y[seen], work, noise=0.1).many(x[~seen])
    assert np.mean(y[~seen] / found) == pytest.approx(1, abs=0.03)  # 1.046 without smearing


def test_outside_utilisation_is_held(surface):
    inside, outside, far = (surface.seconds((m, 16384, 16384)) for m in (16384, 32768, 131072))
    assert (inside.outside, outside.outside, far.outside) == pytest.approx((0, 1, 3))
    assert outside.seconds / inside.seconds == pytest.approx(2, rel=0.02)
    assert far.seconds / inside.seconds == pytest.approx(8, rel=0.02)
    assert inside.sigma < outside.sigma < far.sigma
    assert surface.seconds((int(16384 * REACH[-1]) + 1, 16, 16)) is None
    assert surface.seconds((1, 16, 16)).seconds <= surface.seconds((16, 16, 16)).seconds


def test_a_hole_in_the_corner_is_outside():
    x = grid()
    x = x[x.prod(1) < 2**36]
    s = Surface(x, seconds(x), work)
    corner = s.seconds((16384, 16384, 16384))
    assert not corner.exact and corner.outside > 0
    assert corner.seconds >= s.measured[~np.isnan(s.measured)].max()


def test_a_free_dim_may_fall():
    t, ranks = (a.reshape(-1) for a in np.meshgrid(2 ** np.arange(12), [1, 2, 4, 8], indexing="ij"))
    x = np.stack([t, ranks], 1)
    s = Surface(x, 1e-6 + 1e-6 * t / ranks, lambda x: np.stack([np.ones(len(x)), x[:, 0] / x[:, 1]], 1), free=(1,))
    assert s.seconds((1000, 8)).seconds < s.seconds((1000, 4)).seconds < s.seconds((1001, 4)).seconds
    assert s.seconds((1000, 4)).seconds == pytest.approx(251e-6, rel=0.01)


def test_a_tuned_dim_is_free_where_it_falls_often():
    b, h = (a.reshape(-1) for a in np.meshgrid(2 ** np.arange(10), 2 ** np.arange(8), indexing="ij"))
    x = np.stack([b, h], 1)
    surfaces = [Surface(x, (1 + b * h) * 1e-6 * s, lambda x: np.stack([np.ones(len(x)), x.prod(1)], 1), tuned=(1,))
                for s in (1.0, np.where(h == 32, 3.0, 1.0))]
    assert surfaces[0].ordered == [0, 1] and surfaces[1].ordered == [0]
    assert surfaces[1].seconds((100, 64)).seconds == pytest.approx(6401e-6, rel=0.02)


def test_a_dim_that_is_zero():
    t = 2 ** np.arange(15)
    x = np.stack([t, np.zeros_like(t)], 1)

    def attention(x):
        t, prefix = np.asarray(x, dtype=float).T
        return np.stack([np.ones_like(t), t * (prefix + t / 2)], 1)

    s = Surface(x, attention(x) @ [1e-5, 1e-10], attention, continued={1: 2 ** np.arange(6, 21)})
    chunk = s.seconds((1000, 10000))
    assert chunk.outside > 0 and chunk.seconds == pytest.approx(1e-5 + 1e-10 * 1000 * 10500, rel=0.05)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_few_points(points):
    x = grid()[:points]
    s = Surface(x, seconds(x), work)
    np.testing.assert_array_equal(s.many(x), seconds(x))
    assert s.seconds((33, 33, 33)).sigma >= 0.5


def test_rates_are_found_and_never_negative():
    x = grid(1)
    np.testing.assert_allclose(fit(work(x), work(x) @ RATES), RATES, rtol=1e-6)
    assert (fit(work(x), 1e-5 / np.sqrt(x[:, 0])) >= 0).all()


def test_isotonic_by_hand():
    got = _isotonic(np.array([[3.0, 1, 2, 6, 4], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]), 1)
    np.testing.assert_allclose(got, [[2, 2, 2, 5, 5], [1, 2, 3, 4, 5], [3, 3, 3, 3, 3]])
    np.testing.assert_allclose(_isotonic(np.array([[2.0, 0], [1, 1]]), 0), [[1.5, 0], [1.5, 1]])


def test_lookup_is_fast(surface):
    x = between(np.random.default_rng(7), 2000).tolist()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for row in x:
            surface.seconds(row)
        best = min(best, (time.perf_counter() - start) / len(x))
    assert best < 50e-6
