"""Run by the native test executable: every small case of the named ops, on each ISA, with 1 to 3 threads, on memory
without slack, judged against the definition."""

import sys

import numpy as np
import tight

from kernomics import OPS, _cpu, numpy_ops
from kernomics.numerics import judge_default

SMALL = 3e6  # FLOPs: sanitized kernels are an order of magnitude slower


def exact(x, shift):
    """A copy in memory that ends with its last element; with ``shift`` it starts at an address that suits no vector."""
    if x is None:
        return None
    raw = tight.bytes(x.nbytes + shift * x.itemsize)[shift * x.itemsize:].view(x.dtype).reshape(x.shape)
    raw[...] = x
    return raw


checked = 0
for name in OPS_TO_CHECK:  # noqa: F821
    op = OPS[name]
    for case in op.cases:
        if op.work(**case).flops > SMALL or op.work(**case).bytes > 4e6:
            continue
        inputs, scalars = numpy_ops.sample(op, case)
        fresh = {n: x if x is None else x.copy() for n, x in inputs.items()}
        want = op.define(**fresh, **scalars)
        want = tuple(fresh[n] for n in op.mutates) if not op.outs else want if isinstance(want, tuple) else (want,)
        first = None
        for isa in _cpu.isas():
            _cpu.use_isa(isa)
            for threads in (1, 2, 3):
                mine = {n: exact(x, threads == 2) for n, x in inputs.items()}
                dims, codes, values, _ = op.bind(*mine.values(), *scalars.values())
                outs = []
                for shape, _, code in op.shapes(dims, codes, values):
                    outs.append(exact(np.empty(shape, numpy_ops._BY_CODE[code]), threads == 2))
                    outs[-1].view(np.uint8)[...] = 0xFF if outs[-1].size else 0
                numpy_ops.launch(op, op.kernels[-1], list(mine.values()), outs, values, dims, threads)
                got = tuple(mine[n] for n in op.mutates) if not op.outs else tuple(outs)
                measures = (op.judge or judge_default)(got, want, inputs | scalars)
                over = {m: v for m, v in measures.items() if not v[0] <= v[1]}
                if over:
                    sys.exit(f"{name} {case.id} on {isa} with {threads} threads: {over}")
                checked += 1
if not checked:
    sys.exit("nothing was checked")
print(f"{checked} calls of {', '.join(OPS_TO_CHECK)} agree with their definitions")  # noqa: F821
