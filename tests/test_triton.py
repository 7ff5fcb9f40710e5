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
from kernomics.numerics import TENSOR_CORE  # noqa: E402
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


GUARD = 4096  # bytes of 0xFF (NaN, -1) on either side of every tensor; a kernel may neither use nor change them


def guarded(x):
    """(tensor with the values of array ``x``, the bytes it lies in)."""
    given = from_numpy(x)
    size = given.numel() * given.element_size()
    whole = torch.full((GUARD + -(-size // 256) * 256 + GUARD,), 0xFF, dtype=torch.uint8, device=DEVICE)
    inside = whole[GUARD: GUARD + size].view(given.dtype).view(given.shape)
    inside.copy_(given)
    return inside, whole


def untouched(whole, size):
    return bool((whole[:GUARD] == 0xFF).all() and (whole[GUARD + size:] == 0xFF).all())


def call(op, kernel, inputs, scalars):
    """The kernel's results in poisoned outputs, with a poisoned workspace, as NumPy arrays; nothing else has changed."""
    _, _, values = numpy_ops.checked(op, list(inputs.values()), list(scalars.values()))
    dims, codes, _, _ = op.bind(*inputs.values(), *values)
    kernel.load()
    laid = {n: (None, None) if x is None else guarded(x) for n, x in inputs.items()}
    laid |= {f"output {i}": guarded(poison(shape, code)) for i, (shape, _, code) in enumerate(op.shapes(dims, codes, values))}
    gpu = common.chip_of(laid[next(iter(op.tensors))][0])
    size = kernel.workspace(dims, gpu) if kernel.workspace else 0
    laid["workspace"] = guarded(np.full(size, 0xFF, np.uint8)) if size else (None, None)
    kernel.function(*(x for x, _ in laid.values()), *values)
    for name, (x, whole) in laid.items():
        if x is not None:
            assert untouched(whole, x.numel() * x.element_size()), f"{op.name} writes outside of {name}"
            if name in inputs and name not in op.mutates:
                assert to_numpy(x.cpu()).tobytes() == inputs[name].tobytes(), f"{op.name} changes {name}"
    tensors = {n: laid[n][0] for n in inputs}
    outs = tuple(x for n, (x, _) in laid.items() if n.startswith("output "))
    return tuple(to_numpy(x.cpu()) for x in results(op, tensors, outs))


def tensor_core():
    """What judges must know of FP8 sums on this chip; the interpreter adds in f32."""
    return {"tensor_core": TENSOR_CORE} if not INTERPRET and chip.current(0).e4m3 else {}


@pytest.mark.parametrize("op, kernel, case, family", list(cases()))
def test_value(op, kernel, case, family, assume):
    """The definition's values, every element written, and the same bits again."""
    assume(family)
    index = op.cases.index(case)
    inputs, scalars = drawn(op.name, index)
    given, select, want = wanted(op.name, index)
    got = call(op, kernel, copies(inputs), scalars)
    judge(op, select(got), want, given | tensor_core(), f"{op.name} on {family}")
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


# ---------------------------------------------------------------- on a GPU: the torch op


def forced():
    """(op, kernel, index of its first small case that is not empty) for calls through torch."""
    for op, kernel in kernels():
        small = [i for i, c in enumerate(op.cases) if not c.bench and 0 < op.work(**c).flops < LONG_FLOPS]
        yield pytest.param(op, kernel, small[0], id=op.name)


@pytest.mark.skipif(INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("op, kernel, index", list(forced()))
def test_torch_op(op, kernel, index):
    """The torch op waits for nothing on the host, can be captured in a CUDA graph, and gives the kernel's own bits."""
    inputs, scalars = drawn(op.name, index)
    want = call(op, kernel, copies(inputs), scalars)
    tensors = {n: x if x is None else from_numpy(x.copy()).cuda() for n, x in inputs.items()}
    args = [*tensors.values(), *scalars.values()]
    op.torch_call(*args, kernel.name)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.torch_call(*args, kernel.name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        op.torch_call(*args, kernel.name)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.torch_call(*args, kernel.name)
    graph.replay()
    torch.cuda.synchronize()
    got = [to_numpy(x.cpu()) for x in results(op, tensors, out)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want))


@pytest.mark.skipif(INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("op, kernel, index", list(forced()))
def test_repeats(op, kernel, index):
    """Twenty runs, the same bits."""
    inputs, scalars = drawn(op.name, index)
    first = call(op, kernel, copies(inputs), scalars)
    for _ in range(20):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, call(op, kernel, copies(inputs), scalars)))
