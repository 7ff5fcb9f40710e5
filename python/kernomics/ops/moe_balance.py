"""Auxiliary-loss-free load balancing of experts."""

import numpy as np

from kernomics.contract import F32, I32, Case, op


def _check_data(error, counts):
    if np.any(counts < 0):
        raise error("counts", f"{counts.min()} somewhere", "at least 0")


@op(
    flops=lambda e: 4 * e,
    cases=[
        Case(e=256, bench="decode or prefill step"),
        Case(e=7),  # divides nothing
        Case(e=1),  # always balanced
        Case(e=0),  # empty
    ],
    sample=lambda rng, e: {"counts": rng.integers(0, 100, e).astype(np.int32)},
    check_data=_check_data,
    host=True,
)
def moe_balance(counts: I32["e"], bias: F32["e"], *, rate: float = 1e-3) -> F32["e"]:
    """``bias + rate * sign(mean(counts) - counts)``.

    Parameters
    ----------
    counts : tokens that each expert got
    bias : the routing bias in force
    rate : step of the update

    Returns
    -------
    bias : for the next step: overloaded experts get less, underloaded ones more, those at the mean keep theirs

    Raises
    ------
    ContractError : for a negative count

    Notes
    -----
    Host code in NumPy. The comparison with the mean is exact (integers); the update runs in float32.

    References
    ----------
    DeepSeek-V3 technical report, section 2.1.2 (auxiliary-loss-free load balancing).

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> kx.moe_balance(np.int32([6, 2, 4]), np.float32([0, 0, 0.5]), rate=0.25)
    array([-0.25,  0.25,  0.5 ], dtype=float32)
    """
    counts = counts.astype(np.int64)
    sign = np.sign(counts.sum() - counts * counts.size)  # of e * (mean - count)
    return bias + np.float32(rate) * sign.astype(np.float32)
