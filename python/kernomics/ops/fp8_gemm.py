"""FP8 block-scaled matrix product."""

import numpy as np

from kernomics.contract import BF16, F32, FP8, Case, Kernel, keyword, op
from kernomics.numerics import dequantize, judge_sums


def _judge(got, want, inputs):
    a = dequantize(inputs["a"], inputs["a_scale"], (1, 128)).astype(np.float32)
    b = dequantize(inputs["b"], inputs["b_scale"], (128, 128)).astype(np.float32)
    return judge_sums(got[0], want[0], k=a.shape[1], noise=np.sqrt((a * a) @ (b * b).T), extra=inputs.get("tensor_core", 0))


def gemm_workspace(m, k):
    """Bytes of up to 256 rows as f32, in whole vectors of lanes."""
    return 4 * k * (-(-min(m, 256) // 32) * 32)


@op(
    flops=lambda m, n, k: 2 * m * n * k,
    cases=[
        Case(m=1, n=2112, k=7168, bench="decode q_a+kv_a"),
        Case(m=1, n=24576, k=1536, bench="decode q_b"),
        Case(m=1, n=7168, k=16384, bench="decode o"),
        Case(m=1, n=4096, k=7168, bench="decode shared gate+up"),
        Case(m=1, n=7168, k=2048, bench="decode shared down"),
        Case(m=1, n=36864, k=7168, bench="decode dense gate+up"),
        Case(m=1, n=7168, k=18432, bench="decode dense down"),
        Case(m=16, n=4096, k=7168, bench="decode gate+up, 16 tokens"),
        Case(m=64, n=2112, k=7168, bench="decode q_a+kv_a, 64 tokens"),
        Case(m=256, n=2112, k=7168, bench="prefill q_a+kv_a, 256 tokens"),
        Case(m=256, n=4096, k=7168, bench="prefill gate+up, 256 tokens"),
        Case(m=4096, n=4096, k=7168, bench="prefill gate+up"),
        Case(m=65, n=192, k=200),  # nothing divides the tile
        Case(m=1, n=129, k=257, out_dtype="f32"),  # one token, odd sizes
        Case(m=0, n=128, k=128),  # empty
        Case(m=3, n=5, k=0),  # empty sum: zeros
        Case(m=8, n=300, k=640),  # largest m of the streaming path
        Case(m=9, n=300, k=640),  # smallest m of the panel path
        Case(m=290, n=233, k=777),  # crosses every row, column and depth tile
        Case(m=2, n=7, k=33),
        Case(m=3, n=70, k=4104),  # few tiles, long sums: several programs share one, the last one's share is shorter
        Case(m=2, n=300, k=840),  # two rows as codes: more rows than a turn reads, a last block that is cut
    ],
    rows="m",
    judge=_judge,
    kernels=[
        Kernel("cuda", "kernomics._cuda:fp8_gemm_sm90", on="sm90"),
        Kernel("triton", "kernomics.triton_kernels.fp8_gemm:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:fp8_gemm",
               workspace=lambda dims, chip: gemm_workspace(dims["m"], dims["k"])),
    ],
)
def fp8_gemm(a: FP8["m k"], a_scale: F32["m k/128"], b: FP8["n k"], b_scale: F32["n/128 k/128"], *,
             out_dtype: BF16 | F32 = "bf16") -> keyword("out_dtype")["m n"]:
    """``c = (a * a_scale) @ (b * b_scale).T``, accumulated in float32.

    Parameters
    ----------
    a, a_scale : activations in e4m3, one f32 scale per row and 128 columns
    b, b_scale : weights in e4m3, one f32 scale per 128 x 128 block
    out_dtype : bfloat16 (default) or float32

    Returns
    -------
    c : the product, rounded once from float32

    Notes
    -----
    Any m, n, k; k = 0 gives zeros. NaN codes (0x7f, 0xff) give NaN in every sum they enter. Deterministic for
    any thread count. A row's result does not depend on the other rows within one path of the CPU kernel
    (up to 8 rows, or more).

    References
    ----------
    DeepSeek-V3 technical report, section 3.3.2; DeepGEMM ``fp8_gemm_nt``.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> a, a_scale = kx.fp8_quantize(np.ones((2, 256), np.float32))
    >>> b, b_scale = kx.fp8_quantize(np.ones((3, 256), np.float32), block=(128, 128))
    >>> kx.fp8_gemm(a, a_scale, b, b_scale)
    array([[256, 256, 256],
           [256, 256, 256]], dtype=bfloat16)
    """
    return dequantize(a, a_scale, (1, 128)) @ dequantize(b, b_scale, (128, 128)).T
