"""Compiles kernels before they are needed, for the GPU at hand or for one that is not: ``kernomics warmup``.

The launches are those that a call would do: ``launch`` runs on tensors without memory, and its kernels are collected
and compiled into Triton's cache on disk, where a process on that GPU finds them.
"""

import torch
from kernomics.triton_kernels import common
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernomics import contract
from kernomics.contract import OPS, Case
from kernomics.torch_ops import _BY_CODE

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 500, 512, 1000, 1024, 2048, 4096, 8192)  # of a step; a multiple
# of 16 or not is another kernel


class NoGPU:
    """What Triton asks of a driver in order to compile; each chip counts as a device of its own."""

    devices = {}

    def __init__(self, family):
        self.target = GPUTarget("hip", family, 64) if family.startswith("gfx") else GPUTarget("cuda", int(family[2:]), 32)
        self.device = 1000 + self.devices.setdefault(family, len(self.devices))

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


def prepared(op, kernel, case, chip):
    """A function that does what a call of this case does on ``chip`` and gives the kernels it launches: [(kernel, arguments,
    options)]."""
    layout, values = op.layout(case), op.values(case)
    tensors = [None if x is None else torch.empty(x[1], dtype=_BY_CODE[contract.NAMES.index(x[0])], device="meta")
               for x in layout.values()]
    dims, codes, scalars, _ = op.bind(*tensors, *(values[s.name] for s in op.scalars))
    outs = [torch.empty(shape, dtype=_BY_CODE[code], device="meta") for shape, _, code in op.shapes(dims, codes, scalars)]
    kernel.load()

    def call():
        size = kernel.workspace(dims, chip) if kernel.workspace else 0
        space = torch.empty(size, dtype=torch.uint8, device="meta") if size else None
        before = common.ASSUMED
        common.ASSUMED, common.COLLECT = chip, []
        try:
            kernel.function(*tensors, *outs, space, *scalars)
            return [(fn, args, options) for fn, _, args, options in common.COLLECT]
        finally:
            common.ASSUMED, common.COLLECT = before, None

    return call


def launches(op, kernel, case, chip):
    """The kernels that a call of this case launches on ``chip``."""
    return prepared(op, kernel, case, chip)()


def _kind(x):
    """What of an argument the compiler specializes on."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype)
    if isinstance(x, int) and not isinstance(x, bool):
        return "1" if x == 1 else f"{'i64' if x > 2**31 - 1 else 'i32'}{':16' * (x % 16 == 0)}"
    return f"{x.base.dtype}{x.block_shape}" if hasattr(x, "block_shape") else "None" if x is None else type(x).__name__


def distinct(op, kernel, cases, chip):
    """The different kernels that these calls launch: {(name, options as text, kinds of arguments): launch}."""
    found = {}
    for case in cases:
        for fn, args, options in launches(op, kernel, case, chip):
            words = " ".join(f"{n}={v}" for n, v in options.items() if n != "enable_fp_fusion")
            found.setdefault((fn.__name__, words, tuple(map(_kind, args))), (fn, args, options))
    return found


def compiled(launch, chip=None):
    """The compiled kernel of a launch, for the GPU at hand or for a chip that need not be there."""
    fn, args, options = launch
    if chip is None:
        return fn.warmup(*args, grid=(1,), **options)
    driver.set_active(NoGPU(chip.family))
    try:
        return fn.warmup(*args, grid=(1,), **options)
    finally:
        driver.set_active(None)


def calls(rows, page=64):
    """(op name, Case) of a cost model's rows: cached ops get pages of ``page`` tokens."""
    for row in rows:
        if row.op is None or not any(k.name == "triton" for k in OPS[row.op].kernels):
            continue
        op, case = OPS[row.op], {k: v for k, v in row.dims.items() if k != "active"}
        case = case | {"softmax_scale": 0.1} if any(s.name == "softmax_scale" for s in op.scalars) else case
        if "kv_cache" in op.tensors:
            pages = -(-case.get("s", case.get("t", 1)) // page)
            case |= {"page": page, "p": case.get("b", 1) * pages, "n": pages}
        yield row.op, Case(**case)


def jobs(model, chip, tokens=TOKENS, context=4096):
    """Launches to compile for a model (``cost.model.Model``): decode steps and prefill chunks of ``tokens`` tokens."""
    by_op = {}
    for t in tokens:
        for name, case in (*calls(model.decode(t, context)), *calls(model.prefill(t))):
            by_op.setdefault(name, []).append(case)
    found = {}
    for name, cases in by_op.items():
        kernel = next(k for k in OPS[name].kernels if k.name == "triton")
        found |= {(name, *key): launch for key, launch in distinct(OPS[name], kernel, cases, chip).items()}
    return found
