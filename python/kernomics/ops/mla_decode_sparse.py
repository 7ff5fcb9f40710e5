"""Multi-head latent attention over chosen tokens of a paged cache."""

import numpy as np

from kernomics.contract import BF16, F32, I32, U8, Case, Kernel, op
from kernomics.numerics import cache_values, draw_cache, judge_attention, sink_weight, softmax
from kernomics.ops.mla_decode import SCALE, split_workspace


def _flops(b, q, h, top_k, keys=None):
    return 2 * h * (576 + 512) * q * sum((top_k,) * b if keys is None else keys)


def _bytes(b, q, h, top_k, p, page, keys=None, kv_cache="bf16", sink=None):
    tokens = min(q * sum((top_k,) * b if keys is None else keys), p * page)  # a token that queries share counts once
    cache = tokens * (656 if kv_cache == "u8" else 1152)
    return cache + b * q * (4 * top_k + h * (2 * 576 + 2 * 512 + 4)) + (4 * h if sink else 0)


def _sample(rng, b, q, h, top_k, p, page, keys=None, kv_cache="bf16", sink=None):
    slots = p * page
    indices = rng.choice(np.array([-1, -9, slots, 2**31 - 1], np.int32), (b, q, top_k))
    for i, count in enumerate((top_k,) * b if keys is None else keys):
        for j in range(q):
            places = rng.permutation(top_k)[:count]
            indices[i, j, places] = rng.choice(slots, count, replace=count > slots) if count else []
    used = np.unique(indices[(indices >= 0) & (indices < slots)])
    drawn = {"indices": indices, "kv_cache": draw_cache(rng, p, page, used, kv_cache)}
    return drawn | ({"sink": rng.normal(4, 3, h).astype(np.float32)} if sink else {})


def _rows(rng, inputs):
    """One sequence, four queries."""
    i = slice(*(rng.integers(inputs["q"].shape[0]) + [0, 1]))
    rows = np.sort(rng.permutation(inputs["q"].shape[1])[:4])
    cut = inputs | {n: inputs[n][i][:, rows] for n in ("q", "indices")}
    return cut, lambda outs: [x[i][at] for x, at in zip(outs, (np.s_[:, rows], np.s_[:, :, rows]))]


@op(
    flops=_flops,
    bytes=_bytes,
    cases=[
        Case(b=1, q=1, h=128, top_k=2048, page=64, p=256, softmax_scale=SCALE, bench="decode, 2048 of 16k"),
        Case(b=1, q=1, h=128, top_k=2048, page=64, p=256, softmax_scale=SCALE, kv_cache="u8", bench="decode fp8, 2048 of 16k"),
        Case(b=4, q=1, h=128, top_k=2048, page=64, p=256, softmax_scale=SCALE, kv_cache="u8",
             bench="decode fp8, 4 x 2048 of 16k"),
        Case(b=1, q=32, h=128, top_k=2048, page=64, p=64, softmax_scale=SCALE, bench="prefill, 32 tokens, 2048 of 4k"),
        Case(b=1, q=32, h=128, top_k=2048, page=64, p=64, softmax_scale=SCALE, kv_cache="u8",
             bench="prefill fp8, 32 tokens, 2048 of 4k"),
        Case(b=3, q=3, h=5, top_k=19, keys=(11, 0, 19), page=7, p=4, softmax_scale=0.07),  # nothing divides; no keys
        Case(b=3, q=3, h=5, top_k=19, keys=(11, 0, 19), page=7, p=4, softmax_scale=0.07, kv_cache="u8", sink="f32"),
        Case(b=1, q=1, h=2, top_k=30, page=4, p=3, softmax_scale=0.1),  # more indices than tokens: duplicates
        Case(b=1, q=1, h=1, top_k=1, page=1, p=1, softmax_scale=1.0),  # one token
        Case(b=1, q=1, h=1, top_k=1, page=64, p=1, softmax_scale=1.0, kv_cache="u8"),
        Case(b=0, q=1, h=4, top_k=8, page=64, p=1, softmax_scale=0.1),  # no sequences
        Case(b=1, q=2, h=4, top_k=0, page=64, p=1, softmax_scale=0.1, sink="f32"),  # no indices
        Case(b=2, q=2, h=130, top_k=300, keys=(300, 129), page=64, p=9, softmax_scale=SCALE),  # crosses head and key tiles
        Case(b=1, q=2, h=40, top_k=100, keys=(90,), page=16, p=10, softmax_scale=SCALE, kv_cache="u8", sink="f32"),
        Case(b=2, q=1, h=33, top_k=520, keys=(520, 257), page=16, p=40, softmax_scale=SCALE, kv_cache="u8"),
    ],
    sample=_sample,
    contiguous=("kv_cache",),
    rows=_rows,
    judge=lambda got, want, inputs: judge_attention(*got, *want, inputs.get("bf16_weights", 0)),
    kernels=[
        Kernel("triton", "kernomics.triton_kernels.mla_decode_sparse:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:mla_decode_sparse", workspace=lambda dims, chip: split_workspace(
            dims["b"] * dims["q"] * -(-dims["h"] // 64), dims["top_k"], dims["b"] * dims["q"] * dims["h"])),
    ],
)
def mla_decode_sparse(q: BF16["b q h 576"], kv_cache: BF16["p page 576"] | U8["p page 656"], indices: I32["b q top_k"], *,
                      softmax_scale: float, sink: F32["h"] | None = None) -> (BF16["b q h 512"], F32["b h q"]):
    """``out = softmax(softmax_scale * q @ kv.T) @ kv[:, :512]`` with ``kv = kv_cache[indices]`` of each query.

    Parameters
    ----------
    q : queries with the key projection absorbed: 512 latent, then 64 rotated values
    kv_cache : pages of cached tokens in either layout of ``mla_decode``, contiguous; tokens that no index names
        may hold NaN
    indices : flat tokens ``page_id * page + offset``; -1 or any other value out of range is no key, and a token
        named twice counts twice
    softmax_scale : factor of the scores; DeepSeek: ``192**-0.5 * mscale**2``, not ``576**-0.5``
    sink : one logit a head that takes weight and adds no value: scales out by ``exp(lse) / (exp(lse) + exp(sink))``

    Returns
    -------
    out : attention-weighted latents, 0 where a query has no key
    lse : natural log of the sum of exponentials, without the sink; -inf where a query has no key

    Raises
    ------
    ContractError : for shapes and dtypes; no index is an error

    Notes
    -----
    Nothing is causal here: the indices say what a query sees. NaN in a key (in fp8: codes 0x7f and 0xff) gives
    NaN in the results of every query that names it.

    References
    ----------
    DeepSeek-V3.2-Exp report, section 2.1 (sparse attention); FlashMLA ``flash_mla_with_kvcache(indices=...)``.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, kernomics as kx
    >>> q = np.zeros((1, 1, 1, 576), ml_dtypes.bfloat16)  # equal scores: the mean of the keys
    >>> kv_cache = np.arange(4).reshape(1, 4, 1).repeat(576, axis=2).astype(ml_dtypes.bfloat16)
    >>> indices = np.array([[[3, 1, 3, 1, -1]]], np.int32)
    >>> out, lse = kx.mla_decode_sparse(q, kv_cache, indices, softmax_scale=0.1352, backend="reference")
    >>> float(out[0, 0, 0, 0]), np.exp(lse).round(3).tolist()
    (2.0, [[[4.0]]])
    """
    b, n_q, h, _ = q.shape
    p, page, width = kv_cache.shape
    tokens = kv_cache.reshape(p * page, width)
    out, lse = np.zeros((b, n_q, h, 512)), np.full((b, h, n_q), -np.inf)
    for i, j in np.ndindex(b, n_q):
        chosen = indices[i, j]
        keys = cache_values(tokens[chosen[(chosen >= 0) & (chosen < p * page)]])  # [s, 576]
        weight, lse[i, :, j] = softmax(q[i, j].astype(np.float64) @ keys.T * softmax_scale)  # [h, s], [h]
        out[i, j] = weight @ keys[:, :512]
    if sink is not None:
        out *= sink_weight(lse, sink[:, None]).transpose(0, 2, 1)[..., None]
    return out, lse
