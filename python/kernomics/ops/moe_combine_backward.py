"""Gradients of moe_combine."""

import numpy as np

from kernomics.contract import BF16, F32, I32, Case, Kernel, like, op
from kernomics.numerics import draw_weights, judge_sums
from kernomics.ops.moe_permute_backward import check_rows_of, sample_rows_of


def _gradients(dout, y, row_of, weights):
    dout = dout.astype(np.float64)
    dy, dweights = np.zeros(y.shape), np.zeros(row_of.shape)
    for j, rows in enumerate(row_of.T):
        used = np.flatnonzero(rows >= 0)
        scale = 1 if weights is None else weights[used, j, None].astype(np.float64)
        np.add.at(dy, rows[used], scale * dout[used])
        dweights[used, j] = np.sum(dout[used] * y[rows[used]].astype(np.float64), axis=1)
    return dy, dweights


def _judge(got, want, inputs):
    row_of, weights = inputs["row_of"], inputs["weights"]
    squares = [None if x is None else x.astype(np.float32) ** 2 for x in (inputs["dout"], inputs["y"], weights)]
    noise_y, noise_weights = map(np.sqrt, _gradients(*squares[:2], row_of, squares[2]))
    dy = judge_sums(got[0], want[0], k=row_of.shape[1], noise=noise_y)
    dweights = judge_sums(got[1], want[1], k=inputs["dout"].shape[1], noise=noise_weights)
    return {f"dy {name}": v for name, v in dy.items()} | {f"dweights {name}": v for name, v in dweights.items()}


def _rows(rng, inputs):
    """At most 64 tokens, those that name a row with one of them, and the rows that these name."""
    row_of = inputs["row_of"]
    chosen = np.zeros(len(row_of), bool)
    chosen[rng.permutation(len(row_of))[:64]] = True
    named = np.zeros(len(inputs["y"]) + 1, bool)  # the last: of -1, which is no row
    while True:
        named[row_of[chosen]] = True
        named[-1] = False
        more = named[row_of].any(1) | chosen
        if (more == chosen).all():
            break
        chosen = more
    rows, place = np.flatnonzero(named), np.cumsum(named, dtype=np.int32) - 1
    cut = {n: x if x is None else x[rows] if n == "y" else x[chosen] for n, x in inputs.items()}
    return cut | {"row_of": np.where(row_of < 0, -1, place[row_of])[chosen]}, lambda outs: [outs[0][rows], outs[1][chosen]]


@op(
    flops=lambda t, top_k, d: 3 * t * top_k * d,
    cases=[
        Case(t=1, d=7168, top_k=8, weights="f32", bench="decode"),
        Case(t=4096, d=7168, top_k=8, weights="f32", bench="prefill"),
        Case(t=65, d=33, top_k=3, weights="f32"),  # divides nothing
        Case(t=65, d=33, top_k=3),  # a plain sum
        Case(t=1, d=5, top_k=1, dout="f32", y="f32", weights="f32"),  # one token
        Case(t=0, d=128, top_k=8, weights="f32"),  # empty
        Case(t=300, d=139, top_k=6, weights="f32"),  # crosses every tile
    ],
    sample=lambda rng, t, top_k, d, weights=None: sample_rows_of(rng, t, top_k, d) | (
        {"weights": draw_weights(rng, t, top_k)} if weights else {}),
    check_data=check_rows_of,
    rows=_rows,
    judge=_judge,
    kernels=[Kernel("triton", "kernomics.triton_kernels.moe_combine_backward:launch", on="gpu")],
)
def moe_combine_backward(dout: (BF16 | F32)["t d"], y: (BF16 | F32)["t*top_k d"], row_of: I32["t top_k"],
                         weights: F32["t top_k"] | None = None) -> (like("y")["t*top_k d"], F32["t top_k"]):
    """``dy[row_of[t, j]] = weights[t, j] * dout[t]``, ``dweights[t, j] = dout[t] . y[row_of[t, j]]``.

    Parameters
    ----------
    dout : gradient of the combined rows
    y, row_of, weights : the inputs of ``moe_combine``

    Returns
    -------
    dy : gradient of y; rows that no slot names are zero, a row named twice gets the sum
    dweights : gradient of the weights (of weights 1 where there are none); 0 for dropped slots

    Raises
    ------
    ContractError : for a row outside ``[-1, t * top_k)`` (CPU tensors)

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> y, row_of, weights = np.float32([[1], [2]]), np.int32([[1, 0]]), np.float32([[0.25, 0.75]])
    >>> kx.moe_combine_backward(np.float32([[4]]), y, row_of, weights, backend="reference")
    (array([[3.],
           [1.]], dtype=float32), array([[8., 4.]], dtype=float32))
    """
    return _gradients(dout, y, row_of, weights)
