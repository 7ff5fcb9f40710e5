"""``mla_decode``: the kernels of ``mla`` over the sequences of a block table."""

import torch
from kernomics.triton_kernels import mla
from kernomics.triton_kernels.common import chip_of


def tile(dims, chip):
    """See ``mla.tile``."""
    return mla.tile(dims["q"] * dims["h"], dims["fp8"], dims["page"], dims["h"] if dims["q"] > 1 else 0, chip)


def workspace(dims, chip):
    """Bytes for either layout of the cache."""
    found = []
    for fp8 in (False, True):
        bm, bn, *_, units = tile(dims | {"fp8": fp8}, chip)
        found.append(sum(mla.spaces(dims["b"], dims["q"] * dims["h"], dims["n"] * dims["page"], bm, bn, units)))
    return max(found)


def launch(q, kv_cache, block_table, seq_lens, sink, out, lse, workspace, softmax_scale, causal):
    (_, n_q, h, _), fp8 = q.shape, kv_cache.dtype == torch.uint8
    mla.launch(q, kv_cache, block_table, seq_lens, sink, out, lse, workspace, softmax_scale, causal,
               tile({"q": n_q, "h": h, "page": kv_cache.shape[1], "fp8": fp8}, chip_of(q)))
