"""Rows sorted by expert."""

import numpy as np

from kernomics.contract import BF16, F32, FP8, I32, Case, Kernel, like, op
from kernomics.numerics import check_index, draw_experts, judge_equal


def _check(error, n_experts, t, top_k):
    if n_experts < 0:
        raise error("n_experts", n_experts, "at least 0")
    if t * top_k >= 2**31:
        raise error("experts", [t, top_k], "fewer than 2**31 copies: row_of is int32")


def _judge(got, want, inputs):
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[got[0].itemsize]
    unequal = int(np.sum(got[0].view(bits) != want[0].view(bits)))
    return {"unequal bits of x_sorted": (unequal, 0)} | judge_equal(got[1], want[1], "unequal offsets") | judge_equal(
        got[2], want[2], "unequal row_of")


def cuda_workspace(copies, e):
    """Bytes of a row for each copy and of the counts of up to 128 blocks; none where copies are compared with each other."""
    return 4 * (copies + 128 * (e + 1)) if copies > 1024 else 0


@op(
    flops=lambda: 0,
    cases=[
        Case(t=1, d=7168, top_k=8, n_experts=256, bench="decode"),
        Case(t=128, d=7168, top_k=8, n_experts=256, bench="decode, 128 tokens"),
        Case(t=4096, d=7168, top_k=8, n_experts=256, bench="prefill"),
        Case(t=65, d=33, top_k=3, n_experts=7),  # divides nothing
        Case(t=1, d=5, top_k=1, n_experts=1, x="f32"),  # one token
        Case(t=0, d=128, top_k=8, n_experts=4),  # empty
        Case(t=3, d=6, top_k=0, n_experts=2),  # no copies
        Case(t=700, d=139, top_k=6, n_experts=300, x="fp8"),  # more experts and rows than any tile
    ],
    dims={"e": "n_experts"},
    sample=lambda rng, t, e, top_k, d: {"experts": draw_experts(rng, t, e, top_k, dropped=0.1 * (t > 1 and d < 1024))},
    check=_check,
    check_data=lambda error, experts, n_experts: check_index(error, "experts", experts, n_experts),
    judge=_judge,
    kernels=[
        Kernel("cuda", "kernomics._cuda:moe_permute", on="sm", where=lambda e, **_: e < 8192,  # bins in shared memory
               workspace=lambda dims, chip: cuda_workspace(dims["t"] * dims["top_k"], dims["e"])),
        Kernel("triton", "kernomics.triton_kernels.moe_permute:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:moe_permute", workspace=lambda dims, chip: 4 * dims["e"]),
    ],
)
def moe_permute(x: (BF16 | F32 | FP8)["t d"], experts: I32["t top_k"], *,
                n_experts: int) -> (like("x")["t*top_k d"], I32["e+1"], I32["t top_k"]):
    """``x_sorted[row_of[t, j]] = x[t]``, rows ordered by ``experts[t, j]``.

    Parameters
    ----------
    x : one row a token
    experts : ids of each token's experts; -1 drops the copy
    n_experts : number of groups

    Returns
    -------
    x_sorted : the copies, those of expert i in rows ``offsets[i]:offsets[i + 1]``; rows past ``offsets[-1]`` are zero
    offsets : start of each expert's rows, and the end of the last
    row_of : the row of ``x_sorted`` that holds copy j of token t, -1 for a dropped copy

    Raises
    ------
    ContractError : for an id outside ``[-1, n_experts)`` (CPU tensors)

    Notes
    -----
    Stable: within an expert, rows keep the order of tokens (and of slots). FP8 rows with scales travel as two calls
    with the same experts. Copies bits: NaN stays as it is.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> x = np.float32([[1], [2], [3]])
    >>> experts = np.int32([[1, 0], [0, -1], [1, 0]])
    >>> x_sorted, offsets, row_of = kx.moe_permute(x, experts, n_experts=2, backend="reference")
    >>> x_sorted.ravel(), offsets
    (array([1., 2., 3., 1., 3., 0.], dtype=float32), array([0, 3, 5], dtype=int32))
    >>> row_of
    array([[ 3,  0],
           [ 1, -1],
           [ 4,  2]], dtype=int32)
    """
    t, top_k = experts.shape
    flat = experts.ravel()
    order = np.argsort(flat, kind="stable")  # copies by expert, dropped ones first
    order = order[np.sum(flat < 0):]  # [rows]
    x_sorted = np.zeros((t * top_k, x.shape[1]), x.dtype)
    x_sorted[: len(order)] = x[order // max(top_k, 1)]
    row_of = np.full(t * top_k, -1)
    row_of[order] = np.arange(len(order))
    offsets = np.searchsorted(flat[order], np.arange(n_experts + 1))
    return x_sorted, offsets, row_of.reshape(t, top_k)
