"""Chips side by side on one workload, the trade of one chip, and where each microsecond and cent goes."""

from dataclasses import dataclass, replace
from math import exp, fsum, log

from kernomics.cost import CostError, serving, wrong
from kernomics.cost.economics import dollars_per_mtoken
from kernomics.cost.measured import MARKS


@dataclass(frozen=True)
class Answer:
    """A chip's cheapest service of a scenario, and its price; ``why`` says what stands in the way of one."""

    chip: object
    service: serving.Service | None
    dollars_per_hour: float | None
    utilisation: float = 1.0
    why: str = ""

    def _dollars(self, chip_seconds, tokens):
        if self.dollars_per_hour is None or self.service is None or not tokens:
            return None
        return dollars_per_mtoken(self.dollars_per_hour / self.utilisation, tokens / chip_seconds)

    @property
    def dollars_in(self):
        """$/Mtoken of prompt tokens that are computed: the prefill pool's chip time over them."""
        return self._dollars(self.service and self.service.prefill_seconds, self.service and self.service.workload.fresh)

    @property
    def dollars_out(self):
        """$/Mtoken of answer tokens: the decode pool's chip time over them."""
        return self._dollars(self.service and self.service.decode_seconds, self.service and self.service.workload.tokens_out)

    @property
    def dollars(self):
        """$/Mtoken of all tokens of a request, cached ones included: both pools."""
        w = self.service and self.service.workload
        return self._dollars(self.service and self.service.chip_seconds, w and w.tokens_in + w.tokens_out)

    @property
    def joules_out(self):
        """J per answer token: all-in power (thermal design power where that is unknown) times decode chip time."""
        return self.service and self._watts and self._watts * self.service.decode.chip_seconds_per_token

    @property
    def tokens_per_s_per_mw(self):
        """Answer tokens per second and megawatt of both pools."""
        s = self.service
        return s and self._watts and s.workload.tokens_out / s.chip_seconds / (self._watts / 1e6)

    @property
    def _watts(self):
        return self.chip.get("all_in_watts") or self.chip.get("tdp_watts")

    @property
    def share(self):
        """Part of a request's chip time by mark."""
        s = self.service
        parts = (s.prefill.step.share, s.prefill_seconds), (s.decode.step.share, s.decode_seconds)
        return {m: sum(share[m] * w for share, w in parts) / s.chip_seconds for m in MARKS}


def compare(scenario, sources, chips, each=None):
    """[Answer] of every chip, cheapest first, then those without a price, then those without an answer."""
    model, answers = scenario.load_model(), []
    for chip in chips:
        if each:
            each(chip)
        dollars = scenario.dollars(chip)
        try:
            service = serving.serve(model, chip, sources, scenario.workload(), chips=scenario.chips, base=scenario.plan(),
                                    disaggregated=scenario.disaggregated)
            answers.append(Answer(chip, service, dollars, scenario.utilisation))
        except CostError as error:
            answers.append(Answer(chip, None, dollars, scenario.utilisation, str(error)))
    return sorted(answers, key=lambda a: (a.service is None, a.dollars is None, a.dollars or 0.0))


def pareto(scenario, sources, chip):
    """The front of decode points of a chip at the workload's mean context, fastest user first."""
    points = serving.decode_points(scenario.load_model(), chip, sources, scenario.workload().mean_context, chips=scenario.chips,
                                   base=scenario.plan())
    return serving.front(points)


def held(scenario, sources, answer):
    """f(**inputs) -> $/Mtok of all tokens, with the answer's plans kept and inputs changed.

    An input is a field of the scenario, ``dollars_per_hour``, or a figure of the chip.
    """
    s, model, w = answer.service, answer.service.model, answer.service.workload

    def price(**inputs):
        figures = {n: v for n, v in inputs.items() if n in answer.chip.figures and n != "dollars_per_hour"}
        chip = replace(answer.chip, figures=answer.chip.figures | {n: replace(answer.chip.figures[n], value=v)
                                                                   for n, v in figures.items()})
        fields = {n: v for n, v in inputs.items() if n not in answer.chip.figures}
        asked = scenario.model_copy(update=fields)
        plan = {n: getattr(asked, n) for n in PLAN}
        calls = type(sources)(sources.measured, sources.tables, asked.call_latency, asked.bandwidth_share)
        decode = serving.decode_point(model, chip, calls, replace(s.decode.plan, **plan), s.decode.b, w.mean_context)
        fresh = max(1, round(w.tokens_in * (1 - asked.hit)))
        fill = serving.prefill_point(model, chip, calls, replace(s.prefill.plan, **{**plan, "drafts": 0}),
                                     int(s.prefill.step.tokens), fresh, w.tokens_in - fresh)
        seconds = fresh * fill.chip_seconds_per_token + w.tokens_out * decode.chip_seconds_per_token
        dollars = inputs.get("dollars_per_hour", answer.dollars_per_hour)
        return dollars_per_mtoken(dollars / asked.utilisation, (w.tokens_in + w.tokens_out) / seconds)

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


PLAN = ("acceptance", "imbalance", "comm_share", "overlap", "alpha", "step_overhead", "memory_share", "drafts")


def inputs_of(scenario, answer):
    """name -> uncertainty.Input of the scenario's ranges; a CostError for a name that is no input."""
    from kernomics.cost import uncertainty

    floats = [n for n, f in type(scenario).model_fields.items() if f.annotation is float and n not in ("speed", "first")]
    allowed = [*floats, *(n for n, f in answer.chip.figures.items() if f.value is not None)]
    found = {}
    for name, text in scenario.uncertain.items():
        if name not in allowed:
            raise wrong("uncertain: input", name, ", ".join(allowed))
        found[name] = uncertainty.parse(text, name)
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
    phases = ((f"prefill, {s.prefill.plan.text()}, {s.prefill.step.tokens:g} tokens a step", s.prefill, s.prefill_seconds,
               answer.dollars_in, w.fresh),
              (f"decode, {s.decode.plan.text()}, {s.decode.b} sequences a group", s.decode, s.decode_seconds, answer.dollars_out,
               w.tokens_out))
    nodes = []
    for name, point, seconds, dollars, tokens in phases:
        total = sum(p.total for p in point.step.parts)
        layers = {}
        for p in point.step.parts:
            layers.setdefault(p.layer, []).append(p)
        children = []
        for layer, parts in layers.items():
            scale = seconds / total  # of a step's seconds to chip-seconds of a request
            leaves = [Node(p.name, p.total * scale, None if dollars is None else dollars * p.total / total, p.mark, p.source,
                           f"{p.count:g} x {p.seconds * 1e6:.1f} us") for p in parts]
            children.append(Node(layer, sum(x.seconds for x in leaves),
                                 None if dollars is None else sum(x.dollars for x in leaves), children=tuple(leaves)))
        hidden = total - (point.seconds - point.plan.step_overhead)
        note = f"step {point.seconds * 1e3:.2f} ms" + (f", {hidden * 1e3:.2f} ms more hidden by overlap" if hidden > 1e-9 else "")
        nodes.append(Node(name, seconds, dollars, point.mark, note=f"{note}; {tokens:,} tokens a request",
                          children=tuple(sorted(children, key=lambda n: -n.seconds))))
    return Node(f"{answer.chip.key}: a request of {w.tokens_in:,} + {w.tokens_out:,} tokens", s.chip_seconds, answer.dollars,
                s.mark, children=tuple(nodes))
