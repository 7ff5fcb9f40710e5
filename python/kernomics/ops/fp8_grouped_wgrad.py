"""Weight gradients of grouped FP8 matrix products."""

from itertools import pairwise

import numpy as np

from kernomics.contract import F32, FP8, I32, Case, Kernel, op
from kernomics.numerics import check_offsets, dequantize, draw_offsets, judge_sums


def _judge(got, want, inputs):
    noise = np.zeros(want[0].shape)
    dy = dequantize(inputs["dy"], inputs["dy_scale"], (128, 1)).astype(np.float32)
    x = dequantize(inputs["x"], inputs["x_scale"], (128, 1)).astype(np.float32)
    offsets = inputs["offsets"]
    for i, (start, stop) in enumerate(pairwise(offsets)):
        noise[i] = np.sqrt((dy[start:stop] ** 2).T @ x[start:stop] ** 2)
    return judge_sums(got[0], want[0], k=int(np.diff(offsets).max(initial=0)), noise=noise)


@op(
    flops=lambda t, n, k: 2 * t * n * k,
    cases=[
        Case(t=32, e=4, n=4096, k=7168, active=4, bench="decode-sized batch, gate+up, 8 rows an expert"),
        Case(t=512, e=4, n=4096, k=7168, active=4, bench="prefill-sized batch, gate+up, 128 rows an expert"),
        Case(t=37, e=3, n=65, k=100),  # nothing divides the tile
        Case(t=1, e=2, n=129, k=33),  # one token
        Case(t=0, e=3, n=16, k=24),  # empty: zeros
        Case(t=5, e=0, n=4, k=8),  # no expert
        Case(t=300, e=3, n=72, k=136),  # crosses tiles of small groups, steps and scale blocks
        Case(t=300, e=3, n=144, k=272),  # large tiles, cut
        Case(t=700, e=4, n=133, k=261),  # crosses every row, column and depth tile; groups straddle scale blocks
    ],
    sample=lambda rng, t, e, active=None: {"offsets": draw_offsets(rng, t, e, active)},
    check_data=check_offsets,
    rows="n",
    judge=_judge,
    kernels=[
        Kernel("triton", "kernomics.triton_kernels.fp8_grouped_wgrad:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:fp8_grouped_wgrad"),
    ],
)
def fp8_grouped_wgrad(dy: FP8["t n"], dy_scale: F32["t/128 n"], x: FP8["t k"], x_scale: F32["t/128 k"],
                      offsets: I32["e+1"]) -> F32["e n k"]:
    """``dw[i] = (dy * dy_scale)[rows of i].T @ (x * x_scale)[rows of i]``, accumulated in float32.

    Parameters
    ----------
    dy, dy_scale : gradients of the outputs in e4m3, one f32 scale per 128 rows and column
    x, x_scale : inputs in e4m3, one f32 scale per 128 rows and column
    offsets : expert i owns rows ``offsets[i]:offsets[i + 1]``; a group may be empty and then gives zeros

    Returns
    -------
    dw : one float32 gradient an expert

    Raises
    ------
    ContractError : when offsets do not start at 0, decrease, or end past t

    Notes
    -----
    Scale blocks count rows from the start of the tensor, not of the group: a group may begin inside one. Rows past
    ``offsets[e]`` are not read. Deterministic for any thread count.

    References
    ----------
    DeepSeek-V3 technical report, section 3.3.2; DeepGEMM ``k_grouped_fp8_gemm_tn_contiguous``.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> x, x_scale = kx.fp8_quantize(np.full((3, 2), 7, np.float32), block=(128, 1), backend="reference")
    >>> offsets = np.array([0, 1, 3], np.int32)
    >>> kx.fp8_grouped_wgrad(x, x_scale, x, x_scale, offsets, backend="reference")
    array([[[49., 49.],
            [49., 49.]],
    <BLANKLINE>
           [[98., 98.],
            [98., 98.]]], dtype=float32)
    """
    dy = dequantize(dy, dy_scale, (128, 1))  # [t, n]
    x = dequantize(x, x_scale, (128, 1))  # [t, k]
    dw = [dy[start:stop].T @ x[start:stop] for start, stop in pairwise(offsets)]
    return np.stack(dw) if dw else np.zeros((0, dy.shape[1], x.shape[1]))
