"""Measured seconds of operators by chip: the schema, what a kind's dims mean, and answers with their uncertainty.

A table file (CSV or Parquet) has the columns

    chip     a key of chips.toml or any other lower-case name
    kind     one of KINDS
    dtype    one of BITS
    variant  optional: what else tells measurements apart (routing distribution, window, implementation)
    <dims>   the kind's dims, integers; columns of other kinds' dims stay empty
    seconds  or latency_ms: over 0
    source   where the measurement comes from
    date     when, as 2026-11-25

Between the points of one table an ``interpolate.Surface`` answers (imported). Where a chip has the kind but not the
dtype or shape class, another one's seconds are scaled by the work of both (transferred). Otherwise there is no answer.
"""

import csv
import datetime
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from kernomics.cost import CostError, wrong
from kernomics.cost.economics import expected_active
from kernomics.cost.interpolate import NOISE, UNJUDGED, Surface
from kernomics.cost.measured import IMPORTED, TRANSFERRED

BITS = {  # dtype -> bits of a weight (or cached value), of an activation
    "bf16": (16, 16), "fp16": (16, 16), "fp8": (8, 8), "fp8_block": (8, 8), "int8": (8, 8), "mxfp8": (8, 8),
    "nvfp4": (4, 4), "mxfp4": (4, 4), "int4": (4, 16), "int4_wo": (4, 16), "int8_wo": (8, 16), "w4afp8": (4, 8),
    "w4a16_mxfp4": (4, 16), "w4a8_mxfp4_mxfp8": (4, 8), "w4a8_mxfp4_fp8": (4, 8), "w4a16_nvfp4": (4, 16),
}
TILE = 128  # rows and columns of a GEMM's tile
PREFIX = tuple(2**i for i in range(6, 21))  # nodes along cached prefix tokens, which few tables vary


@dataclass(frozen=True)
class Kind:
    """An operator: its dims, those that only name a shape class, and its work per dtype."""

    dims: tuple
    work: object  # work(bits of a weight, bits of an activation, *dims) -> features of interpolate.Surface
    classes: tuple = ()  # dims that are never interpolated
    free: tuple = ()  # dims along which seconds may fall
    tuned: tuple = ()  # dims for whose values kernels are chosen one by one: may fall where measured
    prefer: tuple = (None,)  # variants in the order in which one is taken where none is asked for
    zero: tuple = ()  # dims that may be 0
    noise: float = NOISE  # of interpolate.Surface
    tiles: dict = field(default_factory=dict)  # dim -> size that kernels pad it to
    includes: tuple = ()  # parts of a model's layer measured with it, where a table says nothing else

    @cached_property
    def axes(self):
        return tuple(d for d in self.dims if d not in self.classes)


def _gemm(w, a, m, n, k):
    padded = np.ceil(m / TILE) * np.ceil(n / TILE) * TILE**2
    return 1, n * k * w / 8, m * k * a / 8 + 2 * m * n, 2 * m * n * k * a / 16, 2 * padded * k * a / 16


def _mla_decode(w, a, b, s, h):
    return 1, b * s * 576 * w / 8, b * h * (576 + 512) * 2, 2 * b * h * s * (576 + 512)


def _mla_prefill(w, a, b, t, prefix, h):
    return 1, b * h * (t + prefix) * 320 * 2, b * h * t * 320 * 2, 2 * b * h * t * (prefix + (t + 1) / 2) * 320


def _gqa_decode(w, a, b, s, h, kv_heads, head_dim):
    return 1, b * s * kv_heads * head_dim * 2 * w / 8, b * h * head_dim * 4, 4 * b * h * s * head_dim


def _gqa_prefill(w, a, b, t, prefix, h, kv_heads, head_dim):
    return (1, b * (t + prefix) * kv_heads * head_dim * 2 * w / 8, b * h * t * head_dim * 4,
            4 * b * h * t * (prefix + (t + 1) / 2) * head_dim * min(w, 16) / 16)


def _moe(w, a, t, d, n, e, top_k, tp, ep):
    active = expected_active(t, e, np.minimum(top_k, e)) / ep  # experts of the rank that some token reaches
    return 1, active * 3 * d * n / tp * w / 8, t * top_k / ep * (d + n / tp) * a / 8, 6 * t * top_k / ep * d * n / tp * a / 16


def _collective(w, a, bytes, ranks):
    return 1, np.log2(ranks), bytes * (1 - 1 / ranks)


def _exchange(w, a, t, d, top_k, e, ranks):
    reached = expected_active(top_k, ranks, 1)  # ranks that hold one of a token's experts
    return 1, np.log2(ranks), t * d * reached * w / 8, t * d * top_k * w / 8


COLLECTIVE = Kind(("bytes", "ranks"), _collective, prefer=("custom_graph", "custom", "custom_eager", "nccl", None))
EXCHANGE = Kind(("t", "d", "top_k", "e", "ranks"), _exchange, classes=("d", "top_k", "e"), prefer=("normal", "low_latency"))
KINDS = {
    "gemm": Kind(("m", "n", "k"), _gemm, noise=0.1, tiles={"m": 64}),  # [m, k] x [k, n]
    # Decode: one new token a sequence, s cached tokens with it. Prefill: b prompts of t new tokens, prefix cached before.
    # The dtype is the cache's.
    "mla_decode": Kind(("b", "s", "h"), _mla_decode, tuned=("h",)),
    "mla_prefill": Kind(("b", "t", "prefix", "h"), _mla_prefill, zero=("prefix",)),
    "gqa_decode": Kind(("b", "s", "h", "kv_heads", "head_dim"), _gqa_decode, classes=("kv_heads", "head_dim"),
                       tuned=("h",)),
    "gqa_prefill": Kind(("b", "t", "prefix", "h", "kv_heads", "head_dim"), _gqa_prefill, classes=("kv_heads", "head_dim"),
                        zero=("prefix",)),
    # Two grouped products with SwiGLU between on one of tp * ep ranks; t counts the tokens of all of them together.
    "moe": Kind(("t", "d", "n", "e", "top_k", "tp", "ep"), _moe, classes=("d", "n", "e", "top_k"), free=("tp", "ep"),
                prefer=("power_law_1.01", "balanced", "uniform", "balanced_prefill", "balanced_decode", None),
                includes=("activation",)),
    "all_reduce": COLLECTIVE,  # bytes of the buffer
    "all_gather": COLLECTIVE,  # bytes that a rank ends with
    "reduce_scatter": COLLECTIVE,  # bytes that a rank starts with
    "all_to_all": COLLECTIVE,  # bytes that a rank starts with
    "dispatch": EXCHANGE,  # t tokens a rank
    "combine": EXCHANGE,
}


@dataclass(frozen=True)
class Table:
    """Measurements of one kind on one chip with one dtype and variant."""

    chip: str
    kind: str
    dtype: str
    dims: dict  # name -> integers [rows]
    seconds: np.ndarray  # [rows]
    source: str
    date: str = ""
    variant: str | None = None
    note: str = ""
    includes: tuple | None = None  # parts measured with it (model.Row.part); None: its kind's

    def __post_init__(self):
        for name, value, allowed in (("kind", self.kind, KINDS), ("dtype", self.dtype, BITS)):
            if value not in allowed:
                raise wrong(f"{self.source}: {name}", value, ", ".join(allowed))
        missing = [d for d in KINDS[self.kind].dims if d not in self.dims]
        if missing:
            raise wrong(f"{self.source}: {self.kind}.{missing[0]}", None, "a column of integers")
        if self.includes is None:
            object.__setattr__(self, "includes", KINDS[self.kind].includes)

    @property
    def x(self):
        return np.stack([np.asarray(self.dims[d], dtype=np.int64) for d in KINDS[self.kind].dims], 1)  # [rows, dims]


@dataclass(frozen=True)
class Found:
    """Seconds of a call, how they are known, from where, and their relative 1-sigma error (0: measured)."""

    seconds: float
    mark: str
    source: str
    sigma: float
    note: str = ""
    includes: tuple = ()  # parts of a layer measured with it


class Shapes:
    """One table split into shape classes, each with a Surface built when first asked for."""

    def __init__(self, table):
        self.table, self.kind = table, KINDS[table.kind]
        self.axes = [self.kind.dims.index(d) for d in self.kind.axes]
        named = [self.kind.dims.index(d) for d in self.kind.classes]
        x = table.x
        self.rows = {}
        if named:
            keys, where = np.unique(x[:, named], axis=0, return_inverse=True)
            order = np.argsort(where.reshape(-1), kind="stable")
            parts = np.split(order, np.cumsum(np.bincount(where.reshape(-1)))[:-1])
            self.rows = {tuple(map(int, key)): part for key, part in zip(keys, parts)}
        else:
            self.rows[()] = np.arange(len(x))
        self._x, self._surfaces = x, {}

    def full(self, key, x):
        """Axis values [points, axes] with the class's dims filled in, [points, dims]."""
        x = np.asarray(x)
        values = dict(zip(self.kind.classes, key)) | dict(zip(self.kind.axes, x.T))
        return np.stack([np.broadcast_to(values[d], len(x)) for d in self.kind.dims], 1)

    def work(self, key, x, dtype=None):
        """Features of axis values x [points, axes] in a class, as ``dtype`` (default the table's)."""
        columns = self.full(key, x).astype(float).T
        parts = self.kind.work(*BITS[dtype or self.table.dtype], *columns)
        return np.stack(np.broadcast_arrays(*parts, columns[0])[:-1], 1)

    def surface(self, key):
        if key not in self._surfaces:
            axes, rows = self.kind.axes, self.rows[key]
            self._surfaces[key] = Surface(
                self._x[rows][:, self.axes], np.asarray(self.table.seconds)[rows], lambda x: self.work(key, x),
                free=[axes.index(d) for d in self.kind.free], tuned=[axes.index(d) for d in self.kind.tuned],
                noise=self.kind.noise, tiles={axes.index(d): size for d, size in self.kind.tiles.items()},
                continued={axes.index("prefix"): PREFIX} if "prefix" in axes else None)
        return self._surfaces[key]

    def scaled(self, key, x, donor, other):
        """Seconds at axis values x [points, axes] in class ``key``, by the work of class ``donor`` of ``other``."""
        surface = other.surface(donor)
        rates = surface.rates
        return surface.many(x) * (self.work(key, x, self.table.dtype) @ rates) / (other.work(donor, x) @ rates)


class Tables:
    """Tables of any number of chips, read when first asked for."""

    def __init__(self, tables=(), lazy=None):
        self._lazy = dict(lazy or {})  # (chip, kind) -> function returning Table objects
        self._shapes, self._choices, self._errors = {}, {}, {}
        for table in tables:
            self._add(table)

    def _add(self, table):
        variants = self._shapes.setdefault((table.chip, table.kind), {})
        variants.setdefault((table.dtype, table.variant), Shapes(table))

    def _of(self, chip, kind):
        """(dtype, variant) -> Shapes of a chip's kind."""
        if (chip, kind) in self._lazy:
            for table in list(self._lazy[chip, kind]()):
                self._add(table)
            del self._lazy[chip, kind]
        return self._shapes.get((chip, kind), {})

    def __add__(self, other):
        """Both; where they hold the same chip, kind, dtype and variant the left one answers."""
        both = Tables()
        both._lazy = {key: lambda key=key: [s.table for side in (self, other) for s in side._of(*key).values()]
                      for key in {*self.keys(), *other.keys()}}
        return both

    def keys(self):
        """The (chip, kind) pairs there are tables of."""
        return sorted({*self._shapes, *self._lazy})

    def chips(self):
        return sorted({chip for chip, _ in self.keys()})

    def describe(self):
        """One line a table: chip, kind, dtype, variant, points, source. Reads everything."""
        return [f"{chip} {kind} {dtype}{f' {variant}' if variant else ''}: {len(s.table.seconds)} points, {s.table.source}"
                for chip, kind in self.keys() for (dtype, variant), s in self._of(chip, kind).items()]

    def seconds(self, chip, kind, dtype, dims, variant=None):
        """The Found of a call, or None where the chip has nothing to say about it.

        ``dtype`` None takes the first there is, ``variant`` None the kind's preferred one.
        """
        spec, shapes, dtype, variant, own = self._chosen(chip, kind, dtype, variant)
        x, key = _asked(spec, kind, dims)
        if own and key in own.rows:
            return _at(own, key, x)
        found = []
        if own:
            found.append(self._from_class(own, key, x))
        others = [s for (d, v), s in shapes.items() if v == variant and d != dtype]
        found += [self._from_dtype(s, dtype, key, x, others + [own] * bool(own)) for s in others if key in s.rows]
        if not any(found):
            for s in others:
                near = self._from_class(s, key, x)
                if near:
                    found.append(self._from_dtype(s, dtype, key, x, others, near))
        return min((f for f in found if f), default=None, key=lambda f: f.sigma)

    def many(self, chip, kind, dtype, dims, variant=None):
        """Seconds of many calls, dims as arrays of one length; NaN where there is no answer."""
        spec, _, dtype, variant, own = self._chosen(chip, kind, dtype, variant)
        columns = [np.atleast_1d(np.asarray(dims[d], dtype=np.int64)) for d in spec.dims]
        x = np.stack(np.broadcast_arrays(*columns), 1)
        axes, named = ([spec.dims.index(d) for d in names] for names in (spec.axes, spec.classes))
        seconds = np.full(len(x), np.nan)
        keys, where = np.unique(x[:, named], axis=0, return_inverse=True)
        for i, key in enumerate(map(tuple, keys.tolist())):
            rows = np.flatnonzero(where.reshape(-1) == i)
            if own and key in own.rows:
                seconds[rows] = own.surface(key).many(x[rows][:, axes])
            else:
                for r in rows:
                    found = self.seconds(chip, kind, dtype, dict(zip(spec.dims, x[r].tolist())), variant)
                    seconds[r] = found.seconds if found else np.nan
        return seconds

    def _chosen(self, chip, kind, dtype, variant):
        """(kind's spec, its tables, dtype, variant, the table of both): what a call means where it leaves them open."""
        asked = (chip, kind, dtype, variant)
        if asked in self._choices:
            return self._choices[asked]
        if kind not in KINDS:
            raise wrong("kind", kind, ", ".join(KINDS))
        if dtype is not None and dtype not in BITS:
            raise wrong("dtype", dtype, ", ".join(BITS))
        spec, shapes = KINDS[kind], self._of(chip, kind)
        if variant is None and (dtype, None) not in shapes:
            there = [v for d, v in shapes if d == dtype] or [v for _, v in shapes]
            variant = min(there, default=None, key=lambda v: spec.prefer.index(v) if v in spec.prefer else len(spec.prefer))
        if dtype is None:
            dtype = min((d for d, v in shapes if v == variant), default=None, key=list(BITS).index)
        self._choices[asked] = spec, shapes, dtype, variant, shapes.get((dtype, variant))
        return self._choices[asked]

    def _from_class(self, shapes, key, x):
        """From the shape class of the same table nearest to ``key``."""
        donor = _nearest(shapes, key)
        point = shapes.surface(donor).seconds(x) if donor is not None else None
        if not point:
            return None
        if id(shapes) not in self._errors:
            self._errors[id(shapes)] = _class_error(shapes)
        rates = shapes.surface(donor).rates
        ratio = float((shapes.work(key, [x]) @ rates)[0] / (shapes.work(donor, [x]) @ rates)[0])
        sigma = float(np.hypot(self._errors[id(shapes)], point.sigma))
        like = ", ".join(f"{d} {v}" for d, v in zip(shapes.kind.classes, donor))
        return Found(point.seconds * ratio, TRANSFERRED, shapes.table.source, sigma, _note(
            f"seconds of {like}, scaled by work", shapes.table.note, _beyond(point)), shapes.table.includes)

    def _from_dtype(self, donor, dtype, key, x, others, near=None):
        """From another dtype's table of the same variant; ``near`` an answer already carried over to the class."""
        if near is None:
            point = donor.surface(key).seconds(x)
            if point is None:
                return None
            near = Found(point.seconds, IMPORTED, donor.table.source, point.sigma, _note(donor.table.note, _beyond(point)),
                         donor.table.includes)
            like = key
        else:
            like = _nearest(donor, key)
        rates = donor.surface(like).rates
        ratio = float((donor.work(key, [x], dtype) @ rates)[0] / (donor.work(key, [x]) @ rates)[0])
        known = (id(donor), dtype)
        if known not in self._errors:
            judged = [o for o in others if o is not donor]
            own = [o for o in judged if o.table.dtype == dtype]
            self._errors[known] = max((_dtype_error(donor, o) for o in own or judged), default=UNJUDGED)
        sigma = float(np.hypot(self._errors[known], near.sigma))
        return Found(near.seconds * ratio, TRANSFERRED, near.source, sigma,
                     _note(f"seconds of {donor.table.dtype}, scaled by work", near.note), near.includes)


def _asked(spec, kind, dims):
    """Axis values and class of a call's dims."""
    if dims.keys() != set(spec.dims):
        raise wrong(f"{kind} dims", ", ".join(dims), ", ".join(spec.dims))
    for d, value in dims.items():
        if isinstance(value, bool) or int(value) != value or value < (0 if d in spec.zero else 1):
            raise wrong(f"{kind}.{d}", value, f"an integer of at least {0 if d in spec.zero else 1}")
    return tuple(int(dims[d]) for d in spec.axes), tuple(int(dims[d]) for d in spec.classes)


def _at(shapes, key, x):
    point = shapes.surface(key).seconds(x)
    if point is None:
        return None
    mark = TRANSFERRED if point.outside > 0 else IMPORTED
    return Found(point.seconds, mark, shapes.table.source, point.sigma, _note(shapes.table.note, _beyond(point)),
                 shapes.table.includes)


def _beyond(point):
    return f"{point.outside:.1f} doublings outside the measurements, utilisation held" if point.outside > 0 else ""


def _note(*parts):
    return "; ".join(p for p in parts if p)


def _nearest(shapes, key):
    """The other class with the least sum of log ratios of its dims."""
    others = [k for k in shapes.rows if k != key]
    return min(others, default=None, key=lambda k: sum(abs(np.log(a / b)) for a, b in zip(k, key)))


def _sampled(shapes, key, count=64):
    """Some measured axis values of a class, and their seconds."""
    rows = shapes.rows[key]
    rows = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    return shapes._x[rows][:, shapes.axes], np.asarray(shapes.table.seconds)[rows]


def _quantile(errors):
    errors = np.concatenate(errors) if errors else np.array([])
    errors = errors[~np.isnan(errors)]
    return float(np.quantile(np.abs(errors), 0.6827)) if len(errors) else UNJUDGED


def _class_error(shapes, count=8):
    """Relative error of a class predicted from the nearest other one, over some of the classes."""
    errors = []
    for key in list(shapes.rows)[:: max(1, len(shapes.rows) // count)]:
        donor = _nearest(shapes, key)
        if donor is not None:
            x, seconds = _sampled(shapes, key)
            errors.append(np.log(shapes.scaled(key, x, donor, shapes) / seconds))
    return _quantile(errors)


def _dtype_error(donor, other, count=4):
    """Relative error of the other dtype's table predicted from the donor's, over some of the classes of both."""
    errors, both = [], [k for k in other.rows if k in donor.rows]
    for key in both[:: max(1, len(both) // count)]:
        x, seconds = _sampled(other, key)
        errors.append(np.log(other.scaled(key, x, key, donor) / seconds))
    return _quantile(errors)


# ---------------------------------------------------------------- files


def parquet():
    """pyarrow.parquet, or a CostError that says how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise CostError("Parquet tables need pyarrow: pip install 'kernomics[tables]'") from None
    return pyarrow.parquet


def read(path):
    """Tables of a CSV or Parquet file of this module's schema."""
    path = Path(path)
    if not path.is_file():
        raise wrong("table", str(path), "a .csv or .parquet file")
    arrow = parquet() if path.suffix == ".parquet" else None
    try:
        if arrow:
            frame = arrow.read_table(path)
            rows, names, unit, first = frame.to_pylist(), frame.column_names, "row", 1
        else:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                names, rows, unit, first = reader.fieldnames or [], list(reader), "line", 2
    except (OSError, ValueError, csv.Error) as error:  # ValueError: of pyarrow, and of text that is not UTF-8
        raise wrong("table", str(path), f"a .csv or .parquet file that can be read ({error})") from None
    time = next((t for t in ("seconds", "latency_ms") if t in names), None)
    for column in ("chip", "kind", "dtype", "source", "date", time or "seconds"):
        if column not in names:
            raise wrong(f"{path.name}: columns", ", ".join(map(str, names)),
                        "chip, kind, dtype, the dims, seconds or latency_ms, "
                        f"source and date; {column} is missing")
    groups = {}
    for number, row in enumerate(rows, first):
        key, dims, seconds = _checked(row, f"{path.name} {unit} {number}", time)
        groups.setdefault(key, []).append((dims, seconds))
    tables = []
    for (chip, kind, dtype, variant, source, date), found in groups.items():
        columns = {d: np.array([dims[i] for dims, _ in found]) for i, d in enumerate(KINDS[kind].dims)}
        tables.append(Table(chip, kind, dtype, columns, np.array([s for _, s in found]), source, date, variant))
    return Tables(_joined(tables))


def _joined(tables):
    """Tables of one chip, kind, dtype and variant from several sources as one."""
    same = {}
    for t in tables:
        same.setdefault((t.chip, t.kind, t.dtype, t.variant), []).append(t)
    for (chip, kind, dtype, variant), group in same.items():
        dims = {d: np.concatenate([t.dims[d] for t in group]) for d in KINDS[kind].dims}
        yield Table(chip, kind, dtype, dims, np.concatenate([t.seconds for t in group]),
                    "; ".join(dict.fromkeys(t.source for t in group)), max(t.date for t in group), variant)


def _checked(row, where, time):
    """((chip, kind, dtype, variant, source, date), dims, seconds) of a row."""
    text = {c: str(row.get(c) if row.get(c) is not None else "").strip() for c in
            ("chip", "kind", "dtype", "variant", "source", "date")}
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", text["chip"]):
        raise wrong(f"{where}: chip", text["chip"], "a key as in chips.toml, lower case")
    for column, allowed in (("kind", KINDS), ("dtype", BITS)):
        if text[column] not in allowed:
            raise wrong(f"{where}: {column}", text[column], ", ".join(allowed))
    if not text["source"]:
        raise wrong(f"{where}: source", text["source"], "where the measurement comes from")
    try:
        datetime.date.fromisoformat(text["date"][:10])
    except ValueError:
        raise wrong(f"{where}: date", text["date"], "a day, as 2026-11-25") from None
    spec = KINDS[text["kind"]]
    dims = tuple(_integer(row.get(d), f"{where}: {d}", 0 if d in spec.zero else 1) for d in spec.dims)
    try:
        seconds = float(row.get(time))
    except (TypeError, ValueError):
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise wrong(f"{where}: {time}", row.get(time), "a number over 0")
    return (text["chip"], text["kind"], text["dtype"], text["variant"] or None, text["source"], text["date"]), dims, (
        seconds / 1e3 if time == "latency_ms" else seconds)


def _integer(value, where, least):
    try:
        number = float(value)
        if number == int(number) >= least:
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise wrong(where, value, f"an integer of at least {least}")
