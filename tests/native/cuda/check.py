"""Run by the native test executable: every small case of the named ops on their CUDA kernels, a fiber a thread, with copies and
products that land at once, late, or in a drawn order, judged against the definition."""

import os
import sys
import time

from emulator import bits, cuda_kernel, defined, judge, start

from kernomics import OPS, numpy_ops

SMALL = float(os.environ.get("CUDA_FLOPS", 3e7))  # of a case
ONLY = os.environ.get("CUDA_CASE", "")  # part of a case's id
SCHEDULES = [(4, 0, 1.0), (4, 1, 0.0), (132, 2, 0.5)]

checked, slow = 0, []
for name in OPS_TO_CHECK:  # noqa: F821
    op = OPS[name]
    kernel = cuda_kernel(op)
    for case in op.cases if kernel else ():
        if op.work(**case).flops > SMALL or op.work(**case).bytes > 4e6 or ONLY not in case.id:
            continue
        inputs, scalars = numpy_ops.sample(op, case)
        if kernel.refusal("sm90", op.bind(*inputs.values(), *scalars.values())[0]) is not None:
            continue
        want, begin, seen = defined(op, inputs, scalars), time.time(), {}
        for schedule in SCHEDULES:
            try:
                outs = start(op, inputs, scalars, schedule)
            except RuntimeError as error:
                sys.exit(f"{name} {case.id} with schedule {schedule}: {error}")
            judge(op, outs, want, inputs, scalars, f"{case.id} with schedule {schedule}")
            if seen.setdefault(schedule[0], bits(outs)) != bits(outs):
                sys.exit(f"{name} {case.id} with schedule {schedule}: other bits than in another order")
            checked += 1
        slow.append((time.time() - begin, name, case.id))
if not checked:
    sys.exit("nothing was checked")
print(f"{checked} calls of {', '.join(OPS_TO_CHECK)} agree with their definitions")  # noqa: F821
for seconds, name, case in sorted(slow)[-5:]:
    print(f"  {seconds:5.1f} s {name} {case}")
