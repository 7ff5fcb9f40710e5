"""Ranges: quantiles by hand, draws that repeat, swings in order, elasticities of known powers, wrong inputs told."""

import numpy as np
import pytest

from kernomics.cost import CostError, tco, wrong
from kernomics.cost.uncertainty import Input, elasticities, monte_carlo, parse, sample, tornado

RANGES = {"a": "1..3", "b": "2..3..8", "c": 5, "d": {"dist": "lognormal", "median": 4, "sigma": 0.2}}
VARIED = ["2..4", "0..1..3", "0..0..1", "0..1..1", {"dist": "normal", "mean": 1, "sd": 2},
          {"dist": "lognormal", "median": 3, "sigma": 0.5}, {"dist": "normal", "mean": 0.9, "sd": 0.2, "low": 0, "high": 1}]


def total(a, b, c, d):
    return a + b + c + d


def test_medians_by_hand():
    assert parse(7).median == parse("7").median == 7
    assert parse("2..4").median == 3
    assert parse("0..1..2").median == 1
    assert parse("0..0..1").median == pytest.approx(1 - 0.5**0.5)
    assert parse("0..1..3").median == pytest.approx(3 - 3**0.5)  # (3 - x)**2 / (3 * 2) = 1/2
    assert parse({"dist": "normal", "mean": 3, "sd": 2}).median == pytest.approx(3)
    assert parse({"dist": "lognormal", "median": 3, "sigma": 2}).median == pytest.approx(3)


def test_quantiles_by_hand():
    assert parse("10..20").quantile(0.1) == 11
    assert parse("0..1..2").quantile(0.125) == pytest.approx(0.5)  # x**2 / 2
    assert parse("-1e3..1e3").quantile([0, 0.5, 1]).tolist() == [-1000, 0, 1000]
    assert parse({"dist": "normal", "mean": 1, "sd": 2}).quantile(0.8413447460685429) == pytest.approx(3)
    assert parse({"dist": "lognormal", "median": 2, "sigma": 1}).quantile(0.8413447460685429) == pytest.approx(2 * np.e)


@pytest.mark.parametrize("value", VARIED)
def test_draws_have_the_quantiles(value):
    x = parse(value)
    draws = x.sample(np.random.default_rng(0), 20000)
    for p in (0.1, 0.5, 0.9):
        assert np.quantile(draws, p) == pytest.approx(x.quantile(p), rel=1e-3, abs=1e-3)
    rising = x.quantile(np.linspace(0.01, 0.99, 99))
    assert (np.diff(rising) > 0).all()


@pytest.mark.parametrize("value, low, high", [
    ({"dist": "normal", "mean": 0.9, "sd": 0.5, "low": 0, "high": 1}, 0, 1),
    ({"dist": "lognormal", "median": 1, "sigma": 2, "high": 3}, 0, 3), ("0..1..4", 0, 4), ("-2..5", -2, 5)])
def test_draws_keep_to_their_bounds(value, low, high):
    draws = parse(value).sample(np.random.default_rng(1), 5000)
    assert low <= draws.min() and draws.max() <= high
    assert (parse(value).quantile(0), parse(value).quantile(1)) == pytest.approx((low, high), abs=1e-12)


def test_an_input_stays_as_it_is():
    x = parse("1..2")
    assert parse(x) is x and x == Input("uniform", (1.0, 2.0)) and not x.fixed and parse(3).fixed


@pytest.mark.parametrize("value", [np.float32(2), np.float64(2), np.int64(2), np.array(2.0), 2])
def test_numbers_of_numpy_are_numbers(value):
    assert parse(value) == Input("fixed", (2.0,))
    assert monte_carlo(lambda x: value, {"x": "1..3"}, n=4)[:3] == (2, 2, 2)


@pytest.mark.parametrize("value, told", [
    (np.array([1.0]), "share is array"), (np.True_, "share is .*True"), (10**400, "share is 1000"), (2j, "share is 2j"),
    ("3..1", "share is '3..1', allowed: numbers that rise"), ("1..1", "share is '1..1', allowed: numbers that rise"),
    ("1..5..3", "share is '1..5..3', allowed: numbers that rise"), ("1..2..3..4", "allowed: a number, \"lo..hi\""),
    ("low..high", "share is 'low..high', allowed: a number, "), ("1..inf", "share is '1..inf'"), ("", "share is ''"),
    (float("nan"), "share is nan"), (True, "share is True"), (None, "share is None"), ([1, 2], "share is \\[1, 2\\]"),
    ({"dist": "beta"}, "share.dist is 'beta', allowed: normal, lognormal"), ({}, "share.dist is None"),
    ({"dist": "normal", "mean": 1}, "share.sd is None, allowed: a number above 0"),
    ({"dist": "normal", "mean": 1, "sd": 0}, "share.sd is 0, allowed: a number above 0"),
    ({"dist": "normal", "mean": "1", "sd": 1}, "share.mean is '1', allowed: a number"),
    ({"dist": "lognormal", "median": -1, "sigma": 1}, "share.median is -1, allowed: a number above 0"),
    ({"dist": "lognormal", "mean": 1, "sigma": 1}, "share: field is 'mean', allowed: dist, median, sigma, low, high"),
    ({"dist": "normal", "mean": 1, "sd": 1, "low": 2, "high": 1}, "share.low is 2.0, allowed: below high = 1"),
    ({"dist": "normal", "mean": 3, "sd": 1, "high": 1}, "share.mean is 3.0, allowed: low .. high"),
])
def test_wrong_inputs_are_told(value, told):
    with pytest.raises(CostError, match=told):
        parse(value, "share")


def test_wrong_calls_are_told():
    with pytest.raises(CostError, match="p is 1.5, allowed: 0 to 1"):
        parse("1..2").quantile(1.5)
    for n in (0, 1.5, True):
        with pytest.raises(CostError, match=f"n is {n}, allowed: a whole number"):
            monte_carlo(total, RANGES, n=n)
    with pytest.raises(CostError, match="seed is -1, allowed"):
        monte_carlo(total, RANGES, seed=-1)
    with pytest.raises(CostError, match="b is 'x', allowed"):
        tornado(total, dict(RANGES, b="x"))
    with pytest.raises(CostError, match="n is 0, allowed"):
        sample(RANGES, 0)
    with pytest.raises(CostError, match="not a finite number at x = 1, y = 2"):
        monte_carlo(lambda x, y: np.where(np.arange(9) > 3, np.nan, x + y), {"x": 1, "y": 2}, n=9, vectorised=True)
    with pytest.raises(CostError, match=r"the result's shape is \(3,\), allowed: \(\) or \(9,\)"):
        monte_carlo(lambda x: np.ones(3), {"x": 2}, n=9, vectorised=True)
    with pytest.raises(CostError, match="not a finite number at x = 2"):
        monte_carlo(lambda x: float("inf"), {"x": 2})


def test_a_seed_repeats():
    first = monte_carlo(total, RANGES, n=200, seed=3)
    assert first == monte_carlo(total, dict(reversed(RANGES.items())), n=200, seed=3)
    assert first != monte_carlo(total, RANGES, n=200, seed=4)
    assert len(first.samples) == 200 and first.p10 < first.p50 < first.p90


def test_arrays_give_what_floats_give():
    one = monte_carlo(total, RANGES, n=300, seed=3)
    assert monte_carlo(total, RANGES, n=300, seed=3, vectorised=True) == one
    assert monte_carlo(lambda **_: 4, RANGES, n=3, vectorised=True) == (4, 4, 4, (4, 4, 4))


def test_samples_are_what_is_drawn():
    drawn = sample(RANGES, 300, seed=3)
    assert list(drawn) == list(RANGES) and {x.shape for x in drawn.values()} == {(300,)}
    assert tuple(total(**drawn)) == monte_carlo(total, RANGES, n=300, seed=3).samples
    assert (sample({"b": "2..3..8", "z": "0..1"}, 300, seed=3)["b"] == drawn["b"]).all()  # whatever else is drawn


def test_spread_of_one_input_is_its_own():
    spread = monte_carlo(lambda x: 2 * x, {"x": "0..10"}, n=2000)
    assert spread[:3] == pytest.approx((2, 10, 18), rel=0.01)
    fixed = monte_carlo(lambda x: 2 * x, {"x": 5}, n=3)
    assert fixed == (10, 10, 10, (10, 10, 10))


def test_inputs_are_drawn_apart():
    pairs = []
    monte_carlo(lambda x, y: pairs.append((x, y)) or 1, {"x": "0..1", "y": "0..1"}, n=4000)
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.05


def test_each_is_called_after_every_draw():
    seen = []
    monte_carlo(total, RANGES, n=3, each=lambda done, n: seen.append((done, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_tornado_is_sorted_by_swing():
    rows = tornado(lambda a, b, c, k: 10 * a - b + c + k, {"b": "0..50", "a": "0..1", "c": "0..30", "k": 7})
    assert [name for name, *_ in rows] == ["b", "c", "a"]  # k is fixed
    assert rows[0][1:] == pytest.approx((5 - 5 + 15 + 7, 5 - 45 + 15 + 7))
    swings = [abs(high - low) for _, low, high in rows]
    assert swings == pytest.approx([40, 24, 8])


def test_elasticities_of_powers():
    found = elasticities(lambda x, y, z, w: 3 * x**2 / y + 0 * z + 0 * w, {"x": "1..3", "y": 4, "z": 0, "w": 9})
    assert found == pytest.approx({"x": 2, "y": -1, "z": 0, "w": 0}, abs=1e-8)
    assert elasticities(lambda x: -(x**3), {"x": -2}) == pytest.approx({"x": 3})


def test_elasticities_at_the_end_of_a_range():
    def f(u):
        if u > 1:
            raise wrong("u", u, "at most 1")
        return 1 / u

    assert elasticities(f, {"u": 1}) == pytest.approx({"u": -1})
    with pytest.raises(CostError, match="u is"):
        elasticities(f, {"u": 2})
    with pytest.raises(CostError, match="beside x = 1, allowed: both above or both below 0"):
        elasticities(lambda x: x - 1, {"x": 1})


def test_elasticities_of_the_parts_of_a_price_sum_to_one():
    """Price is linear in dollars: scaling all of them scales it."""
    dollars = dict(chip_dollars="15e3..20e3..30e3", server_dollars=5000, network_dollars="2e3..4e3", storage_dollars=500,
                   install_dollars=800, dollars_per_kwh="0.04..0.12", hosting_dollars_per_kw_month=120,
                   staff_dollars_per_chip_year=300)

    def price(**fields):
        return tco.price_per_hour(tco.read(dict(fields, watts=1500, rate=0.1, residual=0.1, opex_share=0.02, margin=0.3)))

    assert sum(elasticities(price, dollars).values()) == pytest.approx(1, rel=1e-7)
    assert tornado(price, dollars)[0][0] == "chip_dollars"
    spread = monte_carlo(price, dollars, n=300)
    assert spread.p10 < price(**{k: parse(v).median for k, v in dollars.items()}) < spread.p90
