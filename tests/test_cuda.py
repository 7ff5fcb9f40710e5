"""The CUDA kernels without a GPU: what nvcc made of them, and how a call reaches them. Their values: tests/native/cuda."""

import contextlib
import re

import numpy as np
import pytest

import cuda_resources
from kernomics import OPS, chip
from kernomics.contract import NoKernel

_cuda = pytest.importorskip("kernomics._cuda", reason="built without nvcc")
CUDA = [(op, k) for op in OPS.values() for k in op.kernels if k.name == "cuda"]


@pytest.fixture(scope="module")
def rows():
    return cuda_resources.resources(_cuda.__file__)


def test_nothing_spills(rows):
    assert rows
    assert not [r for r in rows if r["stack"] or r["local"] or r["words"]["LDL"] or r["words"]["STL"]]


def test_hopper_kernels_use_its_units(rows):
    """Products of warpgroups and copies by tensor map (but of scattered tokens) in the large ones; portable ones for each
    family."""
    hopper = [row for row in rows if row["chip"] == "sm_90a"]
    must = {"fp8_gemm_kernel": ("QGMMA", "UTMALDG"), "mla_decode_kernel": ("HGMMA", "UTMALDG"),
            "mla_decode_few_kernel": ("HGMMA",)}
    assert {re.match(r"\w+", row["kernel"]).group() for row in hopper} >= set(must)
    for row in hopper:
        assert all(row["words"][w] for w in must.get(re.match(r"\w+", row["kernel"]).group(), ())), row
        assert row["words"]["UTMALDG"] or re.match(r"mla_decode_few_kernel<\d+, false>", row["kernel"]), row
    portable = {}
    for row in rows:
        if row["chip"] != "sm_90a":
            portable.setdefault(row["kernel"], set()).add(row["chip"])
    assert portable and all(chips == {"sm_80", "sm_89", "sm_90", "sm_120a"} for chips in portable.values())


def test_table(rows):
    """``docs/cuda_kernels.md`` lists what this compiler made."""
    committed = cuda_resources.TABLE.read_text()
    if f"(nvcc {cuda_resources.nvcc()})" not in committed:
        pytest.skip("another nvcc than the table's")
    assert cuda_resources.text(rows) == committed, "make cuda-table, and look at the difference"


@pytest.mark.parametrize("op, kernel", CUDA, ids=[op.name for op, _ in CUDA])
def test_kernels_of_rooms_are_in_the_module(op, kernel):
    assert kernel.native and callable(kernel.load()) and kernel.target.startswith("kernomics._cuda:")


def test_families():
    """A kernel of Hopper refuses others; a portable one takes NVIDIA's and refuses AMD's, with the reason."""
    op = OPS["fp8_gemm"]
    hopper = next(k for k in op.kernels if k.name == "cuda")
    dims = {"m": 4, "n": 8, "k": 128}
    assert hopper.refusal("sm90", dims) is None
    assert all("runs on sm90" in hopper.refusal(f, dims) for f in chip.FAMILIES if f != "sm90")
    portable = next(k for k in OPS["moe_combine"].kernels if k.name == "cuda")
    for family in chip.FAMILIES:
        assert (portable.refusal(family, {}) is None) == family.startswith("sm")
    with pytest.raises(NoKernel, match="cuda: runs on sm90, the tensors are on gfx942"):
        op.choose("gfx942", dims, "cuda")


def test_the_call_on_a_gpu(monkeypatch):
    """What torch hands to a native kernel: addresses at multiples of 16, dtype codes, sizes, scalars, the stream."""
    torch = pytest.importorskip("torch")
    from kernomics import torch_ops

    given = []
    op = OPS["fp8_quantize"]
    kernel = next(k for k in op.kernels if k.name == "cuda")
    kernel.load()
    monkeypatch.setattr(kernel, "function", lambda *args: given.append(args))
    monkeypatch.setattr(torch_ops.chip, "current", lambda index: chip.FAMILIES["sm90"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch_ops, "_stream", lambda index: 77)
    x = torch.from_numpy(np.arange(1.0, 400.0, dtype=np.float32))[1:385].view(3, 128)  # starts at no multiple of 16
    assert x.data_ptr() % 16
    codes, scale = torch_ops._run_gpu(op, [x], [(1, 128), "pow2", 1e-4], "cuda")
    (view, out, out_scale, space, *scalars), = given
    assert view[0] % 16 == 0 and view[1:] == (0, (3, 128)) and out == (codes.data_ptr(), 2, (3, 128))
    assert out_scale == (scale.data_ptr(), 0, (3, 1)) and space == (0, 0, ()) and scalars == [1, 128, 1, 1e-4, 77]
