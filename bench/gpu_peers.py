"""What PyTorch and the libraries of the field offer for the same call on a GPU, where they can be imported.

A peer is ``build(x) -> call``: ``x`` holds the inputs (CUDA tensors or None) and scalars by name. Layouts that a peer
wants are made by ``build``, which is not timed. Outputs are compared with ours before anything is timed.
"""

import importlib

import torch
import torch.nn.functional as F
from kernomics.bench.peers import dequantize, spread

PEERS = {}  # op -> {name: build}
LARGEST = 2e10  # bytes of converted weights; a peer that needs more is not run


def peer(label, *ops):
    def decorate(build):
        for op in ops:
            PEERS.setdefault(op, {})[label] = build
        return build

    return decorate


def need(name):
    """The module, or an ImportError that says it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{name} is not installed") from None


def difference(op, ours, theirs, inputs):
    """Relative distance of the finite values of the first outputs; codes count as the values they stand for."""
    def values(outs):
        outs = outs if isinstance(outs, tuple) else (outs,)
        if op.name in ("fp8_quantize", "swiglu_quantize"):
            return outs[0].float() * spread(outs[1], (1, 128), outs[0].shape)
        return outs[0].float()

    a, b = values(ours).flatten(), values(theirs).flatten()
    if a.shape != b.shape:
        return float("inf")
    both = a.isfinite() & b.isfinite()
    return float(torch.where(both, a - b, 0).norm() / torch.where(both, a, 0).norm().clamp(min=1e-30))


# ---------------------------------------------------------------- matrix products


@peer("torch bf16", "fp8_gemm")
def matmul(x):
    a, b = dequantize(x.a, x.a_scale, (1, 128), torch.bfloat16), dequantize(x.b, x.b_scale, (128, 128), torch.bfloat16).t()
    return lambda: a @ b


@peer("torch scaled_mm", "fp8_gemm")
def scaled_mm(x):
    """Block-scaled: 1 x 128 and 128 x 128, scales of A with rows innermost; of a multiple of 4 rows, as cuBLASLt wants."""
    m = len(x.a)
    a = F.pad(x.a.view(torch.uint8), (0, 0, 0, -m % 4)).view(x.a.dtype)
    a_scale = F.pad(x.a_scale, (0, 0, 0, -m % 4)).t().contiguous().t()
    b, b_scale = x.b.t(), x.b_scale.t()
    return lambda: torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)[:m]


@peer("DeepGEMM", "fp8_gemm")
def deep_gemm(x):
    lib = need("deep_gemm")
    out = torch.empty(x.a.shape[0], x.b.shape[0], dtype=torch.bfloat16, device=x.a.device)
    a_scale = lib.get_mn_major_tma_aligned_tensor(x.a_scale)

    def call():
        lib.fp8_gemm_nt((x.a, a_scale), (x.b, x.b_scale), out)
        return out

    return call


@peer("FlashInfer", "fp8_gemm")
def flashinfer_gemm(x):
    """Scales of A with rows innermost, padded to a multiple of 4."""
    lib = need("flashinfer.gemm")
    a_scale = F.pad(x.a_scale.t(), (0, -len(x.a) % 4)).contiguous()
    return lambda: lib.fp8_blockscale_gemm_sm90(x.a, x.b, a_scale, x.b_scale, out_dtype=torch.bfloat16)


@peer("torch grouped bf16", "fp8_grouped_gemm")
def grouped_mm(x):
    if x.b.numel() * 2 > LARGEST:
        raise MemoryError("the weights in bf16 are too large")
    a = dequantize(x.a, x.a_scale, (1, 128), torch.bfloat16)
    b = torch.stack([dequantize(c, s, (128, 128), torch.bfloat16) for c, s in zip(x.b, x.b_scale)]).transpose(-2, -1)
    return lambda: torch._grouped_mm(a, b, offs=x.offsets[1:])


@peer("DeepGEMM", "fp8_grouped_gemm")
def deep_gemm_grouped(x):
    lib = need("deep_gemm")
    counts = x.offsets.diff()
    if bool((counts % 128).any()):
        raise ValueError("its groups start at multiples of 128 rows")
    of_row = torch.repeat_interleave(torch.arange(len(counts), device=x.a.device, dtype=torch.int32), counts)
    a_scale = lib.get_mn_major_tma_aligned_tensor(x.a_scale)
    out = torch.empty(x.a.shape[0], x.b.shape[1], dtype=torch.bfloat16, device=x.a.device)

    def call():
        lib.m_grouped_fp8_gemm_nt_contiguous((x.a, a_scale), (x.b, x.b_scale), out, of_row)
        return out

    return call


# ---------------------------------------------------------------- attention


@peer("FlashMLA", "mla_decode")
def flash_mla(x):
    lib = need("flash_mla")
    if x.kv_cache.dtype == torch.uint8:
        return flash_mla_fp8(lib, x, tokens_seen(x))
    meta, splits = lib.get_mla_metadata(x.seq_lens, x.q.shape[1] * x.q.shape[2], 1)
    return lambda: lib.flash_mla_with_kvcache(x.q, x.kv_cache.unsqueeze(2), x.block_table, x.seq_lens, 512, meta, splits,
                                              softmax_scale=x.softmax_scale, causal=x.causal)


@peer("FlashMLA", "mla_decode_sparse")
def flash_mla_sparse(x):
    lib = need("flash_mla")
    if x.kv_cache.dtype == torch.uint8:
        return flash_mla_fp8(lib, x, x.indices)
    q, keys, indices = x.q.flatten(0, 1), x.kv_cache.view(-1, 1, 576), x.indices.flatten(0, 1).unsqueeze(1)
    return lambda: lib.flash_mla_sparse_fwd(q, keys, indices, x.softmax_scale)[0].view(*x.q.shape[:3], 512)


def flash_mla_fp8(lib, x, indices):
    """It reads the 656-byte cache by lists of tokens alone."""
    b, q, h, _ = x.q.shape
    lens = torch.full((b,), indices.shape[-1], dtype=torch.int32, device=x.q.device)
    meta, splits = lib.get_mla_metadata(lens, q * h, 1, h, True, indices.shape[-1])
    return lambda: lib.flash_mla_with_kvcache(x.q, x.kv_cache.unsqueeze(2), None, lens, 512, meta, splits,
                                              softmax_scale=x.softmax_scale, is_fp8_kvcache=True, indices=indices)


def tokens_seen(x):
    """The tokens that each query of an ``mla_decode`` sees, as ``mla_decode_sparse`` lists them."""
    page, q = x.kv_cache.shape[1], x.q.shape[1]
    key = torch.arange(x.block_table.shape[1] * page, device=x.q.device, dtype=torch.int32)
    later = torch.arange(q - 1, -1, -1, device=x.q.device, dtype=torch.int32) if x.causal else key.new_zeros(q)
    seen = key < (x.seq_lens[:, None] - later)[..., None]
    return torch.where(seen, (x.block_table[:, key // page] * page + key % page)[:, None], -1)


@peer("FlashInfer", "mla_decode")
def flashinfer_mla(x):
    lib = need("flashinfer")
    if x.kv_cache.dtype == torch.uint8:
        raise TypeError("it does not read the 656-byte cache")
    b, q, h, _ = x.q.shape
    page = x.kv_cache.shape[1]
    wrapper = lib.mla.BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=x.q.device))
    pages = -(-x.seq_lens // page)
    start = torch.cat([pages.new_zeros(1), pages.cumsum(0)]).int()
    ids = torch.cat([x.block_table[i, :n] for i, n in enumerate(pages.tolist())])
    rows = torch.arange(0, b * q + 1, q, device=x.q.device, dtype=torch.int32)
    wrapper.plan(rows, start, ids, x.seq_lens, h, 512, 64, page, x.causal, x.softmax_scale, torch.bfloat16, torch.bfloat16)
    latent, rope = x.q.view(b * q, h, 576).split([512, 64], -1)
    cache = x.kv_cache.split([512, 64], -1)
    return lambda: wrapper.run(latent, rope, *cache, return_lse=False).view(b, q, h, 512)


def prefill(x, attention):
    """A call of ``attention(q, k, v)`` on sequences of one length, as a batch with heads before tokens."""
    q_len, k_len = x.cu_q.diff(), x.cu_k.diff()
    if bool((q_len != q_len[0]).any() | (k_len != k_len[0]).any()) or int(q_len[0]) != int(k_len[0]):
        raise ValueError("the sequences differ in length")
    q, k, v = (y.view(len(q_len), -1, *y.shape[1:]).transpose(1, 2) for y in (x.q, x.k, x.v))
    return lambda: attention(q, k, v).transpose(1, 2).reshape(x.q.shape[0], x.q.shape[1], -1)


@peer("torch SDPA", "mla_prefill")
def sdpa(x):
    return prefill(x, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=x.causal, scale=x.softmax_scale))


@peer("FlexAttention", "mla_prefill")
def flex_attention(x):
    lib = need("torch.nn.attention.flex_attention")
    size = int(x.cu_q[1])
    mask = lib.create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device=x.q.device) if x.causal else None
    torch._dynamo.reset()  # after a few shapes it would compile for any, then not at all
    compiled = torch.compile(lib.flex_attention, dynamic=False)
    return prefill(x, lambda q, k, v: compiled(q, k, v, block_mask=mask, scale=x.softmax_scale))


# ---------------------------------------------------------------- experts


@peer("torch eager", "moe_route")
def route(x):
    def call():
        score = x.logits.float().sigmoid() if x.score == "sigmoid" else x.logits.float().softmax(-1)
        choice = score + x.bias if x.bias is not None else score
        groups = choice.view(len(choice), x.n_group, -1)
        best = groups.topk(2, -1)[0].sum(-1).topk(x.topk_group, -1)[1]
        keep = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
        ids = choice.masked_fill(~keep.repeat_interleave(groups.shape[-1], 1), float("-inf")).topk(x.top_k, -1)[1]
        weights = score.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * x.scaling

    return call


@peer("torch compile", "moe_combine")
def combine(x):
    def body(y, row_of, weights):
        rows = y[row_of.clamp(min=0)].float() * (weights * (row_of >= 0))[..., None]
        return rows.sum(1).to(y.dtype)

    torch._dynamo.reset()  # as above
    compiled = torch.compile(body, dynamic=False)
    return lambda: compiled(x.y, x.row_of, x.weights)
