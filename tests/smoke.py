"""What a NumPy user gets from an installed wheel, without torch. Run outside the repository."""

import importlib.util
import sys

import kernomics.bench
import kernomics.triton_kernels
import numpy as np

import kernomics as kx
from kernomics import numpy_ops
from kernomics.numerics import judge_default

assert importlib.util.find_spec("torch") is None, "this test is for an environment without torch"
assert "site-packages" in kx.__file__, kx.__file__
calls = 0
for op in kx.OPS.values():
    for case in op.cases:
        if case.bench or op.work(**case).flops > 1e6 or op.host or not any(k.on == "cpu" for k in op.kernels):
            continue
        inputs, scalars = numpy_ops.sample(op, case)
        again = {n: x if x is None else x.copy() for n, x in inputs.items()}
        got, want = op(**inputs, **scalars), op.define(**again, **scalars)
        if not op.outs:
            got, want = inputs["kv_cache"], again["kv_cache"]
        got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
        measures = (op.judge or judge_default)(got, want, inputs | scalars)
        assert all(v <= bound for v, bound in measures.values()), (op.name, case.id, measures)
        calls += 1
assert calls > 50 and "torch" not in sys.modules
x = np.ones((2, 256), np.float32)
assert kx.fp8_gemm(*kx.fp8_quantize(x), *kx.fp8_quantize(x, block=(128, 128)))[0, 0] == 256
print(f"{calls} calls of the wheel's ops agree with their definitions, without torch")
