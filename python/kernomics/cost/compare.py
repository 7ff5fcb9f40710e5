"""Chips side by side on one workload, the trade of one chip, and where each microsecond and cent goes."""

from dataclasses import dataclass, field, replace
from math import exp, fsum, isfinite, log

from kernomics.cost import CostError, economics, serving, tco, wrong
from kernomics.cost.chips import RANGE
from kernomics.cost.economics import allocated_mtoken, chips_needed, dollars_per_mtoken, owned_day, rented_day
from kernomics.cost.fields import parse
from kernomics.cost.measured import BOUND, MARKS


@dataclass(frozen=True)
class Answer:
    """A chip's cheapest service of a scenario, and its price; ``why`` says what stands in the way of one."""

    chip: object  # or a Pair
    service: serving.Service | None
    rents: tuple  # $/h of a chip that prefills, of one that decodes; None where unknown
    utilisation: float = 1.0
    allocation: str = "time"
    sold: dict = field(default_factory=dict)  # {kind of token: $/Mtoken}, of the allocation by price
    requests_per_s: float | None = None  # a load to size a fleet for
    rent_sources: tuple = ("rented", "rented")  # given, owned, rented, or why a price is unknown
    why: str = ""
    profile: tuple = ()  # load of each hour of a day over its mean, which is requests_per_s
    hourly: tuple = (None, None)  # $/h of a chip of each pool that is rented by the hour

    @property
    def dollars_per_hour(self):
        """$/(chip*h), of both pools' chips as they are matched; None where a price is unknown."""
        fill, decode = self.rents
        if fill == decode or self.service is None or None in self.rents:
            return fill if fill == decode else None
        return fill * self.service.prefill_share + decode * (1 - self.service.prefill_share)

    @property
    def request_dollars(self):
        """$ of a request = sum over pools of chip*s / (3600 s/h) * $/(chip*h) / utilisation; None where a price is unknown."""
        if None in self.rents or self.service is None:
            return None
        s, (fill, decode) = self.service, self.rents
        dollars = s.prefill_seconds * fill + s.decode_seconds * decode + s.tiered_seconds * self.tier_rent
        return dollars / 3600 / self.utilisation

    @property
    def tier_rent(self):
        """$/h of a chip's tier of the prefix cache, beside the chip's own."""
        tier = self.service.workload.tier
        return tier.dollars_per_hour if tier else 0.0

    @property
    def mtoken(self):
        """{kind: $/Mtoken} of the tokens in (prefilled), cached and out: the cost of a request, as allocated."""
        dollars = self.request_dollars
        if dollars is None:
            return {}
        s, rents = self.service, dict(zip(("in", "cached", "out"), (self.rents[0], self.tier_rent, self.rents[1])))
        seconds = {"in": s.prefill_seconds - s.waits, "cached": s.waits, "out": s.decode_seconds}
        pools = {kind: (chips, rents[kind]) for kind, chips in s.pools.items()} if self.allocation == "pool" else {}
        return allocated_mtoken(self.allocation, dollars, s.workload.tokens, seconds, pools, self.sold)

    @property
    def dollars_in(self):
        """$/Mtoken of prompt tokens that are computed."""
        return self.mtoken.get("in")

    @property
    def dollars_cached(self):
        """$/Mtoken of prompt tokens found in the cache; None where there are none."""
        return self.mtoken.get("cached")

    @property
    def dollars_out(self):
        """$/Mtoken of answer tokens."""
        return self.mtoken.get("out")

    @property
    def dollars(self):
        """$/Mtoken of all tokens of a request, cached ones included: the blend, the same under any allocation."""
        dollars = self.request_dollars
        return dollars if dollars is None else dollars / sum(self.service.workload.tokens.values()) * 1e6

    @property
    def margins(self):
        """{gross_margin, margin_over_cost: share} of a request at what its tokens sell for; empty where none sell or cost."""
        cost = self.request_dollars
        if not (cost and self.sold):
            return {}
        revenue = economics.sold_dollars({kind: n for kind, n in self.service.workload.tokens.items() if n}, self.sold)
        return {"gross_margin": economics.gross_margin(revenue, cost),
                "margin_over_cost": economics.margin_over_cost(revenue, cost)}

    def beside(self, other):
        """(requests/s of a chip over those of another's, the ratio from which it is the cheaper one); None without prices."""
        if not (self.request_dollars and other.request_dollars):
            return None
        mine, theirs = (a.request_dollars / a.service.chip_seconds for a in (self, other))
        return other.service.chip_seconds / self.service.chip_seconds, economics.break_even_performance(mine, theirs)

    @property
    def fleet(self):
        """The Fleet for the load: whole instances, busy for the share ``utilisation`` of the hours; None without a load."""
        asked = self.requests_per_s
        return self.service and asked and Fleet(self, asked, *self.service.fleet(asked, self.utilisation))

    @property
    def day(self):
        """The Day of fleets, one an hour; None without a load and its profile."""
        if not (self.service and self.requests_per_s and self.profile):
            return None
        loads = [self.requests_per_s * x for x in self.profile]
        return Day(self, tuple(Fleet(self, x, *self.service.fleet(x, self.utilisation)) for x in loads))

    @property
    def watts(self):
        """All-in power (thermal design power where that is unknown) of a chip that prefills, of one that decodes."""
        return tuple(chip.get("all_in_watts") or chip.get("tdp_watts") for chip in self.chip.pools)

    @property
    def joules_out(self):
        """J per answer token: power times decode chip time."""
        _, watts = self.watts
        return self.service and watts and watts * self.service.decode.chip_seconds_per_token

    @property
    def tokens_per_s_per_mw(self):
        """Answer tokens per second and megawatt of both pools."""
        s, (fill, decode) = self.service, self.watts
        if not (s and fill and decode):
            return None
        return s.workload.tokens_out / (s.prefill_seconds * fill + s.decode_seconds * decode) * 1e6

    @property
    def share(self):
        """Part of a request's chip time by mark."""
        s = self.service
        parts = (s.prefill.step.share, s.prefill_seconds), (s.decode.step.share, s.decode_seconds)
        return {m: sum(share[m] * w for share, w in parts) / s.chip_seconds for m in MARKS}

    @property
    def bound(self):
        """Whether most of a request's chip time is a roofline bound."""
        return self.share[BOUND] > 0.5


@dataclass(frozen=True)
class Fleet:
    """Chips that serve a load."""

    answer: Answer
    requests_per_s: float
    prefill: int  # chips
    decode: int

    @property
    def chips(self):
        return self.prefill + self.decode

    @property
    def nodes(self):
        """Scale-up domains, a pool's chips in domains of their own; None where a domain is unknown."""
        domains = [chip.get("scale_up_domain") for chip in self.answer.chip.pools]
        return None if None in domains else sum(map(chips_needed, (self.prefill, self.decode), domains))

    @property
    def dollars_per_hour(self):
        """$/h = sum over pools of chip * $/(chip*h), idle hours within; None where a price is unknown."""
        rents = self.answer.rents
        if None in rents:
            return None
        tiered = self.prefill if self.answer.service.disaggregated else self.decode
        return self.prefill * rents[0] + self.decode * rents[1] + tiered * self.answer.tier_rent

    @property
    def dollars(self):
        """$/Mtoken of all tokens, whole instances paid."""
        tokens = self.requests_per_s * sum(self.answer.service.workload.tokens.values())
        return self.dollars_per_hour and dollars_per_mtoken(self.dollars_per_hour, tokens)


@dataclass(frozen=True)
class Day:
    """Fleets by the hour: owned and paid at the peak of each pool, or rented as they are used."""

    answer: Answer
    hours: tuple  # a Fleet for each

    @property
    def chips(self):
        """Of each hour."""
        return [f.chips for f in self.hours]

    @property
    def pools(self):
        """(chips of each hour that prefill, that decode)"""
        return [f.prefill for f in self.hours], [f.decode for f in self.hours]

    @property
    def peak(self):
        """Chips to own: the most of each pool."""
        return sum(map(max, self.pools))

    @property
    def utilisation(self):
        """Mean share of the owned chips that an hour needs."""
        return sum(self.chips) / len(self.chips) / self.peak

    def _dollars(self, day, rents):
        if None in rents:
            return None
        tiered = self.answer.service.disaggregated, not self.answer.service.disaggregated  # the pool that bears the tier
        return sum(day(chips, rent + self.answer.tier_rent * bears) for chips, rent, bears in zip(self.pools, rents, tiered))

    @property
    def owned_dollars(self):
        """$/day of the peak, at the scenario's $/h."""
        return self._dollars(owned_day, self.answer.rents)

    @property
    def rented_dollars(self):
        """$/day of the hours used, at the hourly rental."""
        return self._dollars(rented_day, self.answer.hourly)

    @property
    def break_even(self):
        """An hourly rental over the owner's $/h at which both ways cost the same."""
        used = self._dollars(rented_day, self.answer.rents)
        return self.owned_dollars / used if used else None


def compare(scenario, sources, chips, each=None):
    """[Answer] of every chip, cheapest first, then those without a price, then those without an answer."""
    model, answers = scenario.load_model(), []
    for chip in chips:
        if each:
            each(chip)
        try:
            answers.append(_answer(scenario, chip, serving.serve(model, chip, sources, scenario.workload(), **scenario.setup())))
        except CostError as error:
            answers.append(refused(scenario, chip, error))
    return sorted(answers, key=lambda a: (a.service is None, a.dollars is None, a.dollars or 0.0))


def pareto(scenario, sources, chip):
    """[Answer] of the front of a chip's services, fastest user first: no plan and batch beats these in both speeds."""
    found = serving.services(scenario.load_model(), chip, sources, scenario.workload(), **scenario.setup())
    return [_answer(scenario, chip, s) for s in serving.front(found)]


@dataclass(frozen=True)
class Stream:
    """One user alone on a chip's fastest plan, beside the fewest chips that hold the model and a sequence."""

    chip: object
    fewest: int
    point: serving.Point
    dollars: float | None  # $/Mtoken out, all chips of the instance paid

    @property
    def uncounted(self):
        """Communication over links that nobody has published is left out."""
        return any(p.source == serving.UNCOUNTED for p in self.point.step.parts)


def stream(scenario, sources, answer):
    """The Stream of an answer's decoding chip: $/Mtoken = $/(chip*h) * chip / (3600 s/h) / (token/s) * 1e6."""
    (_, chip), (_, rent) = answer.chip.pools, answer.rents
    points = serving.decode_points(scenario.load_model(), chip, sources, scenario.workload().mean_context, chips=scenario.chips,
                                   base=scenario.plan())
    p = max((p for p in points if p.b == 1), key=lambda p: (p.tokens_per_s_per_user, -p.plan.chips))
    dollars = None if rent is None else dollars_per_mtoken(p.plan.chips * rent / answer.utilisation, p.tokens_per_s_per_user)
    return Stream(answer.chip, min(x.plan.chips for x in points), p, dollars)


def sweep(scenario, sources, chip, contexts):
    """[(prompt tokens, Answer)] of a chip as prompts grow."""
    return [(s, *compare(scenario.model_copy(update={"tokens_in": s}), sources, [chip])) for s in contexts]


def _answer(scenario, chip, service, why=""):
    rents, where = zip(*map(scenario.rent, chip.pools))
    return Answer(chip, service, rents, scenario.utilisation, scenario.named_allocation, scenario.sold, scenario.requests_per_s,
                  where, why, scenario.profile, tuple(map(scenario.hourly, chip.pools)))


def refused(scenario, chip, error):
    """The Answer of a chip that has none."""
    return _answer(scenario, chip, None, str(error))


def held(scenario, sources, answer):
    """f(**inputs) -> $/Mtok of all tokens, with the answer's plans kept and inputs changed.

    An input is a field of the scenario, ``dollars_per_hour``, a figure of the chip, or of one that is owned a field of [tco].
    Tokens are rounded to whole ones; where longer contexts leave less room, fewer sequences are decoded at a time.
    """
    s, model, w = answer.service, answer.service.model, answer.service.workload
    _one_chip(answer)

    def price(**inputs):
        inputs = {n: round(v) if n in WHOLE else v for n, v in inputs.items()}
        for name, value in inputs.items():
            _within(scenario, answer, name, value)
        figures = {n: v for n, v in inputs.items() if n in answer.chip.figures and n != "dollars_per_hour"}
        chip = replace(answer.chip, figures=answer.chip.figures | {n: replace(answer.chip.figures[n], value=v)
                                                                   for n, v in figures.items()})
        owned = {n: v for n, v in inputs.items() if n in _owned(answer)}
        fields = {n: v for n, v in inputs.items() if n not in answer.chip.figures and n not in owned}
        asked = scenario.model_copy(update=fields)
        plan = {n: getattr(asked, n) for n in PLAN}
        calls = type(sources)(sources.measured, sources.tables, asked.call_latency, asked.bandwidth_share, asked.kernel_times)
        load = replace(w, hit=asked.hit, tokens_in=asked.tokens_in, tokens_out=asked.tokens_out)
        shared = replace(s.decode.plan, **plan)
        room = serving.most_sequences(model, chip, shared, load.mean_context, shared.drafts + 1)
        decode = serving.decode_point(model, chip, calls, shared, max(1, min(s.decode.b, room)), load.mean_context)
        fill = serving.prefill_point(model, chip, calls, replace(s.prefill.plan, **plan),
                                     int(s.prefill.step.tokens), load.fresh, load.tokens["cached"])
        held = serving.service(model, chip, load, decode, fill, s.disaggregated)
        dollars = inputs.get("dollars_per_hour", answer.dollars_per_hour)
        if _owned(answer) and "dollars_per_hour" not in inputs:
            dollars = tco.cost_per_available_hour(scenario.owned(chip, **owned))
        return replace(answer, service=held, rents=(dollars, dollars), utilisation=asked.utilisation).dollars

    return price


def share_of(answer, op):
    """Share of a request's chip time that calls of ``op`` take."""
    s, seconds = answer.service, 0.0
    for point, rows, total in ((s.decode, s.decode_rows(), s.decode_seconds), (s.prefill, s.prefill_rows(), s.prefill_seconds)):
        names = {(r.layer, r.name) for r in rows if r.op == op}
        parts = point.step.parts
        seconds += total * sum(p.total for p in parts if (p.layer, p.name) in names) / sum(p.total for p in parts)
    return seconds / s.chip_seconds


def speedup(before, after, op):
    """Geometric mean of old over new seconds of the calls of ``op`` that both records (lists) hold."""
    from kernomics.cost.measured import Measured

    old, new = ({key: s for (chip, name), calls in Measured(r).best.items() if name == op for key, (_, s) in calls.items()}
                for r in (before, after))
    both = old.keys() & new.keys()
    if not both:
        raise CostError(f"the records share no call of {op}")
    return exp(fsum(log(old[k] / new[k]) for k in both) / len(both))


def _one_chip(answer):
    if answer.chip.mixed:
        raise wrong("chip", answer.chip.key, "one chip, whose figures are varied")


PLAN = ("acceptance", "imbalance", "comm_share", "overlap", "alpha", "step_overhead", "memory_share", "drafts")
WHOLE = ("tokens_in", "tokens_out")


def _owned(answer):
    """Inputs of what an hour costs, where the chip is owned."""
    return [n for n in tco.Tco.model_fields if n not in ("utilisation", "margin")] if "owned" in answer.rent_sources else []


def _within(scenario, answer, name, value):
    """A CostError where no scenario or chip may have this value of an input: a draw must not leave what is allowed."""
    if name in _owned(answer):
        scenario.owned(answer.chip, **{name: value})
    elif name not in RANGE:
        parse(type(scenario), {name: value}, "uncertain")
    elif not RANGE[name][0] <= value <= RANGE[name][1]:
        raise wrong(f"uncertain: {name}", value, "{:g} to {:g}".format(*RANGE[name]))


def inputs_of(scenario, answer):
    """name -> uncertainty.Input of the scenario's ranges; a CostError for a name that is no input."""
    from kernomics.cost import uncertainty

    _one_chip(answer)
    floats = [n for n, f in type(scenario).model_fields.items() if f.annotation is float and n not in ("speed", "first")]
    allowed = [*WHOLE, *floats, *(n for n, f in answer.chip.figures.items() if f.value is not None), *_owned(answer)]
    found = {}
    for name, text in scenario.uncertain.items():
        if name not in allowed:
            raise wrong("uncertain: input", name, ", ".join(allowed))
        found[name] = uncertainty.parse(text, name)
        for end in filter(isfinite, (found[name].quantile(0), found[name].quantile(1))):
            _within(scenario, answer, name, round(end) if name in WHOLE else end)
    if answer.dollars_per_hour is None:
        raise CostError(f"{answer.chip.key}: $/h is unknown; give it with --dollars-per-hour {answer.chip.key}=...")
    return found


@dataclass(frozen=True)
class Node:
    """A part of a whole: seconds of a step, dollars of a million tokens, and what they are made of."""

    name: str
    seconds: float
    dollars: float | None
    mark: str = ""
    source: str = ""
    note: str = ""
    children: tuple = ()


def explain(answer):
    """The answer as a tree: request -> phase -> layer -> operator, in chip-seconds and $ of a million requests' tokens."""
    s, w = answer.service, answer.service.workload
    fill, decode = (f" on {c.key}" if answer.chip.mixed else "" for c in answer.chip.pools)
    phases = ((f"prefill{fill}, {s.prefill.plan.text()}, {s.prefill.step.tokens:g} tokens a step", s.prefill, s.prefill_seconds,
               answer.dollars_in, w.fresh),
              (f"decode{decode}, {s.decode.plan.text()}, {s.decode.b} sequences a group", s.decode, s.decode_seconds,
               answer.dollars_out, w.tokens_out))
    nodes = []
    for name, point, seconds, dollars, tokens in phases:
        total, waits = sum(p.total for p in point.step.parts), s.waits if point is s.prefill else 0.0
        stall = s.stalls[point is s.decode]
        worked, each, layers = seconds - waits - stall, dollars and dollars / seconds, {}
        idle = worked * (1 - (point.plan.filled if point is s.prefill else point.plan.busy))
        for p in point.step.parts:
            layers.setdefault(p.layer, []).append(p)
        children = []
        for layer, parts in layers.items():
            scale = (worked - idle) / total  # of a step's seconds to chip-seconds of a request
            leaves = [Node(p.name, p.total * scale, each and each * p.total * scale, p.mark, p.source,
                           f"{p.count:g} x {p.seconds * 1e6:.1f} us") for p in parts]
            children.append(Node(layer, sum(x.seconds for x in leaves),
                                 None if dollars is None else sum(x.dollars for x in leaves), children=tuple(leaves)))
        if idle:
            children.append(Node(f"bubbles of {point.plan.pp} stages", idle, each and each * idle, BOUND,
                                 "microbatches of a wave" if point is s.prefill else "batches that fit, fewer than stages"))
        if waits:
            children.append(Node(f"waits for {w.tier.name}", waits, each and each * waits))
        if s.move and (point is s.prefill or stall):
            note = f"{s.move.bytes / 1e6:,.0f} MB a request in {1e3 * s.move.seconds:.1f} ms" if point is s.prefill else ""
            children.append(Node("KV cache to the decode pool" if point is s.prefill else "waits for the KV cache", stall,
                                 each and each * stall, BOUND, s.move.source, note))
        hidden = total - (point.seconds - point.plan.step_overhead)
        note = f"step {point.seconds * 1e3:.2f} ms" + (f", {hidden * 1e3:.2f} ms more hidden by overlap" if hidden > 1e-9 else "")
        nodes.append(Node(name, seconds, dollars, point.mark, note=f"{note}; {tokens:,} tokens a request",
                          children=tuple(sorted(children, key=lambda n: -n.seconds))))
    return Node(f"{answer.chip.key}: a request of {w.tokens_in:,} + {w.tokens_out:,} tokens", s.chip_seconds, answer.dollars,
                s.mark, children=tuple(nodes))
