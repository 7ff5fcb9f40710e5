"""What the generic tests share: every (op, case), its inputs and its definition's result, and the machine's ISAs."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest

import kernomics
from kernomics import OPS, _cpu, numpy_ops
from kernomics.numerics import judge_default

# InferSim's measurements, where they lie beside the checkout and KERNOMICS_INFERSIM names no other place.
BESIDE = Path(__file__).resolve().parents[2] / "shared/data/infersim"
if BESIDE.is_dir():
    os.environ.setdefault("KERNOMICS_INFERSIM", str(BESIDE))

LONG_FLOPS, LONG_BYTES = 1e9, 2e7  # larger cases run in `make test-long` and in the bench; over 1 GFLOP on sampled rows


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the large cases too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="long case: make test-long")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skip)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: more than 1 GFLOP or 20 MB, run by make test-long")


def cases(native=True, small=False):
    """Parameters (op, case) for all cases; ``native`` those of ops with a CPU kernel, ``small`` one per op."""
    out = []
    for op in OPS.values():
        if native and not any(k.on == "cpu" for k in op.kernels):
            continue
        chosen = [c for c in op.cases if not c.bench] if small else op.cases
        for case in chosen[:1] if small else chosen:
            long = op.work(**case).flops > LONG_FLOPS or op.work(**case).bytes > LONG_BYTES
            out.append(pytest.param(op, case, id=f"{op.name}-{case.id}", marks=[pytest.mark.long] if long else []))
    return out


def copies(inputs):
    return {n: x if x is None else x.copy() for n, x in inputs.items()}


def results(op, inputs, result):
    """An op's results as a tuple; an op that mutates gives its changed argument."""
    if not op.outs:
        return tuple(inputs[n] for n in op.tensors if n in op.mutates)
    return result if isinstance(result, tuple) else (result,)


@functools.lru_cache(maxsize=4)
def drawn(name, index):
    op = OPS[name]
    return numpy_ops.sample(op, op.cases[index])


@functools.lru_cache(maxsize=4)
def wanted(name, index):
    """(inputs to judge by, select(outs), definition's results) of a case; long cases on sampled rows."""
    op = OPS[name]
    inputs, scalars = drawn(name, index)
    if op.work(**op.cases[index]).flops > LONG_FLOPS:
        rows = 16 if op.work(**op.cases[index]).bytes < LONG_BYTES * 10 else 3  # large weights make each row dear
        some, _ = numpy_ops.sampled_rows(op, inputs, [], rows)
        select = lambda outs: numpy_ops.sampled_rows(op, inputs, list(outs), rows)[1]  # noqa: E731
    else:
        some, select = copies(inputs), lambda outs: outs
    fresh = copies(some) if op.mutates else some
    return some | scalars, select, results(op, fresh, op.define(**fresh, **scalars))


def judge(op, got, want, inputs, name=None):
    """Fail with every measure that is over its bound."""
    measures = (op.judge or (lambda *a: judge_default(*a)))(tuple(got), tuple(want), inputs)
    over = {m: f"{v:.3g} > {bound:.3g}" for m, (v, bound) in measures.items() if not v <= bound}
    assert not over, f"{name or op.name}: {over}"


@pytest.fixture(autouse=True)
def restore():
    """Tests may change threads and ISA."""
    threads, isa = kernomics.get_num_threads(), _cpu.isa()
    yield
    kernomics.set_num_threads(threads)
    _cpu.use_isa(isa)


def poison(shape, code):
    """An output full of NaN (and of -1 where it holds integers)."""
    x = np.empty(shape, numpy_ops._BY_CODE[code])
    x.view(np.uint8)[...] = 0xFF if x.size else 0
    return x


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs a law on the definition and on the CPU kernels."""
    return request.param
