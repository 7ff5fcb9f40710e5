"""``fp8_grouped_gemm``: one launch of ``gemm.grouped``."""

from kernomics.triton_kernels.gemm import grouped


def launch(a, a_scale, b, b_scale, offsets, out, workspace):
    grouped(a, a_scale, b, b_scale, offsets, out)
