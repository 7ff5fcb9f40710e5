"""Scores of the sparse-attention indexer."""

import numpy as np

from kernomics.contract import F32, FP8, I32, Case, Kernel, op
from kernomics.numerics import e4m3_decode, judge_sums


def _windows(t, s, ragged=False):
    """``start`` and ``stop`` of a causal chunk at the end of the keys, or of windows of any kind."""
    i = np.arange(t)
    if not ragged:
        return np.zeros(t, np.int32), (s - t + 1 + i).astype(np.int32)
    start = i * 37 % (s + 20) - 10  # some before 0, some past s, some empty
    return start.astype(np.int32), (start + i * 53 % (s + 5)).astype(np.int32)


def _flops(t, h, s, ragged=False):
    start, stop = (np.clip(x, 0, s) for x in _windows(t, s, ragged))
    return 2 * 128 * h * int(np.maximum(stop - start, 0).sum())


def _sample(rng, t, s, ragged=False):
    return dict(zip(("start", "stop"), _windows(t, s, ragged)))


def _judge(got, want, inputs):
    """Dots of 128 and a sum over h: sqrt(128) x + sqrt(h) y <= sqrt(128 + h) * sqrt(x**2 + y**2), see judge_sums."""
    q, k = (e4m3_decode(inputs[n]).astype(np.float32) for n in ("q", "k"))
    weights, k_scale = inputs["weights"], inputs["k_scale"]
    noise = np.zeros(want[0].shape)
    for i, w in enumerate(weights):
        terms2 = (q[i] ** 2) @ (k**2).T + np.maximum(q[i] @ k.T, 0) ** 2  # [h, s]
        noise[i] = np.sqrt(w**2 @ terms2) * np.abs(k_scale)
    return judge_sums(got[0], want[0], k=128 + q.shape[1], noise=noise, extra=inputs.get("tensor_core", 0))


@op(
    flops=_flops,
    cases=[
        Case(t=1, h=64, s=16384, bench="decode, 16k context"),
        Case(t=4, h=64, s=4096, bench="decode, 4 tokens, 4k context"),
        Case(t=256, h=64, s=4096, bench="prefill chunk of 256 at 4k"),
        Case(t=7, h=5, s=33, ragged=True),  # nothing divides the tile
        Case(t=1, h=1, s=1),  # one token
        Case(t=0, h=64, s=10),  # no queries
        Case(t=3, h=4, s=0, ragged=True),  # no keys
        Case(t=3, h=0, s=5),  # no heads: zeros in the window
        Case(t=9, h=2, s=6),  # more queries than keys: empty windows
        Case(t=67, h=33, s=261, ragged=True),  # crosses query, head and key tiles
        Case(t=130, h=65, s=130),
        Case(t=3, h=70, s=140),  # more heads than a step of most GPUs
        Case(t=70, h=1, s=140, ragged=True),  # several steps of queries in a chunk of GPUs with few units
    ],
    sample=_sample,
    rows="t",
    judge=_judge,
    kernels=[
        Kernel("triton", "kernomics.triton_kernels.mla_index:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:mla_index"),
    ],
)
def mla_index(q: FP8["t h 128"], k: FP8["s 128"], k_scale: F32["s"], weights: F32["t h"], start: I32["t"],
              stop: I32["t"]) -> F32["t s"]:
    """``logits[t, s] = sum_h relu(q[t, h] . k[s]) * weights[t, h] * k_scale[s]``, -inf outside ``[start, stop)``.

    Parameters
    ----------
    q : indexer queries in e4m3; their scale belongs into ``weights``
    k, k_scale : indexer keys in e4m3, one f32 scale a key
    weights : weight of each head, times the scale of the query and of the softmax
    start, stop : window of keys of each query, clamped to ``[0, s]``; empty unless start < stop

    Returns
    -------
    logits : scores inside the window, -inf outside

    Notes
    -----
    The largest ``top_k`` of a row are the ``indices`` of ``mla_decode_sparse``. NaN codes (0x7f, 0xff) give NaN in
    every score they enter, and nothing outside the window.

    References
    ----------
    DeepSeek-V3.2-Exp report, equation 1; DeepGEMM ``fp8_mqa_logits``.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, kernomics as kx
    >>> q = np.ones((1, 2, 128), ml_dtypes.float8_e4m3fn)
    >>> k = np.ones((3, 128), ml_dtypes.float8_e4m3fn)
    >>> k_scale, weights = np.array([1, 0.5, 2], np.float32), np.array([[1, 2]], np.float32)
    >>> start, stop = np.array([0], np.int32), np.array([2], np.int32)
    >>> kx.mla_index(q, k, k_scale, weights, start, stop, backend="reference")
    array([[384., 192., -inf]], dtype=float32)
    """
    s, keys = len(k), e4m3_decode(k)
    logits = np.full((len(q), s), -np.inf)
    for i in range(len(q)):
        window = slice(*np.clip((start[i], stop[i]), 0, s))
        scores = np.maximum(e4m3_decode(q[i]) @ keys[window].T, 0)  # [h, window]
        logits[i, window] = (weights[i].astype(np.float64) @ scores) * k_scale[window]
    return logits
