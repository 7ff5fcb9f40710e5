"""``moe_permute_backward``: each token's rows added up, as ``moe_combine`` does it without weights."""

from kernomics.triton_kernels import moe_combine


def launch(dx_sorted, row_of, dx, workspace):
    moe_combine.launch(dx_sorted, row_of, None, dx, workspace)
