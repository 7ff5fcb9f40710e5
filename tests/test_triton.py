"""Every Triton kernel on every small case against the definition: on the GPU where there is one, else in the interpreter.

The interpreter runs when TRITON_INTERPRET=1 is set before Triton is imported (``make test`` does, in a process of its
own); it stands in for a chip with e4m3 (sm90) and for one without (sm80).
"""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernomics.triton_kernels import common  # noqa: E402

import interpreter  # noqa: E402
from conftest import LONG_BYTES, LONG_FLOPS, copies, drawn, judge, poison, results, wanted  # noqa: E402
from kernomics import OPS, chip, numpy_ops  # noqa: E402
from kernomics.torch_ops import from_numpy, to_numpy  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(),
                                reason="no GPU, and TRITON_INTERPRET=1 is not set")
if INTERPRET:
    interpreter.install()
FAMILIES = ("sm90", "sm80") if INTERPRET else ("here",)
LIMIT = 3e7 if INTERPRET else LONG_FLOPS  # FLOPs of a case; the interpreter takes seconds for more


def kernels():
    return [(op, k) for op in OPS.values() for k in op.kernels if k.name == "triton"]


def cases():
    for op, kernel in kernels():
        for case in op.cases:
            work = op.work(**case)
            if work.flops <= LIMIT and work.bytes <= (2e6 if INTERPRET else LONG_BYTES):
                for family in FAMILIES:
                    yield pytest.param(op, kernel, case, family, id=f"{op.name}-{case.id}-{family}")


@pytest.fixture
def assume(monkeypatch):
    """Sets the chip that the interpreter stands for."""
    return lambda family: monkeypatch.setattr(common, "ASSUMED", chip.FAMILIES[family]) if INTERPRET else None


def tensor(x):
    return x if x is None else from_numpy(x.copy()).to(DEVICE)


def call(op, kernel, inputs, scalars):
    """The kernel's results in poisoned outputs, with a poisoned workspace, as NumPy arrays."""
    _, _, values = numpy_ops.checked(op, list(inputs.values()), list(scalars.values()))
    dims, codes, _, _ = op.bind(*inputs.values(), *values)
    tensors = {n: tensor(x) for n, x in inputs.items()}
    outs = [tensor(poison(shape, code)) for shape, _, code in op.shapes(dims, codes, values)]
    kernel.load()
    size = kernel.workspace(dims, common.chip_of(tensors[next(iter(tensors))])) if kernel.workspace else 0
    space = torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE) if size else None
    kernel.function(*tensors.values(), *outs, space, *values)
    return tuple(to_numpy(x.cpu()) for x in results(op, tensors, tuple(outs)))


@pytest.mark.parametrize("op, kernel, case, family", list(cases()))
def test_value(op, kernel, case, family, assume):
    """The definition's values, every element written, and the same bits again."""
    assume(family)
    index = op.cases.index(case)
    inputs, scalars = drawn(op.name, index)
    given, select, want = wanted(op.name, index)
    got = call(op, kernel, copies(inputs), scalars)
    judge(op, select(got), want, given, f"{op.name} on {family}")
    if not INTERPRET:
        again = call(op, kernel, copies(inputs), scalars)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, again)), "other bits the second time"


@pytest.mark.skipif(not INTERPRET, reason="patches the interpreter")
def test_the_patched_interpreter_rounds_like_torch():
    """Casts from f32 to bf16 and e4m3 and a bf16 product, value by value against torch."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, narrow, codes, product, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        v = tl.load(x + at)
        h = v.to(tl.bfloat16)
        tl.store(narrow + at, h)
        tl.store(codes + at, v.to(tl.float8e4nv).to(tl.uint8, bitcast=True))
        tl.store(product + at, tl.dot(h, h))

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 64), np.float32) * 40)
    h, codes, product = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.uint8), torch.empty(64, 64)
    kernel[(1,)](x, h, codes, product, N=64)
    assert torch.equal(h, x.bfloat16())
    assert torch.equal(codes, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    exact = x.bfloat16().double() @ x.bfloat16().double()
    assert (product - exact).norm() < 1e-6 * exact.norm()
