"""Chips: the figures of chips.toml or of a user's own file, checked, and chips built from bench records."""

import datetime
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kernomics.cost import CostError, Unknown, wrong

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STATUS = ("vendor", "measured", "estimate", "unknown")
MEMORY = ("hbm", "dram", "sram")  # sram: the chip has no other memory
REQUIRED = ("flops_bf16", "flops_fp8", "bytes_per_s", "memory_bytes", "dollars_per_hour")
COUNTS = ("sm_count", "scale_up_domain", "year")
RANGE = {  # of a figure, in SI units: what lies outside is a slip of unit
    **dict.fromkeys(("flops_bf16", "flops_fp8", "flops_fp4", "flops_int8"), (1e10, 1e19)),
    **dict.fromkeys(("bytes_per_s", "sram_bytes_per_s"), (1e9, 1e17)),
    "memory_bytes": (1e7, 1e13), "sram_bytes": (1e5, 1e12), "sm_count": (1, 1e7),
    "scale_up_bytes_per_s": (1e8, 1e15), "scale_up_domain": (1, 1e6), "scale_out_bytes_per_s": (1e8, 1e15),
    "tdp_watts": (1, 1e5), "all_in_watts": (1, 1e5), "die_mm2": (1, 1e5), "year": (2010, 2040),
    "price_dollars": (1, 1e8), "cogs_dollars": (1, 1e8),
    **dict.fromkeys(("dollars_per_hour", "tco_owned_dollars_per_hour", "tco_neocloud_dollars_per_hour"), (1e-3, 1e4)),
}
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
    figures: dict  # figure name -> Figure; one that is absent is unknown
    memory: str = "hbm"
    mixed = False  # one chip for both pools

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

    @property
    def pools(self):
        """(the chip that prefills, the chip that decodes)"""
        return self, self


@dataclass(frozen=True)
class Pair:
    """Two chips for the pools of disaggregated serving: one prefills, the other decodes."""

    prefill: Chip
    decode: Chip
    mixed = True

    @property
    def key(self):
        return f"{self.prefill.key}+{self.decode.key}"

    @property
    def name(self):
        return f"{self.prefill.name} + {self.decode.name}"

    @property
    def pools(self):
        return self.prefill, self.decode


def check(key, table, file="chips.toml", sources=None, notes=None, default=None):
    """The Chip of one table; a CostError says which figure is wrong and what is allowed.

    ``sources`` {key: {text, date}} and ``notes`` {key: text} are what figures cite. With ``default`` {source, date} (a
    user's file) a figure may be a number alone, then an estimate, and any figure may be missing.
    """
    figures, memory, name = {}, table.get("memory", "hbm"), table.get("name", key)
    if memory not in MEMORY:
        raise wrong(f"{file}: {key}.memory", memory, ", ".join(MEMORY))
    if not isinstance(name, str):
        raise wrong(f"{file}: {key}.name", name, "a text")
    for field, entry in table.items():
        if field in ("name", "memory"):
            continue
        if field not in RANGE:
            raise wrong(f"{file}: figure of {key}", field, ", ".join(("name", "memory", *RANGE)))
        figures[field] = _figure(f"{file}: {key}.{field}", field, entry, sources or {}, notes or {}, default)
    if not figures:
        raise wrong(f"{file}: figures of {key}", None, ", ".join(RANGE))
    for field in REQUIRED:
        if field not in figures:
            if default is None:
                raise wrong(f"{file}: {key}.{field}", None, 'a table; status = "unknown" where nobody has sourced it')
            figures[field] = Figure(None, "unknown", **default)
    fp8, bf16 = figures["flops_fp8"], figures["flops_bf16"]
    if fp8.value and bf16.value and fp8.value > FP8_OVER_BF16 * bf16.value and not fp8.note:
        raise wrong(f"{file}: {key}.flops_fp8.value", fp8.value,
                    f"at most {FP8_OVER_BF16} x flops_bf16 = {FP8_OVER_BF16 * bf16.value:g} (is it sparse?), or a note")
    return Chip(key, name, figures, memory)


def _figure(where, name, entry, sources, notes, default):
    """The Figure of one entry, its source and note in full."""
    peak = name.startswith("flops_")
    if default is not None:
        entry = entry if isinstance(entry, dict) else {"value": entry}
        entry = {"status": "estimate", **default, **({"dense": True} if peak else {}), **entry}
    if not isinstance(entry, dict):
        raise wrong(where, entry, "a table of value, status, source, date, note, dense")
    extra = set(entry) - {"value", "status", "source", "date", "note", "dense"}
    if extra:
        raise wrong(f"{where}: field", sorted(extra)[0], "value, status, source, date, note, dense")
    value, status, source, date, note, dense = map(entry.get, ("value", "status", "source", "date", "note", "dense"))
    if isinstance(source, str) and source in sources:
        source, date = sources[source]["text"], sources[source]["date"]
    if status not in STATUS:
        raise wrong(f"{where}.status", status, ", ".join(STATUS))
    if not isinstance(source, str) or not source.strip():
        raise wrong(f"{where}.source", source, "where the figure was read, or a key of [sources]")
    if not isinstance(date, datetime.date):
        raise wrong(f"{where}.date", date, "the day it was read, as 2026-11-22, unless the source is a key of [sources]")
    if not isinstance(note, str | None):
        raise wrong(f"{where}.note", note, "a text")
    known, (low, high) = status != "unknown", RANGE[name]
    if known and not (isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high):
        raise wrong(f"{where}.value", value, f'{low:g} to {high:g} (SI units), or status = "unknown" without one')
    if known and name in COUNTS and value != int(value):
        raise wrong(f"{where}.value", value, "a whole number")
    if not known and value is not None:
        raise wrong(f"{where}.value", value, 'no value while status = "unknown"')
    if peak and known and dense is not True:
        raise wrong(f"{where}.dense", dense, "true: sparse peaks are refused")
    return Figure(value, status, source, date, notes.get(note, note) or "", dense)


def _parse(text, file):
    """(chip tables, sources, notes) of a file."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CostError(f"{file}: {error}") from None
    sources, notes = tables.pop("sources", {}), tables.pop("notes", {})
    for key, entry in sources.items():
        if not isinstance(entry, dict) or set(entry) != {"text", "date"}:
            raise wrong(f"{file}: sources.{key}", entry, "{ text = where, date = 2026-11-22 }")
    return tables, sources, notes


def load(text=None):
    """key -> Chip of chips.toml (or of ``text``)."""
    if text is None:
        text = resources.files("kernomics.cost").joinpath("chips.toml").read_text(encoding="utf-8")
    tables, sources, notes = _parse(text, "chips.toml")
    return {key: check(key, table, sources=sources, notes=notes) for key, table in tables.items()}


def read(path):
    """The Chip of a user's TOML file: figures at its top, numbers alone if need be; its key is the file's stem."""
    path = Path(path)
    try:
        text, written = path.read_text(encoding="utf-8"), path.stat().st_mtime
    except (OSError, UnicodeDecodeError) as error:
        raise wrong("chip", str(path), f"a key of chips.toml, or a TOML file that can be read ({error})") from None
    table, sources, notes = _parse(text, path.name)
    default = {"source": f"user's file {path.name}", "date": datetime.date.fromtimestamp(written)}
    return check(path.stem.lower(), table, path.name, sources, notes, default)


def find(name, extra=()):
    """The Chip of a key (of chips.toml or of ``extra``, {key: Chip}), or of a user's file by its path, *.toml."""
    known = {**load(), **dict(extra)}
    if name not in known and not name.endswith(".toml"):
        raise wrong("chip", name, f"{', '.join(sorted(known))}, or a TOML file of your own")
    return known[name] if name in known else read(name)


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
    return Chip(key, key, figures, "dram")
