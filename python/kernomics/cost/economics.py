"""The arithmetic of the cost model: every formula a function, its unit equation in its docstring."""

from itertools import accumulate, pairwise
from math import ceil, cos, exp, expm1, floor, inf, log1p, log10, pi, prod, sqrt

from scipy.optimize import brentq

from kernomics.cost import wrong

HOURS_PER_YEAR = 8760
HOURS_PER_MONTH = HOURS_PER_YEAR / 12


def roofline_seconds(flops, peak, size, bandwidth):
    """s = max(FLOP / (FLOP/s), byte / (byte/s)): neither limit can be beaten, both may overlap."""
    return max(flops / peak, size / bandwidth)


def chips_needed(size, memory):
    """chips = ceil(byte / (byte/chip))"""
    return ceil(size / memory)


def shared_seconds(seconds, chips):
    """s = chip*s / chips: perfect balance, no communication, so a bound."""
    return seconds / chips


def tokens_per_second(tokens, seconds):
    """token/s = token / s"""
    return tokens / seconds


def dollars_per_mtoken(dollars_per_hour, tokens_per_s):
    """$/Mtoken = $/h / (3600 s/h) / (token/s) * 1e6 token/Mtoken"""
    return dollars_per_hour / 3600 / tokens_per_s * 1e6


def fleet_dollars(nodes, chips_per_node, hours, dollars_per_hour):
    """$ = node * chip/node * h * $/(chip*h)"""
    return nodes * chips_per_node * hours * dollars_per_hour


def owned_day(chips, dollars_per_hour):
    """$ = max chip * h * $/(chip*h): a fleet that is owned is paid at its peak in every hour; chips: those of each hour."""
    return max(chips) * len(chips) * dollars_per_hour


def rented_day(chips, dollars_per_hour):
    """$ = sum of chip * 1 h * $/(chip*h): a fleet rented by the hour is paid as it is used."""
    return sum(chips) * dollars_per_hour


def day_shape(mean, peak, hours=24):
    """[1 ...]: 1 + (peak / mean - 1) * cos(2 pi h / hours), hour 0 the busiest: of a day whose mean and peak alone are known."""
    return [1 + (peak / mean - 1) * cos(2 * pi * h / hours) for h in range(hours)]


def expected_active(t, e, top_k):
    """Mean number of experts that t tokens reach when each draws top_k of e uniformly: e * (1 - (1 - top_k/e)**t)."""
    return e * (1 - (1 - top_k / e) ** t)


# ---------------------------------------------------------------- capital


def straight_line(dollars, years, residual=0.0):
    """$/year = ($ - $ got back at the end) / year: depreciation without the cost of money."""
    return (dollars - residual) / years


def capital_recovery(rate, years):
    """1/year = r / (1 - (1 + r)**-years): the level yearly payment on one dollar, 1/years at r = 0."""
    return rate / -expm1(-years * log1p(rate)) if rate else 1 / years


def annuity(dollars, rate, years, residual=0.0):
    """$/year = ($ - $ got back) * 1/year + r * $ got back: level year-end payments that repay a cost; r = 0: straight_line."""
    lost = dollars - residual
    return lost * capital_recovery(rate, years) + rate * residual if rate else straight_line(dollars, years, residual)


def npv(rate, flows):
    """$ = sum of $ / (1 + r)**t: flows of year 0, 1, 2 ..., each at its year's end."""
    return sum(x / (1 + rate) ** t for t, x in enumerate(flows))


def irr(flows):
    """The rate at which the flows are worth nothing today: npv(irr, flows) = 0; one change of sign makes it the only one."""
    low, high = -0.99, 10.0
    signs = [x > 0 for x in flows if x]
    if sum(a != b for a, b in pairwise(signs)) != 1 or npv(low, flows) * npv(high, flows) >= 0:
        raise wrong("flows", list(flows), "flows that change sign once, with a rate of return of -99 % to 1000 %")
    return brentq(npv, low, high, args=(flows,), xtol=1e-12)


def payback_years(dollars, dollars_per_year):
    """year = $ / ($/year); infinite where nothing is earned."""
    return dollars / dollars_per_year if dollars_per_year > 0 else inf


def flows_payback_years(flows):
    """year until the sum of the flows is no longer below 0, each flow spread evenly over its year; infinite if it stays."""
    sums = list(accumulate(flows))
    return next((t + a / (a - b) for t, (a, b) in enumerate(pairwise(sums)) if b >= 0), inf) if sums[0] < 0 else 0.0


def falling_rent(dollars_per_hour, decline, years):
    """$/h = $/h * exp(-1/year * year)"""
    return dollars_per_hour * exp(-decline * years)


def falling_rent_value(dollars_per_hour, decline, rate, years):
    """$ = $/h * 8760 h/year * integral of exp(-(d + r) t) dt over the years, r compounded continuously."""
    fall = decline + rate
    return dollars_per_hour * HOURS_PER_YEAR * (-expm1(-fall * years) / fall if fall else years)


def rental_profit(dollars_per_hour, utilisation, cost_per_hour):
    """$/year = ($/h * rented share - $/h) * 8760 h/year: rent less the cost of every hour owned."""
    return (dollars_per_hour * utilisation - cost_per_hour) * HOURS_PER_YEAR


def rental_flows(dollars, dollars_per_hour, utilisation, running_per_hour, years, decline=0.0):
    """[$ ...]: -$ paid, then of each year (a whole number) the rent, falling all the time, less $/h * 8760 h of running it."""
    earned = [falling_rent_value(dollars_per_hour * utilisation, decline, 0.0, t) for t in range(years + 1)]
    return [-dollars] + [b - a - yearly_dollars(running_per_hour) for a, b in pairwise(earned)]


def owned_dollars_per_hour(dollars, years, utilisation=1.0):
    """$/h = $ / (year * 8760 h/year * used share): capital alone, straight line."""
    return dollars / (years * HOURS_PER_YEAR * utilisation)


def power_dollars_per_hour(watts, dollars_per_kwh):
    """$/h = W / (1000 W/kW) * $/kWh"""
    return watts / 1000 * dollars_per_kwh


def yearly_dollars(dollars_per_hour, utilisation=1.0):
    """$/year = $/h * 8760 h/year * used share"""
    return dollars_per_hour * HOURS_PER_YEAR * utilisation


def capex_from_revenue(dollars_per_year, margin, years):
    """$ = $/year * (1 - gross margin) * year: the capital whose straight-line depreciation is the whole cost of revenue."""
    return dollars_per_year * (1 - margin) * years


def nre_per_unit(dollars, units):
    """$/unit = $ / unit: what a design costs each chip made of it."""
    return dollars / units


def break_even_units(dollars, saved_per_unit):
    """unit = $ / ($/unit): how many must be made before a design repays what it cost; infinite where nothing is saved."""
    return dollars / saved_per_unit if saved_per_unit > 0 else inf


# ---------------------------------------------------------------- margins and prices


def margin_over_cost(revenue, cost):
    """1 = ($ - $) / $: profit over cost."""
    return (revenue - cost) / cost


def gross_margin(revenue, cost):
    """1 = ($ - $) / $: profit over revenue."""
    return (revenue - cost) / revenue


def gross_of_over_cost(margin):
    """1 = m / (1 + m): the gross margin of a margin over cost."""
    return margin / (1 + margin)


def over_cost_of_gross(margin):
    """1 = m / (1 - m): the margin over cost of a gross margin."""
    return margin / (1 - margin)


def price_at_margin(cost, margin):
    """$ = $ / (1 - gross margin)"""
    return cost / (1 - margin)


def price_through(cost, margins):
    """$ = $ / product of (1 - gross margin): a price after every seller of a chain took a margin."""
    return cost / prod(1 - m for m in margins)


def margin_shares(cost, margins):
    """[$ ...]: the cost, then what each seller of the chain adds; their sum is price_through."""
    prices = list(accumulate(margins, price_at_margin, initial=cost))
    return [cost] + [high - low for low, high in pairwise(prices)]


def break_even_performance(tco_b, tco_a):
    """1 = $ / $: the performance of b over a from which b gives more a dollar."""
    return tco_b / tco_a


def performance_per_dollar(performance, dollars):
    """token/s/$ (or FLOP/s/$, byte/$) = token/s / $"""
    return performance / dollars


def query_dollars(tokens_in, dollars_in, tokens_out, dollars_out):
    """$ = token * $/Mtoken / 1e6 of the prompt + of the answer"""
    return (tokens_in * dollars_in + tokens_out * dollars_out) / 1e6


def blended_price(tokens_in, dollars_in, tokens_out, dollars_out):
    """$/Mtoken = $ / (token in + token out) * 1e6 token/Mtoken"""
    return query_dollars(tokens_in, dollars_in, tokens_out, dollars_out) / (tokens_in + tokens_out) * 1e6


def prefill_bill_share(tokens_in, dollars_in, tokens_out, dollars_out):
    """1 = $ of the prompts / $ of all"""
    return query_dollars(tokens_in, dollars_in, 0, dollars_out) / query_dollars(tokens_in, dollars_in, tokens_out, dollars_out)


def tokens_bought(dollars, dollars_per_mtok):
    """token = $ / ($/Mtoken) * 1e6 token/Mtoken"""
    return dollars / dollars_per_mtok * 1e6


def allocate(cost, weights):
    """{name: $} = $ * weight / sum of weights: seconds of each part split a cost by time, $ sold of each by price."""
    total = sum(weights.values())
    if min(weights.values(), default=0) < 0 or not 0 < total < inf:
        raise wrong("weights", weights, "0 or more, one at least above 0")
    return {name: cost * w / total for name, w in weights.items()}


def allocate_by_time(cost, seconds):
    """{kind: $} = $ * s / sum of s: each kind of token pays for the chip time it takes."""
    return allocate(cost, seconds)


def allocate_by_price(cost, tokens, prices):
    """{kind: $} = $ * (token * $/Mtoken) / sum of them: each kind pays by what it sells for, so all earn one margin."""
    return allocate(cost, {kind: n * prices[kind] for kind, n in tokens.items()})


def allocate_by_pool(cost, pools):
    """{kind: $} = $ * (chip * $/(chip*h)) / sum of them: each kind pays for its pool; pools: {kind: (chips, $/h of one)}."""
    return allocate(cost, {kind: chips * dollars for kind, (chips, dollars) in pools.items()})


def allocated_mtoken(allocation, cost, tokens, seconds, pools, prices):
    """{kind: $/Mtoken} of a request that costs $, by the named allocation: time takes s, pool (chip, $/h), price $/Mtoken."""
    if not cost:
        return dict.fromkeys((kind for kind, n in tokens.items() if n), 0.0)
    if allocation == "time":
        costs = allocate_by_time(cost, seconds)
    elif allocation == "pool":
        costs = allocate_by_pool(cost, pools)
    else:
        costs = allocate_by_price(cost, {kind: n for kind, n in tokens.items() if n}, prices)
    return mtoken_costs(costs, tokens)


def mtoken_costs(costs, tokens):
    """{kind: $/Mtoken} = $ / token * 1e6 token/Mtoken, of in, cached, out; kinds without tokens are left out."""
    return {kind: dollars / tokens[kind] * 1e6 for kind, dollars in costs.items() if tokens[kind]}


def sold_dollars(tokens, prices):
    """$ = sum over kinds of token * $/Mtoken / 1e6 token/Mtoken"""
    return sum(n * prices[kind] for kind, n in tokens.items()) / 1e6


def blended_mtoken(tokens, prices):
    """$/Mtoken = sold_dollars / sum of token * 1e6 token/Mtoken: the mean price of all kinds."""
    return sold_dollars(tokens, prices) / sum(tokens.values()) * 1e6


def spend_change(fall, elasticity):
    """1 = c**(e - 1): spend over spend before when a price falls c times and demand rises c**e times."""
    return fall ** (elasticity - 1)


def chips_demanded(tasks, chip_seconds, utilisation=1.0):
    """chip = task/s * chip*s/task / used share"""
    return tasks * chip_seconds / utilisation


# ---------------------------------------------------------------- energy


def watt_hours(watts, seconds):
    """Wh = W * s / (3600 s/h)"""
    return watts * seconds / 3600


def mean_watts(kwh_per_year):
    """W = kWh/year * 1000 W/kW / (8760 h/year)"""
    return kwh_per_year * 1000 / HOURS_PER_YEAR


def joules_per_token(watts, tokens_per_s, pue=1.0):
    """J/token = W * PUE / (token/s); PUE 1 is the equipment alone."""
    return watts * pue / tokens_per_s


def tokens_per_s_per_mw(tokens_per_s, watts):
    """token/s/MW = token/s / W * 1e6 W/MW"""
    return tokens_per_s / watts * 1e6


def chips_per_watt(chip_watts, pue=1.0):
    """chip/W = 1 / (W/chip * PUE)"""
    return 1 / (chip_watts * pue)


def freed_share(old, new):
    """1 = 1 - W / W: the part of a power budget that is free when ``old`` equal machines become ``new``."""
    return 1 - new / old


# ---------------------------------------------------------------- arithmetic of models


def inference_flops(params, tokens=1):
    """FLOP = 2 FLOP/(param*token) * param * token: a forward pass."""
    return 2 * params * tokens


def training_flops(params, tokens):
    """FLOP = 6 FLOP/(param*token) * param * token: forward 2, backward 4."""
    return 6 * params * tokens


def optimal_tokens(params, tokens_per_param):
    """token = param * token/param"""
    return params * tokens_per_param


def training_hours(flops, peak, share):
    """chip*h = FLOP / (FLOP/(s*chip) * achieved share) / (3600 s/h)"""
    return flops / (peak * share) / 3600


def training_dollars(chip_hours, dollars_per_hour):
    """$ = chip*h * $/(chip*h)"""
    return chip_hours * dollars_per_hour


def achieved_share(flops, chip_hours, peak):
    """1 = FLOP / (chip*h * 3600 s/h) / (FLOP/(s*chip))"""
    return flops / (chip_hours * 3600) / peak


def tenfold_steps(low, high):
    """1 = log10(high / low): steps of ten from one spend to another."""
    return log10(high / low)


def training_adder(dollars, tokens):
    """$/Mtoken = $ / token * 1e6 token/Mtoken: a training cost spread over the tokens ever served."""
    return dollars / tokens * 1e6


def rollout_share(rollouts, kept):
    """1 = R * 2N / (R * 2N + K * 6N): part of the FLOP that is generation when K of R rollouts are trained on."""
    made, trained = inference_flops(1, rollouts), training_flops(1, kept)
    return made / (made + trained)


def tokens_per_step(acceptance, drafts):
    """token/step = (1 - p**(k+1)) / (1 - p): k guesses, each right with probability p until the first miss."""
    return drafts + 1.0 if acceptance == 1 else (1 - acceptance ** (drafts + 1)) / (1 - acceptance)


def speculation_speedup(acceptance, drafts, overhead):
    """1 = token/step / (1 + overhead): overhead is what guessing adds to a step."""
    return tokens_per_step(acceptance, drafts) / (1 + overhead)


def acceptance_for(tokens, drafts):
    """The p at which tokens_per_step(p, drafts) = tokens, 1 < tokens < drafts + 1."""
    if not 1 < tokens < drafts + 1:
        raise wrong("tokens", tokens, f"above 1 and below {drafts + 1}")
    return brentq(lambda p: tokens_per_step(p, drafts) - tokens, 0, 1, xtol=1e-12)


def mha_kv_bytes(layers, heads, key_dim, value_dim, size):
    """byte/token = layer * head * (key + value) * byte"""
    return layers * heads * (key_dim + value_dim) * size


def gqa_kv_bytes(layers, kv_heads, head_dim, size):
    """byte/token = layer * KV head * 2 * dim * byte"""
    return mha_kv_bytes(layers, kv_heads, head_dim, head_dim, size)


def mla_kv_bytes(layers, rank, rope_dim, size):
    """byte/token = layer * (rank + rope) * byte: one latent vector for all heads."""
    return layers * (rank + rope_dim) * size


def users_that_fit(memory, usable, weights, s, kv_bytes):
    """user = floor((byte * usable share - byte) / (token/user * byte/token)), at least 0"""
    return max(0, floor((memory * usable - weights) / (s * kv_bytes)))


def users_at_speed(tokens_per_s, bandwidth, weights, s, kv_bytes):
    """user = ((byte/s) / (token/s) - byte) / (token/user * byte/token): bytes of a step left for caches; at least 0."""
    return max(0.0, (bandwidth / tokens_per_s - weights) / (s * kv_bytes))


def resident_ratio(before, after):
    """1 = token / token: users before over users after, when each keeps that many tokens and memory is full."""
    return after / before


def kv_read_bytes(prompt, answer, kv_bytes):
    """byte = byte/token * sum over the answer's tokens of the tokens cached then: quadratic in length."""
    return kv_bytes * answer * (prompt + (answer - 1) / 2)


def attention_pairs(s):
    """pair = s * (s + 1) / 2: query-key pairs of a causal prefill, quadratic in length."""
    return s * (s + 1) / 2


def query_cost_ratio(users_ratio, tokens_ratio):
    """1 = (users before / users after) * (tokens after / tokens before), at equal step time"""
    return users_ratio * tokens_ratio


def answer_seconds(tokens, tokens_per_s):
    """s = token / (token/s)"""
    return tokens / tokens_per_s


def bandwidth_for(tokens_per_s, weight_bytes):
    """byte/s = token/s * byte/token: one stream reads every weight for each token."""
    return tokens_per_s * weight_bytes


def restore_dollars(size, bandwidth, chip_dollars_per_s, dollars_per_byte_s=0.0, seconds=0.0):
    """$ = byte / (byte/s) * $/s + byte * $/(byte*s) * s: a kept cache moved back, and its keep."""
    return size / bandwidth * chip_dollars_per_s + size * dollars_per_byte_s * seconds


def break_even_hit_rate(kept, moved, prefill):
    """1 = $ / ($ - $): share of kept caches that must be asked for again, for keeping and moving to cost less than prefill."""
    return kept / (prefill - moved) if prefill > moved else inf


def prefill_dollars(tokens, params, peak, share, chip_dollars_per_s):
    """$ = token * 2 FLOP/param * param / (FLOP/s * achieved share) * $/s"""
    return inference_flops(params, tokens) / (peak * share) * chip_dollars_per_s


def pipeline_busy(microbatches, stages):
    """1 = m / (m + p - 1): share of the time that stages work when m microbatches pass and the pipeline then runs empty."""
    return microbatches / (microbatches + stages - 1)


def imbalance_slowdown(loads):
    """1 = max load / mean load: all wait for the busiest."""
    return max(loads) / (sum(loads) / len(loads))


def overlapped(compute, comm, share):
    """s = max(s / (1 - share), s): communication hides behind compute that gave up ``share`` of its units."""
    return max(compute / (1 - share), comm)


# ---------------------------------------------------------------- a chip's cost


def dies_per_wafer(die_mm2, wafer_mm=300.0):
    """die = pi (d/2)**2 / A - pi d / sqrt(2 A), mm and mm2: wafer area over die area, less the dies cut by the edge.

    Not rounded down, so costs change smoothly with the area. Raises CostError where no die fits.
    """
    dies = pi * (wafer_mm / 2) ** 2 / die_mm2 - pi * wafer_mm / sqrt(2 * die_mm2)
    if dies < 1:
        raise wrong("die_mm2", die_mm2, f"an area that fits a wafer of {wafer_mm:g} mm once at least")
    return dies


def die_yield(die_mm2, defects_per_cm2, model="poisson", alpha=3.0):
    """Share of good dies, with x = 1/cm2 * mm2 / 100 defects a die.

    poisson: exp(-x); murphy: ((1 - exp(-x)) / x)**2; negative_binomial: (1 + x/alpha)**-alpha, clustered by alpha.
    """
    x = defects_per_cm2 * die_mm2 / 100
    if model == "poisson" or x == 0:
        return exp(-x)
    return (-expm1(-x) / x) ** 2 if model == "murphy" else (1 + x / alpha) ** -alpha


def die_dollars(wafer_dollars, die_mm2, defects_per_cm2, model="poisson", alpha=3.0, wafer_mm=300.0):
    """$ = $/wafer / (die/wafer * yield): good dies pay for the bad ones."""
    return wafer_dollars / (dies_per_wafer(die_mm2, wafer_mm) * die_yield(die_mm2, defects_per_cm2, model, alpha))


def memory_dollars(size, dollars_per_gb):
    """$ = byte / (1e9 byte/GB) * $/GB"""
    return size / 1e9 * dollars_per_gb


# ---------------------------------------------------------------- engineering as money


def efficiency_cost(share):
    """1 = 1 / share: dollars paid over dollars at peak, when code reaches that share of it."""
    return 1 / share


def step_speedup(share, speedup):
    """1 = 1 / (1 - share + share / speedup): a step when ``share`` of its time gets ``speedup`` times faster."""
    return 1 / (1 - share + share / speedup)


def kernel_payback(share, speedup, fleet_dollars_per_year, engineering_dollars):
    """($/year, month): $/year = $/year * share * (1 - 1/speedup); month = $ / ($/year) * 12 month/year"""
    saved = fleet_dollars_per_year * (1 - 1 / step_speedup(share, speedup))
    return saved, 12 * payback_years(engineering_dollars, saved)
