"""Bench records as a source of seconds: exact, interpolated between two points that bracket, or nothing."""

import json
from math import exp, log
from pathlib import Path

from kernomics import chip
from kernomics.contract import OPS
from kernomics.cost import CostError, wrong
from kernomics.cost.economics import expected_active

MEASURED, INTERPOLATED, IMPORTED, TRANSFERRED = "measured", "interpolated", "imported", "transferred"
DERATED, BOUND = "derated", "bound"  # a roofline with a named latency or share of bandwidth; a roofline
MARKS = (MEASURED, INTERPOLATED, IMPORTED, TRANSFERRED, DERATED, BOUND)  # best first
VARYING = ("m", "t", "s", "b")  # a row may differ from the two records around it in one of these
IGNORED = {  # what does not change a call's work
    "mla_append_kv": {"p", "page"},
    "mla_decode": {"p", "n"},
    "mla_decode_sparse": {"p"},
    "moe_experts": {"e"},  # only the experts in use are read
    "moe_experts_bf16": {"e"},
}
SCALES = {"softmax_scale", "eps", "scaling", "floor", "rate"}  # values of scalars that change no time
EXPERTS = ("moe_experts", "moe_experts_bf16")


def weakest(marks):
    """The mark of a sum: that of its least certain part."""
    return max(marks, key=MARKS.index, default=MEASURED)


def read(path=None):
    """The records of a .jsonl file or a folder of them; without a path those of the package."""
    path = Path(path) if path is not None else chip.results()
    if path is None:
        return []
    if not path.exists():
        raise wrong("records", str(path), "a .jsonl file or a folder of them")
    records = []
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    records.append(_checked(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise CostError(f"{file.name} line {number}: {error}") from None
    return records


def _checked(record):
    fields = (("op", str, "an op's name"), ("chip", str, "a chip's key"), ("dims", dict, "an object"),
              ("seconds_median", (int, float), "seconds over 0"))
    for name, kind, allowed in fields:
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool) or name == "seconds_median" and not value > 0:
            raise wrong(name, value, allowed)
    return record


def call_of(op, dims, scalars=(), dtypes=()):
    """Everything about a call that can change its time, defaults filled in, as a dict."""
    call, skip = {}, IGNORED.get(op, set()) | SCALES
    if op in OPS:
        tensors = OPS[op].tensors
        call = {s.name: s.default for s in OPS[op].scalars if not s.required}
        call.update({t: spec.pick()[0] for t, spec in tensors.items() if not spec.optional})
        dtypes = {t: dtype for t, dtype in dict(dtypes).items() if t in tensors}
        skip = skip | set(OPS[op].keyword_dims)  # they follow from a scalar
    call.update(dtypes)
    call.update(scalars)
    call.update(dims)
    if op == "mla_prefill" and {"t", "s"} <= set(call):
        call["s"] -= call["t"]  # keys before the chunk: whole prompts of any length differ in t alone
    if op in EXPERTS and {"t", "e", "top_k"} <= set(call):
        call.setdefault("active", min(call["e"], call["t"] * call["top_k"]))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in call.items() if k not in skip}


class Measured:
    """Seconds of calls by chip, from bench records.

    Cold records (operands not in cache, as a layer's weights are) win over warm ones, then the fastest kernel.
    """

    def __init__(self, records):
        self.records = records
        self.best = {}  # (chip, op) -> {call as sorted items: (warm, seconds)}
        for r in records:
            call = call_of(r["op"], r["dims"], r.get("scalars") or {}, r.get("dtypes") or {})
            table = self.best.setdefault((r["chip"], r["op"]), {})
            found = (r.get("cache_state") == "warm", r["seconds_median"])
            key = tuple(sorted(call.items(), key=lambda item: item[0]))
            table[key] = min(table.get(key, found), found)

    def of(self, chip):
        return [r for r in self.records if r["chip"] == chip]

    def ceilings(self, chip):
        """The highest of each ceiling that the chip's records hold."""
        best = {}
        for r in self.of(chip):
            for name, value in (r.get("ceilings") or {}).items():
                if isinstance(value, (int, float)):
                    best[name] = max(best.get(name, 0), value)
        return best

    def date(self, chip):
        return max((str(r.get("date") or "") for r in self.of(chip)), default="")

    def machine(self):
        """The key of the CPU measured last; of those measured that day, the one with the highest FMA peak."""
        keys = {r["chip"] for r in self.records if r["chip"].startswith("cpu-")}
        return max(keys, key=lambda k: (self.date(k)[:10], self.ceilings(k).get("flops_f32", 0), k), default=None)

    def seconds(self, chip, op, case):
        """(seconds, mark) of a call, or None where no record or pair of records gives it."""
        want = call_of(op, case)
        points = [(_differing(want, dict(key)), dict(key), s) for key, (_, s) in self.best.get((chip, op), {}).items()]
        exact = [s for differing, _, s in points if not differing]
        if exact:
            return min(exact), MEASURED
        for dim in [d for d in VARYING if want.get(d)]:
            line = sorted((call[dim], s) for differing, call, s in points if call.get(dim)
                          and (differing == {dim} or differing == {dim, "active"} and _uniform(call, case)))
            below = [p for p in line if p[0] < want[dim]]
            above = [p for p in line if p[0] > want[dim]]
            if below and above:
                return log_log(want[dim], below[-1], above[0]), INTERPOLATED
        return None


def _uniform(call, case):
    """Whether a record's experts in use are as many as its tokens would reach in the case's model."""
    return call["active"] == round(expected_active(call["t"], case["e"], case["top_k"]))


def _differing(want, call):
    """The names on which two calls disagree."""
    return {k for k in want.keys() | call.keys() if want.get(k) != call.get(k)}


def log_log(x, below, above):
    """s on the straight line through two (x, s) points in log-log coordinates."""
    (x0, s0), (x1, s1) = below, above
    return exp(log(s0) + (log(s1) - log(s0)) * (log(x) - log(x0)) / (log(x1) - log(x0)))
