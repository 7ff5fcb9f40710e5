"""The expert block of a mixture-of-experts layer, with bf16 weights."""

import numpy as np

from kernomics.contract import BF16, F32, I32, Case, Kernel, op
from kernomics.numerics import BF16 as BF16_DTYPE
from kernomics.numerics import check_index, draw_experts, draw_weights
from kernomics.ops.moe_experts import as_bf16, expert_block, judge_block, workspace


def _matrices(w13, w2):
    return (lambda i: w13[i].astype(np.float64)), (lambda i: w2[i].astype(np.float64))


def _bytes(t, d, n, e, top_k, active=None):
    active = min(e, t * top_k) if active is None else active  # experts in use: each one's weights are read once
    return 4 * t * d + 8 * t * top_k + active * 6 * n * d


def _sample(rng, t, d, n, e, top_k, active=None):
    return {
        "x": (rng.standard_normal((t, d)) / max(d, 1) ** 0.5).astype(np.float32).astype(BF16_DTYPE),  # gate, up near 1
        "weights": draw_weights(rng, t, top_k),
        "experts": draw_experts(rng, t, e, top_k, active, dropped=0.1 * (t > 1 and d < 1024)),
    }


@op(
    flops=lambda t, d, n, top_k: 6 * t * top_k * d * n,
    bytes=_bytes,
    cases=[
        Case(t=1, d=7168, n=2048, e=16, top_k=8, bench="decode, 1 token"),
        Case(t=16, d=7168, n=2048, e=16, top_k=8, bench="decode, 16 tokens"),
        Case(t=128, d=7168, n=2048, e=16, top_k=8, bench="prefill, 128 tokens"),
        Case(t=9, d=72, n=40, e=5, top_k=3),  # nothing divides the tile
        Case(t=1, d=201, n=67, e=6, top_k=4),  # one token
        Case(t=0, d=128, n=128, e=2, top_k=2),  # empty
        Case(t=3, d=8, n=4, e=2, top_k=0),  # no expert: zeros
        Case(t=150, d=269, n=133, e=3, top_k=2),  # crosses every row, column and depth tile
    ],
    sample=_sample,
    check_data=lambda error, experts, e: check_index(error, "experts", experts, e),
    rows="t",
    judge=lambda got, want, inputs: judge_block(got, want, inputs, *_matrices(inputs["w13"], inputs["w2"]), as_bf16),
    kernels=[
        Kernel("triton", "kernomics.triton_kernels.moe_experts_bf16:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:moe_experts_bf16", workspace=workspace),
    ],
)
def moe_experts_bf16(x: BF16["t d"], w13: BF16["e 2*n d"], w2: BF16["e d n"], weights: F32["t top_k"],
                     experts: I32["t top_k"]) -> BF16["t d"]:
    """``out[t] = sum_j weights[t, j] * w2[i] @ (silu(gate) * up)``, ``gate, up = w13[i] @ x[t]``, ``i = experts[t, j]``.

    Parameters
    ----------
    x : one row a token
    w13 : gate rows, then up rows
    w2 : projections back
    weights : routing weights
    experts : ids; -1 contributes 0, whatever its weight

    Returns
    -------
    out : one row a token

    Raises
    ------
    ContractError : for an id outside ``[-1, e)`` (CPU tensors)

    Notes
    -----
    As ``moe_experts`` with ``activations="bf16"``: sums in float32; both products and the SwiGLU result are rounded to
    bf16; the weighted sum runs in the order of the slots and is rounded once. Weights of experts that no token uses
    are not read.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> from kernomics.numerics import BF16
    >>> x, weights, experts = np.full((1, 3), 8, BF16), np.float32([[0.5, 1]]), np.int32([[0, -1]])
    >>> kx.moe_experts_bf16(x, np.ones((1, 2, 3), BF16), np.ones((1, 3, 1), BF16), weights, experts, backend="reference")
    array([[288, 288, 288]], dtype=bfloat16)
    """
    return expert_block(x, weights, experts, *_matrices(w13, w2), as_bf16)
