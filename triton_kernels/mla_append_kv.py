"""``mla_append_kv``: one program takes a few tokens, each read once, and writes them to their places in the cache."""

import torch
import triton
import triton.language as tl
from kernomics.triton_kernels.common import block_scale, chip_of, e4m3_encode, run

FLOOR = 1e-4  # of fp8_quantize


def tile(dims, chip):
    """Tokens of a program and its warps. Unmeasured: a warp a token, 2 x 16 bytes a thread, where a program a token would
    be more than two for each unit of the chip."""
    return (4, 4) if dims["t"] > 2 * chip.units else (1, 4)


@triton.jit
def kernel(kv_c, k_pe, latent, rope, scales, slots, weight, cos, sin, t, n_slots, eps, INTERLEAVED: tl.constexpr,
           POW2: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, TOKENS: tl.constexpr, FLOOR: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, mask=token < t, other=-1)
    keep = (slot >= 0) & (slot < n_slots)
    col = tl.arange(0, 512)
    x = tl.load(kv_c + token[:, None] * 512 + col[None, :], mask=keep[:, None], other=0.0).to(tl.float32)
    if weight is not None:
        mean = tl.sum(x * x, axis=1) / 512.0
        x = tl.div_rn(x, tl.sqrt_rn(mean + eps)[:, None]) * tl.load(weight + col).to(tl.float32)[None, :]
    x = x.to(tl.bfloat16)
    if FP8:
        v = tl.reshape(x.to(tl.float32), (TOKENS, 4, 128))
        size = tl.abs(v)
        size = tl.where(size < float("inf"), size, 0.0)  # NaN and Inf do not count
        scale = block_scale(tl.max(size, axis=2), FLOOR, POW2)
        codes = e4m3_encode(tl.div_rn(v, tl.broadcast_to(scale[:, :, None], (TOKENS, 4, 128))), NATIVE)
        tl.store(latent + slot[:, None] * 656 + col[None, :], tl.reshape(codes, (TOKENS, 512)), mask=keep[:, None])
        tl.store(scales + slot[:, None] * 164 + 128 + tl.arange(0, 4)[None, :], scale, mask=keep[:, None])
    else:
        tl.store(latent + slot[:, None] * 576 + col[None, :], x, mask=keep[:, None])

    rope += slot[:, None] * (328 if FP8 else 576) + (264 if FP8 else 512)
    k_pe += token[:, None] * 64
    if cos is not None:
        pair = tl.arange(0, 32)
        at = token[:, None] * 32 + pair[None, :]
        c = tl.load(cos + at, mask=keep[:, None], other=0.0)
        s = tl.load(sin + at, mask=keep[:, None], other=0.0)
        first, second = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + 32)
        a = tl.load(k_pe + first[None, :], mask=keep[:, None], other=0.0).to(tl.float32)
        b = tl.load(k_pe + second[None, :], mask=keep[:, None], other=0.0).to(tl.float32)
        tl.store(rope + first[None, :], (a * c - b * s).to(tl.bfloat16), mask=keep[:, None])
        tl.store(rope + second[None, :], (a * s + b * c).to(tl.bfloat16), mask=keep[:, None])
    else:
        at = tl.arange(0, 64)[None, :]
        tl.store(rope + at, tl.load(k_pe + at, mask=keep[:, None], other=0.0), mask=keep[:, None])


def launch(kv_c, k_pe, kv_cache, slots, norm_weight, cos, sin, workspace, eps, interleaved, scale):
    (t, _), (p, page, _), chip, fp8 = kv_c.shape, kv_cache.shape, chip_of(kv_c), kv_cache.dtype == torch.uint8
    tokens, warps = tile({"t": t}, chip)
    rope, scales = (kv_cache.view(torch.bfloat16), kv_cache.view(torch.float32)) if fp8 else (kv_cache, None)
    run(kernel, (triton.cdiv(t, tokens),), kv_c, k_pe, kv_cache, rope, scales, slots, norm_weight, cos, sin, t, p * page, eps,
        INTERLEAVED=interleaved, POW2=scale == "pow2", FP8=fp8, NATIVE=chip.e4m3, TOKENS=tokens, FLOOR=FLOOR,
        num_warps=warps)
