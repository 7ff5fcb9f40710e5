"""What to serve, on what, how and at what price: read from a TOML file, from options, or both."""

import re
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from kernomics.cost import CostError, Unknown, tco, wrong
from kernomics.cost import chips as chip_files
from kernomics.cost.economics import day_shape
from kernomics.cost.fields import Checked, parse
from kernomics.cost.measured import Measured, read
from kernomics.cost.model import Model
from kernomics.cost.price import Sources
from kernomics.cost.serving import MEMORY_SHARE, Plan, Tier, Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TIER = ("tier", "tier_gb", "tier_gb_per_s", "tier_dollars_per_gb_month")
DAY6 = "day-6"
DAY6_NODES = 226.75, 278  # mean, peak, to 2025-02-28: DeepSeek, open-infra-index, day 6; hours are not given in numbers
LOAD = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?) ?([kM]?) ?(requests|tokens)/s")
CHIPS = ("h100", "h200", "b200", "mi300x", "trainium2")


ALLOCATED = {
    "time": "Cost allocated by time: each kind of token pays for the chip time it takes, cached ones for waits alone.",
    "price": "Cost allocated by price: each kind of token pays by what it sells for, so all earn one margin.",
    "pool": "Cost allocated by pool: tokens in pay for the chips that prefill, tokens out for those that decode, cached ones "
            "for the tier that keeps them, if any.",
}


class Scenario(Checked):
    """Fields of a scenario file; all have defaults."""

    model: str = "deepseek-v3"
    weights: Literal["fp8", "bf16"] | None = Field(None, description="of projections; default: as the checkpoint")
    experts: Literal["fp8", "bf16", "nvfp4"] | None = Field(None, description="of routed experts; default: as weights")
    chip: list[str] = Field(list(CHIPS), min_length=1)
    tokens_in: int = Field(4096, ge=1, description="prompt tokens of a request")
    tokens_out: int = Field(1024, ge=1, description="answer tokens of a request")
    hit: float = Field(0.0, ge=0, lt=1, description="share of the prompt found in the prefix cache")
    speed: float = Field(0.0, ge=0, le=1e9, description="tokens/s a user gets at least")
    first: float = Field(float("inf"), gt=0, description="seconds to the first token at most")
    tier: str | None = Field(None, description="memory that keeps the prefix cache beside the chips, as host or ssd")
    tier_gb: float | None = Field(None, gt=0, le=1e6, description="GB of it a chip")
    tier_gb_per_s: float | None = Field(None, gt=0, le=1e5, description="GB/s from it into a chip")
    tier_dollars_per_gb_month: float | None = Field(None, ge=0, le=1e3, description="$ of a GB and month of it")
    kv_gb_per_s: float | None = Field(None, gt=0, le=1e5, description="GB/s of a chip from the prefill to the decode pool; "
                                      "default: its scale-out link")
    disaggregated: bool = Field(True, description="prefill and decode on pools of their own")
    chips: int = Field(64, ge=1, le=4096, description="chips of an instance at most")
    pp: int = Field(1, ge=1, le=256, description="stages of layers; where SRAM is the only memory, those that are needed")
    wave: int = Field(0, ge=0, description="microbatches of prefill before the stages run empty; default: 4 a stage")
    cache: Literal["bf16", "fp8"] = Field("bf16", description="dtype of the KV cache")
    drafts: int = Field(0, ge=0, le=16, description="tokens drafted a step by the MTP module")
    acceptance: float = Field(0.85, ge=0, le=1, description="chance that a draft is right; 85 to 90 % in the V3 report")
    imbalance: float = Field(1.0, ge=1, le=1024, description="busiest chip's expert load over the mean")
    micro_batches: Literal[1, 2] = Field(1, description="2: one half's communication beside the other's compute")
    comm_share: float = Field(0.0, ge=0, lt=1, description="share of the compute units lost to communication")
    overlap: float = Field(1.0, ge=0, le=1, description="share of the hideable communication that two batches hide")
    alpha: float = Field(0.0, ge=0, lt=1, description="seconds a message where no table knows")
    step_overhead: float = Field(0.0, ge=0, le=3600, description="seconds a step of host and launch time")
    call_latency: float = Field(0.0, ge=0, lt=1, description="seconds a call that nobody measured takes beyond its roofline")
    bandwidth_share: float = Field(1.0, gt=0, le=1, description="of the memory bandwidth that such calls reach")
    kernel_times: float = Field(1.0, gt=0, le=100, description="factor on times of records and tables, which may be off")
    memory_share: float = Field(MEMORY_SHARE, gt=0, le=1, description="of a chip's memory for weights and cache")
    dollars_per_hour: dict[str, float] = Field({}, description="$/h by chip; default: that of chips.toml")
    tco: dict[str, float | dict[str, float]] = Field({}, description="fields of tco.Tco for every chip, tables of them for one: "
                                                     "$/h is what an available hour costs an owner")
    uncertain: dict[str, str | dict] = Field({}, description="ranges of inputs: lo..hi, lo..mode..hi, or a distribution")
    allocation: Literal["time", "price", "pool"] | None = Field(None, description="of cost: each kind of token pays by its chip "
                                                                "time, its price or its pool; default: pool, of one pool time")
    sold: dict[str, float] = Field({}, description="$/Mtoken that tokens in, cached and out sell for, of the allocation by price")
    load: str | None = Field(None, description="to size a fleet for: 20 requests/s, or 50k tokens/s of answers")
    day: str | list[float] | None = Field(None, description="the load's shape over a day: 24 numbers, one an hour, load their "
                                          "mean, or day-6, DeepSeek's")
    utilisation: float = Field(1.0, gt=0, le=1, description="share of the paid hours that serve")
    records: str | None = Field(None, description="bench records: a .jsonl file or a folder")
    tables: list[str] = Field([], description="imported tables: aic, infersim:<folder>, deepep, or a .csv or .parquet file")

    @field_validator("dollars_per_hour", "sold")
    @classmethod
    def _dollars(cls, value):
        bad = [k for k, v in value.items() if not 0 <= v < float("inf")]
        if bad:
            raise ValueError(f"$ of at least 0, {bad[0]} has {value[bad[0]]}")
        return value

    def check(self):
        """Self; a CostError where fields that are right each do not go together."""
        given = [n for n in TIER if getattr(self, n) is not None]
        if given and len(given) < len(TIER):
            missing = next(n for n in TIER if n not in given)
            raise wrong(missing, None, f"{Scenario.model_fields[missing].description}, as {given[0]} is given")
        kinds = [k for k, n in self.workload().tokens.items() if n]
        if self.allocation == "price" and set(self.sold) != set(kinds):
            raise wrong("sold", self.sold, f"$/Mtoken of {', '.join(kinds)}, as the allocation is by price")
        if self.sold and self.allocation != "price":
            raise wrong("allocation", self.allocation, "price, as prices of tokens are given with sold")
        if self.allocation == "pool" and not self.disaggregated:
            raise wrong("allocation", self.allocation, "time, price: aggregated serving has one pool")
        if self.kv_gb_per_s and not self.disaggregated:
            raise wrong("kv_gb_per_s", self.kv_gb_per_s, "none: aggregated serving has one pool")
        if self.profile and not self.load:
            raise wrong("load", self.load, "the mean of the day, as day is given")
        self.requests_per_s  # noqa: B018  checks the load
        return self

    @property
    def requests_per_s(self):
        """Of the load; None where none is asked for."""
        if self.load is None:
            return None
        found = LOAD.fullmatch(self.load)
        rate = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]] if found else 0.0
        if not 0 < rate < float("inf"):
            raise wrong("load", self.load, "above 0 requests/s, or tokens/s of answers, as 20 requests/s or 50k tokens/s")
        return rate / (self.tokens_out if found[3] == "tokens" else 1)

    @property
    def profile(self):
        """Load of each hour over the day's mean; empty where no day is asked for."""
        if self.day is None:
            return ()
        if self.day == DAY6:
            return tuple(day_shape(*DAY6_NODES))
        try:
            hours = [float(x) for x in (self.day.split(",") if isinstance(self.day, str) else self.day)]
        except ValueError:
            hours = []
        if len(hours) != 24 or min(hours) < 0 or not 0 < sum(hours) < float("inf"):
            raise wrong("day", self.day, f"24 numbers of at least 0, one above 0, or {DAY6}")
        return tuple(24 * x / sum(hours) for x in hours)

    @property
    def named_allocation(self):
        return self.allocation or ("pool" if self.disaggregated else "time")

    def workload(self):
        tier = self.tier and Tier(self.tier, self.tier_gb * 1e9, self.tier_gb_per_s * 1e9, self.tier_dollars_per_gb_month)
        link = self.kv_gb_per_s and self.kv_gb_per_s * 1e9
        return Workload(self.tokens_in, self.tokens_out, self.hit, self.speed, self.first, tier, link)

    def plan(self):
        return Plan(pp=self.pp, wave=self.wave, cache=self.cache, drafts=self.drafts, acceptance=self.acceptance,
                    imbalance=self.imbalance, micro_batches=self.micro_batches, comm_share=self.comm_share, overlap=self.overlap,
                    alpha=self.alpha, step_overhead=self.step_overhead, memory_share=self.memory_share)

    def setup(self):
        """What ``serving.serve`` takes beside the workload."""
        return {"chips": self.chips, "base": self.plan(), "disaggregated": self.disaggregated}

    def load_model(self):
        return Model.load(self.model, self.weights, self.experts)

    def load_chips(self, measured):
        """The chips named: of chips.toml, of a TOML file given by path, or of the bench records; a Pair of ``a+b``."""
        known = {key: chip_files.from_records(key, measured.ceilings(key), measured.date(key))
                 for key in {r["chip"] for r in measured.records} - set(chip_files.load())}

        def find(name):
            name = measured.machine() or name if name == "this" else name
            return known[name] if name in known else chip_files.find(name, known)

        found = [[find(name) for name in dict.fromkeys(_pools(entry))] for entry in dict.fromkeys(self.chip)]
        names = {"this", *known, *chip_files.load(), *(c.key for chips in found for c in chips)}
        for field, keys in (("dollars_per_hour", self.dollars_per_hour),
                            ("tco", [k for k, v in self.tco.items() if isinstance(v, dict)])):
            for key in keys:
                if key not in names:  # of a chip that is not asked for it may be
                    raise wrong(f"{field}: chip", key, ", ".join(sorted(names)))
        return [chips[0] if len(chips) == 1 else chip_files.Pair(*chips) for chips in found]

    def given(self, chip):
        """$/h of a chip by the scenario's own figures, ``this`` being a machine of the bench records; None without one."""
        this = self.dollars_per_hour.get("this") if chip.key.startswith("cpu-") else None
        return self.dollars_per_hour.get(chip.key, this)

    def rent(self, chip):
        """($/h of a chip, None where nobody says; where it comes from): given, owned (by the [tco] table), or rented."""
        if self.given(chip) is not None:
            return self.given(chip), "given"
        if self.tco:
            try:
                return tco.cost_per_available_hour(self.owned(chip)), "owned"
            except Unknown as error:
                return None, str(error)
        return chip.get("dollars_per_hour"), "rented"

    def hourly(self, chip):
        """$/h of a chip rented by the hour: as given, else the rental of chips.toml, whatever it costs an owner."""
        given = self.given(chip)
        return chip.get("dollars_per_hour") if given is None else given

    def dollars(self, chip):
        """$/h of a chip, or None where nobody says."""
        return self.rent(chip)[0]

    def owned(self, chip, **changed):
        """The Tco of a chip: the [tco] table, [tco.<chip>] before it, ``changed`` before both; the chip's own price and watts."""
        fields = {k: v for k, v in self.tco.items() if not isinstance(v, dict)} | self.tco.get(chip.key, {}) | changed
        for name in ("utilisation", "margin"):
            if name in fields:
                raise wrong(f"tco: {name}", fields[name], "none: the hours that serve are the scenario's utilisation, at cost")
        return tco.from_chip(chip, **fields)

    def sources(self):
        """(Sources, the bench records behind them)."""
        measured = Measured(read(self.records))
        chips = list(dict.fromkeys(name for entry in self.chip for name in _pools(entry)))
        tables = [t for name in self.tables for t in open_tables(name, chips)]
        return Sources(measured, tables, self.call_latency, self.bandwidth_share, self.kernel_times), measured


def _pools(entry):
    """The names in ``h200``, or in ``h100+h200``: prefill on the first, decode on the second."""
    names = entry.split("+") if not Path(entry).is_file() else [entry]
    if len(names) > 2 or not all(names):
        raise wrong("chip", entry, "a chip, or two as h100+h200: prefill on the first, decode on the second")
    return names


def open_tables(name, chips):
    """Imported tables by name: ``aic`` (the installed aiconfigurator), ``infersim:<folder>``, ``deepep``, a .csv or .parquet."""
    if name == "aic" or name.startswith("aic:"):
        from kernomics.cost import aic

        framework = name.partition(":")[2] or None
        known = aic.chips()
        return [aic.load(chip, framework=framework) for chip in chips if chip in known or not known]
    if name.startswith("infersim:"):
        from kernomics.cost import infersim

        folder = name.partition(":")[2]
        known, _ = infersim.chips(folder)
        return [infersim.load(folder, chip) for chip in chips if chip in known or not set(chips) & set(known)]
    if name == "deepep" or name.startswith("deepep:"):
        from kernomics.cost import deepep

        return [deepep.Exchange(name.partition(":")[2] or deepep.NEWEST)]
    from kernomics.cost import tables

    return [tables.read(name)]


def from_options(scenario=None, **options):
    """As ``load``, with dicts as texts: $/h as ``h200=2.5``, ranges as ``bandwidth_share=0.7..0.9``."""
    for name, (kind, allowed) in TEXTS.items():
        options[name] = _pairs(name.replace("_", "-"), options.get(name) or (), kind, allowed)
    return load(scenario, **options)


TEXTS = {  # dicts that options give entry by entry: what a value is, and its form
    "dollars_per_hour": (float, "chip=number, in $/h"),
    "tco": (float, "field=number, as server_dollars=25000"),
    "sold": (float, "in=number, cached=number or out=number, in $/Mtoken"),
    "uncertain": (str, "input=lo..hi or input=lo..mode..hi"),
}


def _pairs(option, entries, kind, allowed):
    """{name: value} of ``name=value`` texts."""
    found = {}
    for entry in entries:
        name, sep, text = entry.partition("=") if kind is str else entry.rpartition("=")
        try:
            if not sep:
                raise ValueError
            found[name] = kind(text)
        except ValueError:
            raise wrong(option, entry, allowed) from None
    return found


def load(path=None, **options):
    """The Scenario of a TOML file with ``options`` (those not None) in place of its fields."""
    fields = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise wrong("scenario", str(path), "the path of a TOML file")
        try:
            fields = tomllib.loads(file.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise CostError(f"{file.name}: {error}") from None
    given = {k: v for k, v in options.items() if v is not None and v != [] and v != {}}
    for name in set(fields) & set(given):
        if isinstance(fields[name], dict):
            given[name] = {**fields[name], **given[name]}
    fields = {**fields, **given}
    for name in [n for n, f in Scenario.model_fields.items() if f.annotation is float]:
        if type(fields.get(name)) is int:  # 50 is as good as 50.0
            fields[name] = float(fields[name])
    for name in ("dollars_per_hour", "sold"):
        if isinstance(fields.get(name), dict):
            fields[name] = {k: float(v) if type(v) is int else v for k, v in fields[name].items()}
    return parse(Scenario, fields, Path(path).name if path is not None else "scenario").check()
