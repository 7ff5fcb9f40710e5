"""``kernomics price``: the inventory of a model, seconds per layer by op and chip, tokens/s and $/Mtoken."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernomics.cost import CostError, wrong
from kernomics.cost import chips as chip_files
from kernomics.cost.measured import BOUND, DERATED, IMPORTED, INTERPOLATED, MEASURED, TRANSFERRED, Measured, read, weakest
from kernomics.cost.model import NEGLECTED, PUBLISHED, Model
from kernomics.cost.price import Request, price
from kernomics.cost.scenario import ALLOCATED, from_options

DEFAULT_CHIPS = ("h200", "h100", "b200", "mi300x", "tpu-v5p", "trainium2")
PHASES = ("decode", "prefill")
THIS = "this"
SIGN = {MEASURED: ("●", "green"), INTERPOLATED: ("◐", "yellow"), IMPORTED: ("■", "cyan"), TRANSFERRED: ("□", "magenta"),
        DERATED: ("◌", "blue"), BOUND: ("○", "dim")}
WIDTH = 100


# ---------------------------------------------------------------- arguments


def choose_chips(names, measured):
    """The chips named (``this``: the machine measured last), by default this machine and the six known."""
    known, machine = chip_files.load(), measured.machine()
    for key in {r["chip"] for r in measured.records} - set(known):
        known[key] = chip_files.from_records(key, measured.ceilings(key), measured.date(key))
    if not names:
        names = ([machine] if machine else []) + list(DEFAULT_CHIPS)
    chosen = {}
    for name in names:
        key = machine if name == THIS and machine else name
        chip = known[key] if key in known else chip_files.find(key, known)
        chosen[chip.key] = chip
    return list(chosen.values())


def parse_dollars(entries, chips):
    """{chip key: $/h} from ``h200=2.5`` entries; a number alone is for every chip."""
    keys, machine, dollars = [c.key for c in chips], next((c.key for c in chips if c.key.startswith("cpu-")), None), {}
    for entry in entries or ():
        key, sep, number = entry.rpartition("=")
        key = machine if key == THIS and machine else key
        if sep and key not in keys:
            raise wrong("dollars-per-hour: chip", key, ", ".join(keys))
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise wrong("dollars-per-hour", entry, "a number, or chip=number, in $/h")
        dollars.update(dict.fromkeys([key] if sep else keys, value))
    return dollars


# ---------------------------------------------------------------- numbers for reading


def seconds_text(s):
    """1.23e-5 -> '12.3us'"""
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        if s >= 0.9995 * size or unit == "ns":
            return f"{_three(s / size)}{unit}"


def si(x, unit=""):
    """7.03e11 -> '703 G'"""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= 0.9995 * size:
            return f"{_three(x / size)} {prefix}{unit}"
    return f"{_three(x)} {unit}".rstrip()


def _three(x):
    """Three significant digits."""
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


def money(x):
    return "-" if x is None else f"{x:,.0f}" if x >= 999.5 else f"{_three(x)}" if x >= 0.0995 else f"{x:.3g}"


SHAPES = {
    "fp8_quantize": "{m}x{k}", "fp8_gemm": "{m}x{n}x{k}", "mla_append_kv": "{t} tok", "mla_decode": "{b} x {s} keys",
    "mla_decode_sparse": "{b} x {top_k} keys", "mla_index": "{t} x {s} keys", "mla_prefill": "{t} tok",
    "moe_route": "{t}x{e}", "moe_experts": "{active} of {e}", "moe_experts_bf16": "{active} of {e}",
    "swiglu_quantize": "{t}x{n}",
}


def _shape(row):
    if row.kind and row.kind.startswith("gqa"):
        return "{b} x {s} keys".format(**row.dims)
    return SHAPES[row.op].format(**row.dims) if row.op else "x".join(map(str, row.dims.values()))


def _title(chip):
    return "this CPU" if chip.key.startswith("cpu-") else chip.key


# ---------------------------------------------------------------- tables


def model_table(model, steps):
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    billions = "{:.2f} B".format
    published = PUBLISHED.get(model.name)
    table.add_row("parameters", billions(model.total_params / 1e9), f"published: {published}" if published else "")
    table.add_row("active per token", billions(model.active_params / 1e9), "with the input embedding")
    table.add_row("multiplied per token", billions(model.active_params_no_embedding / 1e9), "without it: a look-up")
    if model.mtp_params:
        table.add_row("MTP module", billions(model.mtp_params / 1e9), "beside the total, not priced")
    kinds = model.weights if model.experts == model.weights else f"{model.weights}, experts {model.experts}"
    table.add_row("weights", si(model.weight_bytes, "B"), f"projections {kinds}, the rest bf16")
    table.add_row("KV cache per token", f"{model.kv_bytes_per_token():,} B", f"{model.kv_bytes_per_token('fp8'):,} B in fp8")
    for step in steps:
        flops, size = (sum(r.count * getattr(r.work, f) for r in step.rows) for f in ("flops", "bytes"))
        words = f"{si(size, 'B')} to move: {_three(flops / size)} FLOP/B; {step.at}"
        table.add_row(f"{step.phase} step", si(flops, "FLOP"), words)
    return table


LAYERS = {"attention": "attention, each layer", "dense": "dense MLP", "moe": "MoE", "head": "output head"}


def layer_table(prices):
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("op", no_wrap=True)
    table.add_column("shape", style="dim", no_wrap=True)
    only = [marks.pop() if len(marks := {t.mark for t in p.timed}) == 1 else None for p in prices]
    for p, mark in zip(prices, only, strict=True):  # a mark that all of a column share stands in its head
        table.add_column(f"{_title(p.chip)}\n{mark or ''}", justify="right", no_wrap=True)

    def cell(seconds, mark, shared):
        if seconds is None:
            return Text("unknown", style="red")
        sign, style = SIGN[mark]
        return Text(seconds_text(seconds) if shared else f"{seconds_text(seconds)} {sign}", style=style)

    def total(label, seconds, layers):
        marks = [weakest([t.mark for t in p.timed if t.row.layer in layers]) for p in prices]
        table.add_row(Text(label, style="bold"), "", *map(cell, map(seconds, prices), marks, only))

    rows = [t.row for t in prices[0].timed]
    for layer, label in LAYERS.items():
        numbers = [i for i, row in enumerate(rows) if row.layer == layer]
        if numbers:
            table.add_row(Text(f"{label} (x {rows[numbers[0]].count})", style="bold"))
        for i in numbers:
            cells = [cell(p.timed[i].seconds, p.timed[i].mark, shared) for p, shared in zip(prices, only, strict=True)]
            table.add_row(f"  {rows[i].name}", _shape(rows[i]), *cells)
    for layer in ("dense", "moe"):
        if any(row.layer == layer for row in rows):
            kinds = ("attention", layer)
            total(f"one {layer.replace('moe', 'MoE')} layer", lambda p, kinds=kinds: p.layer_seconds(*kinds), kinds)
    total("step on one chip", lambda p: p.chip_seconds, tuple(LAYERS))
    return table


def price_table(prices, decode):
    table = Table(box=None, padding=(0, 2, 0, 0))
    heads = ["chip", "chips", "step", "tok/s/user", "tok/s/chip", "$/h", f"$/Mtok {'out' if decode else 'in'}", "the step is"]
    for name in heads if decode else [h for h in heads if h != "tok/s/user"]:
        table.add_column(name, justify="left" if name in ("chip", "the step is") else "right", no_wrap=name != "the step is")
    for p in prices:
        figure = p.chip.figures["dollars_per_hour"]
        source = {"estimate": " est.", "vendor": " list"}.get(figure.status, "") if p.dollars_per_hour == figure.value else ""
        rent, speeds = money(p.dollars_per_hour) + source, [p.tokens_per_s_per_user, p.tokens_per_s_per_chip][not decode:]
        if p.seconds is None:
            known = ["unknown", *["unknown"] * len(speeds), rent, "-", Text("; ".join(p.unknown), style="red")]
        else:
            parts = ", ".join(f"{100 * s:.0f}% {m}" for m, s in p.share.items() if s >= 0.005)
            state = Text(p.mark if p.share[p.mark] > 0.995 else f"{p.mark}: {parts}", style=SIGN[p.mark][1])
            known = [seconds_text(p.seconds), *map(si, speeds), rent, money(p.dollars_per_mtoken), state]
        table.add_row(_title(p.chip), str(p.chips or "?"), *known)
    return table


def _notes(chips, measured, prices):
    yield "● measured  ◐ interpolated between two measured points  ○ bound: the roofline, which the chip cannot beat"
    yield "chips: the fewest that hold weights and KV cache. They share the step without communication, so it is a bound."
    yield "Experts are drawn uniformly. Not counted: " + ", ".join((*NEGLECTED, "communication", "the MTP module")) + "."
    machine = next((c for c in chips if c.key.startswith("cpu-")), None)
    if machine:
        priced = any(p.dollars_per_hour is not None for p in prices if p.chip is machine)
        day = measured.date(machine.key)[:10]
        yield "".join((f"this CPU: {machine.key}", f", measured {day}" if day else "",
                       "" if machine.get("memory_bytes") else "; memory unknown, priced as if one held the model",
                       "" if priced else "; give its price with --dollars-per-hour this=..."))
    elif not measured.records:
        yield "No measurements found: run `kernomics bench`, or name a folder with --records."
    unknown = [c.key for c in chips if c is not machine and c.get("dollars_per_hour") is None]
    if unknown:
        yield f"$/h unknown: {', '.join(unknown)}; give it with --dollars-per-hour {unknown[0]}=..."


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Step:
    """One step to price: its rows, the tokens it makes, the users it serves, the bytes it must hold."""

    phase: str
    at: str  # in words
    rows: list
    tokens: int
    users: int
    memory: float


def make_steps(model, batches, context, chunks, phase):
    """Decode steps of each batch, prefill steps of each chunk."""
    steps = []
    for b in batches if phase != "prefill" else ():
        rows, memory = model.decode(b, context), model.memory_bytes(b, context)
        steps.append(Step("decode", f"batch {b}, context {context}", rows, b, b, memory))
    for t in chunks if phase != "decode" else ():
        steps.append(Step("prefill", f"a prompt of {t} tokens", model.prefill(t), t, 1, model.memory_bytes(1, t)))
    return steps


def request_table(requests):
    table = Table(box=None, padding=(0, 2, 0, 0))
    kinds = [kind for kind, n in requests[0].tokens.items() if n]
    for name in ("chip", *(f"$/Mtok {kind}" for kind in kinds), "$/Mtok all"):
        table.add_column(name, justify="left" if name == "chip" else "right", no_wrap=True)
    for r in requests:
        table.add_row(_title(r.decode.chip), *(money(r.mtoken.get(kind)) for kind in kinds), money(r.blended))
    return table


def largest(steps, prices, phase):
    """The step of a phase with the most tokens, and its prices."""
    return max(((s, p) for s, p in zip(steps, prices, strict=True) if s.phase == phase), key=lambda x: x[0].tokens)


def main(model="deepseek-v3", chip=(), dollars_per_hour=(), batch=(1,), context=4096, chunk=(1024,), phase="both", records=None,
         plot=None, as_json=False, request=None):
    """Print the price of a model's steps, as tables or JSON; see ``kernomics price --help``.

    Seconds by layer are shown for the first batch and the first chunk, prices for all. ``request`` has the fields tokens_in,
    tokens_out, hit, allocation and sold of ``scenario.Scenario``: its tokens are priced at the largest chunk and batch.
    """
    if phase not in (*PHASES, "both"):
        raise wrong("phase", phase, ", ".join((*PHASES, "both")))
    for name, values in (("batch", batch), ("context", [context]), ("chunk", chunk)):
        for value in values:
            if value < 1:
                raise wrong(name, value, "an integer of at least 1")
    if request and phase != "both":
        raise wrong("phase", phase, "both, as a request has a prompt and an answer")
    asked = from_options(**(request or {}))
    measured = Measured(read(records))
    chips = choose_chips(chip, measured)
    dollars = parse_dollars(dollars_per_hour, chips)
    model = Model.load(model)
    steps = make_steps(model, batch, context, chunk, phase)
    prices = [[price(s.rows, c, measured, tokens=s.tokens, users=s.users, memory=s.memory, dollars_per_hour=dollars.get(c.key))
               for c in chips] for s in steps]
    requests, at = [], ""
    if phase == "both":
        (filled, fill), (decoded, decode) = (largest(steps, prices, name) for name in ("prefill", "decode"))
        requests = [Request(f, d, asked.workload().tokens, asked.named_allocation, asked.sold)
                    for f, d in zip(fill, decode, strict=True)]
        at = f"{asked.tokens_in:,} tokens in ({100 * asked.hit:.0f} % cached), {asked.tokens_out:,} out"
    first = {s.phase: i for i, s in reversed(list(enumerate(steps)))}
    picture = ""
    if plot:
        from kernomics.cost import roofline

        try:
            picture = str(roofline.plot(Path(plot), chips, measured, {p: steps[i].rows for p, i in sorted(first.items())}))
        except (CostError, OSError) as error:  # the tables do not depend on it
            picture = f"not drawn, {error}"
    if as_json:
        print(json.dumps(as_dict(model, steps, prices, requests), indent=1))
        return
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    console.print(f"[bold]{model.name}[/]: {model.text()}", highlight=False)
    console.print(model_table(model, steps))
    columns = max(1, (console.width - 36) // 9)
    for i in sorted(first.values()):
        console.print(f"\n[bold]{steps[i].phase}[/], {steps[i].at}: seconds per call", highlight=False)
        for j in range(0, len(chips), columns):
            console.print(layer_table(prices[i][j:j + columns]))
    for step, priced in zip(steps, prices, strict=True):
        console.print(f"\n[bold]{step.phase}[/], {step.at}: price", highlight=False)
        console.print(price_table(priced, step.phase == "decode"))
    if requests:
        console.print(f"\n[bold]request[/], {at}: price", highlight=False)
        console.print(request_table(requests))
        console.print(f"Prefill as {filled.at}, decode at {decoded.at}. {ALLOCATED[asked.named_allocation]}", highlight=False,
                      style="dim")
    console.print()
    for note in _notes(chips, measured, [p for ps in prices for p in ps]):
        console.print(note, highlight=False, style="dim")
    if picture:
        console.print(f"roofline: {picture}", highlight=False, markup=False)


def as_dict(model, steps, prices, requests=()):
    """Everything the tables show, and the FLOPs and bytes behind it, in SI units."""

    def row(i, r, priced):
        seconds = {p.chip.key: {"seconds": p.timed[i].seconds, "mark": p.timed[i].mark} for p in priced}
        return {"layer": r.layer, "name": r.name, "op": r.op, "dims": r.dims, "dtype": r.dtype, "count": r.count,
                "flops": r.work.flops, "bytes": r.work.bytes, "chips": seconds}

    def chip(p):
        return {"chips": p.chips, "seconds": p.seconds, "chip_seconds": p.chip_seconds, "mark": p.mark, "share": p.share,
                "tokens_per_s_per_chip": p.tokens_per_s_per_chip, "tokens_per_s_per_user": p.tokens_per_s_per_user,
                "dollars_per_hour": p.dollars_per_hour, "dollars_per_mtoken": p.dollars_per_mtoken, "unknown": p.unknown}

    return {
        "model": {"name": model.name, "total_params": model.total_params, "active_params": model.active_params,
                  "active_params_no_embedding": model.active_params_no_embedding, "mtp_params": model.mtp_params,
                  "weight_bytes": model.weight_bytes, "kv_bytes_per_token": model.kv_bytes_per_token()},
        "steps": [{"phase": s.phase, "at": s.at, "tokens": s.tokens, "memory_bytes": s.memory,
                   "rows": [row(i, r, priced) for i, r in enumerate(s.rows)],
                   "chips": {p.chip.key: chip(p) for p in priced}} for s, priced in zip(steps, prices, strict=True)],
        "request": {r.decode.chip.key: {"tokens": r.tokens, "allocation": r.allocation, "dollars": r.dollars,
                                        "dollars_per_mtoken": {**r.mtoken, "all": r.blended}} for r in requests},
    }
