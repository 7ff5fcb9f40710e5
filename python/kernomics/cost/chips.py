"""Chips: the figures of chips.toml, checked, and chips built from bench records."""

import datetime
import sys
from dataclasses import dataclass
from importlib import resources

from kernomics.cost import CostError, Unknown, wrong

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STATUS = ("vendor", "measured", "estimate", "unknown")
FIGURES = ("flops_bf16", "flops_fp8", "bytes_per_s", "memory_bytes", "dollars_per_hour")
FP8_OVER_BF16 = 2.05  # a dense FP8 peak is twice the bf16 peak; 4x is a sparse one


@dataclass(frozen=True)
class Figure:
    value: float | None  # None: unknown
    status: str
    source: str
    date: datetime.date
    note: str = ""
    dense: bool | None = None


@dataclass(frozen=True)
class Chip:
    key: str
    name: str
    figures: dict  # figure name -> Figure

    def get(self, figure):
        """The figure's value in SI units; None where it is unknown."""
        found = self.figures.get(figure)
        return found.value if found else None

    def need(self, figure):
        """The figure's value; raises Unknown rather than assume one."""
        value = self.get(figure)
        if value is None:
            raise Unknown(f"{self.key}: {figure} is unknown")
        return value


def check(key, table):
    """The Chip of one chips.toml table; a CostError says which figure is wrong and what is allowed."""
    figures = {}
    for name, entry in table.items():
        where = f"chips.toml: {key}.{name}"
        if name == "name":
            continue
        if name not in FIGURES:
            raise wrong(f"chips.toml: figure of {key}", name, ", ".join(FIGURES))
        extra = set(entry) - {"value", "status", "source", "date", "note", "dense"}
        if extra:
            raise wrong(f"{where}: field", sorted(extra)[0], "value, status, source, date, note, dense")
        if entry.get("status") not in STATUS:
            raise wrong(f"{where}.status", entry.get("status"), ", ".join(STATUS))
        if not isinstance(entry.get("source"), str) or not entry["source"].strip():
            raise wrong(f"{where}.source", entry.get("source"), "where the figure was read")
        if not isinstance(entry.get("date"), datetime.date):
            raise wrong(f"{where}.date", entry.get("date"), "the day it was read, as 2026-11-22")
        value, known = entry.get("value"), entry["status"] != "unknown"
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if known and not number:
            raise wrong(f"{where}.value", value, 'a positive number, or status = "unknown" without one')
        if not known and value is not None:
            raise wrong(f"{where}.value", value, 'no value while status = "unknown"')
        if name.startswith("flops_") and known and entry.get("dense") is not True:
            raise wrong(f"{where}.dense", entry.get("dense"), "true: sparse peaks are refused")
        figures[name] = Figure(value, **{k: v for k, v in entry.items() if k != "value"})
    missing = [f for f in FIGURES if f not in figures]
    if missing:
        raise wrong(f"chips.toml: {key}.{missing[0]}", None, 'a table; status = "unknown" where nobody has sourced it')
    fp8, bf16 = figures["flops_fp8"], figures["flops_bf16"]
    if fp8.value and bf16.value and fp8.value > FP8_OVER_BF16 * bf16.value and not fp8.note:
        raise wrong(f"chips.toml: {key}.flops_fp8.value", fp8.value,
                    f"at most {FP8_OVER_BF16} x flops_bf16 = {FP8_OVER_BF16 * bf16.value:g} (is it sparse?), or a note")
    return Chip(key, table.get("name", key), figures)


def load(text=None):
    """key -> Chip of chips.toml (or of ``text``)."""
    if text is None:
        text = resources.files("kernomics.cost").joinpath("chips.toml").read_text(encoding="utf-8")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CostError(f"chips.toml: {error}") from None
    return {key: check(key, table) for key, table in tables.items()}


def from_records(key, ceilings, date):
    """The Chip of a machine known only by what the bench measured on it.

    bf16 and e4m3 are exact in float32, so where a machine has no ceiling of its own for them the float32 FMA peak
    bounds the work.
    """
    source = f"ceilings in the bench records of {key}"

    def figure(value, note=""):
        return Figure(value, "unknown" if value is None else "measured", source, date, note)

    f32, figures = ceilings.get("flops_f32"), {}
    for dtype in ("bf16", "fp8"):
        own = ceilings.get(f"flops_{dtype}")
        figures[f"flops_{dtype}"] = figure(own or f32, "" if own else "the float32 FMA peak")
    figures["bytes_per_s"] = figure(ceilings.get("bytes_read"))
    figures["memory_bytes"] = figure(ceilings.get("memory_bytes"))
    figures["dollars_per_hour"] = figure(None)
    return Chip(key, key, figures)
