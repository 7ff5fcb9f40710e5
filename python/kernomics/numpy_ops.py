"""The ops on NumPy arrays: native CPU kernels or the definition, and inputs drawn from a case."""

import math
import os

import numpy as np

from kernomics import contract
from kernomics.contract import NAMES, OPS, ContractError
from kernomics.numerics import DTYPES, FP8, e4m3_encode

PERIOD = 2_097_143  # drawing is slow: samples repeat after this many elements, a prime, so that no two rows are equal
_BY_CODE = [DTYPES[name] for name in NAMES]
_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(n):
    """Threads of the CPU kernels for NumPy callers (torch callers: ``torch.set_num_threads``)."""
    global _threads
    if type(n) is not int or n < 1:
        raise ContractError(f"set_num_threads: n is {n!r}, expected a positive int")
    _threads = n


def get_num_threads():
    """Threads of the CPU kernels for NumPy callers."""
    return _threads


def scalar_codes(op, scalars):
    """Scalars as kernels take them: choices by their index, pairs flattened."""
    out = []
    for choices, v in zip(op.choices, scalars):
        if choices:
            out.append(choices[v])
        elif isinstance(v, tuple):
            out += v
        else:
            out.append(v)
    return out


def checked(op, tensors, scalars):
    """Bind a call and run the op's own checks; returns dims, codes, scalars."""
    dims, codes, scalars, _ = op.bind(*tensors, *scalars)
    if op.check is not None or op.check_data is not None:
        values = {**dims, **dict(zip((s.name for s in op.scalars), scalars))}
        if op.check is not None:
            contract._call(op.check, {"error": op.error, **values})
        if op.check_data is not None:
            contract._call(op.check_data, {"error": op.error, **values, **dict(zip(op.tensors, tensors))})
    return dims, codes, scalars


ABSENT = (0, 0, ())  # an optional tensor left out, see csrc/caster.h


def _view(x):
    return (x.__array_interface__["data"][0], contract.CODES[x.dtype], x.shape)


def refuse_layout(op, name, x):
    """Raise when argument ``name`` must be contiguous or writeable and is not."""
    if name in op.contiguous and not (x.flags.c_contiguous and x.flags.aligned):
        raise op.error(name, f"strided {x.strides}", "contiguous and aligned")
    if name in op.mutates and not x.flags.writeable:
        raise op.error(name, "read-only", "writeable")


def run(op, tensors, scalars, backend=None):
    """Run ``op`` on arrays: bind, check, choose a kernel, allocate, launch."""
    for name, x in zip(op.tensors, tensors):
        if not (x is None or isinstance(x, np.ndarray)):
            raise op.error(name, f"a {type(x).__module__}.{type(x).__qualname__}", f"a NumPy array ({op.tensors[name]})")
    dims, codes, scalars = checked(op, tensors, scalars)
    for name in op.contiguous | op.mutates:
        refuse_layout(op, name, tensors[list(op.tensors).index(name)])
    if op.host or backend == "reference":
        return define(op, tensors, scalars, dims, codes)
    kernel = op.choose("cpu", dims, backend)
    outs = [np.empty(shape, _BY_CODE[code]) for shape, _, code in op.shapes(dims, codes, scalars)]
    launch(op, kernel, tensors, outs, scalars, dims)
    return outs[0] if len(outs) == 1 else tuple(outs) if outs else None


def launch(op, kernel, tensors, outs, scalars, dims, threads=None):
    """Call a CPU kernel: inputs, outputs, workspace, scalars, threads. Strided inputs are copied first."""
    views, keep = [], []
    for x in tensors:
        if x is not None and not (x.flags.c_contiguous and x.flags.aligned):
            x = np.ascontiguousarray(x) if not x.flags.c_contiguous else x.copy()
        keep.append(x)
        views.append(ABSENT if x is None else _view(x))
    workspace = ABSENT
    if kernel.workspace is not None:
        space = np.empty(contract._call(kernel.workspace, {"dims": dims, "chip": None}), np.uint8)
        keep.append(space)
        workspace = _view(space)
    (kernel.function or kernel.load())(*views, *map(_view, outs), workspace, *scalar_codes(op, scalars), threads or _threads)


def define(op, tensors, scalars, dims, codes):
    """The definition's result, rounded to the declared dtypes."""
    result = op.define(**dict(zip(op.tensors, tensors)), **dict(zip((s.name for s in op.scalars), scalars)))
    if not op.outs:
        return None
    results = result if isinstance(result, tuple) else (result,)
    if op.host:
        return result
    with np.errstate(over="ignore", invalid="ignore"):
        outs = [
            r.astype(np.float32 if code < 2 and r.dtype != _BY_CODE[code] else r.dtype).astype(_BY_CODE[code])
            for r, (_, _, code) in zip(map(np.asarray, results), op.shapes(dims, codes, scalars))
        ]
    return outs[0] if len(outs) == 1 else tuple(outs)


def register():
    """Give every op its NumPy call."""
    for op in OPS.values():
        count = len(op.tensors)

        def call(*args, op=op, count=count):
            return run(op, args[:count], args[count:-1], args[-1])

        op.numpy_call = call
        op.public.__globals__["ARRAY"] = np.ndarray


def sample(op, case, seed=0, reuse=None):
    """Inputs (name -> array or None) and scalars (name -> value) of a case; the same seed, the same inputs.

    Arrays of ``reuse`` (name -> array) stand for inputs of that dtype and shape that no ``sample=`` of the op draws.
    """
    rng = np.random.default_rng(seed)
    values = op.values(case)
    inputs = {}
    for name, item in op.layout(case).items():
        if item is None:
            inputs[name] = None
            continue
        dtype, shape = item
        size = min(math.prod(shape), PERIOD)
        kept = (reuse or {}).get(name)
        if kept is not None and (kept.dtype, kept.shape) == (DTYPES[dtype], shape):
            inputs[name] = kept
        elif dtype == "fp8":  # values across the whole range, subnormals included, from a pool: encoding is slow in NumPy
            pool = e4m3_encode(rng.standard_normal(1 << 14) * np.exp2(rng.integers(-6, 7, 1 << 14)))
            inputs[name] = np.resize(pool[rng.integers(0, 1 << 14, size, dtype=np.uint16)], shape).view(FP8)
        elif dtype == "f32" and name.endswith("_scale"):
            inputs[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32) / 64
        elif dtype in ("f32", "bf16"):
            inputs[name] = np.resize(rng.standard_normal(size, np.float32).astype(DTYPES[dtype]), shape)
        else:
            inputs[name] = np.zeros(shape, DTYPES[dtype])
    if op.draw is not None:
        inputs |= contract._call(op.draw, {"rng": rng, **values})
    return inputs, {s.name: values[s.name] for s in op.scalars}


def sampled_rows(op, inputs, outs, count=64, seed=0):
    """Inputs and outputs cut down to at most ``count`` drawn rows, for judging large cases."""
    rng = np.random.default_rng(seed)
    if op.rows is None:
        return inputs, outs
    if callable(op.rows):
        inputs, select = op.rows(rng, inputs)
        return inputs, select(outs) if outs else outs

    def axis(spec):
        words = [d.text for d in spec.alternatives[0].dims]
        return words.index(op.rows) if op.rows in words else None

    sizes = [x.shape[axis(op.tensors[n])] for n, x in inputs.items() if x is not None and axis(op.tensors[n]) is not None]
    rows = np.sort(rng.choice(sizes[0], min(count, sizes[0]), replace=False))

    def cut(x, spec):
        return x if x is None or axis(spec) is None else np.take(x, rows, axis(spec))

    return {n: cut(x, op.tensors[n]) for n, x in inputs.items()}, [cut(x, s) for x, s in zip(outs, op.outs)]
