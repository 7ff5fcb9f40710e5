"""Every op has a room of its own here: contract, definition, work, cases and kernels in one file."""

import importlib

from kernomics.contract import OPS

NAMES = (
    "fp8_quantize", "fp8_gemm", "fp8_grouped_gemm", "fp8_grouped_wgrad",
    "mla_append_kv", "mla_decode", "mla_decode_sparse", "mla_prefill", "mla_prefill_backward", "attention_merge",
    "mla_index",
    "moe_route", "moe_route_backward", "moe_permute", "moe_permute_backward", "moe_combine", "moe_combine_backward",
    "swiglu_quantize", "fp8_linear", "moe_experts", "moe_experts_bf16", "moe_balance", "expert_placement",
)

for _name in NAMES:
    importlib.import_module(f"kernomics.ops.{_name}")

__all__ = ["NAMES", "OPS"]
