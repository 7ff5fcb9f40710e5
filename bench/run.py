"""``kernomics bench``: every kernel judged against its definition, then timed, beside the machine's limits and PyTorch."""

import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module, metadata
from itertools import cycle
from pathlib import Path

import numpy as np
from kernomics.bench import ceilings
from kernomics.bench.timing import MOST, Timed, Timing, interleave
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import kernomics
from kernomics import _cpu, numerics, numpy_ops
from kernomics.contract import OPS, Case, ContractError, NoKernel

SCHEMA = 1
FIELDS = ("schema", "op", "kernel", "chip", "dims", "dtypes", "scalars", "seconds_median", "p10", "p90", "n", "flops", "bytes",
          "error", "ceilings", "cache_state", "versions", "commit", "date", "peers")
QUICK = {  # ops of a quick run and their cases; None: the first of decode and of prefill
    "fp8_quantize": None, "fp8_gemm": None, "mla_append_kv": None, "mla_decode": None, "mla_prefill": None, "moe_route": None,
    "moe_experts": [Case("decode, 1 token", t=1, d=7168, n=2048, e=8, top_k=8),  # fewer experts: drawing them takes longest
                    Case("prefill, 32 tokens", t=32, d=7168, n=2048, e=8, top_k=8)],
}
# Inputs that lie in memory when a layer starts. Calls that mostly read those are timed cold, on copies in turn.
STREAMED = {"fp8_gemm": ("b",), "fp8_linear": ("w",), "fp8_grouped_gemm": ("b",), "moe_experts": ("w13", "w2"),
            "moe_experts_bf16": ("w13", "w2"), "mla_decode": ("kv_cache",), "mla_decode_sparse": ("kv_cache",),
            "mla_index": ("k",)}
STREAMING = 10  # FLOP a byte below which a call counts as reading mostly
LARGE = 3e7  # FLOPs or bytes of a call above which the bench judges drawn rows: `make test-long` judges more
PEER_ERROR = 0.1  # a peer with int8 or bf16 operands may differ by this much of the norm
SLOW = 20  # a peer this many times slower than the kernel is timed twice only; one that takes 10 budgets, once


@dataclass
class Row:
    """One kernel on one case and instruction set."""

    op: object
    case: object
    kernel: object
    isa: str
    work: object
    call: object = None
    outs: tuple = ()
    first: float = 0.0  # seconds of the run that was judged
    error: float = 0.0
    failed: str = ""
    cold: bool = False
    peaks: dict = field(default_factory=dict)  # the machine's ceilings while the row was timed
    timing: Timing | None = None
    peers: list = field(default_factory=list)

    @property
    def best_peer(self):
        return max((p for p in self.peers if "ratio" in p), key=lambda p: -p["seconds_median"], default=None)


# ---------------------------------------------------------------- what to run


def plan(ops=None, kernels=None, quick=False):
    """(op, kernels, cases) of what runs here, and the reason for each op that does not."""
    for name in ops or ():
        if name not in OPS:
            raise ContractError(f"bench: op is {name!r}, expected one of {', '.join(OPS)}")
    chosen, skipped = [], {}
    for name in ops or (QUICK if quick else OPS):
        op = OPS[name]
        cases = [c for c in op.cases if c.bench]
        if quick:
            first = [next((c for c in cases if c.bench.startswith(phase)), None) for phase in ("decode", "prefill")]
            cases = QUICK.get(name) or [c for c in first if c is not None]
        ready = []
        for kernel in op.kernels:
            if kernel.on != "cpu" or (kernels and kernel.name not in kernels):
                continue
            try:
                kernel.load()
                ready.append(kernel)
            except (ImportError, AttributeError) as error:
                skipped[name] = str(error)
        if ready and cases:
            chosen.append((op, ready, cases))
        elif not op.host:
            skipped.setdefault(name, "no CPU kernel")
    return chosen, skipped


# ---------------------------------------------------------------- values first


def _call(op, kernel, isa, inputs, scalars):
    args = [*(inputs[n] for n in op.tensors), *(scalars[s.name] for s in op.scalars), kernel.name]
    run, use = op.numpy_call, _cpu.use_isa

    def call():
        use(isa)
        return run(*args)

    return call


def _results(op, result, inputs):
    """The outputs; those of an op that mutates its input are that input."""
    if op.mutates:
        return tuple(inputs[n] for n in op.tensors if n in op.mutates)
    return result if isinstance(result, tuple) else (result,)


def _own(op, inputs):
    """Inputs with copies of what the op will mutate."""
    return {n: x.copy() if n in op.mutates else x for n, x in inputs.items()}


def sampled(op, work, inputs, outs=()):
    """Inputs and outputs that a result is judged by: some rows of a large one."""
    if max(work.flops, work.bytes) > LARGE:
        rows = 64 if work.flops < 1e9 else 8 if work.bytes < 3e8 else 1
        return numpy_ops.sampled_rows(op, inputs, list(outs), rows)
    return inputs, outs


def definition(op, work, inputs, scalars):
    """The definition's results that ``judge`` compares with."""
    inputs, _ = sampled(op, work, inputs)
    fresh = _own(op, inputs)
    with np.errstate(all="ignore"):
        return _results(op, op.define(**fresh, **scalars), fresh)


def judge(op, work, inputs, scalars, outs, want=None, **more):
    """(worst measure's complaint or "", first measure) of a result, on some of its rows where it is large.

    ``want``: the definition's results, where they are known. ``more`` is what else the op's judge should know, as
    ``tensor_core``.
    """
    want = definition(op, work, inputs, scalars) if want is None else want
    inputs, outs = sampled(op, work, inputs, outs)
    with np.errstate(all="ignore"):
        measures = (op.judge or numerics.judge_default)(tuple(outs), want, {**inputs, **scalars, **more})
    wrong = [f"{name} is {value:.3g}, at most {bound:.3g} allowed" for name, (value, bound) in measures.items()
             if not value <= bound]
    return "; ".join(wrong), float(next(iter(measures.values()))[0])


def _first(call):
    """Result and seconds of a call: its second one, unless the first was long enough to tell."""
    for _ in range(2):
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        if seconds > 0.1:
            break
    return result, seconds


def checked(row, inputs, scalars):
    """Run the kernel once and judge the result: sets ``failed`` or ``error``, and the call."""
    fresh = _own(row.op, inputs)
    row.call = _call(row.op, row.kernel, row.isa, fresh, scalars)
    try:
        result, row.first = _first(row.call)
        row.outs = _results(row.op, result, fresh)
        row.failed, row.error = judge(row.op, row.work, inputs, scalars, row.outs)
    except NoKernel as error:
        row.failed = str(error).splitlines()[1].strip()
    return row


# ---------------------------------------------------------------- then time


def _turning(calls):
    """One call that takes the given ones in turn."""
    if len(calls) == 1:
        return calls[0]
    turn = cycle(calls)
    return lambda: next(turn)()


def copies(op, case, work, inputs, l3):
    """The inputs, several times over where the call should find its weights or cache in memory; and whether it does."""
    names = [n for n in STREAMED.get(op.name, ()) if inputs.get(n) is not None]
    if not names or work.flops > STREAMING * work.bytes:
        return [inputs], work.bytes > 2 * l3
    count = min(-(-2 * l3 // max(int(work.bytes), 1)) + 1, 64) if work.bytes < 2 * l3 else 1
    size = sum(inputs[n].nbytes for n in names)
    count = max(1, min(count, ceilings.free_bytes() // 4 // max(size, 1)))
    more = [inputs | {n: inputs[n].copy() for n in names} for _ in range(count - 1)]
    return [inputs, *more], (count * work.bytes) > 2 * l3


def _peers(op, peers):
    return peers.PEERS.get(op.name, {}) if peers else {}


def _values(op, outs):
    """What a peer's result is compared with: the first output, or the numbers that codes and scales stand for."""
    import torch
    from kernomics.bench import peers

    outs = [x if isinstance(x, torch.Tensor) else peers.from_numpy(x) for x in (outs if isinstance(outs, tuple) else (outs,))]
    if op.name in ("fp8_quantize", "swiglu_quantize"):
        block = [-(-a // b) for a, b in zip(outs[0].shape, outs[1].shape)]
        block = [1 if b == 1 else 128 for b in block]
        return outs[0].float() * peers.spread(outs[1], block, outs[0].shape)
    if op.name == "mla_append_kv":
        return peers.cache_values(outs[0], torch.float32)
    return outs[0].float()


def _peer_error(op, outs, peer_outs):
    """Relative distance of a peer's finite values from ours."""
    ours, theirs = _values(op, outs), _values(op, peer_outs)
    if ours.shape != theirs.shape:
        return float("inf")
    both = ours.isfinite() & theirs.isfinite()
    ours, theirs = ours[both], theirs[both]
    return float((ours - theirs).norm() / max(float(ours.norm()), 1e-30)) if len(ours) else float("inf")


def time_rows(rows, inputs, scalars, l3, peers, budget_s, least, tick):
    """Time the rows of one case and its peers, each peer by turns with all kernels."""
    op, case, work = rows[0].op, rows[0].case, rows[0].work
    variants, cold = copies(op, case, work, inputs, l3)
    found = _peers(op, peers)
    share = max(len(found), 1)
    timed = []
    for row in rows:
        row.cold = cold
        calls = [row.call, *(_call(op, row.kernel, row.isa, x, scalars) for x in variants[1:])]
        timed.append(Timed(_turning(calls), budget_s / share, -(-least // share), -(-MOST // share)))
    rounds = 2 if found and least > 3 else 1
    results = []
    for name, build in found.items():
        tick(name)
        result = {"name": name}
        results.append(result)
        try:
            arguments = peers.arguments(_own(op, inputs), scalars)
            call = build(arguments)
            outs, first = _first(call)
            error = _peer_error(op, rows[0].outs, outs)
            if not error <= PEER_ERROR:
                raise ValueError(f"its result differs by {error:.2g} of the norm")
            calls = [call, *(build(arguments) for _ in variants[1:])]
            limit = 2 if first > SLOW * min(r.first for r in rows) else MOST
            theirs = Timed(_turning(calls), budget_s, min(least, limit), limit)
            if first > 10 * budget_s:
                theirs.samples = [first]
            else:
                interleave([*timed, theirs], rounds)
            result["seconds_median"] = Timing.of(theirs.samples).median
        except Exception as error:  # a peer may fail in any way: it is named, and the bench goes on
            result["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        calls = call = theirs = arguments = outs = None  # operands of one peer at a time
    if peers:
        peers.forget()
    if not all(x.samples for x in timed):
        interleave(timed, 1)
    for row, x in zip(rows, timed):
        row.timing = Timing.of(x.samples)
        row.peers = [r | {"ratio": r["seconds_median"] / row.timing.median} if "seconds_median" in r else r for r in results]


def measure_ceilings(peaks, buffer, isas, threads, tick=lambda: None):
    """Put the FMA peak of each isa and number of threads and the read bandwidth into ``peaks`` where they are higher."""
    for n in threads:
        for isa in isas:
            for _ in range(5):  # other processes hold up many threads more than one: try for longer
                peaks["fma"][isa, n] = max(ceilings.fma_peak(isa, n), peaks["fma"].get((isa, n), 0))
                if peaks["fma"][isa, n] > 0.8 * n * peaks["fma"].get((isa, 1), 0):
                    break
            tick()
        peaks["read"][n] = max(ceilings.read_bandwidth(buffer, n), peaks["read"].get(n, 0))
        tick()


def ceilings_now(start, buffer, isas, threads):
    """As measure_ceilings, afresh: the clock of a shared machine moves by a tenth within minutes."""
    now = {"fma": {key: value for key, value in start["fma"].items() if key[1] != threads}, "read": {}}
    measure_ceilings(now, buffer, isas, [threads])
    return now


# ---------------------------------------------------------------- records


def versions():
    found = {"python": platform.python_version(), "kernomics": kernomics.__version__, "compiler": _cpu.compiler}
    for name in ("numpy", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def commit():
    """Short hash of the source tree this file lies in, with ``-dirty`` after changes; empty outside of one."""
    here = Path(__file__).resolve().parent

    def git(*args):
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) / "bench" != here:
            return ""
        return git("describe", "--always", "--dirty", "--exclude", "*")
    except (OSError, subprocess.CalledProcessError):
        return ""


def record(row, threads, meta):
    """The row as one JSON object."""
    op, case, t = row.op, row.case, row.timing
    scalars = {s.name: op.values(case)[s.name] for s in op.scalars}
    dims = dims_of(op, case)
    values = {
        "schema": SCHEMA, "op": op.name, "kernel": row.kernel.name, "chip": ceilings.chip_key(row.isa, threads), "dims": dims,
        "dtypes": {n: x[0] for n, x in op.layout(case).items() if x}, "scalars": scalars,
        "seconds_median": t.median, "p10": t.p10, "p90": t.p90, "n": t.n, "flops": row.work.flops, "bytes": row.work.bytes,
        "error": row.error,
        "ceilings": {**row.peaks, "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")},
        "cache_state": "cold" if row.cold else "warm", **meta, "peers": row.peers,
    }
    return {name: values[name] for name in FIELDS}


def dims_of(op, case):
    """The sizes of a case, of which some have a tensor's name (q tokens of ``q``); not dtypes and scalars."""
    scalars = {s.name for s in op.scalars}
    return {k: v for k, v in case.items() if k not in scalars and not (k in op.tensors and isinstance(v, str))}


def _identity(r):
    return json.dumps([r.get(k) for k in ("op", "kernel", "chip", "dims", "dtypes", "scalars")], sort_keys=True)


def write(records, path):
    """Put records into a .jsonl file; one of the same call, kernel and chip is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
    kept = {_identity(r): r for r in [*old, *json.loads(json.dumps(records))]}
    path.write_text("".join(json.dumps(r) + "\n" for r in kept.values()))


# ---------------------------------------------------------------- print


def show_ceilings(console, peaks, isas, threads):
    table = Table(box=SIMPLE_HEAD, title=f"This machine at most: {ceilings.cpu_model()}", title_justify="left", padding=(0, 1))
    table.add_column("threads", justify="right")
    for isa in isas:
        table.add_column(f"FMA f32 {isa}, GFLOP/s", justify="right")
    table.add_column("memory read, GB/s", justify="right")
    for n in threads:
        table.add_row(str(n), *(f"{peaks['fma'][isa, n] / 1e9:.0f}" for isa in isas), f"{peaks['read'][n] / 1e9:.1f}")
    console.print(table)
    if any(peaks["fma"][isa, n] < 0.8 * n * peaks["fma"][isa, 1] for isa in isas for n in threads):
        console.print("All threads together stay far below one alone: other work is running.", style="yellow")


def roofline_s(row):
    return max(row.work.flops / row.peaks["flops_f32"], row.work.bytes / row.peaks["bytes_read"])


def _figure(value):
    """About three digits."""
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def show_rows(console, rows, threads):
    title = f"{threads} thread{'s' * (threads > 1)}; ratio: time of the best peer over ours"
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, title=title, title_justify="left")
    table.add_column("op and case", width=26, no_wrap=True)
    table.add_column("kernel", width=10, no_wrap=True)
    for name, width in (("ms", 7), ("±%", 3), ("GFLOP/s", 7), ("GB/s", 5), ("roof%", 5)):
        table.add_column(name, justify="right", width=width, no_wrap=True)
    table.add_column("best peer", width=17, no_wrap=True)
    table.add_column("ratio", justify="right", width=5, no_wrap=True)
    shown = None
    for row in rows:
        if row.op is not shown:
            table.add_row(Text(row.op.name, "bold"))
            shown = row.op
        name, where = f" {row.case.bench}", f"{row.kernel.name} {row.isa}"
        if row.failed:
            table.add_row(name, where, Text("FAILED", "bold red"))
            continue
        t, best = row.timing.median, row.best_peer
        table.add_row(
            name, where, _figure(t * 1e3), f"{100 * row.timing.spread:.0f}", _figure(row.work.flops / t / 1e9),
            _figure(row.work.bytes / t / 1e9), f"{100 * roofline_s(row) / t:.0f}",
            *((best["name"], Text(f"{best['ratio']:.2f}", "green" if best["ratio"] >= 1 else "red")) if best else ("-", "-")))
    console.print(table)
    console.print("roof%: time at this machine's FMA peak or read bandwidth, whichever is longer, over the time taken;\n"
                  "both are measured before and after each case. Operands in cache can pass the read bandwidth of memory.",
                  style="dim")
    for row in rows:
        if row.failed:
            console.print(f"FAILED {row.op.name}, {row.case.bench}: {row.failed}", style="red")
    reasons = {(row.op.name, p["name"], p["reason"]) for row in rows for p in row.peers if "reason" in p}
    for op, name, reason in sorted(reasons):
        console.print(f"no time for {op} by {name}: {reason}", style="dim")


def show_gain(console, rows):
    """How much faster the best instruction set is than the portable one."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title="Gain of each instruction set over base", title_justify="left")
    for name in ("op", "case"):
        table.add_column(name, no_wrap=True)
    isas = list(dict.fromkeys(r.isa for r in rows))
    for isa in isas[1:]:
        table.add_column(isa, justify="right")
    by_call = {}
    for row in rows:
        if row.timing:
            by_call.setdefault((row.op.name, row.case.bench, row.kernel.name), {})[row.isa] = row.timing.median
    for (op, case, _), times in by_call.items():
        if isas[0] in times:
            table.add_row(op, case, *(f"{times[isas[0]] / times[isa]:.2f}" if isa in times else "-" for isa in isas[1:]))
    console.print(table)


# ---------------------------------------------------------------- the command


def main(ops=None, kernels=None, isa=None, threads=None, quick=False, records=None, peers=True, console=None):
    """Bench; returns the rows. ``records``: a folder for ``<chip>.jsonl`` files, True for bench/results, None for out/."""
    console = console or Console()
    if not console.is_terminal or console.width > 100:
        console.width = 100
    known = list(_cpu.isas())
    isas = known if isa == "all" else [isa or _cpu.isa()]
    if isas[0] not in known:
        raise ContractError(f"bench: isa is {isa!r}, expected one of {', '.join(known)} or all")
    if threads is not None and threads < 1:
        raise ContractError(f"bench: threads is {threads}, expected a positive int")
    chosen, skipped = plan(ops, kernels, quick)
    before = numpy_ops.get_num_threads(), _cpu.isa()
    everyone = before[0]
    threads = threads or everyone
    module = None
    if peers:
        try:
            module = import_module("kernomics.bench.peers")
        except ImportError as error:
            console.print(f"No peers: {error}", style="dim")
    budget_s, least = (0.1, 3) if quick else (0.5, 5)
    with Progress(TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
                  transient=True) as progress:
        counts = sorted({1, everyone, threads})
        task = progress.add_task("ceilings", total=2 * len(counts) * (len(known) + 1))
        peaks = {"fma": {}, "read": {}}
        buffer = ceilings.read_buffer(1 << 29 if quick else 1 << 30)
        for _ in range(2):
            measure_ceilings(peaks, buffer, known, counts, lambda: progress.advance(task))
    show_ceilings(console, peaks, known, counts)
    rows = []
    try:
        numpy_ops.set_num_threads(threads)
        if module:
            import torch

            torch_threads = torch.get_num_threads()
            torch.set_num_threads(threads)
        with Progress(TextColumn("{task.description:<52.52}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
                      console=console, transient=True) as progress:
            task = progress.add_task("", total=sum(len(cases) for _, _, cases in chosen))
            before_case = ceilings_now(peaks, buffer, isas, threads)
            for op, ready, cases in chosen:
                drawn = {}
                for case in cases:
                    title = f"{op.name}: {case.bench}"
                    progress.update(task, description=title)
                    made = bench_case(op, case, ready, isas, module, budget_s, least,
                                      lambda name, title=title: progress.update(task, description=f"{title}: {name}"), drawn)
                    after_case = ceilings_now(peaks, buffer, isas, threads)
                    for row in made:
                        row.peaks = {"flops_f32": max(x["fma"][row.isa, threads] for x in (before_case, after_case)),
                                     "bytes_read": max(x["read"][threads] for x in (before_case, after_case))}
                    before_case = after_case
                    rows += made
                    progress.advance(task)
    finally:
        numpy_ops.set_num_threads(before[0])
        _cpu.use_isa(before[1])
        if module:
            torch.set_num_threads(torch_threads)
    show_rows(console, rows, threads)
    if len(isas) > 1:
        show_gain(console, rows)
    for name, reason in skipped.items():
        console.print(f"skipped {name}: {reason}", style="dim")
    meta = {"versions": versions(), "commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    made = [record(r, threads, meta) for r in rows if r.timing]
    if records is None:
        files = {Path("out/bench.jsonl"): made} if made else {}
    else:
        folder = Path(__file__).resolve().parent / "results" if records is True else Path(records)
        files = {folder / f"{chip}.jsonl": [r for r in made if r["chip"] == chip] for chip in {r["chip"] for r in made}}
    for path, part in files.items():
        write(part, path)
        console.print(f"{len(part)} records in {path}", style="dim")
    return rows


def bench_case(op, case, kernels, isas, peers, budget_s, least, tick, drawn):
    """The rows of one case; ``drawn`` holds large inputs of the op's case before, to be used again."""
    inputs, scalars = numpy_ops.sample(op, case, reuse=drawn)
    drawn.clear()
    drawn.update((n, x) for n, x in inputs.items() if n in STREAMED.get(op.name, ()))
    work = op.work(**case)
    rows = [checked(Row(op, case, kernel, isa, work), inputs, scalars) for kernel in kernels for isa in isas]
    good = [row for row in rows if not row.failed]
    if good:
        time_rows(good, inputs, scalars, ceilings.l3_bytes(), peers, budget_s, least, tick)
    for row in rows:
        row.call, row.outs = None, ()  # a row outlives its operands
    return rows
