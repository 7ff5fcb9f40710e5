"""The expert block of a mixture-of-experts layer, with FP8 weights."""

from typing import Literal

import numpy as np

from kernomics.contract import BF16, F32, FP8, I32, Case, Kernel, op
from kernomics.numerics import (
    UNIT,
    block_scale,
    check_index,
    dequantize,
    draw_experts,
    draw_weights,
    e4m3_decode,
    e4m3_encode,
    norm_error,
    quantize,
    round_bf16,
    rounded,
    silu,
    spread,
    swiglu,
)


def as_fp8(x):
    """``x`` after ``fp8_quantize`` with blocks (1, 128), as float64."""
    return dequantize(*quantize(x, (1, 128)), (1, 128))


def as_bf16(x):
    """``x``, which holds bf16 values, as float64."""
    return x.astype(np.float64)


def expert_block(x, weights, experts, w13, w2, activations):
    """``sum_j weights[:, j] * FFN_{experts[:, j]}(x)``: the definition, one expert after the other.

    ``w13(i)``, ``w2(i)`` give an expert's matrices, ``activations`` what either of them multiplies.
    """
    x, used = activations(x), experts >= 0
    y = np.zeros((*experts.shape, x.shape[1]))  # [t, top_k, d]
    for i in np.unique(experts[used]):
        token, slot = np.nonzero(experts == i)
        h = round_bf16(x[token] @ w13(i).T)  # [rows, 2*n]
        y[token, slot] = round_bf16(activations(swiglu(h)) @ w2(i).T)  # [rows, d]
    return np.sum(np.where(used, weights.astype(np.float64), 0)[..., None] * y, axis=1)


def judge_block(got, want, inputs, w13, w2, activations):
    """Judge ``expert_block``: the whole, each element, and each expert's share.

    A sum in float32 that ends within its error bound (``4 * sqrt(k) * 2**-24 * noise``, see ``judge_sums``) of the
    midpoint of two bf16 numbers may round to the other one; at k = 7168 this may befall one intermediate in 100.
    For those elements, and those only, the step to the other bf16 number is carried on: through SwiGLU by its
    derivatives, to the FP8 codes and block scales that the other numbers would get, through the second product as
    independent errors. The resulting deviation of the output enters the bound of an element six times, that of the
    whole norm as it is, with the largest step of one element: rare steps do not average out in a small output.
    A fault of one expert is small in the whole: its contribution c must come back with coefficient 1. Errors of
    deviation s that know nothing of c change the coefficient by ``sqrt(sum (c * s)**2) / sum c**2``, of which six are
    allowed. s is that of twice the output's rounding, of the sums and of the steps; the latter span only n of d
    directions where n is smaller.
    """
    core = inputs.get("tensor_core", 0) if activations is as_fp8 else 0
    unit, weights, experts = UNIT["f32"], inputs["weights"].astype(np.float64), inputs["experts"]
    r, y64 = np.asarray(want[0], np.float64), got[0].astype(np.float64)
    x = activations(inputs["x"])
    (t, d), n = x.shape, inputs["w2"].shape[2]
    variance, step, squares, parts = np.zeros((t, d)), np.zeros((t, d)), np.zeros((t, d)), []
    with np.errstate(over="ignore", invalid="ignore"):
        for i in np.unique(experts[experts >= 0]):
            token, slot = np.nonzero(experts == i)
            a, w = x[token], w13(i)
            h = a @ w.T
            reach = (4 * np.sqrt(d) * unit + core) * np.sqrt((a * a) @ (w * w).T)
            low, h, high = round_bf16(h - reach), round_bf16(h), round_bf16(h + reach)
            gate, up = np.split(h, 2, axis=1)
            dgate, dup = np.split(np.maximum(high - h, h - low), 2, axis=1)
            z = silu(gate) * up
            reach = 1.1 * dgate * (np.abs(up) + dup) + np.abs(silu(gate)) * dup + 8 * unit * np.abs(z)  # |silu'| <= 1.1
            low, z, high = round_bf16(z - reach), round_bf16(z), round_bf16(z + reach)  # [rows, n]
            if activations is as_fp8:
                sizes = np.minimum(np.abs(low), np.abs(high)), np.maximum(np.abs(low), np.abs(high))
                near = []
                for s in (spread(block_scale(v, (1, 128)), (1, 128), z.shape) for v in sizes):
                    near += [e4m3_decode(e4m3_encode(v.astype(np.float32) / s)) * s for v in (low, z, high)]
                z = as_fp8(z)
                dz = np.max([np.abs(v - z) for v in near], axis=0, initial=0)
            else:
                dz = np.maximum(high - z, z - low)
            w = w2(i)
            y = z @ w.T
            reach = (4 * np.sqrt(n) * unit + core) * np.sqrt((z * z) @ (w * w).T)
            dy = np.sqrt((dz * dz) @ (w * w).T)
            share = weights[token, slot][:, None]
            # Of errors below a bf16 step (2**-7 |y|), a part error / step makes the sum round the other way.
            np.add.at(variance, token, share**2 * (dy**2 + (dy + reach) * np.abs(y) * 2.0**-7))
            reach = reach + 6 * dy
            np.add.at(step, token, np.abs(share) * (round_bf16(y + reach) - round_bf16(y - reach)))
            c = share * round_bf16(y)
            np.add.at(squares, token, c * c)
            parts.append((token, c))
        acc = 4 * np.sqrt(experts.shape[1]) * unit * np.sqrt(squares)
        finite = np.isfinite(r)
        loose = np.where(finite, acc + np.sqrt(variance), 0)
        rounding = np.where(finite, rounded(r, got[0].dtype) - r, 0)
        error = np.where(finite, y64 - r, 0)
        size = max(np.linalg.norm(r[finite]), 1e-300)
        largest = np.where(finite, step, 0).max(initial=0)
        whole = (2 * np.linalg.norm(rounding) + np.linalg.norm(loose) + largest) / size
        worst = np.abs(error) / (2 * UNIT["bf16"] * np.abs(r) + acc + step + 1e-300)
        worst = np.where(np.isnan(worst), np.inf, worst)[finite & (y64 != r)].max(initial=0)
        shares = [0.0]
        for token, c in parts:
            c = np.where(finite[token], c, 0)
            power = np.sum(c * c)
            if power > 0:
                s2 = (2 * UNIT["bf16"] * r) ** 2 / 3 + acc**2 + max(d / n, 1) * variance
                allowed = 6 * np.sqrt(np.sum(np.where(finite, s2, 0)[token] * c * c))
                shares.append(abs(np.sum(error[token] * c)) / (allowed + 1e-300))
    return {
        "norm error": (norm_error(y64, r), float(whole)),
        "worst element / its bound": (float(worst), 1.0),
        "worst expert's missing share / its bound": (float(max(shares)), 1.0),
    }


def _matrices(w13, w13_scale, w2, w2_scale):
    return (lambda i: dequantize(w13[i], w13_scale[i], (128, 128))), (lambda i: dequantize(w2[i], w2_scale[i], (128, 128)))


def _judge(got, want, inputs):
    matrices = _matrices(*(inputs[name] for name in ("w13", "w13_scale", "w2", "w2_scale")))
    return judge_block(got, want, inputs, *matrices, as_fp8 if inputs["activations"] == "fp8" else as_bf16)


def _bytes(t, d, n, e, top_k, active=None):
    active = min(e, t * top_k) if active is None else active  # experts in use: each one's weights are read once
    scales = 4 * (-(-n // 64) * -(-d // 128) + -(-d // 128) * -(-n // 128))
    return 4 * t * d + 8 * t * top_k + active * (3 * n * d + scales)


def _sample(rng, t, d, n, e, top_k, active=None):
    """Codes are drawn with rms 20: these scales keep h and the SwiGLU results near 1."""
    return {
        "w13_scale": (rng.uniform(0.5, 1.5, (e, -(-n // 64), -(-d // 128))) / (20 * max(d, 1) ** 0.5)).astype(np.float32),
        "w2_scale": (rng.uniform(0.5, 1.5, (e, -(-d // 128), -(-n // 128))) / (10 * max(n, 1) ** 0.5)).astype(np.float32),
        "weights": draw_weights(rng, t, top_k),
        "experts": draw_experts(rng, t, e, top_k, active, dropped=0.1 * (t > 1 and d < 1024)),
    }


def workspace(dims, chip):
    """Bytes of the CPU kernel's pieces, each from a 64-byte boundary; csrc/cpu/moe_experts.cpp takes them in this order."""
    t, d, n, e, top_k = (dims[x] for x in ("t", "d", "n", "e", "top_k"))
    copies = t * top_k
    few, many = min(copies, 8 * e), min(copies, 256)
    lanes = -(-many // 32) * 32
    sizes = [4 * (e + 1), 4 * e, 4 * copies, 4 * copies, 4 * (e + 1), 4 * (e + 1), 2 * copies * d, 4 * max(few, many) * n,
             4 * few * d, 4 * few * n, 4 * lanes * d, 4 * lanes * n]
    return sum(-(-x // 64) * 64 for x in sizes)


@op(
    flops=lambda t, d, n, top_k: 6 * t * top_k * d * n,
    bytes=_bytes,
    cases=[
        Case(t=1, d=7168, n=2048, e=32, top_k=8, bench="decode, 1 token"),
        Case(t=16, d=7168, n=2048, e=32, top_k=8, bench="decode, 16 tokens"),
        Case(t=128, d=7168, n=2048, e=32, top_k=8, bench="prefill, 128 tokens"),
        Case(t=1, d=7168, n=2048, e=32, top_k=8, activations="bf16", bench="decode, 1 token, weight-only"),
        Case(t=128, d=7168, n=2048, e=32, top_k=8, activations="bf16", bench="prefill, 128 tokens, weight-only"),
        Case(t=9, d=72, n=40, e=5, top_k=3),  # nothing divides the tile
        Case(t=13, d=129, n=130, e=4, top_k=2, activations="bf16"),
        Case(t=40, d=144, n=80, e=3, top_k=2),  # rows of whole vectors: a GPU's quicker tiles
        Case(t=40, d=144, n=80, e=3, top_k=2, activations="bf16"),
        Case(t=1, d=200, n=67, e=6, top_k=4),  # one token
        Case(t=0, d=128, n=128, e=2, top_k=2),  # empty
        Case(t=3, d=8, n=4, e=2, top_k=0),  # no expert: zeros
        Case(t=150, d=269, n=133, e=3, top_k=2),  # crosses every row, column and depth tile
        Case(t=150, d=269, n=133, e=3, top_k=2, activations="bf16"),
    ],
    sample=_sample,
    check_data=lambda error, experts, e: check_index(error, "experts", experts, e),
    rows="t",
    judge=_judge,
    kernels=[
        Kernel("triton", "kernomics.triton_kernels.moe_experts:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:moe_experts", workspace=workspace),
    ],
)
def moe_experts(x: BF16["t d"], w13: FP8["e 2*n d"], w13_scale: F32["e n/64 d/128"], w2: FP8["e d n"],
                w2_scale: F32["e d/128 n/128"], weights: F32["t top_k"], experts: I32["t top_k"], *,
                activations: Literal["fp8", "bf16"] = "fp8") -> BF16["t d"]:
    """``out[t] = sum_j weights[t, j] * w2[i] @ (silu(gate) * up)``, ``gate, up = w13[i] @ x[t]``, ``i = experts[t, j]``.

    Parameters
    ----------
    x : one row a token
    w13, w13_scale : gate rows, then up rows, in e4m3, one f32 scale per 128 x 128 block (``2*n/128`` blocks of rows)
    w2, w2_scale : projections back, in e4m3, one f32 scale per 128 x 128 block
    weights : routing weights
    experts : ids; -1 contributes 0, whatever its weight
    activations : "fp8" quantizes x and the SwiGLU result per row and 128 columns, "bf16" multiplies them in bf16

    Returns
    -------
    out : one row a token

    Raises
    ------
    ContractError : for an id outside ``[-1, e)`` (CPU tensors)

    Notes
    -----
    Equal to ``fp8_quantize``, ``fp8_grouped_gemm``, ``swiglu_quantize``, ``fp8_grouped_gemm``, ``moe_combine``: sums in
    float32; both products and the SwiGLU result are rounded to bf16; the weighted sum runs in the order of the slots
    and is rounded once. Weights of experts that no token uses are not read.

    References
    ----------
    DeepSeek-V3 inference code, ``MoE``.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> from kernomics.numerics import BF16
    >>> w13, w13_scale = kx.fp8_quantize(np.ones((2, 3), np.float32), block=(128, 128), backend="reference")
    >>> w2, w2_scale = kx.fp8_quantize(np.ones((3, 1), np.float32), block=(128, 128), backend="reference")
    >>> weights, experts = np.float32([[0.5, 1]]), np.int32([[0, -1]])
    >>> kx.moe_experts(np.full((1, 3), 8, BF16), w13[None], w13_scale[None], w2[None], w2_scale[None], weights, experts,
    ...                backend="reference")  # 0.5 * silu(24) * 24
    array([[288, 288, 288]], dtype=bfloat16)
    """
    matrices = _matrices(w13, w13_scale, w2, w2_scale)
    return expert_block(x, weights, experts, *matrices, as_fp8 if activations == "fp8" else as_bf16)
