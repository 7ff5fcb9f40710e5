"""New tokens into the paged latent cache: RMSNorm, RoPE, quantization and write in one pass."""

from typing import Literal

import numpy as np

from kernomics.contract import BF16, F32, I64, U8, Case, Kernel, op
from kernomics.numerics import UNIT, block_scale, e4m3_decode, e4m3_encode, pack_fp8_cache, round_bf16, unpack_fp8_cache


def _token(kv_c, k_pe, norm_weight, eps, cos, sin, interleaved):
    """Latent and rotated values before the rounding to bf16, float64."""
    latent, pe = kv_c.astype(np.float64), k_pe.astype(np.float64)
    with np.errstate(invalid="ignore"):
        if norm_weight is not None:
            latent = latent / np.sqrt(np.mean(latent**2, axis=1, keepdims=True) + eps) * norm_weight.astype(np.float64)
        if cos is not None:
            first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, 32), slice(32, 64))
            x, y, rope = pe[:, first], pe[:, second], np.empty(pe.shape)
            rope[:, first], rope[:, second] = x * cos - y * sin, x * sin + y * cos
            pe = rope
    return latent, pe



def _flops(t, skipped=0, kv_cache="bf16", norm_weight=None, cos=None):
    return (t - skipped) * ((4 * 512 if norm_weight else 0) + (6 * 32 if cos else 0) + (3 * 512 if kv_cache == "u8" else 0))


def _bytes(t, skipped=0, kv_cache="bf16", norm_weight=None, cos=None):
    token = 2 * 576 + (656 if kv_cache == "u8" else 1152) + (2 * 4 * 32 if cos else 0)
    return 8 * t + (t - skipped) * token + (512 * (4 if norm_weight == "f32" else 2) if norm_weight else 0)


def _sample(rng, t, p, page, skipped=0, kv_cache="bf16", cos=None):
    slots = rng.permutation(p * page)[:t]
    slots[rng.permutation(t)[:skipped]] = -1
    drawn = {"slots": slots.astype(np.int64)}
    if kv_cache == "u8":
        drawn["kv_cache"] = rng.integers(0, 256, (p, page, 656), np.uint8)  # what a slot held does not matter
    if cos:
        angle = rng.uniform(-np.pi, np.pi, (t, 32))
        drawn |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    return drawn


def _check(error, eps):
    if not eps >= 0:
        raise error("eps", eps, "at least 0")


def _check_data(error, slots, cos, sin, p, page):
    if (cos is None) != (sin is None):
        raise error("sin" if sin is None else "cos", "missing", "both cos and sin, or neither")
    for i in np.flatnonzero((slots < -1) | (slots >= p * page))[:1]:
        raise error("slots", f"{slots[i]} for token {i}", f"-1 or 0 to {p * page - 1}")


def _judge(got, want, inputs):
    """Within one bf16 ulp before quantization; codes and scales those of some bf16 value within it.

    Rounding is monotone, so the codes lie between those of ``x - ulp`` and ``x + ulp``, and the scale between
    those of both amax. RoPE's f32 products may cancel: 3 roundings of at most |x| + |y| more. For slots that
    several tokens name the nearest counts. Slots that no token names keep their bytes.
    """
    cache, slots = got[0].reshape(-1, got[0].shape[-1]), inputs["slots"]
    before, keep = want[0].reshape(cache.shape), slots >= 0
    names = ("kv_c", "k_pe", "norm_weight", "eps", "cos", "sin", "interleaved")
    pe_in = inputs["k_pe"].astype(np.float64)[keep]
    latent, pe = (x[keep] for x in _token(*(inputs[n] for n in names)))
    slots = slots[keep]
    untouched = np.setdiff1d(np.arange(len(cache)), slots)
    row = cache[slots]
    quantized = cache.dtype == np.uint8
    values = unpack_fp8_cache(row) if quantized else row.astype(np.float64)

    def ulp(x):
        with np.errstate(invalid="ignore"):
            return np.ldexp(1.0, np.maximum(np.frexp(np.where(np.isfinite(x), x, 0))[1] - 8, -133))

    def beyond(y, low, high):
        """Elements of y outside [low, high]; NaN wants NaN."""
        return np.where(np.isnan(low), ~np.isnan(y), ~((y >= low) & (y <= high)))

    latent = round_bf16(latent)
    step = ulp(latent) if inputs["norm_weight"] is not None else np.zeros(latent.shape)
    x, y = pe_in, pe_in[:, np.arange(64) ^ 1 if inputs["interleaved"] else (np.arange(64) + 32) % 64]
    turned = inputs["cos"] is not None
    pe, loose = round_bf16(pe), 4 * UNIT["f32"] * (np.abs(x) + np.abs(y)) * turned
    wrong = beyond(values[:, 512:], pe - loose - ulp(pe) * turned, pe + loose + ulp(pe) * turned).sum(axis=1)
    low, high = latent - step, latent + step
    if quantized:
        scale = np.ascontiguousarray(row[:, 512:528]).view(np.float32)
        inner, outer = np.sign(latent) * np.maximum(np.abs(latent) - step, 0), np.sign(latent) * (np.abs(latent) + step)
        wrong += beyond(scale, *(block_scale(v, (1, 128), inputs["scale"]) for v in (inner, outer))).sum(axis=1)
        wide = np.repeat(scale, 128, axis=1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            low, high = (e4m3_decode(e4m3_encode(v.astype(np.float32) / wide)) for v in (low, high))
        wrong += beyond(e4m3_decode(row[:, :512]), low, high).sum(axis=1)
    else:
        wrong += beyond(values[:, :512], low, high).sum(axis=1)
    best = np.full(len(cache), np.iinfo(np.int64).max)
    np.minimum.at(best, slots, wrong)
    as_bytes = (np.ascontiguousarray(x[untouched]).view(np.uint8) for x in (cache, before))
    return {"wrong elements": (int(best[slots].sum()), 0), "changed bytes elsewhere": (int(np.not_equal(*as_bytes).sum()), 0)}


@op(
    flops=_flops,
    bytes=_bytes,
    cases=[
        Case(t=1, p=64, page=64, norm_weight="bf16", cos="f32", sin="f32", bench="decode"),
        Case(t=1, p=64, page=64, norm_weight="bf16", cos="f32", sin="f32", kv_cache="u8", bench="decode fp8"),
        Case(t=64, p=64, page=64, norm_weight="bf16", cos="f32", sin="f32", kv_cache="u8", bench="decode fp8, 64 tokens"),
        Case(t=4096, p=64, page=64, norm_weight="bf16", cos="f32", sin="f32", bench="prefill"),
        Case(t=4096, p=64, page=64, norm_weight="bf16", cos="f32", sin="f32", kv_cache="u8", bench="prefill fp8"),
        Case(t=13, p=5, page=7, skipped=3, norm_weight="f32", cos="f32", sin="f32", interleaved=False),  # nothing divides
        Case(t=13, p=5, page=7, skipped=3, norm_weight="f32", cos="f32", sin="f32", kv_cache="u8", interleaved=False,
             scale="f32"),
        Case(t=1, p=1, page=1),  # one token, copied
        Case(t=5, p=2, page=3, kv_cache="u8"),
        Case(t=3, p=1, page=4, norm_weight="bf16", eps=1e-3),
        Case(t=3, p=1, page=4, kv_cache="u8", cos="f32", sin="f32", scale="f32"),
        Case(t=0, p=2, page=64, kv_cache="u8"),  # no tokens
        Case(t=4, p=1, page=8, skipped=4, norm_weight="bf16"),  # all skipped
        Case(t=300, p=6, page=64, skipped=2, norm_weight="bf16", cos="f32", sin="f32", kv_cache="u8"),  # many pages
    ],
    sample=_sample,
    check=_check,
    check_data=_check_data,
    mutates=("kv_cache",),
    contiguous=("kv_cache",),
    judge=_judge,
    kernels=[Kernel("triton", "kernomics.triton_kernels.mla_append_kv:launch", on="gpu"),
             Kernel("cpu", "kernomics._cpu:mla_append_kv")],
)
def mla_append_kv(kv_c: BF16["t 512"], k_pe: BF16["t 64"], kv_cache: BF16["p page 576"] | U8["p page 656"],
                  slots: I64["t"], *, norm_weight: (BF16 | F32)["512"] | None = None, eps: float = 1e-6,
                  cos: F32["t 32"] | None = None, sin: F32["t 32"] | None = None, interleaved: bool = True,
                  scale: Literal["pow2", "f32"] = "pow2") -> None:
    """``kv_cache[slots] = concat(rms_norm(kv_c) * norm_weight, rope(k_pe))``, quantized when the cache is uint8.

    Parameters
    ----------
    kv_c : compressed latents of the new tokens
    k_pe : their shared keys before rotary embedding
    kv_cache : pages to write to, contiguous, in either layout of ``mla_decode``; the only argument that changes
    slots : flat place ``page_id * page + offset`` of each token; -1 skips the token
    norm_weight : weight of the RMSNorm; None writes the latents as they are
    eps : added to the mean square
    cos, sin : one value per rotated pair and token; None for both writes k_pe as it is
    interleaved : pairs are (2i, 2i+1), otherwise (i, i+32); they stay where they are
    scale : f32 scales of the uint8 layout: rounded up to powers of two, or as they come

    Raises
    ------
    ContractError : for a slot other than -1 outside ``[0, p * page)``, cos without sin, or a negative eps

    Notes
    -----
    RMSNorm and RoPE run in f32 and are each rounded to bf16 once; the uint8 layout then quantizes the bf16 latent
    by the rule of ``fp8_quantize`` per 128 values, floor 1e-4. When tokens share a slot one of them wins whole.
    Hugging Face leaves the rotated pairs de-interleaved: dot products agree, cache bytes do not (pass
    ``cos[:, :32]``). RoPE on q is the caller's, by the same convention.

    References
    ----------
    DeepSeek-V3 ``inference/model.py``, class MLA; FlashMLA ``tests/quant.py`` for the 656-byte token.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, kernomics as kx
    >>> kv_c, k_pe = np.full((1, 512), 3, ml_dtypes.bfloat16), np.ones((1, 64), ml_dtypes.bfloat16)
    >>> kv_cache = np.zeros((1, 4, 576), ml_dtypes.bfloat16)
    >>> weight, slots = np.full(512, 2, np.float32), np.array([1])
    >>> kx.mla_append_kv(kv_c, k_pe, kv_cache, slots, norm_weight=weight, backend="reference")
    >>> kv_cache[0, :, 0].astype(float).tolist(), kv_cache[0, :, 575].astype(float).tolist()
    ([0.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])
    """
    latent, rope = map(round_bf16, _token(kv_c, k_pe, norm_weight, eps, cos, sin, interleaved))
    tokens = pack_fp8_cache(latent, rope, scale) if kv_cache.dtype == np.uint8 else np.concatenate([latent, rope], axis=1)
    keep, page = slots >= 0, kv_cache.shape[1]
    kv_cache[slots[keep] // page, slots[keep] % page] = tokens[keep].astype(kv_cache.dtype)
