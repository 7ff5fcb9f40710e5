"""Every Triton kernel compiled for every chip, without one: what its bench cases launch, as ``docs/triton_kernels.md`` lists.

sm_90 alone in ``make test``, all chips in ``make test-long``. Interpreter and compiler need processes of their own.
"""

import os

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on", allow_module_level=True)

import ahead_of_time as aot  # noqa: E402
from kernomics import OPS, chip  # noqa: E402

TRITON = [(op, k) for op in OPS.values() for k in op.kernels if k.name == "triton"]
# The matrix instruction of each chip's widest path, which the main kernel of an op with such operands must use.
FP8 = {"sm80": "HMMA", "sm90": "QGMMA", "sm100": "UTCQMMA", "sm120": "QMMA", "gfx942": "v_mfma", "gfx950": "v_mfma"}
BF16 = FP8 | {"sm90": "HGMMA", "sm100": "UTCHMMA", "sm120": "HMMA"}
MUST = {name: FP8 for name in ("fp8_gemm", "fp8_grouped_gemm", "fp8_linear", "mla_index", "moe_experts")} | {
    name: BF16 for name in ("fp8_grouped_wgrad", "mla_decode", "mla_decode_sparse", "mla_prefill", "mla_prefill_backward",
                            "moe_experts_bf16")}


def families():
    return [pytest.param(f, marks=[] if f == "sm90" else pytest.mark.long) for f in aot.CHIPS]


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("op, kernel", TRITON, ids=lambda x: getattr(x, "name", ""))
def test_compiles(op, kernel, family):
    """No spills, shared memory that a block may have, matrix instructions where the kernel multiplies matrices, and the
    rows of the committed table."""
    found = aot.resources(op, kernel, family)
    for row in found:
        name = f"{row['kernel']} {row['tile']}"
        assert row["spills"] == 0, f"{name} spills"
        assert row["shared"] <= chip.FAMILIES[family].shared, f"{name} takes {row['shared']} bytes of shared memory"
        assert row["matrix"] or not row["dots"], f"{name} multiplies matrices without matrix instructions"
    if op.name in MUST:
        assert any(x.startswith(MUST[op.name][family]) for row in found for x in row["matrix"]), found
    assert [aot.line(row) for row in found] == aot.committed(op.name, family), "make triton-table, and look at the difference"
