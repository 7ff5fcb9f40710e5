"""Every GPU kernel on every small case against the definition: on the GPU where there is one, else Triton's in the interpreter.

The interpreter runs when TRITON_INTERPRET=1 is set before Triton is imported (``make test`` does, in a process of its
own); it stands in for a chip with e4m3 (sm90), and in ``make test-long`` for one without that has few units (sm80: the
tiles of large calls at small sizes), for one whose products copy tiles by descriptor (sm100), and for two whose tiles of
attention differ again (sm120, gfx942).
"""

import contextlib
import dataclasses
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernomics.triton_kernels import common  # noqa: E402

import interpreter  # noqa: E402
from conftest import LONG_BYTES, LONG_FLOPS, copies, drawn, judge, poison, results, wanted  # noqa: E402
from kernomics import OPS, NoKernel, chip, numpy_ops, torch_ops  # noqa: E402
from kernomics.contract import Case  # noqa: E402
from kernomics.numerics import BF16_WEIGHTS, TENSOR_CORE  # noqa: E402
from kernomics.torch_ops import from_numpy, to_numpy  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(),
                                reason="no GPU, and TRITON_INTERPRET=1 is not set")
if INTERPRET:
    interpreter.install()
CHIPS = {"sm90": chip.FAMILIES["sm90"], "sm80": dataclasses.replace(chip.FAMILIES["sm80"], units=2),
         **{name: chip.FAMILIES[name] for name in ("sm100", "sm120", "gfx942")}}
ONLY = {"sm100": ("fp8_gemm", "fp8_linear", "fp8_grouped_gemm", "moe_experts", "mla_prefill"),
        "sm120": ("mla_decode", "mla_decode_sparse"), "gfx942": ("mla_decode", "mla_decode_sparse")}
LIMIT = 3e7 if INTERPRET else LONG_FLOPS  # FLOPs of a case; the interpreter takes seconds for more


def kernels():
    here = None if INTERPRET or not torch.cuda.is_available() else chip.current(0).family
    runs = lambda k: k.name == "triton" or (here and k.name == "cuda" and k.fits(here))  # noqa: E731
    return [(op, k) for op in OPS.values() for k in op.kernels if runs(k)]


def cases():
    for op, kernel in kernels():
        for case in op.cases:
            work = op.work(**case)
            if work.flops <= LIMIT and work.bytes <= (2e6 if INTERPRET else LONG_BYTES):
                for family in CHIPS if INTERPRET else ("here",):
                    if op.name in ONLY.get(family, (op.name,)):
                        yield pytest.param(op, kernel, case, family, id=f"{op.name}-{kernel.name}-{case.id}-{family}",
                                           marks=[] if family in ("sm90", "here") else [pytest.mark.long])


@pytest.fixture
def assume(monkeypatch):
    """Sets the chip that the interpreter stands for."""
    return lambda family: monkeypatch.setattr(common, "ASSUMED", CHIPS[family]) if INTERPRET else None


@pytest.fixture(autouse=True)
def gpu_of_a_worker():
    """After an illegal address a process's GPU answers no more: xdist's worker ends, and a new one runs the other tests."""
    yield
    if not INTERPRET and os.environ.get("PYTEST_XDIST_WORKER"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


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


def call(op, kernel, inputs, scalars, valid=None):
    """The kernel's results in poisoned outputs, with a poisoned workspace, as NumPy arrays; nothing else has changed.
    ``valid``: inputs of the same shapes where these are none that a caller may give."""
    _, _, values = numpy_ops.checked(op, list((valid or inputs).values()), list(scalars.values()))
    dims, codes, _, _ = op.bind(*inputs.values(), *values)
    kernel.load()
    laid = {n: (None, None) if x is None else guarded(x) for n, x in inputs.items()}
    laid |= {f"output {i}": guarded(poison(shape, code)) for i, (shape, _, code) in enumerate(op.shapes(dims, codes, values))}
    gpu = common.chip_of(laid[next(iter(op.tensors))][0])
    size = kernel.workspace(dims, gpu) if kernel.workspace else 0
    laid["workspace"] = guarded(np.full(size, 0xFF, np.uint8)) if size else (None, None)
    tensors = [x for x, _ in laid.values()]
    torch_ops.launch(op, kernel, tensors[:len(inputs)], tensors[len(inputs):-1], tensors[-1], values)
    for name, (x, whole) in laid.items():
        if x is not None:
            assert untouched(whole, x.numel() * x.element_size()), f"{op.name} writes outside of {name}"
            if name in inputs and name not in op.mutates:
                assert to_numpy(x.cpu()).tobytes() == inputs[name].tobytes(), f"{op.name} changes {name}"
    tensors = {n: laid[n][0] for n in inputs}
    outs = tuple(x for n, (x, _) in laid.items() if n.startswith("output "))
    return tuple(to_numpy(x.cpu()) for x in results(op, tensors, outs))


def arithmetic():
    """What judges must know: softmax weights in bf16, and FP8 sums where this chip's tensor cores do them."""
    fp8 = not INTERPRET and chip.current(0).e4m3
    return {"bf16_weights": BF16_WEIGHTS, "tensor_core": TENSOR_CORE if fp8 else 0.0}


@pytest.mark.parametrize("op, kernel, case, family", list(cases()))
def test_value(op, kernel, case, family, assume):
    """The definition's values, every element written, and the same bits again."""
    assume(family)
    index = op.cases.index(case)
    inputs, scalars = drawn(op.name, index)
    given, select, want = wanted(op.name, index)
    got = call(op, kernel, copies(inputs), scalars)
    judge(op, select(got), want, given | arithmetic(), f"{op.name} on {family}")
    if not INTERPRET:
        again = call(op, kernel, copies(inputs), scalars)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, again)), "other bits the second time"


@pytest.mark.skipif(not INTERPRET, reason="bench cases take these paths on a GPU")
@pytest.mark.parametrize("most, per", [(4096, 1), (4096, 3), (4, 1)], ids=["counts", "blocks of three", "comparing"])
@pytest.mark.parametrize("name, case", [("moe_permute", {"t": 45, "d": 5, "top_k": 3, "n_experts": 7}),
                                        ("moe_experts", {"t": 9, "d": 72, "n": 40, "e": 5, "top_k": 3}),
                                        ("moe_experts_bf16", {"t": 9, "d": 72, "n": 40, "e": 5, "top_k": 3})])
def test_many_copies(name, case, most, per, monkeypatch, assume):
    """With bounds made small, few copies go the way of many: counts of blocks, then rows; or all compared in a launch."""
    from kernomics.triton_kernels import moe_permute

    assume("sm90")
    monkeypatch.setattr(moe_permute, "FEW", 8)
    monkeypatch.setattr(moe_permute, "SUB", 16)
    monkeypatch.setattr(moe_permute, "MOST_BINS", most)
    monkeypatch.setattr(moe_permute, "blocks", lambda copies: (-(-copies // (16 * per)), per))
    op = OPS[name]
    inputs, scalars = numpy_ops.sample(op, Case(**case))
    want = op.define(**inputs, **scalars)
    got = call(op, next(k for k in op.kernels if k.name == "triton"), copies(inputs), scalars)
    judge(op, got, want if isinstance(want, tuple) else (want,), inputs | scalars)


def test_a_row_of_a_wider_tensor(assume):
    """A tensor of one row counts as contiguous whatever its stride, which torch does not view as words where it is odd."""
    from kernomics.triton_kernels import moe_permute

    assume("sm90")
    x = torch.arange(4 * 67, dtype=torch.bfloat16, device=DEVICE).view(4, 67)[1:2, 1:65]
    x_sorted = torch.empty(2, 64, dtype=torch.bfloat16, device=DEVICE)
    experts = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE)
    offsets, row_of = (torch.empty(n, dtype=torch.int32, device=DEVICE) for n in ((4,), (1, 2)))
    moe_permute.launch(x.contiguous(), experts, x_sorted, offsets, row_of, None, 3)
    assert x_sorted.equal(x.expand(2, 64)) and offsets.tolist() == [0, 1, 1, 2] and row_of.tolist() == [[1, 0]]


@pytest.mark.skipif(not INTERPRET, reason="bench cases take this path on a GPU")
@pytest.mark.parametrize("family", ["sm90", "sm100", "sm80", "gfx942"])
@pytest.mark.parametrize("op_name, case, rows", [
    ("fp8_gemm", {"m": 260, "n": 264, "k": 144}, 128), ("fp8_gemm", {"m": 260, "n": 264, "k": 144, "out_dtype": "f32"}, 128),
    ("fp8_gemm", {"m": 20, "n": 1000, "k": 144}, 32), ("fp8_gemm", {"m": 3, "n": 500, "k": 272}, 16),
    ("fp8_gemm", {"m": 48, "n": 1000, "k": 144}, 64), ("fp8_gemm", {"m": 70, "n": 300, "k": 141}, 64),
    ("fp8_gemm", {"m": 3, "n": 500, "k": 145}, 16), ("fp8_linear", {"m": 260, "n": 264, "k": 144, "bias": "bf16"}, 128),
    ("fp8_linear", {"m": 48, "n": 500, "k": 75, "bias": "bf16"}, 64)], ids=lambda x: str(x) if isinstance(x, int) else "")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_program_walks_several_tiles(op_name, case, rows, parts, family, monkeypatch):
    """More tiles than a chip of two units runs at a time, the last ones cut; operands by pointer and by descriptor (sm100)."""
    from kernomics.triton_kernels import gemm

    monkeypatch.setattr(common, "ASSUMED", dataclasses.replace(CHIPS[family], units=2))
    seen, run, tile = [], gemm.run, gemm.dense_tile
    monkeypatch.setattr(gemm, "run", lambda kernel, grid, *args, **options: (
        seen.append((grid, options)), run(kernel, grid, *args, **options)))
    monkeypatch.setattr(gemm, "dense_tile", lambda dims, chip: tile(dims, chip) | (
        {"PARTS": 2, "per_part": -(-dims["k"] // (2 * tile(dims, chip)["BK"]))} if parts == 2 else {}))
    op = OPS[op_name]
    inputs, scalars = numpy_ops.sample(op, Case(**case))
    got = call(op, next(k for k in op.kernels if k.name == "triton"), copies(inputs), scalars)
    grid, options = seen[0]
    assert len(seen) == parts and options["LOOP"]
    assert options["BM"] == (64 if family == "sm90" and rows == 128 else rows)  # two smaller ones a multiprocessor are quicker
    assert grid[0] <= {16: 6, 32: 6, 64: 4, 128: 2}[options["BM"]]
    judge(op, got, (op.define(**inputs, **scalars),), inputs | scalars)


@pytest.mark.parametrize("few", [1024, 8], ids=["few", "many"])
@pytest.mark.parametrize("layout", ["bf16", "u8"])
def test_the_last_of_one_slot_wins(layout, few, monkeypatch, assume):
    from kernomics.triton_kernels import mla_append_kv

    assume("sm90")
    monkeypatch.setattr(mla_append_kv, "FEW", few)
    op = OPS["mla_append_kv"]
    kernel = next(k for k in op.kernels if k.name == "triton")
    inputs, scalars = numpy_ops.sample(op, Case(t=20, p=2, page=4, kv_cache=layout))
    inputs["slots"] = np.arange(20, dtype=np.int64) % 7 - 1  # -1 skips; the last seven tokens are the last of their slots
    last = {n: x if x is None or n == "kv_cache" else x[13:] for n, x in inputs.items()}
    (got,), (want,) = (call(op, kernel, copies(x), scalars) for x in (inputs, last))
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("name", ["mla_prefill", "mla_prefill_backward"])
def test_wrong_offsets_give_nan(name, assume):
    """Offsets on a GPU are checked by no host: not from 0, falling, not to the end, far outside."""
    assume("sm90")
    op, kernel = next(x for x in kernels() if x[0].name == name)
    index = next(i for i, c in enumerate(op.cases) if (c["b"], c["t"]) == (3, 11))
    inputs, scalars = drawn(name, index)
    assert not any(np.isnan(x.astype(np.float32)).all() for x in call(op, kernel, copies(inputs), scalars))
    wrong = (("cu_q", (1, 3, 10, 11)), ("cu_q", (0, 7, 3, 11)), ("cu_k", (0, 13, 17, 19)), ("cu_k", (0, 2**31 - 1, -5, 20)))
    for offsets, values in wrong:
        got = call(op, kernel, copies(inputs) | {offsets: np.int32(values)}, scalars, inputs)
        assert all(np.isnan(x.astype(np.float32)).all() for x in got)


@pytest.mark.parametrize("kernel", [k for op, k in kernels() if op.name == "moe_combine"], ids=lambda k: k.name)
def test_wrong_rows_give_nan(kernel, assume):
    """A row that is none makes its token NaN, a dropped one does nothing, the other tokens are right."""
    assume("sm90")
    y, row_of = np.ones((4, 5), np.float32), np.int32([[3, 0], [1, -1]])
    for weights in (None, np.ones((2, 2), np.float32)):
        valid = {"y": y, "row_of": row_of, "weights": weights}
        for row in (4, -2, 2**31 - 1, -2**31):
            (got,) = call(OPS["moe_combine"], kernel, valid | {"row_of": np.int32([[3, row], [1, -1]])}, {}, valid)
            assert np.isnan(got[0]).all() and (got[1] == 1).all()


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


# ---------------------------------------------------------------- the torch op


def forced():
    """(op, kernel, index of its first small case that is not empty) for calls through torch."""
    for op, kernel in kernels():
        small = [i for i, c in enumerate(op.cases) if not c.bench and op.work(**c).flops < LONG_FLOPS
                 and all(min(x[1], default=1) > 0 for x in op.layout(c).values() if x)]
        yield pytest.param(op, kernel, small[0], id=f"{op.name}-{kernel.name}")


@pytest.mark.skipif(not INTERPRET, reason="test_torch_op calls it")
@pytest.mark.parametrize("op, kernel, index", list(forced()))
def test_the_call_on_a_gpu(op, kernel, index, monkeypatch, assume):
    """What torch calls for GPU tensors: bind, choice of the kernel by family, outputs, workspace, launch; unproved warns."""
    assume("sm90")
    monkeypatch.setattr(torch_ops.chip, "current", lambda index: CHIPS["sm90"])
    monkeypatch.setattr(torch_ops.chip, "proved", lambda family: frozenset())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(op, "kernels", [kernel])  # no native one, which would want a GPU
    inputs, scalars = drawn(op.name, index)
    want = call(op, kernel, copies(inputs), scalars)
    tensors = {n: x if x is None else from_numpy(x.copy()) for n, x in inputs.items()}
    _, _, values = numpy_ops.checked(op, list(inputs.values()), list(scalars.values()))
    with pytest.warns(UserWarning, match=f"{op.name}: kernel 'triton' is unproved on sm90"):
        out = torch_ops._run_gpu(op, tuple(tensors.values()), values, None)
    got = [to_numpy(x) for x in results(op, tensors, out)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))
    with pytest.raises(NoKernel, match="triton: backend='quantum' was asked for"):
        torch_ops._run_gpu(op, tuple(tensors.values()), values, "quantum")


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
