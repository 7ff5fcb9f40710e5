"""Merge of two attention results over disjoint keys."""

from math import prod

import numpy as np

from kernomics.contract import BF16, F32, Case, Kernel, op
from kernomics.numerics import judge_attention


def _sample(rng, lead, q, h):
    drawn = {}
    for name in ("lse_a", "lse_b"):
        lse = 4 * rng.standard_normal((*lead, h, q), np.float32)
        empty = rng.random(lse.shape)
        lse[empty < 0.15] = -np.inf
        lse[empty < 0.05] = np.inf  # FlashMLA's spelling of a row without keys
        drawn[name] = lse
    return drawn


def _rows(rng, inputs):
    """At most 64 queries."""
    q = np.sort(rng.permutation(inputs["out_a"].shape[-3])[:64])
    cut = {n: x[..., q] if n.startswith("lse") else x[..., q, :, :] for n, x in inputs.items()}
    return cut, lambda outs: [x[at] for x, at in zip(outs, (np.s_[..., q, :, :], np.s_[..., q]))]


@op(
    flops=lambda lead, q, h, d: 3 * prod(lead) * q * h * d,  # a * out_a + b * out_b
    cases=[
        Case(lead=(4,), q=1, h=128, d=512, bench="decode, 4 sequences"),
        Case(lead=(64,), q=1, h=128, d=512, bench="decode, 64 sequences"),
        Case(lead=(), q=512, h=128, d=128, bench="prefill chunk of 512"),
        Case(lead=(3,), q=5, h=7, d=33),  # nothing divides a vector
        Case(lead=(2, 3), q=2, h=5, d=512),
        Case(lead=(), q=1, h=1, d=1),  # one value
        Case(lead=(1,), q=1, h=1, d=512),  # one token
        Case(lead=(0,), q=1, h=4, d=512),  # no sequences
        Case(lead=(), q=0, h=4, d=128),  # no queries
        Case(lead=(2,), q=3, h=2, d=0),  # no values: lse alone
        Case(lead=(), q=259, h=33, d=130),  # crosses row and vector tiles
    ],
    sample=_sample,
    rows=_rows,
    judge=lambda got, want, inputs: judge_attention(*got, *want),
    kernels=[Kernel("triton", "kernomics.triton_kernels.attention_merge:launch", on="gpu"),
             Kernel("cpu", "kernomics._cpu:attention_merge")],
)
def attention_merge(out_a: BF16["... q h d"], lse_a: F32["... h q"], out_b: BF16["... q h d"],
                    lse_b: F32["... h q"]) -> (BF16["... q h d"], F32["... h q"]):
    """``lse = log(exp(lse_a) + exp(lse_b))``, ``out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b``.

    Parameters
    ----------
    out_a, lse_a : attention over some keys, as ``mla_decode`` and ``mla_prefill`` return it
    out_b, lse_b : attention of the same queries over other keys

    Returns
    -------
    out, lse : attention over both sets of keys; 0 and -inf where both are without keys

    Notes
    -----
    lse -inf says that there were no keys; +inf, FlashMLA's word for it, is read as -inf. The values beside such
    an lse are not read. NaN in lse gives NaN.

    A sink scales the result of a decode: merge first, then apply it.

    References
    ----------
    FlashInfer ``merge_state``; Flash-Decoding, section "combine".

    Examples
    --------
    >>> import ml_dtypes, numpy as np, kernomics as kx
    >>> out_a, out_b = (np.full((1, 1, 2), x, ml_dtypes.bfloat16) for x in (1, 5))
    >>> lse_a, lse_b = (np.log(np.full((1, 1), x, np.float32)) for x in (3, 1))  # three keys and one
    >>> out, lse = kx.attention_merge(out_a, lse_a, out_b, lse_b, backend="reference")
    >>> out.astype(float).tolist(), np.exp(lse).round(3).tolist()
    ([[[2.0, 2.0]]], [[4.0]])
    """
    outs = [np.asarray(x).astype(np.float64) for x in (out_a, out_b)]
    lses = [np.where(x == np.inf, -np.inf, x.astype(np.float64)) for x in (lse_a, lse_b)]
    with np.errstate(invalid="ignore"):
        lse = np.logaddexp(*lses)
    out = np.zeros(outs[0].shape)
    for x, x_lse in zip(outs, lses):
        with np.errstate(invalid="ignore"):
            weight = np.swapaxes(np.exp(x_lse - lse), -1, -2)[..., None]  # [... q h 1]
            out += np.where(np.swapaxes(x_lse, -1, -2)[..., None] == -np.inf, 0, weight * x)
    return out, lse
