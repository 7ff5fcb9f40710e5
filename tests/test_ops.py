"""Every op x kernel x case against the op's definition, and what every op promises: contract, fake, errors, strides."""

import itertools

import numpy as np
import pytest
import torch

import kernomics
from conftest import LONG_FLOPS, cases, copies, drawn, judge, poison, results, wanted
from kernomics import OPS, ContractError, NoKernel, _cpu, numpy_ops
from kernomics.contract import ITEMSIZE, NAMES
from kernomics.numerics import DTYPES
from kernomics.torch_ops import from_numpy, to_numpy

NATIVE = [op for op in OPS.values() if any(k.on == "cpu" for k in op.kernels)]
DEVICE = [op for op in OPS.values() if not op.host]


def small(op):
    """Index of a small case that is not empty."""
    for i, c in enumerate(op.cases):
        if not c.bench and all(min(x[1], default=1) > 0 for x in op.layout(c).values() if x) and op.work(**c).flops < 1e7:
            return i
    raise AssertionError(f"{op.name} has no small case")


def same_bits(a, b):
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("op, case", cases())
def test_value(op, case):
    """On every ISA of the machine the kernel gives the definition's values, writes every element, and gives the same
    bits for any thread count. The largest cases run on the best ISA alone."""
    index = op.cases.index(case)
    inputs, scalars = drawn(op.name, index)
    _, _, values = numpy_ops.checked(op, list(inputs.values()), list(scalars.values()))
    given, select, want = wanted(op.name, index)
    flops = op.work(**case).flops
    isas, counts = _cpu.isas()[-1 if flops > 50 * LONG_FLOPS else 0:], (1, 3) if flops > LONG_FLOPS else (1, 2, 3)
    for isa, threads in itertools.product(isas, counts):
        _cpu.use_isa(isa)
        mine = copies(inputs) if op.mutates else inputs
        dims, codes, _, _ = op.bind(*mine.values(), *values)
        outs = [poison(shape, code) for shape, _, code in op.shapes(dims, codes, values)]
        numpy_ops.launch(op, op.kernels[-1], list(mine.values()), outs, values, dims, threads)
        got = results(op, mine, tuple(outs))
        if threads == 1:
            first = got
            judge(op, select(got), want, given, f"{op.name} on {isa}")
        else:
            assert same_bits(first, got), f"{isa}: {threads} threads give other bits than one"


@pytest.mark.parametrize("op, case", cases(native=False))
def test_contract_describes_the_definition(op, case):
    """Shapes of the definition's results are those that the signature states; work is not negative."""
    work = op.work(**case)
    assert work.flops >= 0 and work.bytes >= 0
    if work.flops > 1e8 or op.host:
        return
    inputs, scalars = drawn(op.name, op.cases.index(case))
    dims, codes, values, _ = op.bind(*inputs.values(), *scalars.values())
    for name, item in op.layout(case).items():
        assert (inputs[name] is None) == (item is None)
        if item:
            assert (DTYPES[item[0]], item[1]) == (inputs[name].dtype, inputs[name].shape), name
    if op.outs:
        want = wanted(op.name, op.cases.index(case))[2]
        assert [x.shape for x in want] == [shape for shape, _, _ in op.shapes(dims, codes, values)]


@pytest.mark.parametrize("op", DEVICE, ids=lambda op: op.name)
def test_cases_cover(op):
    """Each op has cases for the bench, for odd sizes, for one token and for nothing."""
    sizes = [{n: x[1] for n, x in op.layout(c).items() if x} for c in op.cases]
    assert any(0 in shape for case in sizes for shape in case.values()), "no empty case"
    assert any(not c.bench for c in op.cases)
    assert sum(bool(c.bench) for c in op.cases) >= 2 or op.name.endswith("_backward"), "no decode and prefill bench case"
    assert len({c.id for c in op.cases}) == len(op.cases)


# ---------------------------------------------------------------- call forms


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
def test_call_forms(op):
    """NumPy in gives NumPy out, torch in torch out, with the same bits; the reference form gives the definition."""
    inputs, scalars = drawn(op.name, small(op))
    torch.set_num_threads(2)
    mine = copies(inputs)
    by_numpy = results(op, mine, op(**mine, **scalars))
    tensors = {n: x if x is None else from_numpy(x.copy()) for n, x in inputs.items()}
    out = op(**tensors, **scalars)
    by_torch = results(op, tensors, out)
    assert all(isinstance(x, torch.Tensor) for x in by_torch)
    assert same_bits(by_numpy, [to_numpy(x) for x in by_torch])
    packet = getattr(torch.ops.kernomics, op.name)
    tensors = {n: x if x is None else from_numpy(x.copy()) for n, x in inputs.items()}
    words = {s.name: getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[v]) if s.choices == ("bf16", "f32") else v
             for s, v in zip(op.scalars, scalars.values())}
    assert same_bits(by_numpy, [to_numpy(x) for x in results(op, tensors, packet(*tensors.values(), **words))])
    mine = copies(inputs)
    definition = results(op, mine, getattr(kernomics.reference, op.name)(**mine, **scalars))
    mine = copies(inputs)
    rounded = results(op, mine, op(**mine, **scalars, backend="reference"))
    for x, y in zip(definition, rounded):
        assert x.shape == y.shape
    tensors = {n: x if x is None else from_numpy(x.copy()) for n, x in inputs.items()}
    forced = results(op, tensors, op(**tensors, **scalars, backend="reference"))
    assert same_bits(rounded, [to_numpy(x) for x in forced])


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
def test_no_kernel_says_why(op):
    inputs, scalars = drawn(op.name, small(op))
    with pytest.raises(NoKernel) as refusal:
        op(**copies(inputs), **scalars, backend="quantum")
    for kernel in op.kernels:
        assert f"{kernel.name}: " in str(refusal.value)
    assert "reference" in str(refusal.value) and op.name in str(refusal.value)


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
def test_strides(op):
    """Inputs that are not contiguous give the same bits, or are refused by name; they are never misread."""
    inputs, scalars = drawn(op.name, small(op))
    mine = copies(inputs)
    want = results(op, mine, op(**mine, **scalars))
    for name, x in inputs.items():
        if x is None or x.ndim == 0:
            continue
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        for library in ("numpy", "torch"):
            mine = copies(inputs)
            mine[name] = wide[..., ::2]
            if library == "torch":
                mine = {n: v if v is None else from_numpy(v) for n, v in mine.items()}
                mine[name] = from_numpy(wide)[..., ::2]
            if name in op.contiguous:
                with pytest.raises(ContractError, match=f"{op.name}: {name} is strided"):
                    op(**mine, **scalars)
                continue
            got = results(op, mine, op(**mine, **scalars))
            assert same_bits(want, [to_numpy(v) if library == "torch" else v for v in got]), (name, library)


# ---------------------------------------------------------------- torch


@pytest.mark.parametrize("op", [op for op in NATIVE if not op.host], ids=lambda op: op.name)
def test_opcheck(op):
    inputs, scalars = drawn(op.name, small(op))
    tensors = [x if x is None else from_numpy(x.copy()) for x in inputs.values()]
    words = {s.name: getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[v]) if s.choices == ("bf16", "f32") else v
             for s, v in zip(op.scalars, scalars.values())}
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(x is not None and x.dtype == torch.float8_e4m3fn for x in tensors):
        tests.append("test_schema")  # torch 2.13 cannot compare FP8 tensors on the CPU
    torch.library.opcheck(getattr(torch.ops.kernomics, op.name).default, tuple(tensors), words, test_utils=tests)


@pytest.mark.parametrize("op, case", cases())
def test_fake(op, case):
    """A fake of the torch op has the shapes, dtypes and strides of the real one."""
    if op.work(**case).flops > 1e8 or op.host:
        return
    inputs, scalars = drawn(op.name, op.cases.index(case))
    words = {s.name: getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[v]) if s.choices == ("bf16", "f32") else v
             for s, v in zip(op.scalars, scalars.values())}
    packet = getattr(torch.ops.kernomics, op.name)
    real = packet(*[x if x is None else from_numpy(x.copy()) for x in inputs.values()], **words)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = packet(*[x if x is None else mode.from_tensor(from_numpy(x.copy())) for x in inputs.values()], **words)
    real, fake = (x if isinstance(x, tuple) else (x,) if x is not None else () for x in (real, fake))
    assert [(x.shape, x.dtype, x.stride()) for x in real] == [(x.shape, x.dtype, x.stride()) for x in fake]


@pytest.mark.parametrize("op", [op for op in NATIVE if not op.host], ids=lambda op: op.name)
def test_compile(op):
    inputs, scalars = drawn(op.name, small(op))
    tensors = [x if x is None else from_numpy(x.copy()) for x in inputs.values()]

    def body(*args):
        return op.public(*args, **scalars) if op.outs else (op.public(*args, **scalars), args[2])[1]

    torch._dynamo.reset()
    positional = [p.name for p in op.parameters if p.kind != p.KEYWORD_ONLY]
    if len(positional) < len(tensors):  # optional tensors behind the star go by keyword
        rest = [n for n in op.tensors if n not in positional]

        def body(*args):  # noqa: F811
            named = dict(zip(op.tensors, args))
            out = op.public(*[named[n] for n in positional], **{n: named[n] for n in rest}, **scalars)
            return out if op.outs else named["kv_cache"]

    compiled = torch.compile(body, fullgraph=True, dynamic=True, backend="aot_eager")
    want = results(op, {}, body(*[x if x is None else x.clone() for x in tensors])) if op.outs else (
        body(*[x if x is None else x.clone() for x in tensors]),)
    got = compiled(*[x if x is None else x.clone() for x in tensors])
    got = got if isinstance(got, tuple) else (got,)
    assert same_bits([to_numpy(x) for x in want], [to_numpy(x) for x in got])


@pytest.mark.parametrize("op", [op for op in NATIVE if not op.host], ids=lambda op: op.name)
def test_grad_is_refused(op):
    """Without a backward an input that requires grad raises; under no_grad it runs."""
    inputs, scalars = drawn(op.name, small(op))
    for name, x in inputs.items():
        if x is None or x.dtype.kind in "iu" or name in op.mutates:
            continue
        tensors = {n: v if v is None else from_numpy(v.copy()) for n, v in inputs.items()}
        tensors[name].requires_grad_()
        with pytest.raises(ContractError, match=f"{name} is a tensor that requires grad"):
            op(**tensors, **scalars)
        with torch.no_grad():
            op(**tensors, **scalars)


# ---------------------------------------------------------------- bad input


def call_both(op, inputs, scalars):
    """Call with NumPy arrays and with torch tensors; returns the two errors (None where the call went through)."""
    errors = []
    for library in ("numpy", "torch"):
        args = dict(inputs)
        if library == "torch":
            try:
                args = {n: from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for n, x in args.items()}
            except TypeError:
                continue  # a dtype torch has not
        else:
            args = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in args.items()}
        try:
            op(**args, **scalars)
            errors.append(None)
        except (ContractError, NoKernel) as error:
            errors.append(error)
    return errors


@pytest.mark.parametrize("op", DEVICE, ids=lambda op: op.name)
def test_bad_tensors(op):
    """Wrong kind, dtype, rank and size of every tensor: the error names op, argument, got and expected."""
    inputs, scalars = drawn(op.name, small(op))
    backend = {} if op in NATIVE else {"backend": "reference"}
    for name, x in inputs.items():
        if x is None:
            continue
        accepted = {t for alt in op.tensors[name].alternatives for t in alt.dtypes}
        bad = [np.zeros(x.shape, np.float16), np.zeros(x.shape, DTYPES[next(n for n in NAMES if n not in accepted)]),
               x[None][None], x.ravel()[:1].reshape(()) if x.size else x[None, None]]
        bad += [[1.0], 3, "tensor"] + ([] if op.tensors[name].optional else [None])
        for wrong in bad:
            for error in call_both(op, inputs | {name: wrong}, scalars | backend):
                assert isinstance(error, ContractError), (name, type(wrong), getattr(wrong, "shape", None), error)
                assert str(error).startswith(f"{op.name}: ") and ", expected " in str(error)
        for axis in range(x.ndim):
            grown = np.concatenate([x, np.take(x, [0], axis)], axis)
            for error in call_both(op, inputs | {name: grown}, scalars | backend):
                # A dim that only this argument binds may grow; everything else is refused.
                assert error is None or ", expected " in str(error), (name, axis, error)


@pytest.mark.parametrize("op", DEVICE, ids=lambda op: op.name)
def test_every_size_is_checked(op):
    """For every tensor some grown axis is refused, unless no other argument shares a dim with it."""
    inputs, scalars = drawn(op.name, small(op))
    backend = {} if op in NATIVE else {"backend": "reference"}
    for name, x in inputs.items():
        if x is None:
            continue
        words = [d for d in op.tensors[name].alternatives[0].dims if d.kind != "lead"]
        for axis, word in enumerate(words, start=x.ndim - len(words)):
            others = {w.a for n, s in op.tensors.items() if n != name and inputs[n] is not None
                      for alt in s.alternatives for w in alt.dims}
            if word.kind == "int" or (word.kind in ("name", "times") and (word.binds in others or word.binds in op.keyword_dims)):
                grown = np.concatenate([x, np.take(x, [0], axis)], axis)
                errors = call_both(op, inputs | {name: grown}, scalars | backend)
                # ceil(k/128) does not notice every k: growing k by one may be another valid call.
                only_ceil = all(w.kind == "ceil" for n, s in op.tensors.items() if n != name and inputs[n] is not None
                                for w in s.alternatives[0].dims if w.a == word.binds)
                assert only_ceil or all(isinstance(e, ContractError) for e in errors), (name, axis, word.text, errors)


@pytest.mark.parametrize("op", DEVICE, ids=lambda op: op.name)
def test_bad_scalars(op):
    inputs, scalars = drawn(op.name, small(op))
    backend = {} if op in NATIVE else {"backend": "reference"}
    wrong = {int: ["x", 1.5, None, -(2**40)], float: ["x", float("nan"), float("inf"), None], bool: ["yes", 1.5, None]}
    for s in op.scalars:
        values = ["no such choice", 7, 1.5] if s.choices else wrong.get(s.type, ["x", (0, 128), (1, 2, 3), 5])
        for value in values:
            for error in call_both(op, inputs, scalars | {s.name: value} | backend):
                assert isinstance(error, ContractError), (s.name, value, error)
                assert str(error).startswith(f"{op.name}: {s.name} is ") and ", expected " in str(error), error


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
def test_wild_indices(op):
    """Index data of any value raises a ContractError or gives what the definition gives; it never crashes."""
    inputs, scalars = drawn(op.name, small(op))
    for name, x in inputs.items():
        if x is None or x.dtype.kind != "i":
            continue
        top = np.iinfo(x.dtype).max
        for value, where in itertools.product((-2, -top, top, 10**6), ("first", "last", "all")):
            wild = x.copy()
            wild[(0,) * x.ndim if where == "first" else (-1,) * x.ndim if where == "last" else ...] = value
            mine, again = copies(inputs | {name: wild}), copies(inputs | {name: wild})
            try:
                got = results(op, mine, op(**mine, **scalars))
            except ContractError as error:
                assert name in str(error) or "cu_" in str(error), error
                with pytest.raises(ContractError):
                    op(**copies(inputs | {name: wild}), **scalars, backend="reference")
                continue
            want = results(op, again, op.define(**again, **scalars))
            judge(op, got, want, inputs | {name: wild} | scalars)


@pytest.mark.parametrize("op", DEVICE, ids=lambda op: op.name)
def test_bytes_count_every_tensor(op):
    """Default byte counts are inputs plus outputs."""
    if op._bytes is not None:
        return
    case = op.cases[small(op)]
    inputs, scalars = drawn(op.name, small(op))
    dims, codes, values, _ = op.bind(*inputs.values(), *scalars.values())
    total = sum(x.nbytes for x in inputs.values() if x is not None)
    total += sum(int(np.prod(shape)) * ITEMSIZE[NAMES[code]] for shape, _, code in op.shapes(dims, codes, values))
    assert op.work(**case).bytes == total
