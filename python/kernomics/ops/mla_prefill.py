"""Multi-head attention of whole sequences, with keys and values decompressed from the latent."""

import numpy as np

from kernomics.contract import BF16, F32, I32, Case, Kernel, op
from kernomics.numerics import judge_attention, softmax

SCALE = 0.1352  # DeepSeek-V3: 192**-0.5 * (0.1 * ln(40) + 1)**2


def pairs(t, s, b=1, t_lens=None, s_lens=None, causal=True):
    """Query-key pairs that are not masked, of one head."""
    total = 0
    for tq, tk in zip(t_lens or (t // b if b else 0,) * b, s_lens or (s // b if b else 0,) * b):
        total += int(np.clip(tk - tq + np.arange(tq) + 1, 0, tk).sum()) if causal else tq * tk
    return total


def draw_offsets(t, s, b=1, t_lens=None, s_lens=None):
    """``cu_q`` and ``cu_k`` of sequences of the given lengths, by default equal ones."""
    lens = t_lens or (t // b if b else 0,) * b, s_lens or (s // b if b else 0,) * b
    return {n: np.cumsum((0, *x)).astype(np.int32) for n, x in zip(("cu_q", "cu_k"), lens)}


def check_offsets(error, cu_q, cu_k, t, s):
    for name, cu, end in (("cu_q", cu_q, t), ("cu_k", cu_k, s)):
        if cu[0] != 0 or cu[-1] != end:
            raise error(name, f"from {cu[0]} to {cu[-1]}", f"from 0 to {end}")
        for i in np.flatnonzero(cu[1:] < cu[:-1])[:1]:
            raise error(name, f"{cu[i + 1]} after {cu[i]} at {i + 1}", "not decreasing")


def seen(tq, tk, causal):
    """Which keys a query sees ``[tq, tk]``: with ``causal`` the queries are aligned to the end of the keys."""
    return np.arange(tk) <= np.arange(tq)[:, None] + (tk - tq if causal else tk)


def two_heads(rng, inputs):
    """Inputs cut to two heads, and the same cut of ``[t h d]`` and ``[h t]`` outputs."""
    heads = np.sort(rng.permutation(inputs["q"].shape[1])[:2])

    def cut(x):
        return x[:, heads] if x.ndim == 3 else x[heads] if x.ndim == 2 else x

    return {n: cut(x) for n, x in inputs.items()}, lambda outs: [cut(x) for x in outs]


@op(
    flops=lambda t, s, h, b=1, t_lens=None, s_lens=None, causal=True:
        2 * h * (192 + 128) * pairs(t, s, b, t_lens, s_lens, causal),
    cases=[
        Case(b=1, t=1024, s=1024, h=128, softmax_scale=SCALE, bench="prefill chunk"),
        Case(b=1, t=4096, s=4096, h=16, softmax_scale=SCALE, bench="prefill 4k, 16 heads a rank"),
        Case(b=1, t=512, s=4096, h=16, softmax_scale=SCALE, bench="prefill chunk of 512 at 4k, 16 heads a rank"),
        Case(b=4, t=4, s=4096, h=16, softmax_scale=SCALE, bench="decode, 4 x 1k keys, 16 heads a rank"),
        Case(b=3, t=11, s=20, h=5, t_lens=(3, 7, 1), s_lens=(13, 4, 3), softmax_scale=0.1),  # nothing divides; tq > tk
        Case(b=2, t=9, s=10, h=3, t_lens=(4, 5), s_lens=(7, 3), softmax_scale=0.1, causal=False),
        Case(b=1, t=1, s=1, h=1, softmax_scale=1.0),  # one token
        Case(b=0, t=0, s=0, h=4, softmax_scale=0.1),  # no sequences
        Case(b=2, t=0, s=3, h=2, t_lens=(0, 0), s_lens=(0, 3), softmax_scale=0.1),  # no queries
        Case(b=4, t=10, s=9, h=2, t_lens=(3, 0, 6, 1), s_lens=(0, 4, 5, 0), softmax_scale=0.1),  # no keys: 0, -inf
        Case(b=2, t=330, s=394, h=2, t_lens=(200, 130), s_lens=(200, 194), softmax_scale=SCALE),  # crosses query, key tiles
        Case(b=1, t=3, s=5, h=33, softmax_scale=SCALE),
        Case(b=3, t=8, s=410, h=2, t_lens=(4, 1, 3), s_lens=(197, 101, 112), softmax_scale=SCALE),  # few queries, many keys
        Case(b=1, t=130, s=259, h=1, softmax_scale=SCALE, causal=False),
        Case(b=2, t=200, s=270, h=1, t_lens=(130, 70), s_lens=(190, 80), softmax_scale=SCALE),  # the tiles of GPUs
        Case(b=1, t=9, s=13, h=2, softmax_scale=-0.07),
    ],
    sample=draw_offsets,
    check_data=check_offsets,
    rows=two_heads,
    judge=lambda got, want, inputs: judge_attention(*got, *want, inputs.get("bf16_weights", 0)),
    kernels=[
        Kernel("triton", "kernomics.triton_kernels.mla_prefill:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:mla_prefill"),
    ],
)
def mla_prefill(q: BF16["t h 192"], k: BF16["s h 192"], v: BF16["s h 128"], cu_q: I32["b+1"], cu_k: I32["b+1"], *,
                softmax_scale: float, causal: bool = True) -> (BF16["t h 128"], F32["h t"]):
    """``out = softmax(softmax_scale * q @ k.T) @ v``, each sequence and head by itself.

    Parameters
    ----------
    q, k : queries and keys, 128 values without and 64 with rotary embedding (in any order, the same in both)
    v : values
    cu_q, cu_k : sequence i owns queries ``cu_q[i]:cu_q[i+1]`` and keys ``cu_k[i]:cu_k[i+1]``
    softmax_scale : factor of the scores; DeepSeek: ``192**-0.5 * mscale**2``
    causal : queries are aligned to the end of the keys: query i of tq sees keys up to ``i + tk - tq``

    Returns
    -------
    out : attention-weighted values, 0 where a query sees no key
    lse : natural log of the sum of exponentials; -inf where a query sees no key

    Raises
    ------
    ContractError : when offsets do not start at 0, decrease, or do not end at t (cu_q) and s (cu_k)

    Notes
    -----
    Differentiable in q, k and v through out and lse: see ``mla_prefill_backward``. A value that is not finite
    may also reach queries of its sequence that do not see its key.

    References
    ----------
    DeepSeek-V2 technical report, section 2.1; FlashAttention-2, algorithm 1.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, kernomics as kx
    >>> q, k = (np.zeros((3, 1, 192), ml_dtypes.bfloat16) for _ in "qk")  # equal scores: means of values
    >>> v = np.arange(3).reshape(3, 1, 1).repeat(128, axis=2).astype(ml_dtypes.bfloat16)
    >>> cu = np.array([0, 3], np.int32)
    >>> out, lse = kx.mla_prefill(q, k, v, cu, cu, softmax_scale=0.1352, backend="reference")
    >>> out[:, 0, 0].astype(float).tolist(), np.exp(lse).round(3).tolist()
    ([0.0, 0.5, 1.0], [[1.0, 2.0, 3.0]])
    """
    t, h, _ = q.shape
    out, lse = np.zeros((t, h, 128)), np.full((h, t), -np.inf)
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        mask = seen(q1 - q0, k1 - k0, causal)
        for head in range(h):
            qh, kh, vh = (x[:, head].astype(np.float64) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
            p, lse[head, q0:q1] = softmax(np.where(mask, qh @ kh.T * softmax_scale, -np.inf))  # [tq, tk], [tq]
            out[q0:q1, head] = p @ vh
    return out, lse
