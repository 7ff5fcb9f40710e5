"""Kernel measurements in InferSim's layout (github.com/alibaba/InferSim, bench_data) as Tables.

    gemm/<chip>/data.csv                     m, k, n, latency_us                               fp8, 128 x 128 scales
    mla/decode/<chip>/<h>-512-64.csv         dtype, kv_dtype, batch_size, kv_len, latency_us
    mla/prefill/<chip>/<h>-128-64.csv        dtype, seq_len, latency_us                        one prompt
    mha/decode/<chip>/<h>-<kv_heads>-<head_dim>.csv, mha/prefill/...                           same columns
    grouped_gemm/<decode|prefill>/<chip>/data.csv   both products of a rank's experts, fp8, 128 x 128 scales

A grouped product's tokens are the rank's; here they count over all ranks. decode is the masked, prefill the contiguous
layout: variants ``balanced_decode`` and ``balanced_prefill``. The products alone are timed, without the activation between
them; the masked layout is what DeepEP's low-latency dispatch writes, so no permutation goes with it. A first line of numbers
is data under the usual columns.
"""

import csv
from functools import partial
from pathlib import Path

import numpy as np

from kernomics.cost import wrong
from kernomics.cost.tables import KINDS, Table, Tables

USUAL = {
    "gemm": ("m", "k", "n", "latency_us", "mfu"),
    "decode": ("dtype", "kv_dtype", "batch_size", "kv_len", "latency_us", "mfu"),
    "prefill": ("dtype", "seq_len", "latency_us", "mfu"),
    "experts": ("num_experts", "num_gpus", "num_local_experts", "topk", "hidden_size", "intermediate_size", "tokens",
                "tokens_per_expert", "up_proj_us", "up_mfu", "down_proj_us", "down_mfu"),
}


def chips(path):
    """The chips of the folder bench_data (or of the one above it), and that folder."""
    root = Path(path)
    root = root / "bench_data" if (root / "bench_data").is_dir() else root
    known = sorted({p.name for p in root.glob("gemm/*")} | {p.name for p in root.glob("*/*/*") if p.is_dir()})
    if not known:
        raise wrong("InferSim tables", str(path), "a folder with gemm/<chip>/data.csv")
    return known, root


def load(path, chip):
    """Tables of a chip from the folder bench_data (or the one above it); each kind is read when first asked for."""
    known, root = chips(path)
    if chip not in known:
        raise wrong("chip", chip, ", ".join(known))
    lazy = {}
    for kind, (pattern, read) in KINDS_OF.items():
        files = sorted(root.glob(pattern.format(chip=chip)))
        if files:
            lazy[chip, kind] = partial(_tables, root, chip, kind, files, read)
    return Tables(lazy=lazy)


def _tables(root, chip, kind, files, read):
    rows = {}
    for file in files:
        for dtype, variant, dims, us in read(file, file.relative_to(root).as_posix()):
            rows.setdefault((dtype, variant), []).append((dims, us / 1e6, file.parent.relative_to(root).as_posix()))
    for (dtype, variant), found in rows.items():
        dims = {d: np.array([r[d] for r, _, _ in found]) for d in KINDS[kind].dims}
        source = "InferSim " + ", ".join(dict.fromkeys(place for _, _, place in found))
        includes = ("permutation",) if variant == "balanced_decode" else ()
        yield Table(chip, kind, dtype, dims, np.array([s for _, s, _ in found]), source, variant=variant, includes=includes)


def _rows(file, name, usual):
    """(where, row) of a CSV; columns of numbers as numbers over 0."""
    lines = [line for line in csv.reader(file.open(newline="", encoding="utf-8")) if line]
    header = [h.strip() for h in lines[0]] if lines else []
    headed = set(header) & set(USUAL[usual])
    names, body, first = (header, lines[1:], 2) if headed else (USUAL[usual], lines, 1)
    for number, line in enumerate(body, first):
        where = f"{name} line {number}"
        if len(line) != len(names):
            raise wrong(f"{where}: number of columns", len(line), f"{len(names)}: {', '.join(names)}")
        row = {}
        for column, text in zip(names, line):
            if column.endswith("dtype"):
                row[column] = text.strip()
                continue
            try:
                row[column] = float(text)
            except ValueError:
                raise wrong(f"{where}: {column}", text, "a number") from None
            if row[column] <= 0 and not column.endswith("mfu"):
                raise wrong(f"{where}: {column}", text, "a number over 0")
        yield row


def _gemm(file, name):
    for r in _rows(file, name, "gemm"):
        yield "fp8_block", None, {"m": int(r["m"]), "n": int(r["n"]), "k": int(r["k"])}, r["latency_us"]


def _attention(file, name, kind):
    """The file is named after the heads, and for GQA after the heads of the cache and their width."""
    decode = kind.endswith("decode")
    h, kv_heads, head_dim = map(int, file.stem.split("-"))
    heads = {"h": h} if kind.startswith("mla") else {"h": h, "kv_heads": kv_heads, "head_dim": head_dim}
    for r in _rows(file, name, "decode" if decode else "prefill"):
        if decode:
            tokens = {"b": int(r["batch_size"]), "s": int(r["kv_len"])}
        else:
            tokens = {"b": 1, "t": int(r["seq_len"]), "prefix": 0}
        yield r["kv_dtype" if decode else "dtype"], None, tokens | heads, r["latency_us"]


def _moe(file, name):
    phase = file.parent.parent.name
    for r in _rows(file, name, "experts"):
        tokens = r.get("batch_size_per_gpu") or r.get("seq_len_per_gpu") or r.get("tokens")
        dims = {"t": tokens * r["num_gpus"], "d": r["hidden_size"], "n": r["intermediate_size"], "e": r["num_experts"],
                "top_k": r["topk"], "tp": 1, "ep": r["num_gpus"]}
        yield "fp8_block", f"balanced_{phase}", {d: int(v) for d, v in dims.items()}, r["up_proj_us"] + r["down_proj_us"]


KINDS_OF = {
    "gemm": ("gemm/{chip}/*.csv", _gemm),
    "mla_decode": ("mla/decode/{chip}/*.csv", partial(_attention, kind="mla_decode")),
    "mla_prefill": ("mla/prefill/{chip}/*.csv", partial(_attention, kind="mla_prefill")),
    "gqa_decode": ("mha/decode/{chip}/*.csv", partial(_attention, kind="gqa_decode")),
    "gqa_prefill": ("mha/prefill/{chip}/*.csv", partial(_attention, kind="gqa_prefill")),
    "moe": ("grouped_gemm/*/{chip}/*.csv", _moe),
}
