"""Triton kernels, one file an op; installed as kernomics.triton_kernels."""
