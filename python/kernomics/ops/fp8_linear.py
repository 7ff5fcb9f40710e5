"""A linear layer with FP8 weights."""

from typing import Literal

import numpy as np

from kernomics.contract import BF16, F32, FP8, Case, Kernel, keyword, op
from kernomics.numerics import dequantize, judge_sums, quantize
from kernomics.ops.fp8_gemm import gemm_workspace


def _activations(x, activations):
    return dequantize(*quantize(x, (1, 128)), (1, 128)) if activations == "fp8" else x.astype(np.float64)


def _judge(got, want, inputs):
    x = _activations(inputs["x"], inputs["activations"]).astype(np.float32)
    w = dequantize(inputs["w"], inputs["w_scale"], (128, 128)).astype(np.float32)
    squares = (x * x) @ (w * w).T
    if inputs["bias"] is not None:
        squares = squares + inputs["bias"].astype(np.float32) ** 2
    return judge_sums(got[0], want[0], k=x.shape[1] + 1, noise=np.sqrt(squares), extra=inputs.get("tensor_core", 0))


@op(
    flops=lambda m, n, k: 2 * m * n * k,
    cases=[
        Case(m=1, n=2112, k=7168, bench="decode q_a+kv_a"),
        Case(m=1, n=2112, k=7168, activations="bf16", bench="decode q_a+kv_a, weight-only"),
        Case(m=256, n=2112, k=7168, bench="prefill q_a+kv_a, 256 tokens"),
        Case(m=256, n=2112, k=7168, activations="bf16", bench="prefill q_a+kv_a, 256 tokens, weight-only"),
        Case(m=65, n=192, k=200, bias="bf16"),  # nothing divides the tile
        Case(m=1, n=129, k=257, bias="bf16", activations="bf16", out_dtype="f32"),  # one token, odd sizes
        Case(m=0, n=128, k=128),  # empty
        Case(m=3, n=5, k=0, bias="bf16"),  # empty sum: the bias
        Case(m=8, n=300, k=640, activations="bf16"),
        Case(m=290, n=233, k=389),  # crosses every row, column and depth tile
        Case(m=290, n=233, k=389, activations="bf16", bias="bf16"),
    ],
    rows="m",
    judge=_judge,
    kernels=[
        Kernel("triton", "kernomics.triton_kernels.fp8_linear:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:fp8_linear", workspace=lambda dims, chip: gemm_workspace(dims["m"], dims["k"])),
    ],
)
def fp8_linear(x: BF16["m k"], w: FP8["n k"], w_scale: F32["n/128 k/128"], *, bias: BF16["n"] | None = None,
               activations: Literal["fp8", "bf16"] = "fp8", out_dtype: BF16 | F32 = "bf16") -> keyword("out_dtype")["m n"]:
    """``y = x @ (w * w_scale).T + bias``, accumulated in float32.

    Parameters
    ----------
    x : activations
    w, w_scale : weights in e4m3, one f32 scale per 128 x 128 block
    bias : added in float32 before the final rounding
    activations : "fp8" quantizes x with ``fp8_quantize`` per row and 128 columns, "bf16" multiplies it as it is
    out_dtype : bfloat16 (default) or float32

    Returns
    -------
    y : rounded once from float32

    Notes
    -----
    With "fp8" equal to ``fp8_quantize``, ``fp8_gemm``. NaN codes in w give NaN; NaN or Inf in x makes its row NaN with
    "fp8". Deterministic for any thread count.

    References
    ----------
    DeepSeek-V3 inference code, ``linear``.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> from kernomics.numerics import BF16
    >>> w, w_scale = kx.fp8_quantize(np.ones((2, 4), np.float32), block=(128, 128), backend="reference")
    >>> kx.fp8_linear(np.ones((1, 4), BF16), w, w_scale, bias=np.array([0, 1], BF16), backend="reference")
    array([[4, 5]], dtype=bfloat16)
    """
    y = _activations(x, activations) @ dequantize(w, w_scale, (128, 128)).T
    return y if bias is None else y + bias.astype(np.float64)
