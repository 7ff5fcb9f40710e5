"""Kernel tables of an installed aiconfigurator-core (Apache-2.0) as Tables; nothing of it is imported or copied.

    systems/data/<system>/<family>/<framework>/<version>/<table>.parquet

Latencies there are milliseconds (DeepEP: microseconds). What its columns mean here:

- MLA and GQA decode: s = isl + step, the cached tokens with the new one; dtype is the cache's.
- MLA and GQA prefill: t = isl, prefix = step (0 in every table so far); dtype is the cache's, and where products in bf16
  and in fp8 were both measured on an fp8 cache the faster counts. num_heads are the rank's.
- MoE: t = num_tokens counts the tokens of all tp * ep ranks together; the seconds are those of one rank, the busiest
  under a power law. Variants: the distribution; with ``deepep_prefill_`` and ``deepep_decode_`` before it for SGLang's
  grouped products on tokens as DeepEP delivers them. All are whole calls, tokens in their own order in and out: with the
  activation and the permutation (SGLang's run_moe_core: ep_scatter, products, silu and quantize, ep_gather; in decode DeepEP
  delivers in expert order, and there is none). github.com/ai-dynamo/aiconfigurator, collector/sglang, read 2026-11-26.
- Collectives: message_size counts elements.
- DeepEP: t = tokens a rank, ranks = 8 a node; normal mode with 20 SMs, the library's default; dispatch in fp8,
  combine in bf16.

Per kind one framework answers: the one asked for, else the first of FRAMEWORKS that has the table. Of its versions the
newest counts; an older one fills dtypes, variants, shape classes and ranks that newer ones lack. Where several kernels
were measured at the same dims (TensorRT-LLM's NVFP4 experts), the fastest counts.
"""

import os
import re
from functools import partial
from importlib import util
from pathlib import Path

import numpy as np

from kernomics.cost import wrong
from kernomics.cost.interpolate import distinct
from kernomics.cost.tables import KINDS, Table, Tables, parquet

FRAMEWORKS = ("sglang", "trtllm", "vllm")
DTYPES = {"bfloat16": "bf16", "half": "bf16", "sq": "int8", "default": "bf16", "fp4": "nvfp4"}
SMS = 20  # DeepEP's default number of SMs in normal mode
RANKS_PER_NODE = 8
HOPPER = ("h100", "h200")
FAULTS = (  # (framework, kind, dtype, variant, chips, what to know); None: any
    ("sglang", "mla_decode", "fp8", None, HOPPER, "slower than on a bf16 cache, 5x in the median of large steps; TensorRT-LLM's "
     "takes 0.7x of bf16's"),
    ("sglang", "mla_prefill", None, None, HOPPER, "3x the seconds of TensorRT-LLM's, 170 against 530 TFLOP/s at 128 heads"),
    ("sglang", "moe", "fp8_block", "balanced", (*HOPPER, "b200"), "7168 x 2048 with 256 experts over several ep ranks takes "
     "1.2x to 1.9x of power_law_1.01"),
)


def systems(path=None):
    """The folder of systems: of ``path``, of the environment's KERNOMICS_AIC, or of the installed package; else None."""
    place = path or os.environ.get("KERNOMICS_AIC")
    if place is None:
        package = util.find_spec("aiconfigurator_core")
        place = package.submodule_search_locations[0] if package and package.submodule_search_locations else None
    if place is None:
        return None
    place = Path(place)
    return next((p for p in (place, place / "systems", place / "aiconfigurator_core" / "systems") if (p / "data").is_dir()), None)


def chips(path=None):
    """Chip -> its folder of tables."""
    root = systems(path)
    folders = sorted((root / "data").iterdir()) if root else []
    return {f.name.removesuffix("_sxm"): f for f in folders if any(f.glob("*/*/*/*.parquet"))}


def load(chip, path=None, framework=None):
    """Tables of a chip; each kind's files are read when it is first asked for.

    Raises CostError where aiconfigurator-core is not found, and for a chip or framework it has no tables of.
    """
    if systems(path) is None:
        raise wrong("aiconfigurator tables", path or os.environ.get("KERNOMICS_AIC"),
                    "an installed aiconfigurator-core, or the path of one by argument or KERNOMICS_AIC")
    known = chips(path)
    if chip not in known:
        raise wrong("chip", chip, ", ".join(known))
    if framework not in (None, *FRAMEWORKS):
        raise wrong("framework", framework, ", ".join(FRAMEWORKS))
    files = {kind: _files(known[chip], sources, [framework] if framework else FRAMEWORKS) for kind, sources in SOURCES.items()}
    return Tables(lazy={(chip, kind): partial(_read, chip, kind, found) for kind, found in files.items() if found})


class Source:
    """A table file: where it lies (``framework``: if always the same), and what makes tables of its columns."""

    def __init__(self, family, file, decode, framework=None):
        self.family, self.file, self.decode, self.framework = family, file, decode, framework


def _files(folder, sources, frameworks):
    """(source, file) of the first framework that has any, with those of no framework; newest versions first."""
    shared = [(s, f) for s in sources if s.framework for f in _versions(folder, s, s.framework)]
    own = ([(s, f) for s in sources if not s.framework for f in _versions(folder, s, name)] for name in frameworks)
    return next(filter(None, own), []) + shared


def _versions(folder, source, framework):
    """The source's files of a framework, newest version first."""
    found = (folder / source.family / framework).glob(f"*/{source.file}.parquet")
    return sorted(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.parent.name)], reverse=True)


def _read(chip, kind, files):
    """Tables of a kind from its files, the first of which count most."""
    spec = KINDS[kind]
    apart = [d for d in spec.dims if d in spec.classes or d == "ranks"]  # what an older version may fill
    rows, seen = {}, set()
    for source, file in files:
        frame = parquet().read_table(file)
        new = set()
        for dtype, variant, dims, seconds in source.decode(Columns(frame)):
            labels = [f"{dtype} {variant} {' '.join(map(str, key))}" for key in zip(*(dims[d] for d in apart))] if apart else (
                [f"{dtype} {variant}"] * len(seconds))
            take = np.array([label not in seen for label in labels], dtype=bool) & (seconds > 0)
            new.update(labels)
            if take.any():
                where = f"{file.parent.parent.name} {file.parent.name} {file.stem}"
                rows.setdefault((dtype, variant), []).append((where, {d: v[take] for d, v in dims.items()}, seconds[take]))
        seen |= new
    for (dtype, variant), parts in rows.items():
        wheres = dict.fromkeys(where for where, _, _ in parts)
        note = "; ".join(text for framework, k, d, v, on, text in FAULTS if k == kind and d in (None, dtype)
                         and v in (None, variant) and chip in on and any(w.startswith(framework) for w in wheres))
        x, seconds = distinct(np.stack([np.concatenate([p[1][d] for p in parts]) for d in spec.dims], 1),
                              np.concatenate([p[2] for p in parts]))
        source = "aiconfigurator " + ", ".join(wheres)
        includes = ("activation", "permutation") if kind == "moe" else ()
        yield Table(chip, kind, dtype, dict(zip(spec.dims, x.T)), seconds, source, variant=variant, note=note, includes=includes)


class Columns:
    """Columns of a Parquet table as NumPy arrays; labels as (code of each row, names)."""

    def __init__(self, frame):
        self.frame = frame

    def __contains__(self, column):
        return column in self.frame.column_names

    def __getitem__(self, column):
        return self.frame[column].to_numpy()

    def labels(self, column):
        coded = self.frame[column].combine_chunks().dictionary_encode()
        return coded.indices.to_numpy(), [DTYPES.get(name, name) for name in map(str, coded.dictionary.to_pylist())]

    def split(self, dtype, variant, dims, seconds):
        """(dtype, variant, dims, seconds) for each pair of dtype and variant labels."""
        (i, dtypes), (j, variants) = dtype, variant
        pair = i * len(variants) + j
        for p in np.unique(pair):
            rows = pair == p
            yield dtypes[p // len(variants)], variants[p % len(variants)], {d: v[rows] for d, v in dims.items()}, seconds[rows]

    def same(self, name):
        """Labels of a column that has one name throughout."""
        return np.zeros(self.frame.num_rows, dtype=int), [name]


def _gemm(c):
    return c.split(c.labels("gemm_dtype"), c.same(None), {d: c[d] for d in "mnk"}, c["latency"] / 1e3)


def _mla_decode(c):
    dims = {"b": c["batch_size"], "s": c["isl"] + c["step"], "h": c["num_heads"]}
    return c.split(c.labels("kv_cache_dtype"), c.same(None), dims, c["latency"] / 1e3)


def _mla_prefill(c):
    dims = {"b": c["batch_size"], "t": c["isl"], "prefix": c["step"], "h": c["num_heads"]}
    return c.split(c.labels("kv_cache_dtype"), c.same(None), dims, c["latency"] / 1e3)


def _windows(c):
    if "window_size" not in c:
        return c.same(None)
    widths, codes = np.unique(c["window_size"], return_inverse=True)
    return codes.reshape(-1), [f"window_{w}" if w else None for w in widths]


def _gqa(c, decode):
    heads = {"h": c["num_heads"], "kv_heads": c["num_key_value_heads"], "head_dim": c["head_dim"]}
    tokens = {"s": c["isl"] + c["step"]} if decode else {"t": c["isl"], "prefix": c["step"]}
    return c.split(c.labels("kv_cache_dtype"), _windows(c), {"b": c["batch_size"], **tokens, **heads}, c["latency"] / 1e3)


def _moe(c, phase=""):
    dims = {"t": "num_tokens", "d": "hidden_size", "n": "inter_size", "e": "num_experts", "top_k": "topk",
            "tp": "moe_tp_size", "ep": "moe_ep_size"}
    codes, names = c.labels("distribution")
    return c.split(c.labels("moe_dtype"), (codes, [phase + n for n in names]), {d: c[v] for d, v in dims.items()},
                   c["latency"] / 1e3)


def _width(c, column):
    codes, names = c.labels(column)
    return np.array([{"int8": 1}.get(n, 2) for n in names])[codes]


def _nccl(c, op):
    rows = c.frame.filter(np.array(c.frame["op_name"].to_pylist()) == op)
    c = Columns(rows)
    dims = {"bytes": c["message_size"] * _width(c, "nccl_dtype"), "ranks": c["num_gpus"]}
    return c.split(c.labels("nccl_dtype"), c.same("nccl"), dims, c["latency"] / 1e3)


def _custom(c):
    dims = {"bytes": c["message_size"] * 2, "ranks": c["num_gpus"]}
    codes, names = c.labels("backend") if "backend" in c else c.same("custom")
    names = ["custom_" + n.split("_")[-1] if "_" in n else n for n in names]
    return c.split(c.labels("allreduce_dtype"), (codes, names), dims, c["latency"] / 1e3)


def _deepep(c, phase, mode):
    dims = {"t": c["num_token"], "d": c["hidden_size"], "top_k": c["num_topk"], "e": c["num_experts"],
            "ranks": c["node_num"] * RANKS_PER_NODE}
    if mode == "low_latency":
        seconds, rows = c[f"{phase}_avg_t_us"] / 1e6, slice(None)
    else:
        seconds = (c[f"{phase}_transmit_us"] + c[f"{phase}_notify_us"]) / 1e6
        rows = c[f"{phase}_sms"] == SMS
    yield "fp8" if phase == "dispatch" else "bf16", mode, {d: v[rows] for d, v in dims.items()}, seconds[rows]


def _a2a(c, phase):
    c = Columns(c.frame.filter(np.array(c.frame["phase"].to_pylist()) == phase))
    dims = {"t": c["num_tokens"], "d": c["hidden_size"], "top_k": c["topk"], "e": c["num_experts"], "ranks": c["ep_size"]}
    codes, names = c.labels("comm_backend")
    modes = {"ht": "normal", "ll": "low_latency"}
    variants = [modes.get(n.split("_")[-1], n) for n in names]
    return c.split(c.labels("comm_dtype"), (codes, variants), dims, c["latency"] / 1e6)


def _exchange(phase):
    return [Source("comm", "wideep_deepep_normal_perf", partial(_deepep, phase=phase, mode="normal")),
            Source("comm", "wideep_deepep_ll_perf", partial(_deepep, phase=phase, mode="low_latency")),
            Source("comm", "moe_a2a_perf", partial(_a2a, phase=phase))]


def _collective(op):
    return [Source("comm", "nccl_perf", partial(_nccl, op=op), framework="nccl")]


SOURCES = {
    "gemm": [Source("gemm", "gemm_perf", _gemm)],
    "mla_decode": [Source("mla", "generation_mla_perf", _mla_decode)],
    "mla_prefill": [Source("mla", "context_mla_perf", _mla_prefill)],
    "gqa_decode": [Source("attention", "generation_attention_perf", partial(_gqa, decode=True))],
    "gqa_prefill": [Source("attention", "context_attention_perf", partial(_gqa, decode=False))],
    "moe": [Source("moe", "moe_perf", _moe),
            Source("moe", "wideep_context_moe_perf", partial(_moe, phase="deepep_prefill_")),
            Source("moe", "wideep_generation_moe_perf", partial(_moe, phase="deepep_decode_"))],
    "all_reduce": [Source("comm", "custom_allreduce_perf", _custom), *_collective("all_reduce")],
    "all_gather": _collective("all_gather"),
    "reduce_scatter": _collective("reduce_scatter"),
    "all_to_all": _collective("alltoall"),
    "dispatch": _exchange("dispatch"),
    "combine": _exchange("combine"),
}
