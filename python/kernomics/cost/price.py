"""Seconds of a step, row by row, on a chip; and from them tokens per second and dollars per million tokens."""

from dataclasses import dataclass, field

from kernomics.cost import Unknown, wrong
from kernomics.cost.economics import (
    allocated_mtoken,
    chips_needed,
    dollars_per_mtoken,
    roofline_seconds,
    shared_seconds,
    tokens_per_second,
)
from kernomics.cost.measured import BOUND, DERATED, MARKS, MEASURED, Measured, weakest

WHOLE = ("activation", "permutation")  # of our op moe_experts, which takes tokens in their own order


@dataclass(frozen=True)
class Timed:
    """Seconds of one call of a row on a chip, and how they are known; ``seconds`` None where a figure is unknown."""

    row: object
    seconds: float | None
    mark: str
    why: str = ""
    source: str = ""
    sigma: float | None = None  # relative, of an imported figure
    includes: tuple = ()  # parts of the row's layer that were measured with it

    @property
    def step_seconds(self):
        return None if self.seconds is None else self.row.count * self.seconds


def bound(row, chip):
    """Roofline seconds of one call; elementwise rows are bounded by their bytes alone."""
    work = row.work
    bandwidth = chip.need("bytes_per_s")
    if row.dtype is None:
        return work.bytes / bandwidth
    return roofline_seconds(work.flops, peak(chip, row.dtype), work.bytes, bandwidth)


def peak(chip, dtype):
    """FLOP/s of a dtype's products; fp4 weights on a chip without fp4 units are multiplied in fp8."""
    if dtype == "fp4" and chip.get("flops_fp4") is None:
        dtype = "fp8"
    return chip.need(f"flops_{dtype}")


class Sources:
    """Where seconds come from, best first: bench records, imported tables, the roofline.

    ``call_latency`` seconds a call and ``bandwidth_share`` of the memory bandwidth derate the roofline; 0 and 1 bound it.
    What is known from records and tables is multiplied by ``kernel_times``.
    """

    def __init__(self, measured=None, tables=(), call_latency=0.0, bandwidth_share=1.0, kernel_times=1.0):
        if not 0 <= call_latency < 1:
            raise wrong("call_latency", call_latency, "seconds, 0 to below 1")
        if not 0 < bandwidth_share <= 1:
            raise wrong("bandwidth_share", bandwidth_share, "above 0 to 1")
        if not 0 < kernel_times <= 100:
            raise wrong("kernel_times", kernel_times, "above 0 to 100")
        self.measured, self.tables, self._known = measured or Measured([]), tuple(tables), {}
        self.call_latency, self.bandwidth_share, self.kernel_times = call_latency, bandwidth_share, kernel_times

    def time(self, row, chip):
        _, known = self._known.setdefault(id(chip), (chip, {}))  # the chip is kept, so its id stays its own
        key = row.kind, row.units, row.op, row.dtype, row.work, tuple(row.dims.items()), tuple(row.lookup.items()), row.variants
        found = known.get(key)
        if found is None:
            found = known[key] = self._time(row, chip)
        seconds = found.seconds if found.mark in (BOUND, DERATED) else self.kernel_times * found.seconds
        return Timed(row, seconds, found.mark, found.why, found.source, found.sigma, found.includes)

    def _time(self, row, chip):
        found = self.measured.seconds(chip.key, row.op, row.dims) if row.op else None
        if found and found[1] == MEASURED:
            return Timed(row, *found, source="bench records", includes=WHOLE if row.kind == "moe" else ())
        try:
            limit, why = bound(row, chip), ""
        except Unknown as error:
            limit, why = None, str(error)
        if found:  # between two points, yet never faster than the roofline
            return Timed(row, max(found[0], limit or 0.0), found[1], source="bench records",
                         includes=WHOLE if row.kind == "moe" else ())
        imported = self.imported(row.kind, row.units, row.lookup, chip, row.variants)
        if imported:
            return Timed(row, max(imported.seconds, limit or 0.0), imported.mark, source=imported.source, sigma=imported.sigma,
                         includes=imported.includes)
        if limit is None or not self.call_latency and self.bandwidth_share == 1:
            return Timed(row, limit, BOUND, why, "" if why else "roofline")
        seconds = self.call_latency + max(limit, row.work.bytes / (self.bandwidth_share * chip.need("bytes_per_s")))
        return Timed(row, seconds, DERATED, "", f"roofline, {self.call_latency * 1e6:g} us a call, "
                                                f"{100 * self.bandwidth_share:g} % of bandwidth")

    def imported(self, kind, units, dims, chip, variants=()):
        """The best answer of the tables for the first variant they know, or None."""
        if not kind:
            return None
        for variant in (*variants, None):
            answers = [f for t in self.tables if (f := t.seconds(chip.key, kind, units, dims, variant))]
            if answers:
                return min(answers, key=lambda f: (MARKS.index(f.mark), f.sigma))
        return None


def time(row, chip, measured):
    """A row's seconds from the best source there is."""
    return (measured if isinstance(measured, Sources) else Sources(measured)).time(row, chip)


def times(rows, chip, measured):
    """[Timed] of a step's rows; a part of a layer that was measured with another row of it takes no time of its own."""
    timed = [time(row, chip, measured) for row in rows]
    within = {(t.row.layer, part): t for t in timed for part in t.includes}

    def once(t):
        whole = within.get((t.row.layer, t.row.part))
        return t if whole is None else Timed(t.row, 0.0, whole.mark, source=f"within {whole.row.name}: {whole.source}")

    return [once(t) for t in timed]


@dataclass(frozen=True)
class Price:
    """One step of a model on a chip: ``tokens`` tokens in ``seconds`` on ``chips`` chips."""

    chip: object
    timed: list
    tokens: int
    users: int
    chips: int | None  # the fewest that hold weights and KV cache; None: memory unknown, priced as if one held it
    dollars_per_hour: float | None

    def layer_seconds(self, *layers):
        """Seconds of one layer made of these kinds of rows, on one chip; None where a figure is unknown."""
        return _sum([t.seconds for t in self.timed if t.row.layer in layers])

    @property
    def chip_seconds(self):
        """Seconds of the step's work on one chip."""
        return _sum([t.step_seconds for t in self.timed])

    @property
    def seconds(self):
        """Seconds of the step on all the chips it needs, sharing the work perfectly."""
        return None if self.chip_seconds is None else shared_seconds(self.chip_seconds, self.chips or 1)

    @property
    def mark(self):
        """Of the step: a bound if any row is one, or if chips share the work without communication."""
        return weakest([t.mark for t in self.timed] + ([BOUND] if (self.chips or 1) > 1 else []))

    @property
    def share(self):
        """Part of the step's seconds by mark."""
        if not self.chip_seconds:
            return {}
        return {mark: sum(t.step_seconds for t in self.timed if t.mark == mark) / self.chip_seconds
                for mark in MARKS}

    @property
    def tokens_per_s_per_chip(self):
        return None if self.chip_seconds is None else tokens_per_second(self.tokens, self.chip_seconds)

    @property
    def tokens_per_s_per_user(self):
        return None if self.seconds is None else tokens_per_second(self.tokens / self.users, self.seconds)

    @property
    def dollars_per_mtoken(self):
        if self.dollars_per_hour is None or self.tokens_per_s_per_chip is None:
            return None
        return dollars_per_mtoken(self.dollars_per_hour, self.tokens_per_s_per_chip)

    @property
    def unknown(self):
        """What stands in the way of a time, each reason once."""
        return list(dict.fromkeys(t.why for t in self.timed if t.why))


def price(rows, chip, measured, *, tokens, users, memory, dollars_per_hour=None):
    """The Price of a step: its rows, the tokens it makes, the users it serves and the bytes it must hold."""
    room = chip.get("memory_bytes")
    dollars = chip.get("dollars_per_hour") if dollars_per_hour is None else dollars_per_hour
    return Price(chip, times(rows, chip, measured), tokens, users,
                 chips_needed(memory, room) if room else None, dollars)


@dataclass(frozen=True)
class Request:
    """A request at the speeds of two steps, prefill and decode each on chips of its own: what each kind of token costs."""

    prefill: Price
    decode: Price
    tokens: dict  # {in, cached, out: tokens of a request}
    allocation: str = "pool"
    sold: dict = field(default_factory=dict)  # {kind: $/Mtoken}, of the allocation by price

    @property
    def seconds(self):
        """{kind: chip-seconds}; cached tokens take none. None where a figure is unknown."""
        speeds = self.prefill.tokens_per_s_per_chip, self.decode.tokens_per_s_per_chip
        if None in speeds:
            return None
        return {"in": self.tokens["in"] / speeds[0], "cached": 0.0, "out": self.tokens["out"] / speeds[1]}

    @property
    def dollars(self):
        """$ = chip*s / (3600 s/h) * $/(chip*h); None where a figure is unknown."""
        rent = self.decode.dollars_per_hour
        return None if rent is None or self.seconds is None else sum(self.seconds.values()) / 3600 * rent

    @property
    def mtoken(self):
        """{kind: $/Mtoken} of the tokens in (prefilled), cached and out, as allocated; empty where $ are unknown."""
        if self.dollars is None:
            return {}
        pools = {kind: (seconds, self.decode.dollars_per_hour) for kind, seconds in self.seconds.items()}
        return allocated_mtoken(self.allocation, self.dollars, self.tokens, self.seconds, pools, self.sold)

    @property
    def blended(self):
        """$/Mtoken of all tokens, cached ones included: the same under any allocation."""
        return self.dollars and self.dollars / sum(self.tokens.values()) * 1e6


def _sum(values):
    return None if None in values else sum(values)
