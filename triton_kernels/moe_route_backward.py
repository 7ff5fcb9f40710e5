"""``moe_route_backward``: one program takes whole tokens; the chosen experts' gradients meet their columns by comparison.

Bound by memory: 4096 tokens of 256 experts read and write 8 MB, so the time is that of a launch and two loads.
"""

import triton
import triton.language as tl
from kernomics.triton_kernels.common import chip_of, next_power_of_2, run
from kernomics.triton_kernels.moe_route import score_of


def tile(dims, chip):
    """Warps of a program of one token. 64 comparisons a lane; other numbers are unmeasured."""
    return min(max(next_power_of_2(dims["top_k"]) * next_power_of_2(dims["e"]) // 2048, 1), 8)


@triton.jit
def kernel(dweights, logits, bias, experts, dlogits, scaling, E: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr,
           RENORMALIZE: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index, slot = tl.arange(0, WIDE), tl.arange(0, K)
    inside = index < E
    x = tl.load(logits + row * E + index, mask=inside, other=float("-inf")).to(tl.float32)
    chosen = tl.load(experts + row * TOP_K + slot, mask=slot < TOP_K, other=-1)
    ds = scaling * tl.load(dweights + row * TOP_K + slot, mask=slot < TOP_K, other=0.0)
    if bias is not None:
        shift = tl.load(bias + index, mask=inside, other=0.0)
    real = (chosen >= 0) & (chosen < E)
    picked = tl.load(logits + row * E + chosen, mask=real, other=float("-inf")).to(tl.float32)
    most, total = 0.0, 1.0
    if not SIGMOID:
        most = tl.max(x, axis=0)
        total = tl.sum(score_of(x, most, 1.0, False), axis=0)
    s = score_of(x, most, total, SIGMOID)
    if RENORMALIZE:
        p = tl.where(real, score_of(picked, most, total, SIGMOID), 0.0)
        whole = tl.sum(p, axis=0) + 1e-20
        ds = (ds - tl.sum(tl.where(real, ds * p, 0.0), axis=0) / whole) / whole
    here = (chosen[:, None] == index[None, :]) & real[:, None]
    d = tl.sum(tl.where(here, ds[:, None], 0.0), axis=0)  # of the scores
    if SIGMOID:
        d = d * s * score_of(-x, most, total, True)
    else:
        d = s * (d - tl.sum(tl.where(inside, d * s, 0.0), axis=0))
    choice = s if bias is None else s + shift
    odd = tl.max(((choice != choice) & inside).to(tl.int32), axis=0) > 0
    tl.store(dlogits + row * E + index, tl.where(odd, float("nan"), d).to(dlogits.dtype.element_ty), mask=inside)


def launch(dweights, logits, bias, experts, dlogits, workspace, score, renormalize, scaling):
    (t, e), top_k = logits.shape, experts.shape[1]
    up = next_power_of_2
    warps = tile({"e": e, "top_k": top_k}, chip_of(logits))
    run(kernel, (t,), dweights, logits, bias, experts, dlogits, scaling, E=e, TOP_K=top_k, SIGMOID=score == "sigmoid",
        RENORMALIZE=renormalize, WIDE=up(max(e, 1)), K=up(max(top_k, 1)), num_warps=warps)
