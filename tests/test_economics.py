"""The formulas of the cost model against numbers worked by hand, and the laws they obey."""

from math import exp, inf

import pytest

from kernomics.cost import CostError, tco
from kernomics.cost import economics as eco

TOKENS = {"in": 2e6, "cached": 5e6, "out": 2e6}
PRICES = {"in": 0.5, "cached": 0.1, "out": 2}

HAND = [  # got, worked by hand
    ("roofline_seconds", eco.roofline_seconds(2e12, 1e12, 3e9, 1e9), 3),
    ("chips_needed", eco.chips_needed(671e9, 80e9), 9),
    ("dollars_per_mtoken", eco.dollars_per_mtoken(3.6, 1000), 1),
    ("a day of DeepSeek's nodes", eco.fleet_dollars(226.75, 8, 24, 2), 87072),
    ("training DeepSeek-V3", eco.training_dollars(2.788e6, 2), 5.576e6),
    ("straight_line", eco.straight_line(50e9, 5), 10e9),
    ("capital_recovery: 1.1 of one year", eco.capital_recovery(0.1, 1), 1.1),
    ("annuity: 100 at 10 % over two years is 100 x 0.1 / (1 - 1/1.21)", eco.annuity(100, 0.1, 2), 12.1 / 0.21),
    ("straight_line, 20 got back", eco.straight_line(100, 4, 20), 20),
    ("annuity, 21 got back: 79 repaid, interest alone on 21", eco.annuity(100, 0.1, 2, 21), 7.9 / (1 - 1 / 1.21) + 2.1),
    ("npv: -100 + 110/1.1 + 121/1.21", eco.npv(0.1, [-100, 110, 121]), 100),
    ("irr: 121 after two years", eco.irr([-100, 0, 121]), 0.1),
    ("payback_years", eco.payback_years(10, 4), 2.5),
    ("payback_years of nothing", eco.payback_years(10, 0), inf),
    ("flows_payback_years: 10 left after two years, of 20", eco.flows_payback_years([-50, 20, 20, 20]), 2.5),
    ("flows_payback_years, too little", eco.flows_payback_years([-50, 20, 20]), inf),
    ("flows_payback_years, nothing spent", eco.flows_payback_years([0, 20]), 0),
    ("rental_profit: 4 x 0.75 less 1 an hour", eco.rental_profit(4, 0.75, 1), 17520),
    ("falling_rent", eco.falling_rent(4, 0.5, 2), 4 * exp(-1)),
    ("falling_rent_value: level and free money", eco.falling_rent_value(2, 0, 0, 1), 17520),
    ("falling_rent_value: 8760 x (1 - 1/e)", eco.falling_rent_value(1, 0.6, 0.4, 1), 8760 * (1 - exp(-1))),
    ("owned_dollars_per_hour", eco.owned_dollars_per_hour(8760, 1, 0.5), 2),
    ("power_dollars_per_hour", eco.power_dollars_per_hour(1500, 0.1), 0.15),
    ("yearly_dollars", eco.yearly_dollars(2, 0.5), 8760),
    ("capex_from_revenue", eco.capex_from_revenue(100e9, 0.5, 5), 250e9),
    ("nre_per_unit", eco.nre_per_unit(500e6, 100e3), 5000),
    ("break_even_units", eco.break_even_units(500e6, 5000), 100e3),
    ("break_even_units, nothing saved", eco.break_even_units(500e6, 0), inf),
    ("margin_over_cost", eco.margin_over_cost(150, 100), 0.5),
    ("gross_margin", eco.gross_margin(200, 50), 0.75),
    ("gross_of_over_cost: 5.45 of 6.45", eco.gross_of_over_cost(5.45), 5.45 / 6.45),
    ("over_cost_of_gross", eco.over_cost_of_gross(0.75), 3),
    ("price_at_margin", eco.price_at_margin(25, 0.75), 100),
    ("price_through", eco.price_through(10, [0.5, 0.75]), 80),
    ("break_even_performance", eco.break_even_performance(5000, 35000), 1 / 7),
    ("performance_per_dollar", eco.performance_per_dollar(100, 20), 5),
    ("query_dollars", eco.query_dollars(2e6, 3, 1e6, 10), 16),
    ("blended_price", eco.blended_price(3e6, 3, 1e6, 11), 5),
    ("prefill_bill_share", eco.prefill_bill_share(8e6, 3, 1e6, 10), 24 / 34),
    ("tokens_bought", eco.tokens_bought(1e4, 10), 1e9),
    ("sold_dollars: 0.5 + 1 + 4", eco.sold_dollars(TOKENS, PRICES), 5.5),
    ("blended_mtoken", eco.blended_mtoken(TOKENS, PRICES), 5.5 / 9),
    ("spend_change", eco.spend_change(4, 1.5), 2),
    ("chips_demanded", eco.chips_demanded(100, 0.5, 0.5), 100),
    ("watt_hours", eco.watt_hours(720, 5), 1),
    ("mean_watts", eco.mean_watts(8760), 1000),
    ("joules_per_token", eco.joules_per_token(1000, 500, 1.25), 2.5),
    ("tokens_per_s_per_mw", eco.tokens_per_s_per_mw(2000, 1000), 2e6),
    ("chips_per_watt", eco.chips_per_watt(1000, 1.25), 1 / 1250),
    ("freed_share", eco.freed_share(6, 1), 5 / 6),
    ("inference_flops", eco.inference_flops(5e8), 1e9),
    ("training_flops", eco.training_flops(37e9, 14.8e12), 3.2856e24),
    ("optimal_tokens", eco.optimal_tokens(70e9, 20), 1.4e12),
    ("training_hours", eco.training_hours(3.6e18, 1e15, 0.5), 2),
    ("achieved_share", eco.achieved_share(3.6e18, 2, 1e15), 0.5),
    ("tenfold_steps", eco.tenfold_steps(30e6, 30e9), 3),
    ("training_adder", eco.training_adder(5e6, 1e13), 0.5),
    ("rollout_share: 400 of 412 FLOP", eco.rollout_share(200, 2), 400 / 412),
    ("tokens_per_step: 1 + 0.5 + 0.25", eco.tokens_per_step(0.5, 2), 1.75),
    ("tokens_per_step, never wrong", eco.tokens_per_step(1, 3), 4),
    ("speculation_speedup", eco.speculation_speedup(0.85, 1, 0.25), 1.48),
    ("mha_kv_bytes", eco.mha_kv_bytes(61, 128, 192, 128, 2), 4997120),
    ("gqa_kv_bytes", eco.gqa_kv_bytes(126, 8, 128, 2), 516096),
    ("mla_kv_bytes", eco.mla_kv_bytes(61, 512, 64, 2), 70272),
    ("users_that_fit: 171 of 0.671", eco.users_that_fit(640e9, 0.9, 405e9, 1300, 516096), 254),
    ("users_that_fit, weights too large", eco.users_that_fit(80e9, 0.9, 405e9, 1300, 516096), 0),
    ("users_at_speed: 80 ms of 1 TB/s less 40 GB, 1 GB each", eco.users_at_speed(12.5, 1e12, 40e9, 1000, 1e6), 40),
    ("resident_ratio", eco.resident_ratio(2900, 12900), 12900 / 2900),
    ("kv_read_bytes: 10 + 11 + 12", eco.kv_read_bytes(10, 3, 1), 33),
    ("attention_pairs", eco.attention_pairs(4), 10),
    ("query_cost_ratio", eco.query_cost_ratio(4.5, 11), 49.5),
    ("answer_seconds", eco.answer_seconds(15000, 50), 300),
    ("bandwidth_for", eco.bandwidth_for(1500, 140e9), 210e12),
    ("restore_dollars", eco.restore_dollars(2e9, 1e9, 0.5, 1e-12, 100), 1.2),
    ("break_even_hit_rate: 1 to keep, 4 saved by a hit", eco.break_even_hit_rate(1, 2, 6), 0.25),
    ("break_even_hit_rate, moving dearer than prefill", eco.break_even_hit_rate(1, 6, 6), inf),
    ("prefill_dollars", eco.prefill_dollars(1000, 1e9, 1e12, 0.5, 0.25), 1),
    ("imbalance_slowdown", eco.imbalance_slowdown([8, 2, 2, 4]), 2),
    ("overlapped, compute longer", eco.overlapped(8, 5, 0.2), 10),
    ("overlapped, communication longer", eco.overlapped(4, 8, 0.2), 8),
    ("die_yield", eco.die_yield(1000, 0.1), exp(-1)),
    ("memory_dollars", eco.memory_dollars(80e9, 15), 1200),
    ("efficiency_cost", eco.efficiency_cost(0.5), 2),
    ("step_speedup: half of a step twice as fast", eco.step_speedup(0.5, 2), 4 / 3),
]


@pytest.mark.parametrize(("got", "want"), [x[1:] for x in HAND], ids=[x[0] for x in HAND])
def test_by_hand(got, want):
    assert got == pytest.approx(want, rel=1e-9)


def test_a_published_day():
    revenue = eco.sold_dollars({"cached": 342e9, "in": 266e9, "out": 168e9}, {"cached": 0.14, "in": 0.55, "out": 2.19})
    assert revenue == pytest.approx(342e3 * 0.14 + 266e3 * 0.55 + 168e3 * 2.19)
    cost = eco.fleet_dollars(226.75, 8, 24, 2)
    assert revenue == pytest.approx(562.1e3, rel=1e-3)
    assert eco.margin_over_cost(revenue, cost) == pytest.approx(5.45, abs=0.01)
    assert eco.gross_margin(revenue, cost) == pytest.approx(0.845, abs=1e-3)


def test_a_late_revenue_returns_little():
    assert eco.irr([-50, 0, 0, 20, 20, 20]) == pytest.approx(0.047, abs=5e-4)


def test_a_wafer_holds_whole_dies():
    assert 55 < eco.dies_per_wafer(814) < 65
    assert eco.dies_per_wafer(100) * 100 < 3.1416 * 150**2
    assert eco.die_dollars(16000, 814, 0.1) > 16000 / eco.dies_per_wafer(814)


# ---------------------------------------------------------------- laws


def test_an_annuity_without_interest_is_a_straight_line():
    assert eco.annuity(50, 0, 5) == eco.straight_line(50, 5)
    assert all(eco.annuity(x, 0, 7, x / 3) == eco.straight_line(x, 7, x / 3) for x in range(1, 500))
    assert eco.annuity(50, 1e-9, 5) == pytest.approx(10, rel=1e-6)


def test_free_money_costs_nothing_whatever_the_life():
    parts = dict(server_dollars=5000, network_dollars=3000, storage_dollars=1000, install_dollars=1000, watts=1000)
    for dollars in range(1000, 40000, 777):
        for years in (3, 5, 6, 7):
            owned = tco.read(dict(parts, chip_dollars=dollars, life_years=years, residual=0.1))
            assert tco.interest_per_year(owned) == 0


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("back", [0, 30, 100])
def test_an_annuity_repays_its_cost(rate, back):
    paid = [eco.annuity(100, rate, 7, back)] * 7
    assert eco.npv(rate, [-100] + paid[:6] + [paid[6] + back]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("flows", [[-50, 0, 0, 20, 20, 20], [-50, 13, 13, 13, 13, 13], [-100, 30, 30], [40, -60]])
def test_the_irr_makes_flows_worth_nothing(flows):
    assert eco.npv(eco.irr(flows), flows) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("flows", [[10, 20], [-10, 0], [], [-1, 20], [-1, 6, -11, 6], [-100, 230, -132]])
def test_flows_without_one_rate_are_refused(flows):
    """-1, 6, -11, 6 are worth nothing at 0, 100 and 200 %; 20 for 1 is 1900 %."""
    with pytest.raises(CostError, match="flows is .*, allowed: flows that change sign once"):
        eco.irr(flows)


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.75, 0.9])
def test_margins_and_prices_are_inverse(margin):
    price = eco.price_at_margin(40, margin)
    assert eco.gross_margin(price, 40) == pytest.approx(margin)
    assert eco.margin_over_cost(price, 40) == pytest.approx(eco.over_cost_of_gross(margin))
    assert eco.gross_of_over_cost(eco.over_cost_of_gross(margin)) == pytest.approx(margin)


def test_a_chain_of_margins_sums_to_its_price():
    margins = [0.2, 0.75, 0.3]
    assert sum(eco.margin_shares(10, margins)) == pytest.approx(eco.price_through(10, margins))
    assert eco.price_through(10, margins) == pytest.approx(eco.price_through(10, margins[::-1]))
    assert eco.price_through(10, []) == 10


def test_shares_sum_to_the_cost():
    shares = eco.allocate(100, {"prefill": 1, "decode": 3})
    assert shares == {"prefill": 25, "decode": 75}
    assert sum(eco.allocate(7.3, {"a": 0.2, "b": 5, "c": 11}).values()) == pytest.approx(7.3)


def test_a_joint_cost_by_each_rule():
    seconds = {"in": 1, "cached": 0, "out": 3}
    assert eco.allocate_by_time(8, seconds) == {"in": 2, "cached": 0, "out": 6}
    assert eco.allocate_by_price(11, TOKENS, PRICES) == pytest.approx({"in": 2, "cached": 1, "out": 8})  # sold at 1, 0.5, 4
    assert eco.allocate_by_pool(10, {"in": (4, 3), "out": (14, 2)}) == {"in": 3, "out": 7}
    assert eco.mtoken_costs({"in": 3, "cached": 1, "out": 4}, TOKENS | {"cached": 0}) == {"in": 1.5, "out": 2}


def test_by_price_every_kind_earns_one_margin():
    costs = eco.mtoken_costs(eco.allocate_by_price(2.2, TOKENS, PRICES), TOKENS)
    assert [eco.gross_margin(PRICES[kind], costs[kind]) for kind in TOKENS] == pytest.approx([0.6] * 3)
    assert eco.sold_dollars(TOKENS, costs) == pytest.approx(2.2)  # costs of all tokens are the joint cost


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 2, "b": -1}, {"a": float("nan")}, {"a": inf}])
def test_wrong_weights_are_told(weights):
    with pytest.raises(CostError, match="weights is .*, allowed: 0 or more"):
        eco.allocate(1, weights)


def test_training_hours_and_the_achieved_share_are_inverse():
    hours = eco.training_hours(3.3e24, 1979e12, 0.17)
    assert eco.achieved_share(3.3e24, hours, 1979e12) == pytest.approx(0.17)


def test_a_megawatt_of_tokens_is_the_inverse_of_their_joules():
    assert eco.tokens_per_s_per_mw(1234, 5678) * eco.joules_per_token(5678, 1234) == pytest.approx(1e6)


@pytest.mark.parametrize(("p", "k"), [(0.1, 1), (0.73, 3), (0.9, 8)])
def test_acceptance_inverts_the_tokens_of_a_step(p, k):
    assert eco.acceptance_for(eco.tokens_per_step(p, k), k) == pytest.approx(p)


def test_guesses_bound_the_tokens_of_a_step():
    with pytest.raises(CostError, match="below 3"):
        eco.acceptance_for(3, 2)
    assert eco.tokens_per_step(0, 5) == 1


def test_a_latent_of_all_heads_is_the_cache_of_all_heads():
    assert eco.mla_kv_bytes(4, 2 * 128 * 16, 0, 2) == eco.mha_kv_bytes(4, 16, 128, 128, 2) == eco.gqa_kv_bytes(4, 16, 128, 2)


def test_equal_loads_wait_for_nobody():
    assert eco.imbalance_slowdown([3, 3, 3]) == 1


def test_spend_stays_at_an_elasticity_of_one():
    assert eco.spend_change(45, 1) == 1
    assert eco.spend_change(45, 0) == pytest.approx(1 / 45)


def test_a_falling_rent_is_worth_less():
    level = eco.falling_rent_value(2, 0, 0.1, 4)
    assert eco.falling_rent_value(2, 0.3, 0.1, 4) < level < eco.falling_rent_value(2, 0, 0, 4) == 2 * 4 * 8760


def test_a_rental_pays_by_its_flows():
    level = eco.rental_flows(40e3, 2, 0.75, 0.1, 5)  # 1.5 less 0.1 an hour: 12264 a year
    assert level == pytest.approx([-40e3] + [12264] * 5)
    assert eco.flows_payback_years(level) == pytest.approx(eco.payback_years(40e3, 12264))
    assert eco.npv(0, level) == pytest.approx(5 * eco.rental_profit(2, 0.75, 0.1 + eco.owned_dollars_per_hour(40e3, 5)))


def test_a_falling_rent_returns_less_and_later():
    level, falling = (eco.rental_flows(40e3, 2, 0.75, 0.1, 5, d) for d in (0, 0.2))
    assert sum(falling) == pytest.approx(-40e3 + eco.falling_rent_value(1.5, 0.2, 0, 5) - 0.1 * 5 * 8760)
    assert falling[1:] == sorted(falling[1:], reverse=True)
    assert eco.irr(falling) < eco.irr(level) and eco.flows_payback_years(falling) > eco.flows_payback_years(level)


RISING = [(eco.straight_line, (100, 5, 10), (1, 0, 0)), (eco.annuity, (100, 0.1, 5, 10), (1, 1, 0, 0)),
          (eco.price_at_margin, (40, 0.5), (1, 1)), (eco.dollars_per_mtoken, (2, 1000), (1, 0)),
          (eco.training_hours, (1e20, 1e15, 0.4), (1, 0, 0)), (eco.tokens_per_step, (0.5, 2), (1, 1)),
          (eco.users_at_speed, (10, 1e12, 1e10, 1e3, 1e5), (0, 1, 0, 0, 0)), (eco.joules_per_token, (700, 100, 1.2), (1, 0, 1)),
          (eco.rental_profit, (2, 0.7, 1), (1, 1, 0)), (eco.die_dollars, (16e3, 800, 0.1), (1, 1, 1)),
          (eco.step_speedup, (0.3, 1.5), (1, 1)), (eco.overlapped, (8, 5, 0.2), (1, None, 1)),
          (eco.break_even_hit_rate, (1, 2, 6), (1, 1, 0)), (eco.falling_rent_value, (2, 0.3, 0.1, 4), (1, 0, 0, 1))]


@pytest.mark.parametrize(("f", "at", "rises"), RISING, ids=[f.__name__ for f, *_ in RISING])
def test_it_moves_one_way_with_each_input(f, at, rises):
    for i, up in enumerate(rises):
        more = f(*at[:i], at[i] * 1.1, *at[i + 1:])
        assert more == f(*at) if up is None else (more > f(*at)) == bool(up) and more != f(*at)


def test_a_kernel_pays_back():
    saved, months = eco.kernel_payback(0.25, 2, 8e6, 500e3)  # an eighth of the step's time
    assert saved == pytest.approx(1e6)
    assert months == pytest.approx(6)
    assert eco.kernel_payback(0.25, 1, 8e6, 500e3) == (0, inf)


def test_a_pipeline_by_hand():
    assert (eco.pipeline_busy(1, 4), eco.pipeline_busy(4, 2), eco.pipeline_busy(7, 1)) == (1 / 4, 4 / 5, 1)
