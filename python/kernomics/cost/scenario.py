"""What to serve, on what, how and at what price: read from a TOML file, from options, or both."""

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from kernomics.cost import CostError, wrong
from kernomics.cost import chips as chip_files
from kernomics.cost.fields import Checked, parse
from kernomics.cost.measured import Measured, read
from kernomics.cost.model import Model
from kernomics.cost.price import Sources
from kernomics.cost.serving import MEMORY_SHARE, Plan, Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHIPS = ("h100", "h200", "b200", "mi300x", "trainium2")


class Scenario(Checked):
    """Fields of a scenario file; all have defaults."""

    model: str = "deepseek-v3"
    weights: Literal["fp8", "bf16"] | None = Field(None, description="of projections; default: as the checkpoint")
    experts: Literal["fp8", "bf16", "nvfp4"] | None = Field(None, description="of routed experts; default: as weights")
    chip: list[str] = Field(list(CHIPS), min_length=1)
    tokens_in: int = Field(4096, ge=1, description="prompt tokens of a request")
    tokens_out: int = Field(1024, ge=1, description="answer tokens of a request")
    hit: float = Field(0.0, ge=0, lt=1, description="share of the prompt found in the prefix cache")
    speed: float = Field(0.0, ge=0, description="tokens/s a user gets at least")
    first: float = Field(float("inf"), gt=0, description="seconds to the first token at most")
    disaggregated: bool = Field(True, description="prefill and decode on pools of their own")
    chips: int = Field(64, ge=1, le=4096, description="chips of an instance at most")
    cache: Literal["bf16", "fp8"] = Field("bf16", description="dtype of the KV cache")
    drafts: int = Field(0, ge=0, le=16, description="tokens drafted a step by the MTP module")
    acceptance: float = Field(0.85, ge=0, le=1, description="chance that a draft is right; 85 to 90 % in the V3 report")
    imbalance: float = Field(1.0, ge=1, description="busiest chip's expert load over the mean")
    micro_batches: Literal[1, 2] = Field(1, description="2: one half's communication beside the other's compute")
    comm_share: float = Field(0.0, ge=0, lt=1, description="share of the compute units lost to communication")
    overlap: float = Field(1.0, ge=0, le=1, description="share of the hideable communication that two batches hide")
    alpha: float = Field(0.0, ge=0, lt=1, description="seconds a message where no table knows")
    step_overhead: float = Field(0.0, ge=0, description="seconds a step of host and launch time")
    call_latency: float = Field(0.0, ge=0, lt=1, description="seconds a call that nobody measured takes beyond its roofline")
    bandwidth_share: float = Field(1.0, gt=0, le=1, description="of the memory bandwidth that such calls reach")
    memory_share: float = Field(MEMORY_SHARE, gt=0, le=1, description="of a chip's memory for weights and cache")
    dollars_per_hour: dict[str, float] = Field({}, description="$/h by chip; default: that of chips.toml")
    uncertain: dict[str, str | dict] = Field({}, description="ranges of inputs: lo..hi, lo..mode..hi, or a distribution")
    utilisation: float = Field(1.0, gt=0, le=1, description="share of the paid hours that serve")
    records: str | None = Field(None, description="bench records: a .jsonl file or a folder")
    tables: list[str] = Field([], description="imported tables: aic, infersim:<folder>, or a .csv or .parquet file")

    @field_validator("dollars_per_hour")
    @classmethod
    def _dollars(cls, value):
        bad = [k for k, v in value.items() if not 0 <= v < float("inf")]
        if bad:
            raise ValueError(f"$/h of at least 0, {bad[0]} has {value[bad[0]]}")
        return value

    def workload(self):
        return Workload(self.tokens_in, self.tokens_out, self.hit, self.speed, self.first)

    def plan(self):
        return Plan(cache=self.cache, drafts=self.drafts, acceptance=self.acceptance, imbalance=self.imbalance,
                    micro_batches=self.micro_batches, comm_share=self.comm_share, overlap=self.overlap, alpha=self.alpha,
                    step_overhead=self.step_overhead, memory_share=self.memory_share)

    def load_model(self):
        return Model.load(self.model, self.weights, self.experts)

    def load_chips(self, measured):
        """The chips named: of chips.toml, of a TOML file given by path, or of the bench records."""
        known = {key: chip_files.from_records(key, measured.ceilings(key), measured.date(key))
                 for key in {r["chip"] for r in measured.records}}
        names = dict.fromkeys(measured.machine() or name if name == "this" else name for name in self.chip)
        return [known[name] if name in known else chip_files.find(name, known) for name in names]

    def dollars(self, chip):
        """$/h of a chip, or None where nobody says."""
        return self.dollars_per_hour.get(chip.key, chip.get("dollars_per_hour"))

    def sources(self):
        """(Sources, the bench records behind them)."""
        measured = Measured(read(self.records))
        tables = [t for name in self.tables for t in open_tables(name, self.chip)]
        return Sources(measured, tables, self.call_latency, self.bandwidth_share), measured


def open_tables(name, chips):
    """Imported tables by name: ``aic`` (the installed aiconfigurator), ``infersim:<folder>``, a .csv or .parquet file."""
    if name == "aic" or name.startswith("aic:"):
        from kernomics.cost import aic

        framework = name.partition(":")[2] or None
        known = aic.chips()
        return [aic.load(chip, framework=framework) for chip in chips if chip in known or not known]
    if name.startswith("infersim:"):
        from kernomics.cost import infersim

        return [infersim.load(name.partition(":")[2], chip) for chip in chips]
    from kernomics.cost import tables

    return [tables.read(name)]


def from_options(scenario=None, dollars_per_hour=(), uncertain=(), **options):
    """As ``load``, with $/h as ``h200=2.5`` texts and ranges as ``bandwidth_share=0.7..0.9``."""
    dollars, ranges = {}, {}
    for entry in uncertain or ():
        name, sep, text = entry.partition("=")
        if not sep:
            raise wrong("uncertain", entry, "input=lo..hi or input=lo..mode..hi")
        ranges[name] = text
    for entry in dollars_per_hour or ():
        chip, sep, number = entry.rpartition("=")
        try:
            dollars[chip] = float(number)
        except ValueError:
            sep = ""
        if not sep:
            raise wrong("dollars-per-hour", entry, "chip=number, in $/h")
    return load(scenario, dollars_per_hour=dollars, uncertain=ranges, **options)


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
    if isinstance(fields.get("dollars_per_hour"), dict):
        fields["dollars_per_hour"] = {k: float(v) if type(v) is int else v for k, v in fields["dollars_per_hour"].items()}
    return parse(Scenario, fields, Path(path).name if path is not None else "scenario")
