"""``python -m kernomics.bench.tiles``: how long calls take with other tiles than a kernel's ``tile`` function gives them.

On a GPU; each tile's result is compared with the chosen one's. ``bench/tiles/<chip>.jsonl`` holds what such runs found, which
the ``tile`` functions and the plans of the CUDA kernels name.
"""

import argparse
import itertools
import json
import os
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from kernomics.bench import gpu, run
from kernomics.triton_kernels import gemm, mla, warmup
from rich.console import Console

from kernomics import chip, numpy_ops
from kernomics.contract import OPS, Case
from kernomics.torch_ops import from_numpy

SAMPLES = 8


def instead(name, options, per_unit):
    """``gemm``'s function of that name gives these options, and ``per_unit`` that number."""
    return options | {"per_unit": per_unit}, [(gemm, name, lambda *_: dict(options)), (gemm, "per_unit", lambda *_: per_unit)]


def products(m, n, k, bm, bn, warps, stages, per_unit, unroll=1, group=8, tma=True, swap=False, parts=1):
    """(name, replacements) of a tile of ``fp8_gemm``; per_unit: programs of a multiprocessor."""
    steps = -(-k // 128)
    each = -(-steps // parts)
    options = {"BM": bm, "BN": bn, "BK": 128, "GROUP": group, "UNROLL": unroll, "TMA": tma, "SWAP": swap, "num_warps": warps,
               "num_stages": stages, "PARTS": -(-steps // each), "per_part": each}
    return instead("dense_tile", options, per_unit)


def dense():
    """Shapes and tiles of ``fp8_gemm``."""
    few = [dict(bm=16, bn=64, warps=4, stages=6, per_unit=3, swap=True)]
    some = [dict(bm=64, bn=64, warps=4, stages=5, per_unit=2), dict(bm=64, bn=128, warps=4, stages=4, per_unit=2)]
    many = [*some[1:], *(dict(bm=128, bn=128, warps=8, stages=3, per_unit=1, unroll=2, group=g) for g in (8, 16))]
    for m, tiles in ((1, few), (64, some), (128, [*some, *many[1:]]), (256, [*some, *many[1:]]), (4096, many)):
        for n, k in gpu.GEMMS:
            parts = (1, 2, 4, 8) if m < 4096 else (1,)
            yield Case(m=m, n=n, k=k), [products(m, n, k, **t, parts=p) for t in tiles for p in parts if k // 128 >= 2 * p]


def grouped():
    """Ops, shapes and tiles of grouped products; a tile stands for both products of ``moe_experts``."""
    fp8 = [(16, 64, 128, 4, 5, False, 3), (16, 64, 128, 4, 5, True, 3), (32, 64, 128, 4, 5, False, 3),
           (64, 128, 128, 4, 4, True, 2), (64, 128, 128, 8, 4, False, 2), (128, 128, 128, 8, 3, True, 1),
           (128, 128, 128, 8, 3, False, 1)]
    decoded = [(bm, bn, bk, warps, stages, False, each) for bm, bn, each in ((16, 64, 3), (32, 64, 3), (32, 128, 2), (64, 128, 2))
               for bk, warps, stages in ((64, 4, 5), (64, 8, 4), (128, 4, 4), (128, 8, 3))]
    for op in ("fp8_grouped_gemm", "moe_experts"):
        for case in (*gpu.CASES[op], *(c for c in OPS[op].cases if c.bench)):
            weight_only = case.get("activations") == "bf16"
            yield op, case, [
                instead("grouped_tile", {"BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "UNROLL": 2 if bm == 128 else 1, "TMA": tma,
                                         "SWAP": bm <= 32 or weight_only, "num_warps": warps, "num_stages": stages}, each)
                for bm, bn, bk, warps, stages, tma, each in (decoded if weight_only else fp8)]


def alone(op, name, values):
    """Replacements of a room's ``tile`` by each of the values."""
    module = import_module(f"kernomics.triton_kernels.{op}")
    return [({name: value}, [(module, name, lambda *_, value=value: value)]) for value in values]


def attention(units):
    """Shapes and tiles of ``mla_decode``: (rows, keys, operands, warps, stages, SWAP, EARLY, programs)."""
    large = [(64, keys, c, 8, stages, False, early, units)
             for keys, c, stages, early in itertools.product((32, 64), (1, 4), (1, 2), (True, False))]
    small = [(rows, keys, 4, warps, stages, swap, early, units * each) for rows, keys, warps, stages, swap, early, each in
             itertools.product((16, 32), (32, 64), (4, 8), (1, 2), (True, False), (True, False), (1, 2, 4))
             if keys == 32 or each < 4]
    for heads, kind, tiles in ((128, "bf16", large), (16, "bf16", small), (128, "u8", large), (32, "u8", small),
                               (16, "u8", [t for t in small if t[0] == 16])):
        case = gpu.decode(heads, **({"kv_cache": "u8"} if kind == "u8" else {}))
        yield case, [({"tile": t}, [(mla, "tile", lambda *_, t=t: t)]) for t in tiles]


def everything(units, ops=None):
    """(op's name, case, [(what the tile is, [(module, name, replacement)])]) of these ops, or of all."""
    return [row for row in all_ops(units) if not ops or row[0] in ops]


def all_ops(units):
    for case, tiles in dense():
        yield "fp8_gemm", case, tiles
    for case, tiles in attention(units):
        yield "mla_decode", case, tiles
    yield from grouped()
    for name, tiles in {
        "fp8_grouped_wgrad": [(32, 64, 64, 4, 2), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (128, 64, 64, 4, 2),
                              (32, 128, 64, 4, 2), (64, 128, 64, 8, 3), (64, 128, 128, 8, 2)],
        "mla_prefill": [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)],
        "fp8_quantize": [(16, 2, 4), (8, 2, 4), (4, 4, 4), (2, 8, 4), (1, 8, 4), (1, 8, 2), (2, 4, 2), (4, 2, 2)],
        "swiglu_quantize": [(8, 2, 4), (4, 2, 4), (2, 4, 4), (1, 8, 4), (4, 2, 2)],
        "mla_append_kv": [(4, 4), (8, 4), (2, 2), (1, 2), (2, 1), (1, 1)],
    }.items():
        for case in gpu.CASES.get(name) or [c for c in OPS[name].cases if c.bench]:
            yield name, case, alone(name, "tile", tiles)


@contextmanager
def replaced(changes):
    with ExitStack() as stack:
        for place in changes:
            stack.enter_context(patch.object(*place))
        yield


def compile_share(ops, target, share, shares):
    """Compile each ``shares``-th tile on ``target``, a chip.Chip, into Triton's cache on disk; how many launches."""
    found = 0
    for op, case, changes in [(OPS[name], case, changes) for name, case, tiles in everything(target.units, ops)
                              for _, changes in tiles][share::shares]:
        kernel = next(k for k in op.kernels if k.name == "triton")
        with replaced(changes):
            for launch in warmup.launches(op, kernel, case, target):
                try:
                    warmup.compiled(launch, target)
                    found += 1
                except Exception:  # no tile for this chip, as `times` finds again
                    pass
    return found


def times(op, case, tiles):
    """[(what the tile is, seconds, relative distance from the chosen tile's result)]; a tile that cannot run is left out."""
    arrays, scalars = numpy_ops.sample(op, case)
    inputs = {n: x if x is None else from_numpy(x).cuda() for n, x in arrays.items()}
    sets, _ = gpu.copies(op, op.work(**case), inputs)
    call = lambda given: (lambda: op.torch_call(*given.values(), *scalars.values(), "triton"))  # noqa: E731
    want, found = None, []
    for what, changes in [("chosen", []), *tiles]:
        try:
            with replaced(changes):
                out = call(inputs)()
                out = [inputs[n] for n in op.mutates] if op.mutates else out if isinstance(out, tuple) else (out,)
                out = [x.float() for x in out]
                want = want or out
                away = max(float((a - b).nan_to_num().norm() / b.nan_to_num().norm().clamp(min=1e-30)) for a, b in zip(out, want))
                found.append((what, gpu.measure([call(x) for x in sets], SAMPLES).median, away))
        except Exception as error:  # out of registers or shared memory: no tile for this chip
            print(f"{op.name} {what}: {type(error).__name__}")
    return found


def main():
    parser = argparse.ArgumentParser(description="Time a kernel's other tiles.")
    parser.add_argument("--op", action="append", help="only this op; repeatable")
    parser.add_argument("--results", default="bench/tiles", help="folder for <chip>.jsonl")
    given = parser.parse_args()
    key = gpu.chip_key(torch.cuda.get_device_name(0))
    meta = {"triton": import_module("triton").__version__, "commit": os.environ.get("KERNOMICS_COMMIT") or run.commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    target, shares = chip.current(0), 8 * (os.cpu_count() or 1)
    gpu.compile_all([("a tile", compile_share, (given.op, target, share, shares)) for share in range(shares)], Console(width=100))
    path = Path(given.results) / f"{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, case, tiles in everything(target.units, given.op):
        rows = times(OPS[name], case, tiles)
        with path.open("a") as file:
            for what, seconds, away in rows:
                file.write(json.dumps({"op": name, "kernel": "triton", "chip": key, "dims": run.dims_of(OPS[name], case),
                                       "dtypes": {n: x[0] for n, x in OPS[name].layout(case).items() if x}, "tile": what,
                                       "seconds_median": seconds, "difference": away, **meta}) + "\n")
        best = min(rows, key=lambda row: row[1])
        print(f"{name} {dict(case)}: {rows[0][1] * 1e6:.1f} us, at best {best[1] * 1e6:.1f} with {best[0]}")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
