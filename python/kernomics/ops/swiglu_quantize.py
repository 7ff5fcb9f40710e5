"""SwiGLU and FP8 quantization in one pass."""

from typing import Literal

import numpy as np

from kernomics.contract import BF16, F32, FP8, Case, Kernel, op
from kernomics.numerics import BF16 as BF16_DTYPE
from kernomics.numerics import block_scale, e4m3_encode, quantize, spread, swiglu


def _judge(got, want, inputs):
    """Scales and codes must be exactly those of bf16 values within 1 ulp of the definition's.

    An evaluation in float32 is off by some 2**-21, 2**-13 of a bf16 ulp, so that about one bf16 in 1000 rounds
    the other way and one code in 10000; truncation instead of rounding would change one code in 32.
    """
    codes, scale = got
    h = swiglu(inputs["x"]).astype(BF16_DTYPE)  # [t, n]
    bits = h.view(np.uint16)
    down = np.where(bits & 0x7FFF, bits - 1, bits).astype(np.uint16).view(BF16_DTYPE)  # next magnitude towards 0
    up = np.where((bits & 0x7FFF) < 0x7F7F, bits + 1, bits).astype(np.uint16).view(BF16_DTYPE)
    near = [v.astype(np.float32) for v in (h, down, up)]
    kind = inputs["scale"]
    scale_off = ~np.any([scale == block_scale(v, (1, 128), kind) for v in near], axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        fits = [codes.view(np.uint8) == e4m3_encode(v / spread(scale, (1, 128), v.shape)) for v in near]
    others = np.sum(~fits[0])  # codes of a neighbour
    return {
        "scales of no bf16 amax within 1 ulp": (int(np.sum(scale_off)), 0),
        "codes of no bf16 within 1 ulp": (int(np.sum(~np.any(fits, axis=0))), 0),
        "share of codes off by a bf16 ulp": (float(others / max(codes.size, 1)), 0.002 + 3 / max(codes.size, 1)),
    }


@op(
    flops=lambda t, n: 8 * t * n,  # exp, add, divide, two products, amax, divide, round
    cases=[
        Case(t=8, n=2048, bench="decode, one token at 8 experts"),
        Case(t=4096, n=2048, bench="prefill"),
        Case(t=65, n=200),  # divides no block and no vector
        Case(t=3, n=129, scale="pow2"),
        Case(t=1, n=1),  # one element
        Case(t=0, n=256),  # empty
        Case(t=131, n=387),  # crosses block and row tiles
    ],
    rows="t",
    judge=_judge,
    kernels=[
        Kernel("cuda", "kernomics._cuda:swiglu_quantize", on="sm"),
        Kernel("triton", "kernomics.triton_kernels.swiglu_quantize:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:swiglu_quantize"),
    ],
)
def swiglu_quantize(x: BF16["t 2*n"], *, scale: Literal["f32", "pow2"] = "f32") -> (FP8["t n"], F32["t n/128"]):
    """``fp8_quantize(bf16(silu(gate) * up))`` with ``gate, up`` the halves of each row.

    Parameters
    ----------
    x : gate in the first n columns, up in the others
    scale : "f32", or "pow2" to round each scale up to a power of two

    Returns
    -------
    codes, scale : as ``fp8_quantize`` returns them for blocks (1, 128) and its default floor

    Notes
    -----
    ``silu(gate) * up`` in float32, rounded to bf16, then quantized: codes and scales are exactly those of the bf16
    value, which may differ between backends by one ulp. NaN and Inf become NaN code 0x7f.

    References
    ----------
    DeepSeek-V3 inference code, ``MLP`` and ``act_quant``.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> from kernomics.numerics import BF16
    >>> codes, scale = kx.swiglu_quantize(np.array([[30, 0, 14, 5]], BF16), backend="reference")
    >>> codes.astype(np.float32) * scale  # silu(30) * 14, silu(0) * 5
    array([[420.,   0.]], dtype=float32)
    """
    return quantize(swiglu(x), (1, 128), scale)
