"""Gradients of ``mla_prefill``."""

import numpy as np

from kernomics.contract import BF16, F32, I32, Case, Kernel, op
from kernomics.numerics import DTYPES, UNIT, norm_error, rounded
from kernomics.ops.mla_prefill import SCALE, check_offsets, draw_offsets, mla_prefill, pairs, seen, two_heads


def _sample(rng, t, s, h, softmax_scale, b=1, t_lens=None, s_lens=None, causal=True):
    drawn = draw_offsets(t, s, b, t_lens, s_lens)
    for name, shape in {"q": (t, h, 192), "k": (s, h, 192), "v": (s, h, 128)}.items():
        drawn[name] = rng.standard_normal(shape, np.float32).astype(DTYPES["bf16"])
    out, lse = mla_prefill.define(**drawn, softmax_scale=softmax_scale, causal=causal)
    return drawn | {"out": out.astype(DTYPES["bf16"]), "lse": lse.astype(np.float32)}


def _judge(got, want, inputs):
    """Against rounding the result, f32 sums, and p and ds rounded to bf16 (what tensor cores multiply).

    The rounded terms err by ``UNIT * |term| / sqrt(3)`` of standard deviation each: 4 UNIT are seven of these.
    The f32 sums have up to 192 + 128 + keys terms, see ``judge_sums``; ds is a difference, hence its own measure.
    """
    names = ("dout", "dlse", "q", "k", "v", "out", "lse")
    dout, dlse, q, k, v, out, lse = (np.asarray(inputs[n]).astype(np.float64) for n in names)
    cu_q, cu_k, scale = inputs["cu_q"], inputs["cu_k"], inputs["softmax_scale"]
    bf16, f32 = (tuple(np.zeros(w.shape) for w in want) for _ in range(2))  # squared noise of both kinds
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        mask = seen(q1 - q0, k1 - k0, inputs["causal"])
        for i in range(q.shape[1]):
            a, c = slice(q0, q1), slice(k0, k1)
            with np.errstate(invalid="ignore", over="ignore"):
                p = np.where(mask, np.exp(scale * q[a, i] @ k[c, i].T - lse[i, a, None]), 0)
            delta = np.sum(dout[a, i] * out[a, i], axis=1) - dlse[i, a]
            size = np.sum((dout[a, i] * out[a, i]) ** 2, axis=1) + dlse[i, a] ** 2
            ds2 = (p * (dout[a, i] @ v[c, i].T - delta[:, None])) ** 2
            sum2 = p**2 * (dout[a, i] ** 2 @ (v[c, i] ** 2).T + size[:, None]) + ds2
            for noise2, d2 in ((bf16, ds2), (f32, sum2)):
                noise2[0][a, i] += scale**2 * d2 @ k[c, i] ** 2
                noise2[1][c, i] += scale**2 * d2.T @ q[a, i] ** 2
                noise2[2][c, i] += (p**2).T @ dout[a, i] ** 2
    measures = {}
    terms = 192 + 128 + max([*np.diff(cu_q), *np.diff(cu_k), 0])
    for name, y, r, low, high in zip(("dq", "dk", "dv"), got, want, bf16, f32):
        allowed = UNIT["bf16"] * np.sqrt(low) + np.sqrt(terms) * UNIT["f32"] * np.sqrt(high)
        y64, size = y.astype(np.float64), max(np.linalg.norm(r[np.isfinite(r)]), 1e-300)
        whole = 2 * norm_error(rounded(r, y.dtype), r) + float(np.linalg.norm(np.nan_to_num(allowed)) / size)
        with np.errstate(invalid="ignore"):
            over = np.abs(y64 - r) / (2 * UNIT["bf16"] * np.abs(r) + 4 * allowed + 1e-300)
        over = over[np.isfinite(r) & (y64 != r)]
        measures[f"{name} norm error"] = norm_error(y64, r), whole
        measures[f"{name} worst element / its bound"] = float(over.max(initial=0)), 1.0
    return measures


@op(
    flops=lambda t, s, h, b=1, t_lens=None, s_lens=None, causal=True:
        2 * h * (3 * 192 + 2 * 128) * pairs(t, s, b, t_lens, s_lens, causal),  # q k, dout v, dv, dq, dk
    cases=[
        Case(b=1, t=512, s=512, h=128, softmax_scale=SCALE, bench="training chunk"),
        Case(b=1, t=1024, s=1024, h=16, softmax_scale=SCALE, bench="training 1k, 16 heads a rank"),
        Case(b=3, t=11, s=20, h=5, t_lens=(3, 7, 1), s_lens=(13, 4, 3), softmax_scale=0.1),  # nothing divides; tq > tk
        Case(b=2, t=9, s=10, h=3, t_lens=(4, 5), s_lens=(7, 3), softmax_scale=0.1, causal=False),
        Case(b=1, t=1, s=1, h=1, softmax_scale=1.0),  # one token
        Case(b=0, t=0, s=0, h=4, softmax_scale=0.1),  # no sequences
        Case(b=2, t=0, s=3, h=2, t_lens=(0, 0), s_lens=(0, 3), softmax_scale=0.1),  # no queries
        Case(b=4, t=10, s=9, h=2, t_lens=(3, 0, 6, 1), s_lens=(0, 4, 5, 0), softmax_scale=0.1),  # no keys: zero gradients
        Case(b=2, t=330, s=394, h=2, t_lens=(200, 130), s_lens=(200, 194), softmax_scale=SCALE),  # crosses query, key tiles
        Case(b=1, t=130, s=259, h=1, softmax_scale=SCALE, causal=False),
    ],
    sample=_sample,
    check_data=check_offsets,
    rows=two_heads,
    judge=_judge,
    kernels=[
        Kernel("triton", "kernomics.triton_kernels.mla_prefill_backward:launch", on="gpu"),
    ],
)
def mla_prefill_backward(dout: BF16["t h 128"], dlse: F32["h t"], q: BF16["t h 192"], k: BF16["s h 192"],
                         v: BF16["s h 128"], out: BF16["t h 128"], lse: F32["h t"], cu_q: I32["b+1"],
                         cu_k: I32["b+1"], *, softmax_scale: float,
                         causal: bool = True) -> (BF16["t h 192"], BF16["s h 192"], BF16["s h 128"]):
    """``dq = scale * ds @ k``, ``dk = scale * ds.T @ q``, ``dv = p.T @ dout`` with ``ds = p * (dout @ v.T - delta)``.

    Parameters
    ----------
    dout, dlse : gradients of the two results of ``mla_prefill``
    q, k, v, cu_q, cu_k, softmax_scale, causal : as they were given to ``mla_prefill``
    out, lse : the results of ``mla_prefill``

    Returns
    -------
    dq, dk, dv : gradients of q, k, v; 0 for a query without keys and for a key that no query sees

    Raises
    ------
    ContractError : when offsets do not start at 0, decrease, or do not end at t (cu_q) and s (cu_k)

    Notes
    -----
    ``p = exp(softmax_scale * q @ k.T - lse)``, ``delta = sum(dout * out) - dlse`` per query. ``out`` and ``lse`` are
    used as given, rounded as they are. dlse of a query without keys is ignored.

    References
    ----------
    FlashAttention-2, algorithm 2, with the gradient of lse added to delta.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, kernomics as kx
    >>> q, k = (np.zeros((2, 1, 192), ml_dtypes.bfloat16) for _ in "qk")
    >>> v = dout = np.ones((2, 1, 128), ml_dtypes.bfloat16)
    >>> cu, dlse = np.array([0, 2], np.int32), np.zeros((1, 2), np.float32)
    >>> out, lse = kx.mla_prefill(q, k, v, cu, cu, softmax_scale=0.1352, backend="reference")
    >>> dq, dk, dv = kx.mla_prefill_backward(dout, dlse, q, k, v, out, lse, cu, cu, softmax_scale=0.1352,
    ...                                      backend="reference")
    >>> dv[:, 0, 0].astype(float).tolist()  # the first key has all of query 0 and half of query 1
    [1.5, 0.5]
    """
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        mask = seen(q1 - q0, k1 - k0, causal)
        for head in range(q.shape[1]):
            qh, oh, doh = (x[q0:q1, head].astype(np.float64) for x in (q, out, dout))
            kh, vh = (x[k0:k1, head].astype(np.float64) for x in (k, v))
            lse_h, dlse_h = (x[head, q0:q1].astype(np.float64)[:, None] for x in (lse, dlse))
            with np.errstate(over="ignore", invalid="ignore"):
                p = np.where(mask, np.exp(qh @ kh.T * softmax_scale - lse_h), 0)  # [tq, tk]
            delta = np.sum(doh * oh, axis=1, keepdims=True) - dlse_h  # [tq, 1]
            ds = np.where(mask, p * (doh @ vh.T - delta), 0)
            dq[q0:q1, head] = softmax_scale * ds @ kh
            dk[k0:k1, head] = softmax_scale * ds.T @ qh
            dv[k0:k1, head] = p.T @ doh
    return dq, dk, dv
