"""FP8 block-scaled matrix products, one weight matrix a group of rows."""

from itertools import pairwise

import numpy as np

from kernomics.contract import BF16, F32, FP8, I32, Case, Kernel, op
from kernomics.numerics import check_offsets, dequantize, draw_offsets, judge_sums
from kernomics.ops.fp8_gemm import gemm_workspace


def _bytes(t, n, k, e, active=None):
    active = min(e, t) if active is None else active  # experts with rows: each one's weights are read once
    rows = t * (k + 4 * -(-k // 128) + 2 * n)
    return rows + active * (n * k + 4 * -(-n // 128) * -(-k // 128)) + 4 * (e + 1)


def _rows(rng, inputs):
    """64 drawn rows; each group keeps its own."""
    t = len(inputs["a"])
    rows = np.sort(rng.choice(t, min(t, 64), replace=False))
    offsets = np.searchsorted(rows, inputs["offsets"]).astype(np.int32)
    cut = {"a": inputs["a"][rows], "a_scale": inputs["a_scale"][rows], "offsets": offsets}
    return {**inputs, **cut}, lambda outs: [x[rows] for x in outs]


def _judge(got, want, inputs):
    noise = np.zeros(want[0].shape)
    a = dequantize(inputs["a"], inputs["a_scale"], (1, 128)).astype(np.float32)
    for i, (start, stop) in enumerate(pairwise(inputs["offsets"])):
        if start < stop:
            b = dequantize(inputs["b"][i], inputs["b_scale"][i], (128, 128)).astype(np.float32)
            noise[start:stop] = np.sqrt((a[start:stop] ** 2) @ (b * b).T)
    return judge_sums(got[0], want[0], k=a.shape[1], noise=noise, extra=inputs.get("tensor_core", 0))


@op(
    flops=lambda t, n, k: 2 * t * n * k,
    bytes=_bytes,
    cases=[
        Case(t=8, e=8, n=4096, k=7168, active=8, bench="decode gate+up, one row an expert"),
        Case(t=512, e=8, n=4096, k=7168, active=8, bench="prefill gate+up, 64 rows an expert"),
        Case(t=37, e=3, n=65, k=200),  # nothing divides the tile
        Case(t=1, e=4, n=129, k=257),  # one token
        Case(t=0, e=3, n=128, k=128),  # empty
        Case(t=5, e=0, n=4, k=8),  # no expert: zeros
        Case(t=4, e=2, n=6, k=0),  # empty sums: zeros
        Case(t=150, e=4, n=200, k=272),  # middle tiles of several groups
        Case(t=130, e=1, n=130, k=144),  # large tiles, one of each cut
        Case(t=300, e=3, n=261, k=389),  # crosses every row, column and depth tile
    ],
    sample=lambda rng, t, e, active=None: {"offsets": draw_offsets(rng, t, e, active)},
    check_data=check_offsets,
    rows=_rows,
    judge=_judge,
    kernels=[
        Kernel("cuda", "kernomics._cuda:fp8_grouped_gemm_sm90", on="sm90",
               where=lambda e: e <= 2048),  # where each expert's tiles begin stands in shared memory
        Kernel("triton", "kernomics.triton_kernels.fp8_grouped_gemm:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:fp8_grouped_gemm", workspace=lambda dims, chip: gemm_workspace(dims["t"], dims["k"])),
    ],
)
def fp8_grouped_gemm(a: FP8["t k"], a_scale: F32["t k/128"], b: FP8["e n k"], b_scale: F32["e n/128 k/128"],
                     offsets: I32["e+1"]) -> BF16["t n"]:
    """``c[rows of i] = (a * a_scale)[rows of i] @ (b[i] * b_scale[i]).T``, accumulated in float32.

    Parameters
    ----------
    a, a_scale : rows sorted by expert, in e4m3, one f32 scale per row and 128 columns
    b, b_scale : one weight matrix an expert in e4m3, one f32 scale per 128 x 128 block
    offsets : expert i owns rows ``offsets[i]:offsets[i + 1]``; a group may be empty

    Returns
    -------
    c : the products, rounded once from float32; rows past ``offsets[e]`` are zero

    Raises
    ------
    ContractError : when offsets do not start at 0, decrease, or end past t

    Notes
    -----
    Any t, n, k; groups need no alignment. NaN codes give NaN in every sum they enter; rows past ``offsets[e]`` and
    experts without rows are not read. Deterministic for any thread count.

    References
    ----------
    DeepGEMM ``m_grouped_fp8_gemm_nt_contiguous``.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> a, a_scale = kx.fp8_quantize(np.ones((3, 4), np.float32), backend="reference")
    >>> b, b_scale = kx.fp8_quantize(np.float32([[1, 1, 1, 1], [2, 2, 2, 2]]), block=(128, 128), backend="reference")
    >>> offsets = np.array([0, 1, 3], np.int32)  # expert 0: one row, expert 1: two
    >>> kx.fp8_grouped_gemm(a, a_scale, b[:, None], np.stack([b_scale, b_scale]), offsets, backend="reference")
    array([[4],
           [8],
           [8]], dtype=bfloat16)
    """
    c = np.zeros((a.shape[0], b.shape[1]))
    for i, (start, stop) in enumerate(pairwise(offsets)):
        if start < stop:
            rows = dequantize(a[start:stop], a_scale[start:stop], (1, 128))  # [rows, k]
            c[start:stop] = rows @ dequantize(b[i], b_scale[i], (128, 128)).T
    return c
