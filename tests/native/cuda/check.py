"""Run by the native test executable: every small case of the named ops on every CUDA kernel of theirs, a fiber a thread, with
copies and products that land at once, late, or in a drawn order, on memory without slack, judged against the definition."""

import os
import sys
import time

import numpy as np
import tight

from kernomics import OPS, _cuda, numpy_ops
from kernomics.chip import FAMILIES
from kernomics.contract import _call
from kernomics.numerics import BF16_WEIGHTS, TENSOR_CORE, judge_default

SMALL = float(os.environ.get("CUDA_FLOPS", 3e7))  # of a case
ONLY = os.environ.get("CUDA_CASE", "")  # part of a case's id
SCHEDULES = [(4, 0, 1.0), (3, 1, 0.0), (132, 2, 0.5)]  # multiprocessors, draw of the order (0: in order), share done at once


def exact(x):
    """A copy in memory that ends with its last element."""
    if x is None:
        return None
    raw = tight.bytes(x.nbytes).view(x.dtype).reshape(x.shape)
    raw[...] = x
    return raw


checked, slow = 0, []
for name in OPS_TO_CHECK:  # noqa: F821
    op = OPS[name]
    for kernel in op.kernels:
        if not kernel.target.startswith("kernomics._cuda"):
            continue
        for case in op.cases:
            if op.work(**case).flops > SMALL or op.work(**case).bytes > 4e6 or ONLY not in case.id:
                continue
            inputs, scalars = numpy_ops.sample(op, case)
            mine = {n: exact(x) for n, x in inputs.items()}
            dims, codes, values, _ = op.bind(*mine.values(), *scalars.values())
            if kernel.refusal("sm90", dims) is not None:
                continue
            want = op.define(**inputs, **scalars)
            want = want if isinstance(want, tuple) else (want,)
            first, start = None, time.time()
            for schedule in SCHEDULES:
                _cuda.schedule(*schedule)
                outs = [exact(np.empty(shape, numpy_ops._BY_CODE[code])) for shape, _, code in op.shapes(dims, codes, values)]
                size = _call(kernel.workspace, {"dims": dims, "chip": FAMILIES["sm90"]}) if kernel.workspace else 0
                space = tight.bytes(size)
                for x in (*outs, space):
                    x.view(np.uint8)[...] = 0xFF if x.size else 0
                views = [numpy_ops.ABSENT if x is None else numpy_ops._view(x) for x in (*mine.values(), *outs, space)]
                try:
                    kernel.function(*views, *numpy_ops.scalar_codes(op, values), 0)
                except RuntimeError as error:
                    sys.exit(f"{name} {case.id} with schedule {schedule}: {error}")
                known = inputs | scalars | {"bf16_weights": BF16_WEIGHTS, "tensor_core": TENSOR_CORE}
                over = {m: v for m, v in (op.judge or judge_default)(tuple(outs), want, known).items() if not v[0] <= v[1]}
                if over:
                    sys.exit(f"{name} {case.id} with schedule {schedule}: {over}")
                first = first or [x.tobytes() for x in outs]
                if first != [x.tobytes() for x in outs] and schedule[0] == SCHEDULES[0][0]:
                    sys.exit(f"{name} {case.id} with schedule {schedule}: other bits than with {SCHEDULES[0]}")
                checked += 1
            for n, x in inputs.items():
                if x is not None and x.tobytes() != mine[n].tobytes():
                    sys.exit(f"{name} {case.id} changes {n}")
            slow.append((time.time() - start, name, case.id))
if not checked:
    sys.exit("nothing was checked")
print(f"{checked} calls of {', '.join(OPS_TO_CHECK)} agree with their definitions")  # noqa: F821
for seconds, name, case in sorted(slow)[-5:]:
    print(f"  {seconds:5.1f} s {name} {case}")
