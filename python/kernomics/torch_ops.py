"""The ops in PyTorch: ``torch.ops.kernomics.<op>``, made from the contracts when torch and kernomics are both imported.

For each op: a schema from the signature, a fake that checks the contract and allocates, and an implementation that
is the fake plus a launch over raw addresses.
"""

import functools
import os
import threading

import numpy as np
import torch

from kernomics import chip, contract, numpy_ops
from kernomics.contract import OPS, Dtypes
from kernomics.numerics import BF16, FP8

_BY_CODE = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.int64]
contract.CODES.update({dtype: code for code, dtype in enumerate(_BY_CODE)})
_NAMED = dict(zip(contract.NAMES, _BY_CODE))
CHECK = os.environ.get("KERNOMICS_CHECK") == "1"  # look at index data on GPUs too, which waits for them
_library = torch.library.Library("kernomics", "DEF")
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent without CUDA
_empty, _empty_strided, _threads = torch.empty, torch.empty_strided, torch.get_num_threads


# ---------------------------------------------------------------- arrays


def to_numpy(x):
    """The same memory as a NumPy array (bf16 and FP8 through ml_dtypes)."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(BF16)
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8).numpy().view(FP8)
    return x.numpy()


def from_numpy(x):
    """The same memory as a torch tensor."""
    x = x if x.flags.c_contiguous else np.ascontiguousarray(x)
    if x.dtype == BF16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    if x.dtype == FP8:
        return torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(x)


# ---------------------------------------------------------------- calls


def _checks(op, tensors, dims, scalars, data):
    values = {**dims, **dict(zip((s.name for s in op.scalars), scalars))}
    if op.check is not None:
        contract._call(op.check, {"error": op.error, **values})
    if data and op.check_data is not None:
        named = contract._parameters(op.check_data)
        values["error"] = op.error
        values.update((n, x if x is None else to_numpy(x.cpu())) for n, x in zip(op.tensors, tensors) if n in named)
        contract._call(op.check_data, values)


def _refuse_grad(op, tensors):
    for name, x in zip(op.tensors, tensors):
        if x is not None and x.requires_grad:
            raise op.error(name, "a tensor that requires grad", "no grad: this op has no backward yet (use torch.no_grad())")


def _refuse_layout(op, tensors):
    for name, x in zip(op.tensors, tensors):
        if name in op.contiguous and not x.is_contiguous():
            raise op.error(name, f"strided {tuple(x.stride())}", "contiguous")


def _run(op, tensors, scalars, backend):
    """A call on CPU tensors: bind, check, choose a kernel, allocate, launch over raw addresses."""
    dims, codes, scalars, sizes = op.bind(*tensors, *scalars)
    _checks(op, tensors, dims, scalars, True)
    _refuse_layout(op, tensors)
    if backend == "reference":
        return _reference(op, tensors, scalars, dims, codes)
    kernel = op.choose("cpu", dims, backend)
    views, outs, keep = [], [], []
    for x, code, size in zip(tensors, codes, sizes):
        if code < 0:
            views.append(numpy_ops.ABSENT)
            continue
        if not x.is_contiguous():
            x = x.contiguous()
            keep.append(x)  # alive until the launch
        views.append((x.data_ptr(), code, size))
    for shape, strides, code in op.shapes(dims, codes, scalars):
        x = _empty_strided(shape, strides, dtype=_BY_CODE[code]) if strides else _empty(shape, dtype=_BY_CODE[code])
        outs.append(x)
        views.append((x.data_ptr(), code, shape))
    if kernel.workspace is None:
        views.append(numpy_ops.ABSENT)
    else:
        space = _workspace(kernel.workspace(dims, None))
        views.append((space.data_ptr(), 3, space.shape))
    kernel.function(*views, *numpy_ops.scalar_codes(op, scalars), _threads())
    return outs[0] if len(outs) == 1 else tuple(outs) if outs else None


def _run_gpu(op, tensors, scalars, backend):
    """A call on GPU tensors: as ``_run``, with outputs and workspace from torch's caching allocator, on its stream."""
    dims, codes, scalars, _ = op.bind(*tensors, *scalars)
    _checks(op, tensors, dims, scalars, CHECK)
    _refuse_layout(op, tensors)
    device = tensors[0].device
    for name, x in zip(op.tensors, tensors):
        if x is not None and x.device != device:
            raise op.error(name, f"on {x.device}", f"on {device}, as {next(iter(op.tensors))} is")
    if backend == "reference":
        return _reference(op, tensors, scalars, dims, codes)
    gpu = chip.current(device.index)
    kernel = op.choose(gpu.family, dims, backend)
    with torch.cuda.device(device):
        given = [x if x is None else x.contiguous() for x in tensors]
        outs = [_empty(shape, dtype=_BY_CODE[code], device=device) for shape, _, code in op.shapes(dims, codes, scalars)]
        size = kernel.workspace(dims, gpu) if kernel.workspace else 0
        space = _empty(size, dtype=torch.uint8, device=device) if size else None
        launch(op, kernel, given, outs, space, scalars)
    return outs[0] if len(outs) == 1 else tuple(outs) if outs else None


def launch(op, kernel, given, outs, space, scalars):
    """Start a GPU kernel on torch's stream. A Triton kernel takes the tensors themselves: inputs, outputs, workspace (or None),
    scalars; a native one addresses (multiples of 16, for its widest loads), scalars by code, the stream."""
    if not kernel.native:
        return kernel.function(*given, *outs, space, *scalars)
    given = [x if x is None or x.data_ptr() % 16 == 0 else x.clone() for x in given]
    views = [numpy_ops.ABSENT if x is None else (x.data_ptr(), contract.CODES[x.dtype], tuple(x.shape))
             for x in (*given, *outs, space)]
    kernel.function(*views, *numpy_ops.scalar_codes(op, scalars), _stream(given[0].device.index))


def _reference(op, tensors, scalars, dims, codes):
    arrays = [x if x is None else to_numpy(x.cpu()) for x in tensors]
    result = numpy_ops.define(op, arrays, scalars, dims, codes)
    if result is None:  # the op has changed an argument: on the CPU in place
        for x, y in zip(tensors, arrays):
            if x is not None and x.device.type != "cpu":
                x.copy_(from_numpy(y))
        return None
    device = tensors[0].device
    outs = tuple(from_numpy(x).to(device) for x in (result if isinstance(result, tuple) else (result,)))
    return outs[0] if len(outs) == 1 else outs


_small = threading.local()


def _workspace(size):
    """Scratch memory: a thread's own kept buffers up to 1 MiB (an allocation costs microseconds), else fresh."""
    if size > 1 << 20:
        return _empty(size, dtype=torch.uint8)
    try:
        return _small.buffers[size]
    except (AttributeError, KeyError):
        kept = _small.__dict__.setdefault("whole", _empty(1 << 20, dtype=torch.uint8))
        buffers = _small.__dict__.setdefault("buffers", {})
        if len(buffers) > 1000:
            buffers.clear()
        buffers[size] = kept[:size]
        return buffers[size]


def _fake(op, tensors, scalars, backend):
    dims, codes, scalars, _ = op.bind(*tensors, *scalars)
    _checks(op, tensors, dims, scalars, False)
    device = tensors[0].device
    outs = [_empty(shape, dtype=_BY_CODE[code], device=device) for shape, _, code in op.shapes(dims, codes, scalars)]
    return outs[0] if len(outs) == 1 else tuple(outs) if outs else None


def _host(op, *args):
    """Host code: NumPy on the tensors' values, tensors back."""
    arrays = [x if x is None else to_numpy(x.cpu()) for x in args[: len(op.tensors)]]
    result = op.numpy_call(*arrays, *args[len(op.tensors):])
    return tuple(map(from_numpy, result)) if isinstance(result, tuple) else from_numpy(result)


# ---------------------------------------------------------------- schema


def _schema_type(scalar):
    """(torch schema type, default as schema text) of a scalar."""
    if isinstance(scalar.type, Dtypes):
        return "ScalarType?", "None"
    default = scalar.default
    if scalar.choices:
        return "str", f'"{default}"'
    if scalar.type is bool:
        return "bool", str(default)
    if scalar.type in (int, float):
        return scalar.type.__name__, repr(default)
    return f"int[{len(default)}]", str(list(default))


def schema(op):
    """The op's torch schema; every tensor stands before ``*``, optional ones too, as autograd needs."""
    words = []
    for name, spec in op.tensors.items():
        kind = "Tensor(a!)" if name in op.mutates else "Tensor?" if spec.optional else "Tensor"
        words.append(f"{kind} {name}{'=None' if spec.optional and not _required_after(op, name) else ''}")
    words.append("*")
    for s in op.scalars:
        kind, default = _schema_type(s)
        words.append(f"{kind} {s.name}{'' if s.required else '=' + default}")
    words.append("str? backend=None")
    outs = ", ".join(["Tensor"] * len(op.outs))
    return f"{op.name}({', '.join(words)}) -> {outs if len(op.outs) == 1 else f'({outs})'}"


def _required_after(op, name):
    names = list(op.tensors)
    return any(not op.tensors[n].optional for n in names[names.index(name) + 1:])


def _again(op, error, *args):
    """Turn torch's complaint about an argument's type into the contract's own; any other error passes."""
    if isinstance(error, (contract.ContractError, contract.NoKernel)):
        raise error
    for (name, spec), x in zip(op.tensors.items(), args):
        if not (isinstance(x, torch.Tensor) or (x is None and spec.optional)):
            raise op.error(name, f"a {type(x).__module__}.{type(x).__qualname__}", f"a torch tensor ({spec})") from None
    for s, v in zip(op.scalars, args[len(op.tensors):]):
        try:
            s.normalize(v)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise op.error(s.name, repr(v), s.expected) from None
    raise error


def _straight(op, kernel):
    """``bind`` and ``_run`` written out for an op with one CPU kernel: no loop and no inner call, half the time of a call.

    Names of its own begin with an underscore or are those of ``bind``'s source; no argument's name is either.
    """
    names, scalars = list(op.tensors), [s.name for s in op.scalars]
    listed, values = "".join(n + ", " for n in names), "".join(n + ", " for n in scalars)
    dims = "{" + ", ".join(f"'{d}': D_{d}" for d in op.dim_names) + "}"
    lines = ["try:", *(" " + step for step in op.steps), f" _ok = {op.checks}",
             "except (AttributeError, KeyError, ValueError, TypeError, IndexError): _ok = False",
             f"if not _ok: explain({listed}{values})"]
    if op.check is not None or op.check_data is not None:
        lines.append(f"checks(op, ({listed}), {dims}, ({values}), True)")
    for n in names:
        given = f"{n} is not None and " if op.tensors[n].optional else ""
        lines.append(f"if {given}not {n}.is_contiguous(): {n} = {n}.contiguous()")
    views = [f"({n}.data_ptr(), c{i}, s{i})" + (f" if {n} is not None else ABSENT" if op.tensors[n].optional else "")
             for i, n in enumerate(names)]
    for j, (shape, strides, code) in enumerate(op.out_sources):
        lines.append(f"_h{j} = {shape}; _k{j} = {code}; _o{j} = empty(_h{j}, {strides}, dtype=DTYPE[_k{j}])")
        views.append(f"(_o{j}.data_ptr(), _k{j}, _h{j})")
    if kernel.workspace is not None:
        lines.append(f"_w = workspace(space_of({dims}, None))")
        views.append("(_w.data_ptr(), 3, _w.shape)")
    else:
        views.append("ABSENT")
    for i, s in enumerate(op.scalars):
        views.append(f"CHOICE[{i}][{s.name}]" if s.choices else f"*{s.name}" if s.type not in (int, float, bool) else s.name)
    lines.append(f"kernel({', '.join(views)}, threads())")
    lines.append("return " + ("_o0" if len(op.outs) == 1 else f"({''.join(f'_o{j}, ' for j in range(len(op.outs)))})"))
    return "\n ".join(lines) + "\n"


def _make(op):
    """Three functions with the op's own parameters: implementation, fake, and the call from ``kernomics.<op>``."""
    names, scalars = list(op.tensors), [s.name for s in op.scalars]
    declare = [n + ("=None" if op.tensors[n].optional and not _required_after(op, n) else "") for n in names] + ["*"]
    for s in op.scalars:
        default = None if isinstance(s.type, Dtypes) else s.default
        declare.append(s.name if s.required else f"{s.name}={default!r}")
    unset = "".join(f" if {s.name} is None: {s.name} = {s.default!r}\n" for s in op.scalars if isinstance(s.type, Dtypes))
    tensors, values = "".join(n + ", " for n in names), "".join(n + ", " for n in scalars)
    passed = [f"{s.name}=" + (f"None if {s.name} == {s.default!r} else NAMED[{s.name}]" if isinstance(s.type, Dtypes) else s.name)
              for s in op.scalars]
    normal = "\n  ".join(op.normalize)
    grads = " or ".join(
        (f"({n} is not None and {n}.requires_grad)" if spec.optional else f"{n}.requires_grad")
        for n, spec in op.tensors.items() if {"f32", "bf16", "fp8"} & {t for alt in spec.alternatives for t in alt.dtypes})
    native = [k for k in op.kernels if k.on == "cpu"]
    known = all(strides != "None" for _, strides, _ in op.out_sources)  # leading dims: strides follow at the call
    straight = known and len(native) == 1 and native[0].where is None and not op.contiguous
    refuse = f" if ({grads}) and grad_enabled(): refuse_grad(op, ({tensors}))\n"
    head, passed_on = f"{', '.join(declare)}, backend=None", f"op, ({tensors}), ({values}), backend"
    source = (
        f"def cpu({head}):\n{unset}{refuse}"
        + (f" if backend is not None: return run({passed_on})\n {_straight(op, native[0])}" if straight
           else f" return run({passed_on})\n") +
        f"def cuda({head}):\n{unset}{refuse} return run_gpu({passed_on})\n"
        f"def fake({head}):\n{unset}{refuse} return fake_run({passed_on})\n"
        f"def call({tensors}{values}backend):\n try:\n  {normal or 'pass'}\n"
        f"  return overload({tensors}{', '.join([*passed, 'backend=backend'])})\n"
        f" except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error: again(error, {tensors}{values})\n"
    )

    def load(*args):  # the first call loads the kernel and takes this function's place
        scope["kernel"] = native[0].load()
        scope["kernel"](*args)

    scope = {
        "op": op, "run": _run, "run_gpu": _run_gpu, "fake_run": _fake, "checks": _checks, "again": functools.partial(_again, op),
        "grad_enabled": torch.is_grad_enabled, "refuse_grad": _refuse_grad,
        "explain": op.explain, "CODES": contract.CODES, "NAMES": contract.NAMES, "empty": _empty_strided,
        "workspace": _workspace, "threads": _threads,
        "kernel": load,
        "space_of": native[0].workspace if straight else None,
        "ABSENT": numpy_ops.ABSENT, "CHOICE": op.choices, "DTYPE": _BY_CODE, "NAMED": _NAMED, "INF": float("inf"),
    }
    scope.update({f"N{i}": s.normalize for i, s in enumerate(op.scalars)})
    exec(compile(source, f"<torch binding of {op.name}>", "exec"), scope)
    return scope


def _register():
    for op in OPS.values():
        if op.host:
            op.torch_call = functools.partial(_host, op)
            continue
        scope = _make(op)
        _library.define(schema(op), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(op.name, scope["cpu"], "CPU")
        _library.impl(op.name, scope["cuda"], "CUDA")
        torch.library.register_fake(f"kernomics::{op.name}", scope["fake"], lib=_library)
        scope["overload"] = getattr(torch.ops.kernomics, op.name).default
        op.torch_call = scope["call"]


_register()
