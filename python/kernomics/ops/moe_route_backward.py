"""Gradient of moe_route."""

from typing import Literal

import numpy as np

from kernomics.contract import BF16, F32, I32, Case, Kernel, like, op
from kernomics.numerics import UNIT, check_index, draw_experts, norm_error, rounded
from kernomics.ops.moe_route import scores_of


def _judge(got, want, inputs):
    # Each term carries a few f32 roundings of its score; their differences cancel against the row's mean.
    bound = 2 * norm_error(rounded(want[0], got[0].dtype), want[0]) + 64 * UNIT["f32"]
    return {"norm error": (norm_error(got[0], want[0]), bound)}


@op(
    flops=lambda t, e, top_k: 4 * t * e + 6 * t * top_k,
    cases=[
        Case(t=1, e=256, top_k=8, scaling=2.5, bias="f32", bench="decode"),
        Case(t=4096, e=256, top_k=8, scaling=2.5, bias="f32", bench="prefill"),
        Case(t=65, e=21, top_k=5, bias="f32"),  # divides no vector
        Case(t=37, e=160, top_k=6, score="softmax", renormalize=False, scaling=16.0),  # DeepSeek-V2
        Case(t=33, e=64, top_k=8, logits="bf16", score="softmax"),
        Case(t=1, e=1, top_k=1),  # one token, one expert
        Case(t=0, e=16, top_k=2),  # empty
        Case(t=131, e=300, top_k=17),  # crosses every tile
    ],
    sample=lambda rng, t, e, top_k: {"experts": draw_experts(rng, t, e, top_k)},
    check_data=lambda error, experts, e: check_index(error, "experts", experts, e, lowest=0),
    rows="t",
    judge=_judge,
    kernels=[Kernel("triton", "kernomics.triton_kernels.moe_route_backward:launch", on="gpu")],
)
def moe_route_backward(dweights: F32["t top_k"], logits: (F32 | BF16)["t e"], bias: F32["e"] | None,
                       experts: I32["t top_k"], *, score: Literal["sigmoid", "softmax"] = "sigmoid",
                       renormalize: bool = True, scaling: float = 1.0) -> like("logits")["t e"]:
    """``dlogits`` of ``weights = scaling * s / (sum s + 1e-20)`` with ``s = score(logits)[experts]``, experts fixed.

    Parameters
    ----------
    dweights : gradient of the weights
    logits, bias : the inputs of ``moe_route``; the bias has no gradient
    experts : ids as ``moe_route`` returned them
    score, renormalize, scaling : as in the forward call

    Returns
    -------
    dlogits : in the dtype of logits; for "sigmoid" 0 except at the chosen experts

    Raises
    ------
    ContractError : for an id outside ``[0, e)`` (CPU tensors)

    Notes
    -----
    A row with NaN in logits or bias, whose weights are NaN, gets NaN.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> kx.moe_route_backward(np.float32([[1]]), np.float32([[0, 3]]), None, np.int32([[0]]), renormalize=False,
    ...                       backend="reference")
    array([[0.25, 0.  ]], dtype=float32)
    """
    scores = scores_of(logits, score)  # [t, e]
    s = np.take_along_axis(scores, experts, axis=1)  # [t, top_k]
    ds = scaling * dweights.astype(np.float64)
    if renormalize:
        whole = s.sum(axis=1, keepdims=True) + 1e-20
        ds = (ds - (ds * s).sum(axis=1, keepdims=True) / whole) / whole
    dscores = np.zeros(scores.shape)
    np.add.at(dscores, (np.arange(len(scores))[:, None], experts), ds)
    if score == "sigmoid":
        dlogits = dscores * scores * (1 - scores)
    else:
        dlogits = scores * (dscores - (dscores * scores).sum(axis=1, keepdims=True))
    odd = np.isnan(scores if bias is None else scores + bias).any(axis=1, keepdims=True)
    return np.where(odd, np.nan, dlogits)
