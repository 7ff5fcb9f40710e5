"""``mla_decode_sparse``: the kernels of ``mla`` over the chosen tokens of each query."""

import torch
from kernomics.triton_kernels import mla
from kernomics.triton_kernels.common import chip_of


def tile(dims, chip):
    """See ``mla.tile``."""
    return mla.tile(dims["h"], dims["fp8"], 0, 0, chip)


def workspace(dims, chip):
    """Bytes for either layout of the cache."""
    found = []
    for fp8 in (False, True):
        bm, bn, *_, units = tile(dims | {"fp8": fp8}, chip)
        found.append(sum(mla.spaces(dims["b"] * dims["q"], dims["h"], dims["top_k"], bm, bn, units)))
    return max(found)


def launch(q, kv_cache, indices, sink, out, lse, workspace, softmax_scale):
    mla.launch(q, kv_cache, indices, None, sink, out, lse, workspace, softmax_scale, False,
               tile({"h": q.shape[2], "fp8": kv_cache.dtype == torch.uint8}, chip_of(q)))
