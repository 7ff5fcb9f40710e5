"""Makes Triton's interpreter round and compute like the hardware for bf16 and FP8.

It holds bf16 as integers and adds those, truncates casts to bf16 and loses the carry of casts to FP8. Installed, casts
round to nearest even, to FP8 saturating as cvt.satfinite does, and bf16 arithmetic and matrix products are those of
the values. Ternary operations on bf16 stay wrong: kernels load, convert to f32 and compute.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as ti

NARROW = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2, tl.bfloat16: torch.bfloat16}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
WIDE = {tl.float16: np.float16, tl.float32: np.float32}


def widen(data, dtype):
    """Bits of ``dtype`` as f32 values."""
    if dtype in NARROW:
        bits = np.ascontiguousarray(data)
        return torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.uint8)).view(NARROW[dtype]).float().numpy()
    return np.asarray(data).view(WIDE[dtype]).astype(np.float32)


def narrow(values, dtype):
    """f32 values as bits of ``dtype``."""
    if dtype not in NARROW:
        return values.astype(WIDE[dtype]).view(f"uint{dtype.primitive_bitwidth}")
    x = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    if dtype in LARGEST:
        x = torch.where(x.isnan(), x, x.clamp(-LARGEST[dtype], LARGEST[dtype]))
    x = x.to(NARROW[dtype])
    return x.view(torch.int16).numpy().view(np.uint16) if dtype is tl.bfloat16 else x.view(torch.uint8).numpy()


def install():
    """Patch the interpreter of this process, once."""
    builder, handle, convert = ti.InterpreterBuilder, ti.TensorHandle, ti._convert_float
    if hasattr(builder, "kernomics"):
        return
    binary, unary, dot = builder.binary_op, builder.unary_op, builder.create_dot

    def convert_float(x, of, to, rounding):
        known = all(d in NARROW or d in WIDE for d in (of, to))
        if known and rounding in (None, ti._ir.ROUNDING_MODE.RTNE):
            return narrow(widen(x, of), to).reshape(np.shape(x))
        return convert(x, of, to, rounding)

    def values(h):
        return handle(widen(h.data, h.dtype.scalar).reshape(h.data.shape), tl.float32) if h.dtype.scalar in NARROW else h

    def binary_op(self, a, b, op):
        if a.dtype.scalar == tl.bfloat16 == b.dtype.scalar:
            out = op(values(a).data, values(b).data)
            return handle(out, tl.bfloat16) if out.dtype == np.bool_ else handle(narrow(out, tl.bfloat16), tl.bfloat16)
        return binary(self, a, b, op)

    def unary_op(self, a, op):
        if a.dtype.scalar == tl.bfloat16:
            return handle(narrow(op(values(a).data), tl.bfloat16), tl.bfloat16)
        return unary(self, a, op)

    # Every call of a jitted function would patch triton.language anew (1-2 ms); once a function and launch is enough.
    run, seen = ti.GridExecutor.__call__, set()

    def grid(self, *args, **options):
        seen.clear()
        return run(self, *args, **options)

    def call(self, *args, **options):
        if self.fn not in seen:
            ti._patch_lang(self.fn)
            seen.add(self.fn)
        try:
            return self.rewrite()(*args, **options)
        except Exception as error:
            raise ti.InterpreterError(repr(error)) from error

    ti.GridExecutor.__call__, ti.InterpretedFunction.__call__ = grid, call
    ti._convert_float = convert_float
    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.create_dot = lambda self, a, b, *rest: dot(self, values(a), values(b), *rest)
    builder.kernomics = True
