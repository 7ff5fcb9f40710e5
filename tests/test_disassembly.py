"""The objects hold the instructions they are meant to hold, and nothing that could run on the wrong CPU."""

import pathlib
import platform
import re
import shutil
import subprocess

import pytest

OBJECTS = pathlib.Path(__file__).parents[1] / "build"
KERNELS = sorted(OBJECTS.glob("cp*/CMakeFiles/kernomics_cpu_*.dir/csrc/cpu/*.o"))

pytestmark = [
    pytest.mark.skipif(not KERNELS or not shutil.which("objdump"), reason="needs the build folder and objdump"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instructions"),
]


def text(isa, name):
    path = next(p for p in KERNELS if f"_{isa}.dir" in str(p) and p.name == f"{name}.cpp.o")
    return subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("isa, register, absent", [("avx2", "ymm", "zmm"), ("avx512", "zmm", None)])
def test_vector_code(isa, register, absent):
    gemm, attention = text(isa, "fp8_gemm"), text(isa, "mla_decode")
    for code in (gemm, attention):
        assert len(re.findall(rf"vfmadd\w+ps .*%{register}", code)) > 48  # several register tiles, not the scalar loops' rest
        assert not absent or f"%{absent}" not in code
    assert re.search(rf"vcvtph2ps .*%{register}", gemm), "FP8 is decoded through f16"
    # A register tile keeps its accumulators in registers: its loop is FMAs and loads, without a spill to the stack.
    broadcasts = r"vbroadcastss|\{1to16\}"
    assert len(re.findall(broadcasts, gemm)) > 20


def test_one_row_multiplies_codes():
    """fp8_gemm of one or two rows: codes to bf16 by byte tables, bf16 products summed in f32."""
    code = text("avx512", "fp8_gemm")
    assert len(re.findall(r"vperm[it]2b .*%zmm", code)) > 16 and len(re.findall(r"vdpbf16ps .*%zmm", code)) > 16
    assert not re.search(r"vdpbf16ps", text("avx512", "mla_decode")), "only where the CPU was asked for it"


def test_base_runs_anywhere():
    for path in KERNELS:
        if "_base.dir" in str(path):
            code = text("base", path.name.removesuffix(".cpp.o"))
            assert not re.search(r"\tv[a-z]+\w* .*%[xyz]mm", code), f"{path.name} holds AVX"


def test_no_shared_symbols():
    """An ISA's object defines no weak symbol: the linker could take its copy for every CPU."""
    for path in KERNELS:
        names = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        weak = [line for line in names.splitlines() if re.search(r" [VWu] ", line) and f"kn::{path.parts[-4][14:-4]}" not in line]
        assert not [w for w in weak if "DW.ref" not in w], f"{path}: {weak[:3]}"
