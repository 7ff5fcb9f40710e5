"""What PyTorch offers for the same call, on operands converted beforehand.

A peer is ``build(x) -> call``: ``x`` holds the inputs (torch tensors or None) and scalars by name, ``call()`` does the
work and returns what the op's first output holds (for a quantizer: codes and scale). Building is not timed.
"""

import warnings
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from kernomics.torch_ops import from_numpy

PEERS = {}  # op -> {name: build}
LARGEST = 8e9  # bytes of converted weights; a peer that needs more is not run


class TooLarge(RuntimeError):
    """The converted operands would not fit."""


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def peer(label, *ops, **options):
    """Register ``build`` for these ops."""

    def decorate(build):
        for op in ops:
            PEERS.setdefault(op, {})[label] = partial(build, **options)
        return build

    return decorate


def both(label, *ops):
    """Register it in f32 and in bf16."""

    def decorate(build):
        for name, dtype in DTYPES.items():
            peer(f"{label} {name}", *ops, dtype=dtype)(build)
        return build

    return decorate


def arguments(inputs, scalars):
    """What a peer is built from."""
    tensors = {n: x if x is None else from_numpy(x) for n, x in inputs.items()}
    return SimpleNamespace(**tensors, **scalars)


def spread(scale, block, shape):
    for dim, size in zip((-2, -1), block):
        scale = scale.repeat_interleave(size, dim)
    return scale[..., : shape[-2], : shape[-1]]


def dequantize(codes, scale, block, dtype):
    """Values of block-scaled FP8, matrix by matrix."""
    if codes.dim() == 3:
        if codes.numel() * dtype.itemsize > LARGEST:
            raise TooLarge(f"weights of {codes.numel() * dtype.itemsize / 1e9:.1f} GB")
        return torch.stack([dequantize(c, s, block, dtype) for c, s in zip(codes, scale)])
    (m, k), (b0, b1) = codes.shape, block
    if m % b0 or k % b1:
        return (codes.float() * spread(scale, block, codes.shape)).to(dtype)
    return (codes.float().view(m // b0, b0, k // b1, b1) * scale[:, None, :, None]).view(m, k).to(dtype)


def int8_linear(w):
    """x f32 -> x @ w.T with weights in int8 (one scale a row) and x quantized on the way."""
    scale = (w.abs().amax(1) / 127).clamp(min=1e-12).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what runs fastest
        codes = torch.quantize_per_channel(w, scale, torch.zeros(len(w), dtype=torch.int64), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(codes, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)  # 7-bit x: without VNNI 8 bits overflow


# ---------------------------------------------------------------- matrix products


@both("matmul", "fp8_gemm")
def matmul(x, dtype):
    a, b = dequantize(x.a, x.a_scale, (1, 128), dtype), dequantize(x.b, x.b_scale, (128, 128), dtype)
    return lambda: F.linear(a, b)


@peer("int8 dynamic", "fp8_gemm")
def int8_dynamic(x):
    a, linear = dequantize(x.a, x.a_scale, (1, 128), torch.float32), int8_linear(
        dequantize(x.b, x.b_scale, (128, 128), torch.float32))
    return lambda: linear(a)


@both("linear", "fp8_linear")
def linear(x, dtype):
    a, w = x.x.to(dtype), dequantize(x.w, x.w_scale, (128, 128), dtype)
    bias = None if x.bias is None else x.bias.to(dtype)
    return lambda: F.linear(a, w, bias)


@peer("int8 dynamic", "fp8_linear")
def int8_dynamic_linear(x):
    linear = int8_linear(dequantize(x.w, x.w_scale, (128, 128), torch.float32))
    a, bias = x.x.float(), 0 if x.bias is None else x.bias.float()
    return lambda: linear(a) + bias


@both("matmul by group", "fp8_grouped_gemm")
def matmul_by_group(x, dtype):
    a, b = dequantize(x.a, x.a_scale, (1, 128), dtype), dequantize(x.b, x.b_scale, (128, 128), dtype)
    ends = x.offsets.tolist()

    def call():
        out = torch.zeros(len(a), b.shape[1], dtype=dtype)
        for i, (start, end) in enumerate(zip(ends, ends[1:])):
            if end > start:
                out[start:end] = F.linear(a[start:end], b[i])
        return out

    return call


@peer("grouped_mm bf16", "fp8_grouped_gemm")
def grouped_mm(x):
    a, b = dequantize(x.a, x.a_scale, (1, 128), torch.bfloat16), dequantize(x.b, x.b_scale, (128, 128), torch.bfloat16)
    b, ends = b.transpose(1, 2), x.offsets[1:].contiguous()
    return lambda: torch._grouped_mm(a, b, offs=ends)


@both("matmul by group", "fp8_grouped_wgrad")
def wgrad_by_group(x, dtype):
    dy = x.dy.to(dtype) * x.dy_scale.repeat_interleave(128, 0)[: len(x.dy)]
    a = x.x.to(dtype) * x.x_scale.repeat_interleave(128, 0)[: len(x.x)]
    ends = x.offsets.tolist()
    return lambda: torch.stack([dy[i:j].T @ a[i:j] for i, j in zip(ends, ends[1:])])


# ---------------------------------------------------------------- attention


def cache_values(cache, dtype):
    """[..., 576] of cache entries in either layout."""
    if cache.dtype != torch.uint8:
        return cache.to(dtype)
    latent = cache[..., :512].contiguous().view(torch.float8_e4m3fn).float()
    scale = cache[..., 512:528].contiguous().view(torch.float32).repeat_interleave(128, -1)
    rope = cache[..., 528:].contiguous().view(torch.bfloat16)
    return torch.cat([(latent * scale).to(dtype), rope.to(dtype)], -1)


def gathered(x, dtype):
    """Queries [b, q*h, 576], keys [b, s, 576] and a mask [q*h, s] or None; all sequences are equally long."""
    b, q, h, _ = x.q.shape
    page, lens = x.kv_cache.shape[1], x.seq_lens.tolist()
    if len(set(lens)) != 1:
        raise NotImplementedError("sequences of several lengths")
    tokens = x.block_table[:, : -(-lens[0] // page)].long()
    keys = cache_values(x.kv_cache[tokens].flatten(1, 2)[:, : lens[0]], dtype).contiguous()
    mask = None
    if x.causal and q > 1:
        seen = torch.arange(lens[0]) < lens[0] - q + 1 + torch.arange(q)[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf).repeat_interleave(h, 0)
    return x.q.to(dtype).reshape(b, q * h, 576).contiguous(), keys, mask


@both("bmm", "mla_decode")
def bmm(x, dtype):
    q, keys, mask = gathered(x, dtype)
    values = keys[..., :512]

    def call():
        scores = torch.bmm(q, keys.transpose(1, 2)) * x.softmax_scale
        return torch.bmm(torch.softmax(scores if mask is None else scores + mask, -1), values).view(*x.q.shape[:3], 512)

    return call


@both("SDPA by rows", "mla_decode")
def sdpa_heads_as_rows(x, dtype):
    """Heads as rows of one head: the cache is read in blocks for all of them."""
    q, keys, mask = gathered(x, dtype)
    q, keys = q[:, None], keys[:, None]
    return lambda: F.scaled_dot_product_attention(
        q, keys, keys, attn_mask=mask, scale=x.softmax_scale)[..., :512].reshape(*x.q.shape[:3], 512)


@both("gather, bmm", "mla_decode_sparse")
def gather_and_bmm(x, dtype):
    """Indices change with every token, so that gathering is part of the call."""
    b, q, h, _ = x.q.shape
    tokens = cache_values(x.kv_cache, dtype).flatten(0, 1)
    rows, index = x.q.to(dtype).flatten(0, 1), x.indices.long().flatten(0, 1)
    if bool((index < 0).any()):
        raise NotImplementedError("indices of no key")

    def call():
        keys = tokens[index]  # [b*q, top_k, 576]
        p = torch.softmax(torch.bmm(rows, keys.transpose(1, 2)) * x.softmax_scale, -1)
        return torch.bmm(p, keys[..., :512]).view(b, q, h, 512)

    return call


def by_head(x, dtype):
    """q [b, h, tq, 192], k, v, and the options of a causal mask aligned to the end."""
    b, h = len(x.cu_q) - 1, x.q.shape[1]
    if (x.cu_q.diff().unique().numel(), x.cu_k.diff().unique().numel()) != (1, 1):
        raise NotImplementedError("sequences of several lengths")
    q, k, v = (y.to(dtype).view(b, -1, h, y.shape[-1]).transpose(1, 2).contiguous() for y in (x.q, x.k, x.v))
    tq, tk, mask = q.shape[2], k.shape[2], {}
    if x.causal and tq == tk:
        mask = {"is_causal": True}
    elif x.causal and tq > 1:
        seen = torch.arange(tk) <= torch.arange(tq)[:, None] + tk - tq
        mask = {"attn_mask": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)}
    return q, k, v, mask


@both("SDPA padded", "mla_prefill")
def sdpa_padded(x, dtype):
    """Values padded to the width of the keys: otherwise torch takes its unfused path, which is many times slower."""
    q, k, v, mask = by_head(x, dtype)
    v = F.pad(v, (0, 64))
    return lambda: F.scaled_dot_product_attention(
        q, k, v, scale=x.softmax_scale, **mask)[..., :128].transpose(1, 2).flatten(0, 1)


@peer("eager", "attention_merge")
def merge(x):
    def call():
        a, b = (torch.where(s == torch.inf, -torch.inf, s) for s in (x.lse_a, x.lse_b))
        lse = torch.logaddexp(a, b)
        wa, wb = ((s - lse).exp().nan_to_num(0).transpose(-1, -2)[..., None] for s in (a, b))
        return (x.out_a * wa + x.out_b * wb).to(torch.bfloat16), lse

    return call


@peer("matmul f32", "mla_index")
def index_scores(x):
    q, k = x.q.float(), x.k.float() * x.k_scale[:, None]
    at = torch.arange(len(k))
    outside = (at < x.start[:, None]) | (at >= x.stop[:, None])

    def call():
        scores = torch.relu(q.flatten(0, 1) @ k.T).view(*q.shape[:2], -1)  # [t, h, s]
        return torch.bmm(x.weights[:, None], scores)[:, 0].masked_fill(outside, -torch.inf)

    return call


@peer("eager", "mla_append_kv")
def append(x):
    if x.norm_weight is None or x.cos is None or not x.interleaved:
        raise NotImplementedError("norm and interleaved RoPE only")
    cache, slots, weight = x.kv_cache.flatten(0, 1).clone(), x.slots, x.norm_weight.to(torch.bfloat16)

    def call():
        latent = F.rms_norm(x.kv_c, (512,), weight, x.eps)
        a, b = x.k_pe.float().view(-1, 32, 2).unbind(-1)
        rope = torch.stack([a * x.cos - b * x.sin, a * x.sin + b * x.cos], -1).flatten(1).to(torch.bfloat16)
        if cache.dtype == torch.uint8:
            codes, scale = rounded_codes(latent.float(), x.scale)
            cache[slots] = torch.cat([y.view(torch.uint8) for y in (codes, scale, rope)], 1)
        else:
            cache[slots] = torch.cat([latent, rope], 1)
        return cache.view(x.kv_cache.shape)

    return call


# ---------------------------------------------------------------- quantization


def rounded_codes(x, scale, floor=1e-4):
    """Codes and scales of f32 ``x`` [m, k] with blocks (1, 128); k divides."""
    blocks = x.view(len(x), -1, 128)
    s = blocks.abs().amax(-1).clamp(min=floor) / 448
    if scale == "pow2":
        s = torch.exp2(torch.ceil(torch.log2(s)))
    return (blocks / s[..., None]).to(torch.float8_e4m3fn).view(x.shape), s


@peer("eager", "fp8_quantize")
def quantize(x):
    if x.x.shape[1] % 128 or x.block not in ((1, 128), (128, 128)):
        raise NotImplementedError("blocks that divide only")
    if x.block == (1, 128):
        return lambda: rounded_codes(x.x.float(), x.scale, x.floor)
    m, k = x.x.shape
    padded = -(-m // 128) * 128

    def call():
        blocks = F.pad(x.x.float(), (0, 0, 0, padded - m)).view(padded // 128, 128, k // 128, 128)
        s = blocks.abs().amax((1, 3)).clamp(min=x.floor) / 448
        return (blocks / s[:, None, :, None]).to(torch.float8_e4m3fn).view(padded, k)[:m], s

    return call


@peer("eager", "swiglu_quantize")
def swiglu(x):
    def call():
        gate, up = x.x.chunk(2, -1)
        return rounded_codes((F.silu(gate) * up).float(), x.scale)

    return call


# ---------------------------------------------------------------- mixture of experts


@peer("eager", "moe_route")
def gate(x):
    """DeepSeek-V3's gate as its inference code writes it."""
    if x.score != "sigmoid" or x.group_score != "top2":
        raise NotImplementedError("sigmoid scores and groups by their top two only")

    def call():
        scores = x.logits.float().sigmoid()
        choice = scores if x.bias is None else scores + x.bias
        if x.n_group > 1:
            groups = choice.view(len(choice), x.n_group, -1)
            best = groups.topk(2, -1)[0].sum(-1).topk(x.topk_group, -1)[1]
            out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
            choice = groups.masked_fill(out[..., None], -torch.inf).flatten(1)
        ids = choice.topk(x.top_k, -1)[1]
        weights = scores.gather(1, ids)
        if x.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * x.scaling, ids

    return call


@peer("eager", "moe_permute")
def permute(x):
    top_k = x.experts.shape[1]

    def call():
        flat = x.experts.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=x.n_experts)
        row_of = torch.empty_like(order)
        row_of[order] = torch.arange(len(order))
        return x.x[order // top_k], counts.cumsum(0), row_of

    return call


@peer("eager", "moe_combine")
def combine(x):
    weights = torch.ones(x.row_of.shape) if x.weights is None else x.weights

    def call():
        return (x.y[x.row_of.clamp(min=0)].float() * (weights * (x.row_of >= 0))[..., None]).sum(1).to(x.y.dtype)

    return call


_last = {}  # weights of the peer before, if this one wants the same


def experts_in_use(x, dtype):
    """The experts that tokens use, and their weights one after the other."""
    used = torch.unique(x.experts[x.experts >= 0]).long()
    key = (x.w13.data_ptr(), x.w2.data_ptr(), dtype, *used.tolist())
    if key in _last:
        return used, *_last[key]
    _last.clear()
    size = 3 * x.w2.shape[1] * x.w2.shape[2] * len(used) * dtype.itemsize
    if size > LARGEST:
        raise TooLarge(f"weights of {size / 1e9:.1f} GB")
    if x.w13.dtype == torch.float8_e4m3fn:
        _last[key] = [torch.stack([dequantize(w[i], s[i], (128, 128), dtype) for i in used])
                      for w, s in ((x.w13, x.w13_scale), (x.w2, x.w2_scale))]
    else:
        _last[key] = x.w13[used].to(dtype), x.w2[used].to(dtype)
    return used, *_last[key]


def forget():
    """Free the weights kept for a next peer."""
    _last.clear()


@both("expert loop", "moe_experts", "moe_experts_bf16")
def expert_loop(x, dtype):
    """One expert after the other, as DeepSeek-V3's inference code does it."""
    used, w13, w2 = experts_in_use(x, dtype)
    a = x.x.to(dtype)

    def call():
        out = torch.zeros_like(a)
        for i, expert in enumerate(used):
            token, slot = torch.where(x.experts == expert)
            gate, up = F.linear(a[token], w13[i]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, w2[i])
            out.index_add_(0, token, y * x.weights[token, slot, None].to(dtype))
        return out

    return call


@peer("grouped_mm bf16", "moe_experts", "moe_experts_bf16")
def grouped_experts(x):
    used, w13, w2 = experts_in_use(x, torch.bfloat16)
    w13, w2, top_k = w13.transpose(1, 2), w2.transpose(1, 2), x.experts.shape[1]
    local = torch.searchsorted(used, x.experts.flatten())

    def call():
        order = torch.argsort(local, stable=True)
        ends = torch.bincount(local, minlength=len(used)).cumsum(0, dtype=torch.int32)
        gate, up = torch._grouped_mm(x.x[order // top_k], w13, offs=ends).chunk(2, -1)
        y = torch._grouped_mm((F.silu(gate) * up).contiguous(), w2, offs=ends)
        y = torch.empty_like(y).index_copy_(0, order, y).view(len(x.x), top_k, -1)
        return (y * x.weights[..., None]).sum(1).to(torch.bfloat16)

    return call
