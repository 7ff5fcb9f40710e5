"""``fp8_linear``: ``fp8_quantize`` into the workspace, then ``gemm.dense``; or ``gemm.dense`` with activations in bf16."""

import torch
from kernomics.triton_kernels import fp8_quantize
from kernomics.triton_kernels.common import FLOOR, cdiv
from kernomics.triton_kernels.gemm import dense, dense_tile, dense_workspace


def tile(dims, chip):
    return dense_tile(dims | {"b_bytes": 1}, chip)


def parts(dims):
    """Bytes of the codes and of the scales of x, each up to a multiple of 16."""
    m, k = dims["m"], dims["k"]
    return cdiv(m * k, 16) * 16, cdiv(m * cdiv(k, 128), 4) * 16


def workspace(dims, chip):
    """For either kind of activations, which ``dims`` does not tell."""
    return sum(parts(dims)) + max(dense_workspace(dims | {"a_bytes": bytes, "b_bytes": 1}, chip) for bytes in (1, 2))


def launch(x, w, w_scale, bias, out, workspace, activations, out_dtype):
    if activations == "bf16":
        return dense(x, None, w, w_scale, bias, out, workspace)
    (m, k), (codes, scales) = x.shape, parts({"m": x.shape[0], "k": x.shape[1]})
    if m * k == 0:  # nothing to quantize, and no workspace
        return dense(x.view(torch.float8_e4m3fn)[:, :k], w_scale, w, w_scale, bias, out, None)
    a = workspace[:m * k].view(torch.float8_e4m3fn).view(m, k)
    a_scale = workspace[codes: codes + 4 * m * cdiv(k, 128)].view(torch.float32).view(m, -1)
    fp8_quantize.launch(x, a, a_scale, None, (1, 128), "f32", FLOOR)
    dense(a, a_scale, w, w_scale, bias, out, workspace[codes + scales:])
