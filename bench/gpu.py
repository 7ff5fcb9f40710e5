"""``kernomics bench --gpu``: every GPU kernel judged, then timed by replaying CUDA graphs, beside the chip's own limits.

A sample is one replay of a graph that holds the call several times over; a call that mostly reads weights or cache
finds them in memory and not in L2, because the graph's calls take copies in turn that L2 cannot hold together.
"""

import os
import re
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import import_module
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import torch
from kernomics.bench import run
from kernomics.bench.timing import Timing
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table
from rich.text import Text

from kernomics import chip, numpy_ops
from kernomics.contract import OPS, Case, ContractError
from kernomics.numerics import BF16_WEIGHTS, TENSOR_CORE
from kernomics.ops.mla_decode import SCALE
from kernomics.torch_ops import from_numpy, to_numpy

GEMMS = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]  # DeepGEMM's (n, k)


def decode(h, q=1, b=128, s=4096, **more):
    pages = b * s // 64
    kind = "fp8 cache" if more else "bf16 cache"
    return Case(b=b, q=q, h=h, s=s, page=64, p=pages, n=s // 64, softmax_scale=SCALE,
                bench=f"decode, {b} x {s // 1024}k, {h} heads, {q} tokens, {kind}", **more)


CASES = {  # sizes of a GPU, beside the bench cases of the rooms; of each op the calls that a serving step makes
    "fp8_gemm": [Case(m=m, n=n, k=k, bench=f"{'decode' if m < 256 else 'prefill'}, m {m}, n {n}, k {k}")
                 for m in (1, 64, 128, 4096) for n, k in GEMMS],
    "fp8_grouped_gemm": [
        Case(t=256, e=32, n=4096, k=7168, active=32, bench="decode gate+up, 8 rows an expert, 32 experts"),
        Case(t=4096, e=32, n=4096, k=7168, active=32, bench="prefill gate+up, 128 rows an expert, 32 experts"),
        Case(t=32768, e=4, n=4096, k=7168, active=4, bench="prefill gate+up, 8192 rows an expert"),
        Case(t=32768, e=4, n=7168, k=2048, active=4, bench="prefill down, 8192 rows an expert"),
    ],
    "mla_decode": [decode(128), decode(128, q=2), decode(16), decode(64), decode(128, kv_cache="u8"),
                   decode(16, kv_cache="u8"), decode(16, b=1, s=32768), decode(128, b=1, s=32768)],
    "mla_decode_sparse": [
        Case(b=128, q=2, h=128, top_k=2048, page=64, p=4096, softmax_scale=SCALE, kv_cache=kind,
             bench=f"decode, 128 x 2 tokens, 2048 keys, {'fp8' if kind == 'u8' else kind} cache") for kind in ("bf16", "u8")],
    "mla_prefill": [Case(b=1, t=8192, s=8192, h=32, softmax_scale=SCALE, bench="prefill 8k, 32 heads"),
                    Case(b=4, t=8192, s=8192, h=128, softmax_scale=SCALE, bench="prefill 4 x 2k, 128 heads")],
    "mla_index": [Case(t=4096, h=64, s=4096, bench="prefill 4k")],
    "moe_experts": [Case(t=256, d=7168, n=2048, e=32, top_k=8, bench="decode, 256 tokens, 32 experts"),
                    Case(t=4096, d=7168, n=2048, e=32, top_k=8, bench="prefill, 4096 tokens, 32 experts")],
    "fp8_quantize": [Case(m=65536, k=7168, bench="prefill, 65536 rows")],
    "swiglu_quantize": [Case(t=65536, n=2048, bench="prefill, 65536 rows")],
    "moe_combine": [Case(t=16384, d=7168, top_k=8, weights="f32", bench="prefill, 16384 tokens")],
    "moe_permute": [Case(t=16384, d=7168, top_k=8, n_experts=256, bench="prefill, 16384 tokens")],
    "mla_append_kv": [Case(t=65536, p=1024, page=64, norm_weight="bf16", cos="f32", sin="f32", kv_cache=kind,
                           bench=f"prefill, 65536 tokens, {'fp8' if kind == 'u8' else kind}") for kind in ("bf16", "u8")],
    "attention_merge": [Case(lead=(), q=16384, h=128, d=128, bench="prefill chunk of 16384")],
}
ONCE_AROUND = 3  # the copies of a streamed operand fill L2 this many times
SAMPLES, SAMPLE_S = 40, 2e-3  # replays, and seconds that one of them lasts at least
MOST_CALLS = 256  # calls of one graph
LARGEST = 20e9  # bytes of copies
LOOK_AHEAD = 3  # cases drawn before their turn
HANGS_S = 180  # a kernel or a peer that takes longer hangs; some peers compile first
ON_GPU = [op.name for op in OPS.values() if any(k.on != "cpu" for k in op.kernels)]


def rows(ops=None, family=None):
    """(op, GPU kernel, case) of everything that this bench can run, on chips of one family or on any."""
    for name in ops or OPS:
        if ops and name not in ON_GPU:
            raise ContractError(f"bench: op is {name!r}, expected one of {', '.join(ON_GPU)}")
        op = OPS[name]
        for case in [*CASES.get(name, ()), *(c for c in op.cases if c.bench)]:
            for kernel in op.kernels:
                if kernel.on != "cpu" and (family is None or kernel.fits(family)):
                    yield op, kernel, case


def compile_op(name, target):
    """Compile what the op's rows launch on ``target``, a chip.Chip, into Triton's cache on disk."""
    from kernomics.triton_kernels import warmup

    op = OPS[name]
    kernel = next(k for k in op.kernels if k.name == "triton")
    launches = warmup.distinct(op, kernel, [c for _, k, c in rows([name]) if k is kernel], target)
    for launch in launches.values():
        warmup.compiled(launch, target)
    return len(launches)


def compile_all(jobs, console):
    """Jobs (name, function, arguments), each in a process of its own: one after the other they would take minutes. A kernel
    that does not compile fails where it is launched."""
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), get_context("spawn")) as pool:
        futures = [pool.submit(function, *given) for _, function, given in jobs]
        for (name, _, _), job in zip(jobs, track(futures, "compiling", console=console, transient=True)):
            if error := job.exception():
                console.print(f"{name} does not compile: {type(error).__name__}", style="red")


# ---------------------------------------------------------------- the chip


def chip_key(name):
    """Key of chips.toml from a device's name, as in "NVIDIA H200"; a name of its own where none is known."""
    slug = re.sub(r"[^a-z0-9]+", "", name.lower())
    return next((key for key in sorted(chip.FAMILY_OF, key=len, reverse=True) if key in slug), slug)


def graph_of(calls):
    """A CUDA graph of the calls, each once warmed up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The outer `with` gives the stream back where a capture that fails leaves its own.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_seconds(graph, times=1):
    """Of ``times`` replays behind another one, which hides the launch and, of a new graph, its upload."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(calls, samples=SAMPLES):
    """The Timing of one call, of ``calls`` taken in turn."""
    once = replay_seconds(graph_of(calls)) / len(calls)
    rounds = max(1, min(round(SAMPLE_S / max(once, 1e-7) / len(calls)), MOST_CALLS // len(calls)))
    graph = graph_of(list(calls) * rounds)
    replay_seconds(graph, 3)
    return Timing.of([replay_seconds(graph) / (rounds * len(calls)) for _ in range(samples)])


def ceilings():
    """Bytes/s of a kernel that reads and writes 2 GiB each, and FLOP/s of large matrix products, through torch."""
    found = {}
    x = torch.empty(1 << 29, device="cuda")
    y = torch.empty_like(x)
    # A copy in a graph is left to the copy engine, at two thirds of the bandwidth (H200).
    found["bytes_copy"] = found["bytes_read"] = 2 * x.nbytes / measure([lambda: torch.neg(x, out=y)], 20).median
    del x, y
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found["flops_bf16"] = 2 * n**3 / measure([lambda: a @ b], 20).median
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")
        call = lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16,  # noqa: E731
                                         use_fast_accum=True)
        found["flops_fp8"] = 2 * n**3 / measure([call], 20).median
    except (RuntimeError, ValueError):
        pass  # a chip without FP8 products has no such ceiling
    found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


# ---------------------------------------------------------------- a case


def copies(op, work, inputs):
    """The inputs several times over, so that what is streamed comes from memory; and whether it does."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    names = [n for n in run.STREAMED.get(op.name, ()) if inputs.get(n) is not None]
    if not names or work.bytes > ONCE_AROUND * l2:
        return [inputs], work.bytes > ONCE_AROUND * l2
    size = sum(inputs[n].nbytes for n in names)
    count = max(1, min(-(-ONCE_AROUND * l2 // max(size, 1)) + 1, 64, int(LARGEST // max(size, 1))))
    return [inputs, *(inputs | {n: inputs[n].clone() for n in names} for _ in range(count - 1))], count > 1


def draw(op, case):
    """(inputs, scalars, the definition's results) of a case."""
    inputs, scalars = numpy_ops.sample(op, case)
    return inputs, scalars, run.definition(op, op.work(**case), inputs, scalars)


def ahead(cases, pool):
    """((op, kernel, case), a future of ``draw``) of each row; LOOK_AHEAD cases are drawn beside the GPU's work.

    Kernels of a case, which follow each other, share one."""
    todo = [(op, case, list(group)) for (op, case), group in groupby(cases, lambda x: (x[0], x[2]))]
    futures = deque()
    for i, (_, _, group) in enumerate(todo):
        while len(futures) <= LOOK_AHEAD and i + len(futures) < len(todo):
            futures.append(pool.submit(draw, *todo[i + len(futures)][:2]))
        future = futures.popleft()
        for row in group:
            yield row, future


def bench_case(op, kernel, case, drawn, limits, peers, tick=lambda name: None, without=()):
    """One row: a dict with ``failed``, or with the timing and everything a record holds. ``drawn``: a future of ``draw``.
    ``tick`` hears of each peer before its turn; those of ``without``, as "op:peer", have none."""
    work = op.work(**case)
    row = {"op": op, "kernel": kernel, "case": case, "work": work, "failed": "", "peers": []}

    def call_on(given):
        args = [*given.values(), *scalars.values()]
        return lambda: op.torch_call(*args, kernel.name)

    try:
        arrays, scalars, want = drawn.result()
        inputs = {n: x if x is None else from_numpy(x).cuda() for n, x in arrays.items()}
        result = call_on(inputs)()
        torch.cuda.synchronize()
        tensors = inputs if op.mutates else {}
        outs = [to_numpy(x.cpu()) for x in run._results(op, result, tensors)]
        row["failed"], row["error"] = run.judge(op, work, arrays, scalars, outs, want, bf16_weights=BF16_WEIGHTS,
                                                tensor_core=TENSOR_CORE if chip.current(0).e4m3 else 0.0)
        if row["failed"]:
            return row
        sets, row["cold"] = copies(op, work, inputs)
        row["timing"] = measure([call_on(x) for x in sets])
    except Exception as error:  # one kernel's failure is a row of the table; the bench goes on
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        return row
    row["peaks"] = limits
    for name, build in (peers.PEERS.get(op.name, {}) if peers else {}).items():
        if f"{op.name}:{name}" in without:
            continue
        tick(name)
        found = {"name": name}
        row["peers"].append(found)
        try:
            calls = [build(run_arguments(x, scalars)) for x in sets]
            first = calls[0]()
            difference = peers.difference(op, result, first, inputs)
            if not difference <= run.PEER_ERROR:
                raise ValueError(f"its result differs by {difference:.2g} of the norm")
            found["seconds_median"] = measure(calls, 15).median
            found["ratio"] = found["seconds_median"] / row["timing"].median
        except Exception as error:  # a peer may fail in any way: it is named, and the bench goes on
            found["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            if not answers():
                break
    return row


def run_arguments(inputs, scalars):
    from types import SimpleNamespace

    return SimpleNamespace(**inputs, **scalars)


def record(row, key, meta):
    """The row as one JSON object, as the CPU's (``bench.run.record``)."""
    op, case, t = row["op"], row["case"], row["timing"]
    scalars = {s.name: op.values(case)[s.name] for s in op.scalars}
    values = {
        "schema": run.SCHEMA, "op": op.name, "kernel": row["kernel"].name, "chip": key,
        "dims": run.dims_of(op, case),
        "dtypes": {n: x[0] for n, x in op.layout(case).items() if x}, "scalars": scalars,
        "seconds_median": t.median, "p10": t.p10, "p90": t.p90, "n": t.n, "flops": row["work"].flops, "bytes": row["work"].bytes,
        "error": row["error"], "ceilings": row["peaks"], "cache_state": "cold" if row["cold"] else "warm", **meta,
        "peers": row["peers"],
    }
    return {name: values[name] for name in run.FIELDS}


def floor_s(row):
    """Seconds at the chip's measured ceilings: bytes over the copy's, FLOPs over those of the operands' dtype."""
    fp8 = any(x and x[0] == "fp8" for n, x in row["op"].layout(row["case"]).items()) and "flops_fp8" in row["peaks"]
    flops = row["peaks"]["flops_fp8" if fp8 else "flops_bf16"]
    return max(row["work"].flops / flops, row["work"].bytes / row["peaks"]["bytes_copy"])


def show(console, done):
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, title="ratio: time of the best peer over ours",
                  title_justify="left")
    table.add_column("op and case", width=42, no_wrap=True)
    table.add_column("kernel", width=7, no_wrap=True)
    for name, width in (("us", 8), ("TFLOP/s", 7), ("GB/s", 5), ("floor%", 6)):
        table.add_column(name, justify="right", width=width, no_wrap=True)
    table.add_column("best peer", width=16, no_wrap=True)
    table.add_column("ratio", justify="right", width=5, no_wrap=True)
    shown = None
    for row in done:
        if row["op"] is not shown:
            table.add_row(Text(row["op"].name, "bold"))
            shown = row["op"]
        if row["failed"]:
            table.add_row(f" {row['case'].bench}", row["kernel"].name, Text("FAILED", "bold red"))
            continue
        t, work = row["timing"].median, row["work"]
        best = min((p for p in row["peers"] if "ratio" in p), key=lambda p: p["seconds_median"], default=None)
        table.add_row(f" {row['case'].bench}", row["kernel"].name, f"{t * 1e6:.1f}", f"{work.flops / t / 1e12:.1f}",
                      f"{work.bytes / t / 1e9:.0f}", f"{100 * floor_s(row) / t:.0f}",
                      *((best["name"], f"{best['ratio']:.2f}") if best else ("-", "-")))
    console.print(table)
    console.print("floor%: time at the measured copy bandwidth or matrix rate, whichever is longer, over the time taken",
                  style="dim")
    for row in done:
        if row["failed"]:
            console.print(f"FAILED {row['op'].name}, {row['case'].bench}: {row['failed']}", style="red")
    for reason in sorted({(r["op"].name, p["name"], p["reason"]) for r in done for p in r["peers"] if "reason" in p}):
        console.print("no time for {} by {}: {}".format(*reason), style="dim")


def answers():
    """Whether the GPU still works for this process: after an illegal address it does not."""
    try:
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


@contextmanager
def watched(hangs):
    """A function to call whenever work begins; ``hangs()`` is called once that is HANGS_S ago, from another thread."""
    timers = []

    def begin():
        end()
        timers.append(threading.Timer(HANGS_S, hangs))
        timers[-1].daemon = True
        timers[-1].start()

    def end():
        while timers:
            timers.pop().cancel()

    try:
        yield begin
    finally:
        end()


def main(ops=None, folder=None, peers=True, console=None, start=0, without=()):
    """Bench on the GPU; returns the rows. Records go to ``<folder>/<chip>.jsonl``, by default out/.

    A kernel or a peer that hangs, or breaks the GPU for this process, has no further rows of its op: a new process takes this
    one's place, so that the GPU is free. ``start``, its first row, and ``without``, as "op:kernel" or "op:peer", are for it.
    """
    console = console or Console(width=100)
    module = None
    if peers:
        module = import_module("kernomics.bench.gpu_peers")
    key, limits = chip_key(torch.cuda.get_device_name(0)), ceilings()
    shown = ", ".join(f"{n} {v / 1e12:.2f} T" for n, v in limits.items() if n.startswith(("bytes_copy", "flops")))
    console.print(f"{torch.cuda.get_device_name(0)} as {key}: {shown}/s")
    todo, done = list(rows(ops, chip.current(0).family)), []
    if not start:
        names = sorted({op.name for op, kernel, _ in todo if kernel.name == "triton"})
        compile_all([(name, compile_op, (name, chip.current(0))) for name in names], console)
    found = run.versions() | {"triton": import_module("triton").__version__, "cuda": torch.version.cuda or torch.version.hip}
    meta = {"versions": found, "commit": os.environ.get("KERNOMICS_COMMIT") or run.commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    path = Path(folder or "out") / f"{key}.jsonl"
    progress = Progress(TextColumn("{task.description:<62.62}"), BarColumn(15), MofNCompleteColumn(), TimeElapsedColumn(),
                        console=console, transient=True)
    at, actor, measured = 0, "", todo[start][0] if todo[start:] else None

    def finish():
        progress.stop()
        show(console, done)
        if made := sum(not row["failed"] for row in done):
            console.print(f"records of {made} rows in {path}", style="dim")

    def go_on(what, first):
        """The rows from ``first`` on in a new process, without the one at work."""
        name = todo[at][0].name
        console.print(f"{name}: {actor} {what}; a new process goes on without it", style="red")
        finish()
        sys.stdout.flush()
        flags = [*(f"--op={n}" for n in ops or ()), f"--results={path.parent}", *([] if peers else ["--no-peers"]),
                 f"--start={first}", *(f"--without={x}" for x in [*without, f"{name}:{actor}"])]
        os.execv(sys.executable, [sys.executable, "-m", "kernomics.bench.gpu", *flags])

    # A row whose peer hangs is timed anew: its record was not written.
    pool = ThreadPoolExecutor(LOOK_AHEAD)
    sys.setswitchinterval(1e-4)  # a launch waits no longer for those threads than the replay before it lasts
    with progress, watched(lambda: go_on("hangs", at + (actor == todo[at][1].name))) as begin, pool:
        task = progress.add_task("", total=len(todo), completed=start)
        for at, ((op, kernel, case), drawn) in enumerate(ahead(todo[start:], pool), start):
            title, actor = f"{op.name}: {case.bench}", kernel.name
            progress.update(task, description=title, completed=at)
            if f"{op.name}:{kernel.name}" in without:
                continue
            def tick(name, title=title):
                nonlocal actor
                actor = name
                begin()
                progress.update(task, description=f"{title}: {name}")

            begin()
            if op is not measured:  # a card at its power limit is the slower the longer it has worked
                limits, measured = ceilings(), op
            done.append(bench_case(op, kernel, case, drawn, limits, module, tick, without))
            if not done[-1]["failed"]:
                run.write([record(done[-1], key, meta)], path)  # at once, whatever comes
            if not console.is_terminal:  # no progress is seen there, and the table comes last
                time = f"{done[-1]['timing'].median * 1e6:.1f} us" if not done[-1]["failed"] else f"FAILED {done[-1]['failed']}"
                console.print(f"{at + 1}/{len(todo)} {title}, {kernel.name}: {time}")
            if not answers():
                go_on("broke the GPU for this process", at + 1)
            torch.cuda.empty_cache()
    finish()
    return done


def dry(ops=None, console=None):
    """Without a GPU: what would run, and that each kernel loads; returns the number of rows."""
    console = console or Console(width=100)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="cases of the GPU bench", title_justify="left")
    for name, least in (("op", 20), ("case", 1), ("kernels", 12)):
        table.add_column(name, no_wrap=True, min_width=least)
    for name in ("GFLOP", "MB"):
        table.add_column(name, justify="right", no_wrap=True, min_width=5)
    found, listed = list(rows(ops)), []
    for op, kernel, case in found:
        name = kernel.name
        try:
            kernel.load()
        except ImportError:
            if not kernel.native:
                raise
            name += " (not built)"
        if listed and listed[-1][1] is case:
            listed[-1][2].append(name)
        else:
            listed.append((op, case, [name]))
    for op, case, kernels in listed:
        work = op.work(**case)
        table.add_row(op.name, case.bench, ", ".join(kernels), *(f"{x:.{0 if x >= 10 else 2}f}"
                                                                 for x in (work.flops / 1e9, work.bytes / 1e6)))
    console.print(table)
    return len(found)


if __name__ == "__main__":  # make gpu: a machine that has no pydantic, which newer typer needs
    import argparse

    parser = argparse.ArgumentParser(description="Judge and time the GPU kernels.")
    parser.add_argument("--op", action="append", choices=ON_GPU, help="only this op; repeatable")
    parser.add_argument("--results", help="folder for <chip>.jsonl; by default out/")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--start", type=int, default=0, help="the first row, of those of all ops given")
    parser.add_argument("--without", action="append", default=[], help="op:kernel or op:peer to leave out; repeatable")
    parser.add_argument("--dry", action="store_true", help="list the rows and load each kernel, without a GPU")
    given = parser.parse_args()
    if given.dry:
        dry(given.op)
    elif not torch.cuda.is_available():
        sys.exit("bench: torch sees no GPU; --dry lists the rows")
    else:
        done = main(given.op, given.results, given.peers, None, given.start, given.without)
        sys.exit(bool(given.without) or any(row["failed"] for row in done))
