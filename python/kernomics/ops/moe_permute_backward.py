"""Gradient of moe_permute."""

import numpy as np

from kernomics.contract import BF16, F32, I32, Case, Kernel, like, op
from kernomics.numerics import check_index, judge_sums


def sample_rows_of(rng, t, top_k, d):
    """Rows of a permutation, some of them dropped where the case is small."""
    row_of = rng.permutation(t * top_k).reshape(t, top_k)
    return {"row_of": np.where(rng.random((t, top_k)) < 0.1 * (t > 1 and d < 1024), -1, row_of).astype(np.int32)}


def check_rows_of(error, row_of, t, top_k):
    check_index(error, "row_of", row_of, t * top_k)


def sum_of_rows(y, row_of, weights=None):
    """``sum_j weights[:, j] * y[row_of[:, j]]`` in float64, slot by slot; row -1 contributes 0."""
    out = np.zeros((len(row_of), y.shape[1]))
    for j, rows in enumerate(row_of.T):
        used = np.flatnonzero(rows >= 0)
        scale = 1 if weights is None else weights[used, j, None].astype(np.float64)
        out[used] += scale * y[rows[used]].astype(np.float64)
    return out


def _judge(got, want, inputs):
    noise = np.sqrt(sum_of_rows(inputs["dx_sorted"].astype(np.float32) ** 2, inputs["row_of"]))
    return judge_sums(got[0], want[0], k=inputs["row_of"].shape[1], noise=noise)


@op(
    flops=lambda t, top_k, d: t * top_k * d,
    cases=[
        Case(t=1, d=7168, top_k=8, bench="decode"),
        Case(t=4096, d=7168, top_k=8, bench="prefill"),
        Case(t=65, d=33, top_k=3),  # divides nothing
        Case(t=1, d=5, top_k=1, dx_sorted="f32"),  # one token
        Case(t=0, d=128, top_k=8),  # empty
        Case(t=3, d=6, top_k=0),  # no copies: zeros
        Case(t=300, d=139, top_k=6),  # crosses every tile
    ],
    sample=sample_rows_of,
    check_data=check_rows_of,
    rows="t",
    judge=_judge,
    kernels=[Kernel("triton", "kernomics.triton_kernels.moe_permute_backward:launch", on="gpu")],
)
def moe_permute_backward(dx_sorted: (BF16 | F32)["t*top_k d"], row_of: I32["t top_k"]) -> like("dx_sorted")["t d"]:
    """``dx[t] = sum_j dx_sorted[row_of[t, j]]``, in float32 in the order of the slots.

    Parameters
    ----------
    dx_sorted : gradient of the sorted rows
    row_of : as ``moe_permute`` returned it; -1 contributes 0

    Returns
    -------
    dx : gradient of the tokens, in the dtype of dx_sorted

    Raises
    ------
    ContractError : for a row outside ``[-1, t * top_k)`` (CPU tensors)

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> kx.moe_permute_backward(np.float32([[1], [2], [4], [8]]), np.int32([[3, 0], [1, -1]]), backend="reference")
    array([[9.],
           [2.]], dtype=float32)
    """
    return sum_of_rows(dx_sorted, row_of)
