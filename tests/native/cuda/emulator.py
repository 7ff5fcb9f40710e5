"""What the tests in the emulator share: tensors without slack around them, a call under a schedule, the op's judge."""

import numpy as np
import tight

from kernomics import _cuda, numpy_ops
from kernomics.chip import FAMILIES
from kernomics.contract import _call
from kernomics.numerics import BF16_WEIGHTS, TENSOR_CORE, judge_default


def cuda_kernel(op):
    return next((k for k in op.kernels if k.name == "cuda"), None)


def exact(x):
    """A copy in memory that ends with its last element: the sanitizer sees what is read or written beyond it."""
    if x is None:
        return None
    raw = tight.bytes(x.nbytes).view(x.dtype).reshape(x.shape)
    raw[...] = x
    return raw


def start(op, inputs, scalars, schedule, function=None, more=(), space=None):
    """Results of the op's CUDA kernel, or of ``function`` with scalars of its own at the end, in memory of NaNs, with a workspace
    of NaNs or ``space``. ``schedule``: multiprocessors, the draw of the order (0: in order), the share of copies and products
    that are done at once."""
    kernel = cuda_kernel(op)
    mine = {n: exact(x) for n, x in inputs.items()}
    dims, codes, values, _ = op.bind(*mine.values(), *scalars.values())
    outs = [exact(np.empty(shape, numpy_ops._BY_CODE[code])) for shape, _, code in op.shapes(dims, codes, values)]
    if space is None:
        space = workspace(op, dims)
    for x in outs:
        x.view(np.uint8)[...] = 0xFF if x.size else 0
    views = [numpy_ops.ABSENT if x is None else numpy_ops._view(x) for x in (*mine.values(), *outs, space)]
    _cuda.schedule(*schedule)
    (function or kernel.load())(*views, *numpy_ops.scalar_codes(op, values), *more, 0)
    for n, x in inputs.items():
        assert x is None or x.tobytes() == mine[n].tobytes(), f"{op.name} changes {n}"
    return tuple(outs)


def workspace(op, dims):
    make = cuda_kernel(op).workspace
    space = tight.bytes(_call(make, {"dims": dims, "chip": FAMILIES["sm90"]}) if make else 0)
    space[...] = 0xFF
    return space


def defined(op, inputs, scalars):
    want = op.define(**inputs, **scalars)
    return want if isinstance(want, tuple) else (want,)


def judge(op, got, want, inputs, scalars, what):
    """Fails where the op's judge, which knows the arithmetic of tensor cores, finds the result beyond its bounds."""
    known = inputs | scalars | {"bf16_weights": BF16_WEIGHTS, "tensor_core": TENSOR_CORE}
    over = {m: v for m, v in (op.judge or judge_default)(got, want, known).items() if not v[0] <= v[1]}
    assert not over, f"{op.name} {what}: {over}"


def bits(outs):
    return b"".join(x.tobytes() for x in outs)


def run_tests(scope):
    """Calls every test of a file, as pytest would."""
    for name, test in list(scope.items()):
        if name.startswith("test_"):
            test()
            print(name[5:].replace("_", " ") + ": holds")
