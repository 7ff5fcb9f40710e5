"""Multi-head latent attention over a paged cache, one or a few new tokens a sequence."""

from importlib import import_module

import numpy as np

from kernomics.contract import BF16, F32, I32, U8, Case, Kernel, op
from kernomics.numerics import cache_values, draw_cache, judge_attention, sink_weight, softmax

SCALE = 0.1352  # DeepSeek-V3: 192**-0.5 * (0.1 * ln(40) + 1)**2


def _pairs(b, q, s, lens, causal):
    """Query-key pairs that are not masked, of one head."""
    lens = np.array((s,) * b if lens is None else lens, np.int64)[:, None]
    return int(np.clip(lens - q + np.arange(q) + 1 if causal else lens + np.zeros(q, int), 0, lens).sum())


def _flops(b, q, h, s=0, lens=None, causal=True):
    return 2 * h * (576 + 512) * _pairs(b, q, s, lens, causal)


def _bytes(b, q, h, page, s=0, lens=None, kv_cache="bf16", sink=None):
    lens = (s,) * b if lens is None else lens
    pages = sum(-(-x // page) for x in lens)
    cache = sum(lens) * (656 if kv_cache == "u8" else 1152) if q else 0
    return cache + 4 * (pages + b) + b * q * h * (2 * 576 + 2 * 512 + 4) + (4 * h if sink else 0)


def _sample(rng, b, h, p, page, n, s=0, lens=None, kv_cache="bf16", sink=None):
    lens = np.array((s,) * b if lens is None else lens, np.int32)
    table = rng.choice(np.array([-7, 2**31 - 1], np.int32), (b, n))
    free, used = rng.permutation(p).astype(np.int32), []
    for i, length in enumerate(lens):
        pages, free = np.split(free, [-(-length // page)])
        table[i, : len(pages)] = pages
        used.append((pages[:, None].astype(np.int64) * page + np.arange(page)).ravel()[:length])
    drawn = {"block_table": table, "seq_lens": lens}
    drawn["kv_cache"] = draw_cache(rng, p, page, np.concatenate([np.zeros(0, np.int64), *used]), kv_cache)
    return drawn | ({"sink": rng.normal(4, 3, h).astype(np.float32)} if sink else {})


def _check_data(error, block_table, seq_lens, p, page, n):
    lens = np.asarray(seq_lens, np.int64)
    for i in np.flatnonzero((lens < 0) | (lens > n * page))[:1]:
        raise error("seq_lens", f"{lens[i]} for sequence {i}", f"0 to {n * page} (n * page)")
    used = np.arange(n) < -(-lens // max(page, 1))[:, None]
    for i, j in np.argwhere(used & ((block_table < 0) | (block_table >= p)))[:1]:
        raise error("block_table", f"{block_table[i, j]} at [{i}, {j}]", f"a page from 0 to {p - 1}")


def split_workspace(items, keys, rows):
    """Bytes that hold out, maximum and sum of every row and split: enough splits for 32 items, of 256 keys or more."""
    splits = min(-(-32 // max(items, 1)), -(-keys // 256))
    return splits * rows * 514 * 4 if splits > 1 else 0


def _sm90_workspace(dims, chip):
    return import_module("kernomics._cuda").mla_decode_sm90_workspace(dims["b"], dims["q"] * dims["h"], chip.units)


@op(
    flops=_flops,
    bytes=_bytes,
    cases=[
        Case(b=1, q=1, h=128, s=4096, page=64, p=64, n=64, softmax_scale=SCALE, bench="decode, 4k context"),
        Case(b=4, q=1, h=128, s=4096, page=64, p=256, n=64, softmax_scale=SCALE, bench="decode, 4 x 4k context"),
        Case(b=1, q=1, h=128, s=16384, page=64, p=256, n=256, softmax_scale=SCALE, bench="decode, 16k context"),
        Case(b=1, q=1, h=16, s=4096, page=64, p=64, n=64, softmax_scale=SCALE, bench="decode, 4k, 16 heads a rank"),
        Case(b=4, q=1, h=16, s=4096, page=64, p=256, n=64, softmax_scale=SCALE, bench="decode, 4 x 4k, 16 heads a rank"),
        Case(b=4, q=2, h=128, s=4096, page=64, p=256, n=64, softmax_scale=SCALE, bench="decode, 4 x 4k, one draft token"),
        Case(b=1, q=64, h=16, s=4096, page=64, p=64, n=64, softmax_scale=SCALE, bench="prefill by decode, 64 tokens"),
        Case(b=1, q=1, h=128, s=4096, page=64, p=64, n=64, softmax_scale=SCALE, kv_cache="u8", bench="decode fp8, 4k context"),
        Case(b=4, q=1, h=128, s=4096, page=64, p=256, n=64, softmax_scale=SCALE, kv_cache="u8",
             bench="decode fp8, 4 x 4k context"),
        Case(b=1, q=1, h=128, s=16384, page=64, p=256, n=256, softmax_scale=SCALE, kv_cache="u8",
             bench="decode fp8, 16k context"),
        Case(b=1, q=1, h=16, s=4096, page=64, p=64, n=64, softmax_scale=SCALE, kv_cache="u8",
             bench="decode fp8, 4k, 16 heads a rank"),
        Case(b=4, q=1, h=16, s=4096, page=64, p=256, n=64, softmax_scale=SCALE, kv_cache="u8",
             bench="decode fp8, 4 x 4k, 16 heads a rank"),
        Case(b=3, q=3, h=5, lens=(40, 2, 17), page=7, p=11, n=7, softmax_scale=0.07),  # nothing divides; 2 keys, 3 queries
        Case(b=3, q=3, h=5, lens=(40, 2, 17), page=7, p=11, n=7, softmax_scale=0.07, kv_cache="u8", sink="f32"),
        Case(b=2, q=2, h=3, lens=(9, 30), page=16, p=5, n=3, softmax_scale=0.1, causal=False, sink="f32"),
        Case(b=2, q=2, h=3, lens=(9, 30), page=16, p=5, n=3, softmax_scale=-0.1),
        Case(b=2, q=2, h=3, lens=(9, 30), page=16, p=5, n=3, softmax_scale=0.0),
        Case(b=1, q=1, h=1, lens=(1,), page=1, p=1, n=1, softmax_scale=1.0),  # one token
        Case(b=1, q=1, h=1, lens=(1,), page=64, p=2, n=1, softmax_scale=1.0, kv_cache="u8"),
        Case(b=0, q=1, h=4, lens=(), page=64, p=1, n=0, softmax_scale=0.1),  # no sequences
        Case(b=2, q=0, h=4, lens=(3, 5), page=4, p=4, n=2, softmax_scale=0.1),  # no queries
        Case(b=3, q=1, h=16, lens=(0, 65, 0), page=64, p=3, n=2, softmax_scale=SCALE, sink="f32"),  # no keys: 0, -inf
        Case(b=3, q=1, h=16, lens=(0, 65, 0), page=64, p=3, n=2, softmax_scale=SCALE, kv_cache="u8"),
        Case(b=2, q=2, h=130, lens=(300, 129), page=64, p=9, n=6, softmax_scale=SCALE),  # crosses head and key tiles
        Case(b=2, q=1, h=33, lens=(520, 257), page=16, p=52, n=34, softmax_scale=SCALE, kv_cache="u8"),
        Case(b=1, q=1, h=40, lens=(200,), page=64, p=5, n=4, softmax_scale=SCALE),  # more rows than a GPU's small tiles
        Case(b=2, q=3, h=20, lens=(70, 33), page=64, p=4, n=2, softmax_scale=SCALE, kv_cache="u8"),  # a tile with 3 queries
        Case(b=5, q=1, h=17, lens=(63, 64, 65, 128, 1), page=32, p=16, n=5, softmax_scale=SCALE, kv_cache="u8"),
    ],
    sample=_sample,
    check_data=_check_data,
    contiguous=("kv_cache",),
    rows="b",
    judge=lambda got, want, inputs: judge_attention(*got, *want, inputs.get("bf16_weights", 0)),
    kernels=[
        Kernel("cuda", "kernomics._cuda:mla_decode_sm90", on="sm90", workspace=_sm90_workspace),
        Kernel("triton", "kernomics.triton_kernels.mla_decode:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:mla_decode", workspace=lambda dims, chip: split_workspace(
            dims["b"] * -(-dims["q"] * dims["h"] // 64), dims["n"] * dims["page"], dims["b"] * dims["q"] * dims["h"])),
    ],
)
def mla_decode(q: BF16["b q h 576"], kv_cache: BF16["p page 576"] | U8["p page 656"], block_table: I32["b n"],
               seq_lens: I32["b"], *, softmax_scale: float, causal: bool = True,
               sink: F32["h"] | None = None) -> (BF16["b q h 512"], F32["b h q"]):
    """``out = softmax(softmax_scale * q @ kv.T) @ kv[:, :512]`` with ``kv`` gathered from the pages of each sequence.

    Parameters
    ----------
    q : queries with the key projection absorbed: 512 latent, then 64 rotated values
    kv_cache : pages of cached tokens, contiguous. bf16: 512 latent values, then 64 rotated ones. uint8: 512 e4m3
        codes, four f32 scales (one per 128 codes, any value), 64 bf16 rotated values. What lies outside the
        sequences may hold NaN
    block_table : page of each ``page`` tokens of a sequence; entries past its last page may hold anything
    seq_lens : cached tokens of each sequence, the q new ones included
    softmax_scale : factor of the scores; DeepSeek: ``192**-0.5 * mscale**2``, not ``576**-0.5``
    causal : query i sees the keys below ``seq_len - q + i + 1``; otherwise all of them
    sink : one logit a head that takes weight and adds no value: scales out by ``exp(lse) / (exp(lse) + exp(sink))``

    Returns
    -------
    out : attention-weighted latents, 0 where a query sees no key
    lse : natural log of the sum of exponentials, without the sink; -inf where a query sees no key

    Raises
    ------
    ContractError : for a length outside ``[0, n * page]`` or a used table entry outside ``[0, p)``

    Notes
    -----
    Any number of heads and queries, any page size. NaN in a key (in fp8: codes 0x7f and 0xff) gives NaN in the
    results of every query that sees it.

    References
    ----------
    DeepSeek-V2 technical report, section 2.1; FlashMLA ``flash_mla_with_kvcache``.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, kernomics as kx
    >>> q = np.zeros((1, 1, 2, 576), ml_dtypes.bfloat16)  # equal scores: the mean of the keys
    >>> kv_cache = np.arange(4).reshape(1, 4, 1).repeat(576, axis=2).astype(ml_dtypes.bfloat16)
    >>> table, lens = np.zeros((1, 1), np.int32), np.array([3], np.int32)
    >>> out, lse = kx.mla_decode(q, kv_cache, table, lens, softmax_scale=0.1352, backend="reference")
    >>> float(out[0, 0, 1, 0]), np.exp(lse).round(3).tolist()
    (1.0, [[[3.0], [3.0]]])
    """
    b, n_q, h, _ = q.shape
    page, width = kv_cache.shape[1:]
    out, lse = np.zeros((b, n_q, h, 512)), np.full((b, h, n_q), -np.inf)
    for i, length in enumerate(map(int, seq_lens)):
        pages = block_table[i, : -(-length // max(page, 1))]
        keys = cache_values(kv_cache[pages].reshape(len(pages) * page, width)[:length])  # [s, 576]
        for j in range(n_q):
            seen = keys[: max(length - n_q + j + 1, 0)] if causal else keys
            p, lse[i, :, j] = softmax(q[i, j].astype(np.float64) @ seen.T * softmax_scale)  # [h, s], [h]
            out[i, j] = p @ seen[:, :512]
    if sink is not None:
        out *= sink_weight(lse, sink[:, None]).transpose(0, 2, 1)[..., None]
    return out, lse
