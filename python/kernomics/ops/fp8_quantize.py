"""FP8 quantization with one scale per block."""

from typing import Literal

import numpy as np

from kernomics.contract import BF16, F32, FP8, Case, Kernel, op
from kernomics.numerics import judge_equal, quantize


def _check(error, block, floor):
    if tuple(block) not in ((1, 128), (128, 128), (128, 1)):
        raise error("block", block, "(1, 128), (128, 128) or (128, 1)")
    if not floor >= 0:
        raise error("floor", floor, "at least 0")


def _rows(rng, inputs):
    """128 neighbouring rows, which hold whole blocks of any kind."""
    m, i = len(inputs["x"]), int(rng.integers(max(-(-len(inputs["x"]) // 128), 1)))
    rows = slice(128 * i, 128 * i + 128)
    return {"x": inputs["x"][rows]}, lambda outs: [x[rows] if len(x) == m else x[i:i + 1] for x in outs]


@op(
    flops=lambda m, k: 3 * m * k,  # amax, divide, round
    cases=[
        Case(m=1, k=7168, bench="decode hidden state"),
        Case(m=1, k=1536, bench="decode q latent"),
        Case(m=1, k=16384, bench="decode attention output"),
        Case(m=4096, k=7168, bench="prefill hidden state"),
        Case(m=2112, k=7168, x="f32", block=(128, 128), bench="weights q_a+kv_a"),
        Case(m=65, k=200),  # divides no block and no vector
        Case(m=3, k=129, x="f32", scale="pow2", floor=0.0),
        Case(m=1, k=1),  # one element
        Case(m=0, k=256),  # empty
        Case(m=300, k=387, block=(128, 128), scale="pow2"),  # crosses block boundaries both ways
        Case(m=259, k=130, block=(128, 1)),
    ],
    check=_check,
    rows=_rows,
    judge=lambda got, want, inputs: (
        judge_equal(got[0], want[0], "unequal codes") | judge_equal(got[1], want[1], "unequal scales")),
    kernels=[
        Kernel("cuda", "kernomics._cuda:fp8_quantize", on="sm"),
        Kernel("triton", "kernomics.triton_kernels.fp8_quantize:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:fp8_quantize"),
    ],
)
def fp8_quantize(x: (BF16 | F32)["m k"], *, block: tuple = (1, 128), scale: Literal["f32", "pow2"] = "f32",
                 floor: float = 1e-4) -> (FP8["m k"], F32["m/block0 k/block1"]):
    """``scale = max(amax, floor) / 448``, ``codes = e4m3(x / scale)`` per block.

    Parameters
    ----------
    x : values to quantize
    block : (rows, columns) that share a scale: (1, 128) activations, (128, 128) weights, (128, 1) columns
    scale : "f32", or "pow2" to round each scale up to a power of two
    floor : the smallest amax assumed; with 0 a block of zeros gets scale 1

    Returns
    -------
    codes : e4m3, round-to-nearest-even of ``x / scale``, saturating at 448
    scale : f32, one per block; ``codes * scale`` approximates ``x``

    Raises
    ------
    ContractError : for another block shape or a negative floor

    Notes
    -----
    Both divisions are true f32 divisions, and every backend returns the same bits. amax runs over the finite
    values of a block; a NaN or Inf element becomes NaN code 0x7f and leaves its neighbours alone. A scale that
    underflows to 0 becomes 1.

    References
    ----------
    DeepSeek-V3 technical report, section 3.3.2 (fine-grained quantization).

    Examples
    --------
    >>> import numpy as np
    >>> codes, scale = fp8_quantize(np.array([[1.0, -448.0, 3.0]], np.float32))
    >>> codes.astype(np.float32) * scale
    array([[   1., -448.,    3.]], dtype=float32)
    """
    return quantize(np.asarray(x).astype(np.float32), block, scale, floor)
