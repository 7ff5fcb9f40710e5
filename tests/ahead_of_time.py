"""Compiles launches of Triton kernels for a chip that is not there, and reads what the compiler made of them.

The launches are those that a call would do: ``launch`` runs on tensors without memory and its kernels are collected.
"""

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernomics import chip, contract, numpy_ops
from kernomics.numerics import DTYPES
from kernomics.torch_ops import _BY_CODE
from kernomics.triton_kernels import common

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = r"\b(HGMMA|QGMMA|HMMA|QMMA|UTCHMMA|UTCQMMA|OMMA)\b"


def target(family):
    return GPUTarget("hip", family, 64) if family.startswith("gfx") else GPUTarget("cuda", int(family[2:]), 32)


class NoGPU:
    """What Triton asks of a driver in order to compile; each chip counts as a device of its own."""

    def __init__(self, family):
        self.target, self.device = target(family), list(chip.FAMILIES).index(family)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


def launches(op, kernel, case, family):
    """The kernels that a call of this case launches on a chip of ``family``: [(kernel, arguments, options)]."""
    meta = {code: dtype for code, dtype in enumerate(_BY_CODE)}
    layout, values = op.layout(case), op.values(case)
    tensors = [None if x is None else torch.empty(x[1], dtype=meta[contract.NAMES.index(x[0])], device="meta")
               for x in layout.values()]
    dims, codes, scalars, _ = op.bind(*tensors, *(values[s.name] for s in op.scalars))
    outs = [torch.empty(shape, dtype=meta[code], device="meta") for shape, _, code in op.shapes(dims, codes, scalars)]
    kernel.load()
    size = kernel.workspace(dims, chip.FAMILIES[family]) if kernel.workspace else 0
    space = torch.empty(size, dtype=torch.uint8, device="meta") if size else None
    common.ASSUMED, common.COLLECT = family, []
    try:
        kernel.function(*tensors, *outs, space, *scalars)
        return [(fn, args, options) for fn, _, args, options in common.COLLECT]
    finally:
        common.ASSUMED = common.COLLECT = None


def compiled(launch, family):
    """The compiled kernel of a launch."""
    fn, args, options = launch
    driver.set_active(NoGPU(family))
    try:
        return fn.warmup(*args, grid=(1,), **options)
    finally:
        driver.set_active(None)


def report(kernel):
    """Registers, shared memory, spills and matrix instructions of a compiled kernel."""
    found = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        figure = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
        return found | {"registers": figure("vgpr_count"), "spills": figure("vgpr_spill_count") + figure("sgpr_spill_count"),
                        "matrix": sorted(set(re.findall(r"v_mfma\w+", text)))}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([TOOLS / "cuobjdump", "-res-usage", cubin]).stdout
        sass = run([TOOLS / "nvdisasm", "-c", cubin]).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    # What a thread spills lies on its stack and moves by LDL and STL.
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return found | {"registers": registers, "spills": spills, "stack": stack, "matrix": sorted(set(re.findall(MATRIX, sass))),
                    "tma": "UTMALDG" in sass}


def _kind(x):
    """What of an argument the compiler specializes on."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype)
    if isinstance(x, int) and not isinstance(x, bool):
        return "1" if x == 1 else f"{'i64' if x > 2**31 - 1 else 'i32'}{':16' * (x % 16 == 0)}"
    return f"{x.base.dtype}{x.block_shape}" if hasattr(x, "block_shape") else "None" if x is None else type(x).__name__


def distinct(op, kernel, family, cases=None):
    """The different kernels that the op's bench cases launch on a chip: {(name, options as text, kinds): launch}."""
    found = {}
    for case in cases or [c for c in op.cases if c.bench]:
        for fn, args, options in launches(op, kernel, case, family):
            words = " ".join(f"{n}={v}" for n, v in options.items() if n != "enable_fp_fusion")
            found.setdefault((fn.__name__, words, tuple(map(_kind, args))), (fn, args, options))
    return found


if __name__ == "__main__":  # python tests/ahead_of_time.py OP [FAMILY ...]: what the compiler makes of the bench cases' kernels
    import sys

    from kernomics import OPS

    op = OPS[sys.argv[1]]
    triton_kernel = next(k for k in op.kernels if k.name == "triton")
    for family in sys.argv[2:] or ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950"):
        for (name, words, _), launch in distinct(op, triton_kernel, family).items():
            print(family, name, words, report(compiled(launch, family)), flush=True)
