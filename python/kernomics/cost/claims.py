"""Published claims about chips and their economics, each as a check that runs.

An input is a figure of the claim, a figure of chips.toml or of a model, one cited from elsewhere, or an assumption. The
verdict follows: *contradicted* where the arithmetic denies the claim, *reproduced* where it bears it out without an
assumption, *holds only if* where an assumption is needed, *not testable* where a figure is missing. ``decides`` names the
input on which the verdict turns and ``flip`` a value of it that turns it; ``edge`` lies between.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from types import SimpleNamespace

import ml_dtypes

from kernomics.cost import CostError, chips, wrong
from kernomics.cost import economics as eco
from kernomics.cost.model import BYTES, LATENT, NOPE, ROPE, VALUE, Model
from kernomics.cost.serving import MEMORY_SHARE

FILES = ("000_24cd0f2b07f7aade.txt", "001_9caf5e11e0bb891f.txt", "002_433794f484b7f4da.txt", "003_df327d532d0eb964.txt",
         "004_944569ec5a5a92dd.txt")
VERDICTS = ("reproduced", "holds only if", "contradicted", "not testable")
SAID, ASSUMED, CHOICE = "claim", "assumption", "choice"

LLAMA_405B = {  # huggingface.co/meta-llama/Llama-3.1-405B, config.json
    "model_type": "llama", "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128,
    "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256,
}

_chips = cache(chips.load)


@cache
def _model(name, weights=None):
    return Model.load(LLAMA_405B if name == "llama-3.1-405b" else name, weights)


# ---------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Input:
    """A number and where it is from; ``read`` finds it when it is asked for."""

    origin: str
    number: float | None = None
    read: Callable | None = field(default=None, compare=False)

    @property
    def value(self):
        return self.number if self.read is None else self.read()


def said(value):
    """A figure of the claim or of another of these texts; of a range, a point."""
    return Input(SAID, value)


def assumed(value):
    return Input(ASSUMED, value)


def choice(value):
    """1 or 0: which of two readings."""
    return Input(CHOICE, value)


def cited(value, source):
    return Input(source, value)


def chip(key, figure):
    return Input(f"chips.toml: {key}.{figure}", read=lambda: _chips()[key].need(figure))


def shape(name, what, weights=None, scale=1):
    """A property of a model; ``scale`` units of it."""
    return Input(f"{name}: {what}", read=lambda: scale * getattr(_model(name, weights), what))


def cached(name, cache="bf16"):
    return Input(f"{name}: KV bytes of a token", read=lambda: _model(name).kv_bytes_per_token(cache))


def best(figure):
    """The most of a figure per dollar of price among the HBM chips whose price is known."""
    return Input(f"chips.toml: best {figure} per price_dollars of HBM chips", read=lambda: max(
        eco.performance_per_dollar(c.need(figure), c.need("price_dollars"))
        for c in _chips().values() if c.memory == "hbm" and c.get("price_dollars")))


# ---------------------------------------------------------------- a claim


@dataclass(frozen=True)
class Result:
    """What the arithmetic gives: a number with its unit, whether the claim holds, and a line about it."""

    value: float | None
    unit: str
    holds: bool | None
    words: str = ""


@dataclass(frozen=True)
class Claim:
    """``check`` takes the inputs' values as attributes; without it the claim is not testable, and ``why`` says why."""

    id: str
    text: str
    file: str
    inputs: dict = field(default_factory=dict, hash=False)
    check: Callable | None = field(default=None, compare=False)
    decides: str | None = None
    flip: float | None = None
    why: str = ""

    def values(self, overrides=None):
        for name in overrides or {}:
            if name not in self.inputs:
                raise wrong(f"input of {self.id}", name, ", ".join(self.inputs) or "none")
        return {name: (overrides or {}).get(name, x.value) for name, x in self.inputs.items()}

    def run(self, overrides=None):
        """The Result at the inputs, some replaced."""
        if self.check is None:
            self.values(overrides)
            return Result(None, "", None, self.why)
        values = self.values(overrides)
        try:
            return self.check(SimpleNamespace(**values))
        except ArithmeticError as error:
            raise CostError(f"{self.id}: {error} at {values}") from None

    @property
    def assumptions(self):
        return [name for name, x in self.inputs.items() if x.origin == ASSUMED]

    def verdict(self, result):
        if result.holds is None:
            return "not testable"
        if not result.holds:
            return "contradicted"
        return "holds only if" if self.assumptions else "reproduced"

    def edge(self, overrides=None):
        """The value of the deciding input at which the claim begins or ceases to hold, by bisection; None where there is none."""
        if self.check is None or self.inputs[self.decides].origin == CHOICE:
            return None
        overrides = dict(overrides or {})
        low, high = self.values(overrides)[self.decides], self.flip
        first = self.run(overrides).holds
        if self.run({**overrides, self.decides: high}).holds == first:
            return None
        for _ in range(60):
            middle = (low + high) / 2
            if self.run({**overrides, self.decides: middle}).holds == first:
                low = middle
            else:
                high = middle
        return high


@dataclass(frozen=True)
class Evaluation:
    claim: Claim
    result: Result
    verdict: str
    edge: float | None
    values: dict = field(hash=False)

    @property
    def decided_by(self):
        """The deciding input, its value and the value at which the verdict turns."""
        c = self.claim
        if c.check is None:
            return c.why
        edge = "" if self.edge is None else f", turns at {self.edge:.4g}"
        value = self.values[c.decides]
        origin = c.inputs[c.decides].origin if value == c.inputs[c.decides].value else "given"
        return f"{c.decides} = {value:.4g} ({origin}){edge}"


def within(value, low, high):
    return low <= value <= high


def near(value, other, share=0.05):
    """Equal to what speech rounds away."""
    return abs(value - other) <= share * abs(other)


CLAIMS = []


def _claim(number, file, text, decides, flip, check, **inputs):
    CLAIMS.append(Claim(f"Q{number}", text, FILES[file], inputs, check, decides, flip))


def _untestable(number, file, text, why):
    CLAIMS.append(Claim(f"Q{number}", text, FILES[file], why=why))


R = Result

# ---------------------------------------------------------------- margins, prices and capital


def _tpu_price(x):
    cost = x.gpu_cost * x.cost_share
    ratio = eco.price_at_margin(x.gpu_cost, x.gpu_margin) / eco.price_at_margin(cost, x.tpu_margin)
    return R(ratio, "x", within(ratio, 3, 4), f"a cost of {x.cost_share:.0%} of the GPU's, then the margins")


_claim(1, 0, "A TPU costs its user a third to a quarter of a GPU", "cost_share", 0.9, _tpu_price,
       gpu_cost=chip("h100", "cogs_dollars"), cost_share=assumed(0.6), gpu_margin=said(0.75), tpu_margin=assumed(0.5))


def _tpu_margin(x):
    ratio = eco.price_at_margin(1, x.gpu_margin) / eco.price_at_margin(1, x.tpu_margin)
    return R(ratio, "x", ratio >= 3, "die, HBM and packaging must give the rest of 3 to 4 x")


_claim(2, 0, "Read strictly: a lower margin alone explains the TPU's price", "tpu_margin", 0.2, _tpu_margin,
       gpu_margin=said(0.75), tpu_margin=assumed(0.5))


def _gpu_margin(x):
    multiple = eco.price_at_margin(1, x.margin)
    rival = eco.break_even_performance(multiple, eco.price_at_margin(1, 0.5))
    return R(multiple, "x cost", multiple >= 3.95, f"break-even {multiple:.1f} x against a chip at cost, {rival:.1f} x at 50 %")


_claim(16, 2, "Nvidia sells at 4 x cost, so it must be 2 to 4 x better", "margin", 0.5, _gpu_margin, margin=said(0.75))


def _search(x):
    ratio = x.price_ratio * x.performance
    return R(ratio, "x", within(ratio, 8, 12), "price of a chip times chips needed")


_claim(30, 2, "Search would cost ten times more without TPUs", "performance", 1, _search, price_ratio=said(3.5),
       performance=assumed(2.8))


def _infra(x):
    dollars = eco.capex_from_revenue(x.revenue, x.margin, x.years)
    return R(dollars, "$", near(dollars, 250e9), "all cost of revenue taken as depreciation: no power, staff or interest")


_claim(35, 2, "$100B of revenue carries $250B of infrastructure", "margin", 0.3, _infra, revenue=said(100e9), margin=said(0.5),
       years=said(5))


def _twice(x):
    ratio = x.capex / eco.capex_from_revenue(x.revenue, x.margin, x.years)
    return R(ratio, "x", near(ratio, 2), "capex over what the revenue carries")


_claim(36, 2, "Hyperscalers spend twice what that revenue justifies", "capex", 300e9, _twice, capex=said(500e9),
       revenue=said(100e9), margin=said(0.5), years=said(5))


def _gigawatt(x):
    yearly = eco.straight_line(x.cost, x.years)
    return R(yearly, "$/year", near(yearly, 10e9), f"{eco.annuity(x.cost, 0.1, x.years) / 1e9:.1f} $B/year with money at 10 %")


_claim(37, 2, "A gigawatt of $50B depreciates by $10B a year", "years", 6, _gigawatt, cost=said(50e9), years=said(5))


def _late_revenue(x):
    flows = [-x.cost, 0, 0, x.revenue, x.revenue, x.revenue]
    rate = eco.irr(flows) if x.revenue > 0 else None
    return R(sum(flows[1:]), "$", near(sum(flows[1:]), 60e9) and sum(flows) > 0,
             f"IRR {rate:.1%}, NPV at 10 % {eco.npv(0.1, flows) / 1e9:.1f} $B: revenue, not profit, in years 3 to 5")


_claim(38, 2, "Three late years of $20B return $60B on $50B", "revenue", 16e9, _late_revenue, cost=said(50e9),
       revenue=said(20e9))


def _lease(x):
    flows = [-x.cost] + [x.rent / x.years] * int(x.years)
    return R(eco.irr(flows), "1/year", x.rent > x.cost, f"gross margin {eco.gross_margin(x.rent, x.cost):.0%} before power")


_claim(39, 2, "A cluster rented for $65B over five years pays for its $50B", "rent", 48e9, _lease, cost=said(50e9),
       rent=said(65e9), years=said(5))


def _concentration(x):
    share = x.profit / x.value
    return R(share, "1", within(share, 0.0105, 0.0115), "needs Nvidia's market value of the day")


_claim(59, 3, "Ford's $40B is 1.1 % of Nvidia's value", "value", 3e12, _concentration, profit=said(40e9), value=assumed(3.5e12))


def _dram(x):
    mean = (x.peak + x.trough) / 2
    low, high = (eco.price_at_margin(1, m) for m in (x.trough, x.peak))
    return R(mean, "1", near(mean, 0.2, 0.25), f"prices of {low:.2f} to {high:.2f} x cost")


_claim(55, 3, "DRAM's gross margin peaks at 60 %, goes below zero, averages 20 %", "trough", 0.1, _dram, peak=said(0.6),
       trough=assumed(-0.2))


def _valuation(x):
    after, before = (1 + x.growth_after) * x.margin_after, (1 + x.growth) * x.margin
    ratio = after / before
    return R(ratio, "1", ratio < 0.9, f"price over cost {eco.price_at_margin(1, x.margin):.2f} -> "
             f"{eco.price_at_margin(1, x.margin_after):.2f}")


_claim(105, 3, "Growth of 85 % and a margin of 70 % take a tenth of Nvidia's gross profit", "margin_after", 0.8,
       _valuation, growth=said(1.0), growth_after=said(0.85), margin=said(0.75), margin_after=said(0.70))


def _jensen(x):
    yearly = eco.straight_line(x.total, x.years)
    return R(yearly, "$/year", near(yearly, 500e9), "equals the hyperscalers' capex of a year")


_claim(117, 4, "$1T of new AI and $1T of CPU replacement in four years", "total", 1e12, _jensen, total=said(2e12), years=said(4))


def _gpt4_return(x):
    ratio = x.revenue / x.training
    adder = eco.training_adder(x.training, eco.tokens_bought(x.revenue, 10))
    return R(ratio, "x", ratio > 1, f"training is {adder:.2f} $/Mtoken of what $10/Mtoken sold")


_claim(126, 4, "GPT-4 cost hundreds of millions to train and earns billions", "training", 2e11, _gpt4_return, training=said(2e8),
       revenue=said(2e9))


def _inference_cost(x):
    cost = x.revenue * (1 - x.margin)
    return R(cost, "$", within(cost, 2e9, 5e9), f"price over cost {eco.price_at_margin(1, x.margin):.2f}")


_claim(127, 4, "At 50 to 70 % margin $10B of inference costs a few billion", "margin", 0.2, _inference_cost, revenue=said(10e9),
       margin=said(0.6))


def _no_margin(x):
    ratio = eco.price_at_margin(x.cheaper, x.margin)
    return R(ratio, "x", near(ratio, 30), "cost ratio over 1 - margin")


_claim(140, 4, "15 x cheaper to run is 30 x cheaper without the margin", "margin", 0.7, _no_margin, cheaper=said(15),
       margin=said(0.5))
_untestable(138, 4, "Some fifteen companies sell the same open model", "a count of sellers: no formula gives it")
_untestable(146, 4, "HBM earns a lower gross margin than server DRAM", "neither memory's cost is known")


def _rent(x):
    own = eco.owned_dollars_per_hour(x.price, x.years, x.utilisation)
    power = eco.power_dollars_per_hour(x.watts, x.kwh)
    years = eco.payback_years(x.price, eco.yearly_dollars(x.rent, x.utilisation) - eco.yearly_dollars(power))
    return R(own + power, "$/h", near(x.rent, x.list / 2) and own + power < x.rent,
             f"payback {years:.1f} years; a market of half the list price")


_claim(154, 4, "An H100 rents for $2 an hour, not the quoted $4", "utilisation", 0.4, _rent, price=said(40000), years=said(5),
       rent=said(2), list=said(4), utilisation=assumed(0.8), watts=chip("h100", "all_in_watts"), kwh=assumed(0.08))

# ---------------------------------------------------------------- chips


def _dojo(x):
    ratio = eco.break_even_performance(x.dojo, x.cerebras)
    return R(ratio, "x", ratio >= 3, f"chips.toml has {_chips()['wse-2'].need('flops_bf16') / 1e15:g} PFLOP/s for the WSE-2")


_claim(4, 0, "A Dojo wafer computes over three times what a Cerebras wafer does", "cerebras", 7.5e15, _dojo, dojo=said(9e15),
       cerebras=said(2.5e15))


def _rsc(x):
    ratio = x.rsc_chips * x.rsc_flops / (x.dojo_chips * x.dojo_flops)
    return R(ratio, "x", within(ratio, 4, 6), "compute only: chips.toml has no link bandwidth or transistor count of Dojo")


_claim(5, 0, "Meta's RSC is five times Dojo in compute, far behind in bandwidth per transistor", "rsc_chips", 6080, _rsc,
       rsc_chips=assumed(16000), rsc_flops=chip("a100", "flops_bf16"), dojo_chips=assumed(3000),
       dojo_flops=chip("dojo-d1", "flops_bf16"))


def _amd(x):
    ratio = eco.performance_per_dollar(x.nvidia_flops, x.nvidia_price) / eco.performance_per_dollar(x.amd_flops, x.amd_price)
    return R(ratio, "x", ratio <= 0.55, f"parity where AMD's code reaches {ratio:.2f} of the share of peak that Nvidia's does")


_claim(56, 3, "AMD costs half of Nvidia per FLOP", "amd_price", 28000, _amd, amd_price=chip("mi300x", "price_dollars"),
       amd_flops=chip("mi300x", "flops_bf16"), nvidia_price=chip("h100", "price_dollars"),
       nvidia_flops=chip("h100", "flops_bf16"))


def _area(x):
    ratio = x.wafer / x.die
    return R(ratio, "x", near(ratio, 57), "mm2 over mm2")


_claim(61, 3, "A WSE-3 has 57 times the area of an H100", "die", 1600, _area, wafer=chip("wse-3", "die_mm2"),
       die=chip("h100", "die_mm2"))


def _wafer_flops(x):
    ratio = x.wafer / x.gpu
    return R(ratio, "x", near(ratio, 32, 0.1), "dense bf16; 32 is the ratio of both makers' sparse figures")


_claim(62, 3, "A WSE-3 computes 32 times what an H100 does", "wafer", 32 * 989e12, _wafer_flops,
       wafer=chip("wse-3", "flops_bf16"), gpu=chip("h100", "flops_bf16"))


def _wafer_speed(x):
    need = eco.bandwidth_for(x.speed, x.weights)
    wafers = eco.chips_needed(x.weights, x.memory)
    return R(need, "byte/s", need <= x.bandwidth, f"{wafers} wafers hold the weights; one stream needs "
             f"{need / _chips()['h100'].need('bytes_per_s'):.0f} H100s of bandwidth")


_claim(64, 3, "Llama 70B runs at 1,500 tokens/s on Cerebras", "bandwidth", 3.35e12, _wafer_speed, speed=said(1500),
       weights=shape("llama-3.1-70b", "weight_bytes"), bandwidth=chip("wse-3", "bytes_per_s"),
       memory=chip("wse-3", "memory_bytes"))


def _groq_speculates(x):
    tokens = x.fast / x.plain
    fits = 1 < tokens < x.drafts + 1
    p = eco.acceptance_for(tokens, x.drafts) if fits else None
    return R(tokens, "token/step", fits, f"acceptance {p:.2f} before the cost of guessing" if fits else "more than guesses give")


_claim(66, 3, "Speculation takes Groq from 500 to 1,320 tokens/s", "drafts", 1, _groq_speculates, plain=said(500),
       fast=said(1320), drafts=assumed(3))


def _groq_server(x):
    one = eco.dollars_per_mtoken(eco.owned_dollars_per_hour(x.server, x.years), x.speed)
    return R(one, "$/Mtoken", one > x.price, f"{one / x.price:.0f} streams at once, all day, to earn the price of the server")


_claim(67, 3, "A Groq server of $2M to $3M pays only if kept busy", "price", 20, _groq_server, server=said(2.5e6),
       years=said(5), speed=said(1320), price=assumed(0.8))


def _new_centre(x):
    gain = eco.performance_per_dollar(x.performance, x.cost)
    return R(gain, "x", near(gain, 2), "an old chip's output is then worth half")


_claim(102, 3, "A new data centre costs 10 times as much and gives 20 times as much", "performance", 10, _new_centre,
       cost=said(10), performance=said(20))


def _blackwell(x):
    kv = x.s * x.kv

    def users(bandwidth, memory, weights):
        """Of a chip: by bytes of a step and by room."""
        return min(eco.users_at_speed(x.speed, bandwidth, weights, x.s, x.kv), (memory * MEMORY_SHARE - weights) / kv)

    old = users(x.old_bandwidth, x.old_memory, x.params * BYTES["fp8"] / x.old_chips)
    new = users(x.new_bandwidth, x.new_memory, x.params * BYTES["nvfp4"] / x.new_chips)
    ratio = new / old if old > 0 else eco.inf
    return R(ratio, "x", within(ratio, 10, 15), f"tokens/s a chip at {x.speed:g} tokens/s a user, bandwidth and room alone")


_claim(109, 4, "Blackwell serves very large models 10 to 15 times faster", "speed", 20, _blackwell, params=said(1.76e12),
       speed=assumed(50), s=assumed(4096), kv=assumed(60e3), old_chips=assumed(32), new_chips=chip("gb200", "scale_up_domain"),
       old_bandwidth=chip("h100", "bytes_per_s"), new_bandwidth=chip("gb200", "bytes_per_s"),
       old_memory=chip("h100", "memory_bytes"), new_memory=chip("gb200", "memory_bytes"))


def _per_tco(x):
    gain = eco.performance_per_dollar(x.performance, x.cost)
    tco = [_chips()[key].need("tco_owned_dollars_per_hour") for key in ("gb200", "h100")]
    return R(gain, "x", near(gain, 5), f"TCO of a GB200 over an H100 in chips.toml {eco.break_even_performance(*tco):.1f} x")


_claim(110, 4, "Performance per TCO rises five times a generation", "cost", 3, _per_tco, performance=said(10), cost=said(2))


def _consolidate(x):
    servers = x.new_cores / x.old_cores
    return R(servers, "servers", servers >= x.servers, f"{eco.freed_share(x.servers, 1):.0%} of the power is free at equal watts")


_claim(118, 4, "One new CPU server replaces six", "new_cores", 128, _consolidate, servers=said(6), old_cores=said(24),
       new_cores=said(192))


def _cogs(x):
    memory = eco.memory_dollars(x.memory, x.per_gb)
    foundry = eco.die_dollars(x.wafer, x.die, x.defects) + x.packaging
    return R(memory / foundry, "x", memory > foundry, f"HBM {memory:.0f} $, die and packaging {foundry:.0f} $")


_claim(144, 4, "HBM, not the foundry, is the largest cost of an H100", "per_gb", 10, _cogs, memory=chip("h100", "memory_bytes"),
       per_gb=assumed(17.5), wafer=assumed(16000), die=chip("h100", "die_mm2"), defects=assumed(0.1), packaging=assumed(700))


def _memory_share(x):
    old = eco.memory_dollars(x.old_memory, x.old_per_gb) / eco.die_dollars(x.wafer, x.old_die, x.defects)
    new = eco.memory_dollars(x.new_memory, x.new_per_gb) / (2 * eco.die_dollars(x.wafer, x.new_die / 2, x.defects))
    return R(new / old, "x", new > old, f"HBM over silicon {old:.1f} -> {new:.1f}, the same wafer price")


_claim(145, 4, "From Hopper to Blackwell HBM's share of cost grew faster than silicon's", "new_per_gb", 10, _memory_share,
       old_memory=chip("h100", "memory_bytes"), new_memory=chip("b200", "memory_bytes"), old_die=chip("h100", "die_mm2"),
       new_die=chip("b200", "die_mm2"), old_per_gb=assumed(17.5), new_per_gb=assumed(17.5), wafer=assumed(16000),
       defects=assumed(0.1))


def _amd_memory(x):
    def ratio(figure):
        return eco.performance_per_dollar(getattr(x, f"amd_{figure}"), x.amd_price) / eco.performance_per_dollar(
            getattr(x, f"nvidia_{figure}"), x.nvidia_price)

    compute = ratio("flops") * x.software
    return R(compute, "x", ratio("memory") > 1 and ratio("bandwidth") > 1 and compute <= 1,
             f"per dollar: capacity {ratio('memory'):.1f} x, bandwidth {ratio('bandwidth'):.1f} x, peak {ratio('flops'):.1f} x")


_claim(147, 4, "AMD wins by memory alone", "software", 1.0, _amd_memory, software=assumed(0.4),
       **{f"{who}_{name}": chip(key, figure) for who, key in (("amd", "mi300x"), ("nvidia", "h100")) for name, figure in (
           ("price", "price_dollars"), ("flops", "flops_bf16"), ("memory", "memory_bytes"), ("bandwidth", "bytes_per_s"))})


def _trainium(x):
    capacity, bandwidth = (eco.performance_per_dollar(v, x.price) for v in (x.memory, x.bandwidth))
    return R(capacity / x.best_memory, "x", capacity > x.best_memory and bandwidth > x.best_bandwidth,
             f"bandwidth {bandwidth / x.best_bandwidth:.1f} x the next; a cost, against others' prices")


_claim(148, 4, "Trainium2 has the most HBM and the most bandwidth per dollar", "price", 15000, _trainium, price=said(5000),
       memory=chip("trainium2", "memory_bytes"), bandwidth=chip("trainium2", "bytes_per_s"), best_memory=best("memory_bytes"),
       best_bandwidth=best("bytes_per_s"))


def _trainium_wins(x):
    need, has = eco.break_even_performance(x.price, x.nvidia_price), x.flops / x.nvidia_flops
    return R(need, "x", has > need, f"it has {has:.2f} of an H100's bf16 peak")


_claim(149, 4, "Trainium2 at $5,000 needs a seventh of the speed of a chip at $30,000 to $40,000", "nvidia_price", 6000,
       _trainium_wins, price=said(5000), nvidia_price=said(35000), flops=chip("trainium2", "flops_bf16"),
       nvidia_flops=chip("h100", "flops_bf16"))

# ---------------------------------------------------------------- energy and arithmetic


def _flops(x):
    flops = eco.inference_flops(x.params)
    return R(flops, "FLOP/token", near(flops, 1e9), "2 FLOP a parameter and token")


_claim(7, 1, "Inference of 500 M parameters takes a billion FLOP", "params", 1e9, _flops, params=said(500e6))


def _query(x):
    seconds = eco.answer_seconds(x.tokens, x.speed)
    return R(seconds, "chip*s", within(seconds, 4, 6), f"${seconds * x.rent / 3600:.4f} at ${x.rent:g}/h")


_claim(8, 1, "A chat query takes five H100-seconds", "speed", 2000, _query, tokens=said(1000), speed=assumed(200), rent=said(2))


def _house(x):
    ratio = x.watts / eco.mean_watts(x.house)
    return R(ratio, "x", within(ratio, 2 / 3, 1.5), f"five seconds are {eco.watt_hours(x.watts, 5):.1f} Wh")


_claim(9, 1, "An H100 draws what an average US house does", "watts", 700, _house, watts=chip("h100", "all_in_watts"),
       house=assumed(10500))


def _gpt3(x):
    ratio = eco.training_flops(x.params, x.tokens) / eco.training_flops(1, 1)
    return R(ratio, "x", near(ratio, 10000), "6 FLOP a parameter and token")


_claim(12, 1, "100 x the model on 100 x the data is 10,000 x the compute", "tokens", 10, _gpt3, params=said(100),
       tokens=said(100))
_untestable(13, 1, "Tesla trains on ten times Waymo's cluster with a thousand times the cars", "no law ties cars to quality")


def _halves(x):
    forward = eco.inference_flops(1)
    backward = eco.training_flops(1, 1) - forward + x.recomputed * forward
    return R(forward / backward, "1", near(forward / backward, 0.5), "2 of 6 FLOP; each recomputed forward pass adds 2")


_claim(123, 4, "A forward pass is half the compute of a backward pass", "recomputed", 1, _halves,
       recomputed=cited(0, "nothing recomputed"))


def _rollouts(x):
    share = eco.rollout_share(x.rollouts, x.kept)
    return R(share, "1", share > 0.5, "part of the FLOP that is inference")


_claim(124, 4, "Training by reinforcement is mostly inference", "kept", 100, _rollouts, rollouts=said(200), kept=assumed(2))


def _optimum(x):
    ratio = x.tokens / x.params
    return R(ratio, "token/param", within(ratio, 15, 25), f"15 T tokens then suit {15e12 / ratio / 1e9:.0f} B parameters")


_claim(120, 4, "Training has an optimal ratio of tokens to parameters", "tokens", 300e9, _optimum,
       tokens=cited(1.4e12, "arXiv:2203.15556, Chinchilla"), params=cited(70e9, "arXiv:2203.15556, Chinchilla"))


def _ladder(x):
    last = x.first * x.step**x.steps
    return R(last, "$", near(last, 30e9), f"{eco.tenfold_steps(x.first, last):.0f} steps of ten")


_claim(121, 4, "Each step of progress costs ten times the last: 30 M to 30 B in three", "step", 5, _ladder, first=said(30e6),
       step=said(10), steps=said(3))


def _synthetic(x):
    steps = eco.tenfold_steps(x.spent, x.frontier)
    return R(steps, "steps of ten", steps >= 1, "from the spend so far to a frontier training run")


_claim(122, 4, "Spend on synthetic data is tens of millions, with room to grow", "frontier", 1e8, _synthetic, spent=said(30e6),
       frontier=assumed(1e9))


def _books(x):
    low, high = x.books * x.low, x.books * x.high
    return R(low, "token", near(low, 2.6e12) and near(high, 5.2e12), f"to {high / 1e12:.1f} T")


_claim(97, 3, "All books hold 2.6 T to 5.2 T tokens", "books", 20e6, _books, books=said(40e6), low=said(65e3), high=said(130e3))


def _texts(x):
    return R(x.extra / x.corpora, "1", x.extra < x.corpora,
             f"both suit {(x.extra + x.corpora) / eco.optimal_tokens(1, 20) / 1e12:.1f} T parameters at 20 tokens each")


_claim(101, 3, "All further text is some 7 T tokens beside corpora of 15 T", "extra", 16e12, _texts, extra=said(7e12),
       corpora=said(15e12))


def _genomes(x):
    size = x.each * x.people
    return R(size, "byte", size > x.corpora * x.per_token, "against the text corpora's bytes")


_claim(103, 3, "Genomes would be a far larger corpus than text", "people", 100, _genomes, each=said(200e9), people=said(100e6),
       corpora=said(15e12), per_token=assumed(4))


def _all_people(x):
    speed = x.peak / eco.inference_flops(x.params)
    need = eco.chips_demanded(x.people * x.tokens / x.seconds, 1 / speed)
    return R(need, "chip", need <= x.shipped, f"{speed:.0f} tokens/s a chip at its FP8 peak: a bound")


_claim(143, 4, "A quarter's GPUs run a 7B model at 100 tokens per second for every person", "seconds", 60, _all_people,
       people=assumed(8.1e9), tokens=said(100), seconds=said(1), params=said(7e9), peak=chip("h100", "flops_fp8"),
       shipped=assumed(1e6))

# ---------------------------------------------------------------- serving


def _token_prices(x):
    prefill = eco.roofline_seconds(eco.inference_flops(x.params), x.peak, 0, x.bandwidth)
    step = eco.roofline_seconds(eco.inference_flops(x.params, x.b), x.peak, x.weights + x.b * x.s * x.kv, x.bandwidth)
    ratio = step / x.b / prefill
    return R(ratio, "x", near(ratio, x.price_out / x.price_in, 0.5), "cost of a decoded over a prefilled token, roofline; "
             f"prices differ {x.price_out / x.price_in:.1f} x")


_claim(20, 2, "$10 per million tokens out, $3 in", "b", 16, _token_prices, price_out=said(10), price_in=said(3), b=assumed(256),
       s=assumed(2048), params=shape("llama-3.1-70b", "active_params_no_embedding"),
       weights=shape("llama-3.1-70b", "weight_bytes", "fp8"), kv=cached("llama-3.1-70b"), peak=chip("h100", "flops_fp8"),
       bandwidth=chip("h100", "bytes_per_s"))


def _agent(x):
    share = eco.prefill_bill_share(x.context * x.switches, x.price_in, x.out, x.price_out)
    return R(share, "1", share > 0.5, f"{x.context * x.switches / 1e6:.1f} M tokens in, {x.out / 1e6:.1f} M out")


_claim(21, 2, "A coding agent pays mostly for prefill", "switches", 50, _agent, context=said(40e3), switches=assumed(200),
       out=assumed(1e6), price_in=said(3), price_out=said(10))


def _restore(x):
    per_second = x.rent / 3600
    keep = eco.restore_dollars(x.context * x.kv, x.bandwidth, per_second, x.storage / 1e9 / (730 * 3600), x.held)
    again = eco.prefill_dollars(x.context, x.active, x.peak, x.share, per_second)
    return R(again / keep, "x", again > 2 * keep, f"${again:.5f} to prefill again, ${keep:.5f} to keep and move back")


_claim(22, 2, "Keeping a KV cache elsewhere is far cheaper than prefilling again", "held", 86400.0, _restore, context=said(40e3),
       kv=cached("deepseek-v3"), active=shape("deepseek-v3", "active_params_no_embedding"), peak=chip("h100", "flops_fp8"),
       share=assumed(0.4), bandwidth=chip("h100", "scale_out_bytes_per_s"), rent=said(2), storage=assumed(0.1),
       held=assumed(600.0))


def _week(x):
    tokens = eco.tokens_bought(x.dollars, x.price)
    speed = tokens / (7 * 24 * 3600)
    return R(speed, "token/s", speed / x.context <= x.calls, f"{tokens / 1e9:.1f} G tokens; a call of {x.context:.0f} every "
             f"{x.context / speed:.1f} s, night and day")


_claim(44, 2, "One user spent $10,000 on an agent in a week", "context", 4000, _week, dollars=said(1e4), price=said(3),
       context=said(40e3), calls=assumed(1))


def _pro(x):
    seconds = eco.answer_seconds(x.tokens, x.speed)
    return R(seconds, "s", seconds >= 300, f"300 s at this speed are {300 * x.speed:.0f} tokens")


_claim(94, 3, "o1-pro may take over five minutes", "speed", 100, _pro, tokens=said(11000), speed=assumed(35))


def _thinking(x):
    ratio = (x.answer + x.thinking) / x.answer
    return R(ratio, "x", near(ratio, 10, 0.15), f"{x.answer + x.thinking:.0f} tokens out, spoken of as ten times")


_claim(128, 4, "Thinking makes 1,000 tokens 11,000", "thinking", 3000, _thinking, answer=said(1000), thinking=said(10000))


def _users(x):
    users = eco.users_that_fit(x.memory, x.usable, x.weights, x.s, x.kv)
    return R(users, "user", users >= 0.95 * x.users, f"{x.s:.0f} tokens each, BF16 cache, FP8 weights")


_claim(129, 4, "A $300,000 server groups over 256 users of Llama 405B", "s", 11300, _users, users=said(256),
       memory=Input("chips.toml: 8 x h100.memory_bytes", read=lambda: 8 * _chips()["h100"].need("memory_bytes")),
       usable=cited(MEMORY_SHARE, "vLLM, gpu_memory_utilization"), weights=shape("llama-3.1-405b", "weight_bytes", "fp8"),
       s=assumed(1270), kv=cached("llama-3.1-405b"))


def _fewer(x):
    ratio = eco.resident_ratio(x.prompt + x.answer, x.prompt + x.answer + x.thinking)
    return R(ratio, "x", within(ratio, 4, 5), "room for caches alone, full length")


_claim(131, 4, "Thinking cuts a server's users to a fourth or fifth", "prompt", 300, _fewer, prompt=assumed(1900),
       answer=said(1000), thinking=said(10000))


def _fifty(x):
    ratio = eco.query_cost_ratio(x.users, x.tokens)
    return R(ratio, "x", near(ratio, 50, 0.1), "fewer users times more tokens")


_claim(132, 4, "A query of o1 costs 50 times as much", "users", 8.7, _fifty, users=said(4.5), tokens=said(11))


def _fifty_paid(x):
    ratio = eco.query_cost_ratio(x.price, x.tokens)
    return R(ratio, "x", near(ratio, 50, 0.1), "price a token times tokens")


_claim(133, 4, "Ten times the price of a token and ten times the tokens are 50 times", "price", 5, _fifty_paid, price=said(10),
       tokens=said(10))


def _longer(x):
    if x.reads:
        ratio = eco.kv_read_bytes(0, x.long, x.kv) / eco.kv_read_bytes(0, x.short, x.kv)
    else:
        ratio = x.long * x.kv / (x.short * x.kv)
    pairs = eco.attention_pairs(x.long) / eco.attention_pairs(x.short)
    return R(ratio, "x", ratio > 15, f"bytes kept grow as the length; pairs of a prefill {pairs:.0f} x, as bytes read in all")


_claim(134, 4, "Ten times the context is much more than ten times the KV cache", "reads", 1, _longer, short=said(10),
       long=said(100), kv=cached("llama-3.1-70b"), reads=choice(0))


def _one_gpu(x):
    amd, nvidia = eco.chips_needed(x.params * x.amd_bytes, x.amd), eco.chips_needed(x.params * x.nvidia_bytes, x.nvidia)
    room = [m - x.params * b for m, b in ((x.amd, x.amd_bytes), (x.nvidia, x.nvidia_bytes))]
    return R(nvidia, "chip", amd == nvidia == 1, f"room beside the weights: {room[0] / 1e9:.0f} and {room[1] / 1e9:.0f} GB")


_claim(137, 4, "Llama 70B runs on one AMD or one Nvidia GPU", "nvidia_bytes", 2, _one_gpu,
       params=shape("llama-3.1-70b", "total_params"), amd=chip("mi300x", "memory_bytes"), nvidia=chip("h100", "memory_bytes"),
       amd_bytes=cited(BYTES["bf16"], "byte of a bf16 weight"), nvidia_bytes=assumed(BYTES["fp8"]))


def _smaller(x):
    ratio = x.size / (1 - x.comm)
    return R(ratio, "x", within(ratio, 13, 17), "a small model on one chip spends nothing on all-reduces")


_claim(139, 4, "A model ten times smaller is fifteen times cheaper to run", "comm", 0.0, _smaller, size=said(10),
       comm=assumed(0.33))


def _terabyte(x):
    size = x.params * x.bytes
    chips = eco.chips_needed(size, _chips()["h100"].need("memory_bytes"))
    return R(size, "byte", size >= 1e12, f"{chips} H100s for the weights alone")


_claim(108, 4, "A trillion parameters take over a terabyte", "bytes", 0.5, _terabyte, params=said(1e12),
       bytes=cited(BYTES["fp8"], "byte of an FP8 weight"))


def _experts(x):
    total = x.experts * x.each
    return R(total, "param", near(total, 1.8e12), f"{eco.chips_needed(total, 80e9)} chips of 80 GB in FP8")


_claim(91, 3, "GPT-4 has 1.8 T parameters as 8 experts of 220 B", "each", 111e9, _experts, experts=said(8), each=said(220e9))

# ---------------------------------------------------------------- DeepSeek


def _factors(x):
    parts = {"active parameters": x.rival / x.active, "FP8": x.fp8, "MTP": eco.tokens_per_step(x.acceptance, 1)}
    product = prod(parts.values())
    return R(product, "x", within(product, x.low, x.high), " x ".join(f"{name} {v:.1f}" for name, v in parts.items()))


_claim(74, 3, "DeepSeek is some 45 times more efficient", "rival", 70e9, _factors, rival=assumed(2 * 220e9),
       active=shape("deepseek-v3", "active_params"), fp8=assumed(2), acceptance=said(0.85), low=said(0.9 * 45),
       high=said(1.1 * 45))
_claim(75, 3, "Or 25 to 30 times", "fp8", 2, _factors, rival=assumed(2 * 220e9), active=shape("deepseek-v3", "active_params"),
       fp8=assumed(1.25), acceptance=said(0.85), low=said(25), high=said(30))


def _v3_training(x):
    dollars = eco.training_dollars(x.hours, x.rent)
    share = eco.achieved_share(eco.training_flops(x.active, x.tokens), x.hours, x.peak)
    return R(dollars, "$", within(dollars, 5e6, 6e6), f"rent of the last run, {share:.0%} of the FP8 peak; no capital or trials")


_claim(76, 3, "Training DeepSeek-V3 cost little over $5 M", "rent", 1.5, _v3_training, rent=chip("h800", "dollars_per_hour"),
       hours=cited(2.788e6, "arXiv:2412.19437, table 1"), tokens=cited(14.8e12, "arXiv:2412.19437"),
       active=shape("deepseek-v3", "active_params"), peak=chip("h800", "flops_fp8"))


def _others_training(x):
    dollars = eco.training_dollars(eco.training_hours(x.flops, x.peak, x.share), x.rent)
    return R(dollars, "$", dollars > 100e6, f"{dollars / eco.training_dollars(2.788e6, 2):.0f} x DeepSeek-V3's: not 45")


_claim(77, 3, "Other laboratories spend over $100 M on a model", "share", 0.5, _others_training, flops=assumed(2.1e25),
       peak=chip("a100", "flops_bf16"), share=assumed(0.34), rent=assumed(2))


def _resources(x):
    ratio = x.theirs / x.ours
    return R(ratio, "x", ratio > 100, "GPUs, by the same text's counts")


_claim(78, 3, "Leading laboratories have over 100 times DeepSeek's resources", "theirs", 250e3, _resources, theirs=said(100e3),
       ours=said(2000))


def _meta(x):
    dollars = x.count * x.price
    return R(dollars, "$", dollars >= 1e9, "chips alone")


_claim(80, 3, "Meta's 100,000 H100s cost billions", "count", 20e3, _meta, count=said(100e3), price=chip("h100", "price_dollars"))
_untestable(81, 3, "Thirteen leaders of Llama each earn more than DeepSeek-V3's training cost", "nobody's pay is stated")


def _narrow(x):
    wide, narrow = eco.chips_needed(x.params * x.wide, x.memory), eco.chips_needed(x.weights, x.memory)
    return R(wide / narrow, "x", wide / narrow >= 3, f"{wide} -> {narrow} chips, scales included; 2 x against BF16")


_claim(82, 3, "FP8 in place of 32 bits cuts memory and so GPUs", "wide", 2, _narrow, wide=said(4),
       params=shape("deepseek-v3", "total_params"), weights=shape("deepseek-v3", "weight_bytes"),
       memory=chip("h800", "memory_bytes"))


def _range(x):
    ratio = x.largest / x.smallest
    return R(ratio, "x", ratio > 256, "largest over smallest of E4M3; 8-bit integers reach 127 to 255")


_claim(83, 3, "FP8 spans more than 256 equal steps would", "smallest", 448 / 255, _range,
       largest=Input("ml_dtypes: float8_e4m3fn", read=lambda: float(ml_dtypes.finfo("float8_e4m3fn").max)),
       smallest=Input("ml_dtypes: float8_e4m3fn", read=lambda: float(ml_dtypes.finfo("float8_e4m3fn").smallest_subnormal)))


def _mtp(x):
    gain = eco.speculation_speedup(x.acceptance, x.drafts, x.overhead)
    return R(gain, "x", gain >= 1.7, f"{eco.tokens_per_step(x.acceptance, x.drafts):.2f} tokens a step; 2 is the limit")


_claim(84, 3, "Predicting one more token, right 85 to 90 % of the time, nearly doubles speed", "acceptance", 0.5, _mtp,
       acceptance=said(0.85), drafts=cited(1, "arXiv:2412.19437, 2.2"), overhead=assumed(0.05))


def _latent(x):
    mla = eco.mla_kv_bytes(x.layers, x.rank, x.rope, 2)
    full = eco.mha_kv_bytes(x.layers, x.heads, NOPE + ROPE, VALUE, 2)
    grouped = eco.gqa_kv_bytes(x.layers, 8, 128, 2)
    return R(full / mla, "x", mla < min(full, grouped), f"{mla} bytes a token; 8 grouped heads take {grouped / mla:.1f} x")


_claim(86, 3, "Latent attention keeps a much smaller cache", "rank", 2048, _latent, layers=shape("deepseek-v3", "layers"),
       heads=shape("deepseek-v3", "h"), rank=cited(LATENT, "DeepSeek-V3, config.json"),
       rope=cited(ROPE, "DeepSeek-V3, config.json"))


def _overlap(x):
    share = x.units / x.all
    seconds = eco.overlapped(x.compute, x.comm, share)
    return R(seconds / (x.compute + x.comm), "1", seconds < x.compute + x.comm, f"{1 - share:.1%} of the SMs compute")


_claim(87, 3, "Some 20 SMs suffice to hide communication", "units", 70, _overlap, units=said(20), all=chip("h800", "sm_count"),
       compute=cited(1, "arXiv:2412.19437, 3.2.1: about 1 to 1"), comm=cited(1, "arXiv:2412.19437, 3.2.1: about 1 to 1"))


def _two_cards(x):
    model = _model("deepseek-v3")
    size = model.params(x.experts) * BYTES["fp8"]
    cards, touched = eco.chips_needed(size, x.memory), eco.expected_active(64, model.moe.e, model.moe.top_k)
    return R(cards, "chip", cards <= x.cards,
             f"all experts must be resident; 64 tokens reach {touched:.0f} of {model.moe.e} a layer")


_claim(88, 3, "Two RTX 4090 hold what DeepSeek-V3 needs, 37 B active parameters", "experts", 8, _two_cards, cards=said(2),
       experts=Input("deepseek-v3: experts", read=lambda: _model("deepseek-v3").moe.e), memory=chip("rtx4090", "memory_bytes"))


def _api(x):
    ratio = eco.price_at_margin(1 / x.gain, x.margin) / eco.price_at_margin(1, x.rival_margin)
    return R(ratio, "1", within(ratio, 0.035, 0.065), "price ratio = cost ratio x (1 - their margin) / (1 - its margin)")


_claim(92, 3, "DeepSeek's interface is 95 % cheaper", "margin", 0.5, _api, gain=said(45), rival_margin=said(0.7),
       margin=cited(eco.gross_margin(562027, 87072), "DeepSeek, day 6: a day's theoretical revenue and rent"))


def _api_margin(x):
    margin = eco.gross_margin(x.price * eco.price_at_margin(1, x.rival_margin), 1 / x.gain)
    return R(margin, "1", margin > x.rival_margin, "the margin that a 20 x lower price leaves: above its rivals'")


_claim(93, 3, "It computes some 50 times more efficiently, beyond its price", "gain", 10, _api_margin, gain=said(50),
       price=said(0.05), rival_margin=said(0.7))


def _demand(x):
    change = eco.spend_change(x.fall, x.elasticity)
    return R(change, "1", change < 1, "spend over spend before; it grows where elasticity exceeds 1")


_claim(106, 3, "Compute at a 45th of the cost cuts demand for GPUs", "elasticity", 1.2, _demand, fall=said(45),
       elasticity=assumed(0.5))

# ---------------------------------------------------------------- work and software


def _commits(x):
    value = x.share * x.wages
    return R(value, "$/year", value >= 10e9, "wages of that share of the work: a ceiling on its price")


_claim(42, 2, "An agent writes 2 % of commits, worth tens of billions of wages", "share", 0.002, _commits, share=said(0.02),
       wages=said(2e12))


def _wages(x):
    pay = x.wages / x.developers
    return R(pay, "$/year", within(pay, 30e3, 100e3), "a developer's pay in the world's mean")


_claim(43, 2, "Software wages are $2T a year", "developers", 5e6, _wages, wages=said(2e12), developers=assumed(30e6))


def _developer(x):
    value = x.pay * x.gain
    return R(value, "$/year", near(value, 60e3), f"100 developers' work by {100 / (1 + x.gain):.0f}; by 75 needs a third more")


_claim(142, 4, "20 % more from a developer of $300,000 is worth $60,000", "gain", 0.1, _developer, pay=said(300e3),
       gain=said(0.2))
_untestable(72, 3, "Compiled C reached half the speed of hand-written assembly", "no record here times one kernel in both")


def _porting(x):
    saved, months = eco.kernel_payback(x.share, x.speedup, x.fleet, x.engineers * x.pay * x.months / 12)
    return R(months, "month", months <= x.months, f"{saved / 1e6:.0f} $M a year saved; tuning lasts {x.months:g} months")


_claim(114, 4, "Porting one model is worth the time of a hundred engineers", "fleet", 1e8, _porting, engineers=said(100),
       pay=said(650e3), months=said(6), fleet=assumed(1e9), share=assumed(1.0), speedup=assumed(1.2))

CLAIMS = tuple(sorted(CLAIMS, key=lambda c: int(c.id[1:])))

# ---------------------------------------------------------------- statements that disagree


@dataclass(frozen=True)
class Contradiction:
    """Two statements, and ``supports``: what the arithmetic says, with its number."""

    id: str
    first: str
    second: str
    file: str
    arithmetic: Callable = field(compare=False)

    @property
    def supports(self):
        return self.arithmetic()


def _kv_users(prompt):
    return eco.resident_ratio(prompt + 1000, prompt + 11000)


def _per_person(seconds, figure, key):
    speed = _chips()[key].need(figure) / eco.inference_flops(7e9)
    return eco.chips_demanded(8.1e9 * 100 / seconds, 1 / speed) / 1e6


CONTRADICTIONS = (
    Contradiction("training-cost", "V3 cost over $5 M to train", "less than $5 M, on only 2,000 H100s", FILES[3], lambda: (
        f"first: rent {eco.training_dollars(2.788e6, 2) / 1e6:.3f} $M; to buy 2,000 chips at $40,000 is another quantity, "
        f"{eco.fleet_dollars(1, 2000, 1, 40000) / 1e6:.0f} $M")),
    Contradiction("two-cards", "37 B active parameters fit two RTX 4090", "the model has 671 B parameters", FILES[3], lambda: (
        f"second: {eco.chips_needed(_model('deepseek-v3').weight_bytes, 24e9)} cards hold the FP8 weights; 64 tokens reach "
        f"{eco.expected_active(64, 256, 8):.0f} of 256 experts a layer")),
    Contradiction("full-precision", "others train in 32 bits, so FP8 saves 4 x", "others train in BF16", FILES[3], lambda: (
        f"second: {2 / BYTES['fp8']:.0f} x against BF16, {4 / BYTES['fp8']:.0f} x only against FP32")),
    Contradiction("45x", "DeepSeek is 45 times more efficient", "$5 M against $100 M; a price 95 % lower", FILES[3], lambda: (
        f"second: {100e6 / eco.training_dollars(2.788e6, 2):.0f} x by training cost, {1 / (1 - 0.95):.0f} x by price; "
        "45 has no derivation")),
    Contradiction("per-person", "100 tokens a minute for everyone", "100 tokens a second for everyone", FILES[4], lambda: (
        f"first: {_per_person(60, 'flops_fp8', 'h100'):.2f} M H100s at peak; a second takes "
        f"{_per_person(1, 'flops_fp8', 'h100'):.1f} M, or {_per_person(1, 'flops_fp4', 'b200'):.1f} M B200s in FP4")),
    Contradiction("query-price", "10 x a token's price and 10 x the tokens", "50 x a query", FILES[4], lambda: (
        f"neither alone: 10 x 10 = {eco.query_cost_ratio(10, 10)}, 50 needs 5 x a token = {eco.query_cost_ratio(5, 10)}")),
    Contradiction("context", "10 x the context is much more than 10 x", "the KV cache is linear in context", FILES[4], lambda: (
        f"second for bytes kept: 10 x; first for reads over an answer: "
        f"{eco.kv_read_bytes(0, 100, 1) / eco.kv_read_bytes(0, 10, 1):.0f} x")),
    Contradiction("fewer-users", "thinking leaves a fourth or fifth of the users", "a short prompt", FILES[4], lambda: (
        f"first at prompts of 1,900 tokens: {_kv_users(1900):.1f} x; at 300 tokens {_kv_users(300):.1f} x")),
    Contradiction("gpt-4", "GPT-4 cost hundreds of billions", "hundreds of millions", FILES[4], lambda: (
        f"second: 2.1e25 FLOP on A100s at 34 % is "
        f"{eco.training_dollars(eco.training_hours(2.1e25, 312e12, 0.34), 2) / 1e6:.0f} $M at $2/h")),
    Contradiction("token-price", "$10 for prefill, $3 for decode", "$3 for prefill, $10 for decode", FILES[2], lambda: (
        f"second: a decoded token costs {find('Q20').run().value:.1f} x a prefilled one (roofline)")),
    Contradiction("infrastructure", "$100B of revenue carries $250B", "cost of revenue is power, staff and money too", FILES[2],
                  lambda: f"second: with money at 10 % {50 / eco.capital_recovery(0.1, 5) / 50:.2f} years of cost are capital, "
                          f"{50 / eco.capital_recovery(0.1, 5):.0f} $B, less power and staff; 250 only without all three"),
    Contradiction("margin", "Nvidia's margin is 75 %", "up to 90 %", FILES[3], lambda: (
        f"{eco.price_at_margin(1, 0.75):.0f} x cost against {eco.price_at_margin(1, 0.9):.0f} x; an H100 of chips.toml gives "
        f"{eco.gross_margin(*(_chips()['h100'].need(f) for f in ('price_dollars', 'cogs_dollars'))):.0%}")),
)

# ---------------------------------------------------------------- all of them


def find(id):
    """The claim of an id; a CostError with the ids where there is none."""
    found = {c.id: c for c in CLAIMS}
    if id not in found:
        raise wrong("claim", id, ", ".join(found))
    return found[id]


def evaluate(id=None, overrides=None):
    """[Evaluation ...] of one claim with {input: value} replaced, or of all with {id: {input: value}}."""
    chosen = [find(id)] if id else CLAIMS
    changes = {id: overrides or {}} if id else overrides or {}
    for key in changes:
        find(key)
    found = []
    for claim in chosen:
        change = changes.get(claim.id)
        result = claim.run(change)
        found.append(Evaluation(claim, result, claim.verdict(result), claim.edge(change), claim.values(change)))
    return found


def table(evaluations=None):
    """[(id, claim, result, verdict, decided by) ...] as text."""
    rows = []
    for e in evaluate() if evaluations is None else evaluations:
        value = "" if e.result.value is None else f"{e.result.value:.4g} {e.result.unit}"
        rows.append((e.claim.id, e.claim.text, value, e.verdict, e.decided_by))
    return rows
