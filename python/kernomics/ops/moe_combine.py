"""Expert outputs added up per token."""

import numpy as np

from kernomics.contract import BF16, F32, I32, Case, Kernel, like, op
from kernomics.numerics import draw_weights, judge_sums
from kernomics.ops.moe_permute_backward import check_rows_of, sample_rows_of, sum_of_rows


def _judge(got, want, inputs):
    row_of, weights = inputs["row_of"], inputs["weights"]
    squares = None if weights is None else weights**2
    noise = np.sqrt(sum_of_rows(inputs["y"].astype(np.float32) ** 2, row_of, squares))
    return judge_sums(got[0], want[0], k=row_of.shape[1], noise=noise)


@op(
    flops=lambda t, top_k, d: 2 * t * top_k * d,
    cases=[
        Case(t=1, d=7168, top_k=8, weights="f32", bench="decode"),
        Case(t=128, d=7168, top_k=8, weights="f32", bench="decode, 128 tokens"),
        Case(t=4096, d=7168, top_k=8, weights="f32", bench="prefill"),
        Case(t=65, d=33, top_k=3, weights="f32"),  # divides nothing
        Case(t=65, d=33, top_k=3),  # a plain sum
        Case(t=1, d=5, top_k=1, y="f32", weights="f32"),  # one token
        Case(t=0, d=128, top_k=8, weights="f32"),  # empty
        Case(t=3, d=6, top_k=0),  # no copies: zeros
        Case(t=300, d=139, top_k=6, y="f32", weights="f32"),  # crosses every tile
    ],
    sample=lambda rng, t, top_k, d, weights=None: sample_rows_of(rng, t, top_k, d) | (
        {"weights": draw_weights(rng, t, top_k)} if weights else {}),
    check_data=check_rows_of,
    rows="t",
    judge=_judge,
    kernels=[
        Kernel("cuda", "kernomics._cuda:moe_combine", on="sm"),
        Kernel("triton", "kernomics.triton_kernels.moe_combine:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:moe_combine"),
    ],
)
def moe_combine(y: (BF16 | F32)["t*top_k d"], row_of: I32["t top_k"],
                weights: F32["t top_k"] | None = None) -> like("y")["t d"]:
    """``out[t] = sum_j weights[t, j] * y[row_of[t, j]]``, in float32 in the order of the slots.

    Parameters
    ----------
    y : expert outputs, rows sorted by expert
    row_of : as ``moe_permute`` returned it; -1 contributes 0
    weights : routing weights; None adds the rows unweighted

    Returns
    -------
    out : one row a token, in the dtype of y

    Raises
    ------
    ContractError : for a row outside ``[-1, t * top_k)`` (CPU tensors)

    Notes
    -----
    A row that no slot names is not read, and the weight of a dropped slot does not matter: NaN there stays out.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> y = np.float32([[1], [2], [4], [8]])
    >>> row_of, weights = np.int32([[3, 0], [1, -1]]), np.float32([[0.5, 1], [1, 1]])
    >>> kx.moe_combine(y, row_of, weights, backend="reference")
    array([[5.],
           [2.]], dtype=float32)
    """
    return sum_of_rows(y, row_of, weights)
