"""``mla_append_kv``: one program takes a few tokens, each read once, and writes them to their places in the cache.

Of tokens with one slot the last is written: two at a time would mix. Up to FEW tokens a program looks for later ones
itself (1024 slots are 8 KB of L2); more tokens first write themselves, then the largest of them, into their slot's
place of a table, whose other places nobody reads.
"""

import torch
import triton
import triton.language as tl
from kernomics.triton_kernels.common import FLOOR, block_scale, cdiv, chip_of, e4m3_encode, finite_size, quotients, run, to_bf16

FEW = 1024


def tile(dims, chip):
    """Tokens of a program and its warps. The quickest of eleven in bench/tiles/h200.jsonl where a program a token
    would be more than two for each unit of the chip; otherwise, and on other chips, unmeasured."""
    if dims["t"] <= 2 * chip.units:
        return 1, 4
    return (4, 4) if chip.family in ("sm100", "sm103") else (2, 1)  # there 2 would spill


def workspace(dims, chip):
    return 4 * dims["p"] * dims["page"] if dims["t"] > FEW else 0


@triton.jit
def claim_kernel(slots, owner, t, n_slots, LARGEST: tl.constexpr):
    """A token of each slot, then the last of them, into ``owner``."""
    token = tl.program_id(0) * 256 + tl.arange(0, 256)
    slot = tl.load(slots + token, mask=token < t, other=-1)
    keep = (slot >= 0) & (slot < n_slots)
    if LARGEST:
        tl.atomic_max(owner + slot, token, mask=keep)
    else:
        tl.store(owner + slot, token, mask=keep)


@triton.jit
def kernel(kv_c, k_pe, latent, rope, scales, slots, owner, weight, cos, sin, t, n_slots, eps, INTERLEAVED: tl.constexpr,
           POW2: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, TOKENS: tl.constexpr, FLOOR: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, mask=token < t, other=-1)
    keep = (slot >= 0) & (slot < n_slots)
    if owner is None:
        for first in range(0, t, 128):
            other = first + tl.arange(0, 128)
            same = tl.load(slots + other, mask=other < t, other=-1)[None, :] == slot[:, None]
            keep = keep & (tl.sum((same & (other[None, :] > token[:, None])).to(tl.int32), axis=1) == 0)
    else:
        keep = keep & (tl.load(owner + slot, mask=keep, other=-1) == token)
    col = tl.arange(0, 512)
    x = tl.load(kv_c + token[:, None] * 512 + col[None, :], mask=keep[:, None], other=0.0).to(tl.float32)
    if weight is not None:
        mean = tl.sum(x * x, axis=1) / 512.0
        x = x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None] * tl.load(weight + col).to(tl.float32)[None, :]
    x = to_bf16(x)
    if FP8:
        v = tl.reshape(x.to(tl.float32), (TOKENS, 4, 128))
        scale = block_scale(tl.max(finite_size(v), axis=2), FLOOR, POW2)
        codes = e4m3_encode(quotients(v, tl.broadcast_to(scale[:, :, None], (TOKENS, 4, 128)), 1), NATIVE)
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
    owner = workspace.view(torch.int32) if t > FEW and workspace is not None else None
    for largest in () if owner is None else (False, True):
        run(claim_kernel, (cdiv(t, 256),), slots, owner, t, p * page, LARGEST=largest, num_warps=4)
    run(kernel, (cdiv(t, tokens),), kv_c, k_pe, kv_cache, rope, scales, slots, owner, norm_weight, cos, sin, t, p * page,
        eps, INTERLEAVED=interleaved, POW2=scale == "pow2", FP8=fp8, NATIVE=chip.e4m3, TOKENS=tokens, FLOOR=FLOOR,
        num_warps=warps, **({"maxnreg": 64} if chip.family in ("sm100", "sm103") else {}))  # else it aims at 56 and spills
