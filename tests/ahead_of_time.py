"""What the compiler makes of the Triton kernels for chips that are not there, and the committed table of it."""

import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from kernomics.bench import gpu
from kernomics.triton_kernels import warmup
from rich.progress import track

from kernomics import OPS, chip

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = r"\b(HGMMA|QGMMA|HMMA|QMMA|UTCHMMA|UTCQMMA|OMMA)\b"


def report(kernel):
    """Registers, shared memory, spills and matrix instructions of a compiled kernel."""
    found = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        figure = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
        return found | {"registers": figure("vgpr_count"), "spills": figure("vgpr_spill_count") + figure("sgpr_spill_count"),
                        "matrix": sorted(set(re.findall(r"v_mfma\w+", text)))}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([TOOLS / "cuobjdump", "-res-usage", cubin]).stdout
        sass = run([TOOLS / "nvdisasm", "-c", cubin]).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    # What a thread spills lies on its stack and moves by LDL and STL.
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return found | {"registers": registers, "spills": spills, "stack": stack, "matrix": sorted(set(re.findall(MATRIX, sass))),
                    "tma": "UTMALDG" in sass}


# ---------------------------------------------------------------- the committed table


TABLE = Path(__file__).resolve().parents[1] / "docs/triton_kernels.md"
CHIPS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")
SETS = ("bench", "small")
COLUMNS = ("op", "chip", "cases", "kernel", "tile", "registers", "shared", "spills", "matrix")
HEAD = f"""# What the compiler makes of the Triton kernels

One line for each kernel and tile that the cases of the ops launch (Triton {triton.__version__}, no GPU), bench cases and small
ones (odd sizes, single tokens) apart: registers a thread, bytes of shared memory, spills, matrix instructions. Small cases: the
most over their alignments on sm90, on other chips the least aligned. `make triton-table` writes this file, `make test-long`
compares it.

"""


def launches(op, kernel, family, cases):
    """{(kernel, tile): launches} of the op's ``cases`` ("bench" or "small"): one of bench cases that differ in alignment; of
    small ones all on sm90, elsewhere that with the fewest arguments that 16 divides."""
    small = cases == "small"
    chosen = [c for c in op.cases if not c.bench] if small else [*(c for c in op.cases if c.bench), *gpu.CASES.get(op.name, ())]
    found = {}
    for (name, words, kinds), launch in warmup.distinct(op, kernel, chosen, chip.FAMILIES[family]).items():
        found.setdefault((name, words), []).append((sum(kind.endswith(":16") for kind in kinds), launch))
    if small and family != "sm90":
        return {key: [min(x, key=lambda pair: pair[0])[1]] for key, x in found.items()}
    return {key: [launch for _, launch in (x if small else x[:1])] for key, x in found.items()}


def resources(op, kernel, family, cases):
    """A row for each kernel and tile of ``launches``, with the most over its launches."""
    rows = []
    for (name, words), tile in sorted(launches(op, kernel, family, cases).items(), key=lambda x: x[0]):
        compiled = [warmup.compiled(launch, chip.FAMILIES[family]) for launch in tile]
        reports = [report(k) for k in compiled]
        rows.append({"op": op.name, "chip": family, "cases": cases, "kernel": name, "tile": words,
                     "dots": any("tt.dot" in k.asm["ttir"] for k in compiled),
                     "matrix": sorted({x for r in reports for x in r["matrix"]}),
                     **{figure: max(r[figure] for r in reports) for figure in ("registers", "shared", "spills")}})
    return rows


def line(row):
    """The row in the table."""
    values = row | {"matrix": " ".join(row["matrix"])}
    return "| " + " | ".join(str(values[c]) for c in COLUMNS) + " |"


def committed(op, family, cases):
    return [text for text in TABLE.read_text().splitlines() if text.startswith(f"| {op} | {family} | {cases} |")]


def main():
    """``python tests/ahead_of_time.py``: write the table; ``... OP [CHIP ...]``: print the op's rows."""
    triton_kernels = [(op, k) for op in OPS.values() for k in op.kernels if k.name == "triton"]
    if len(sys.argv) > 1:
        op, kernel = next(x for x in triton_kernels if x[0].name == sys.argv[1])
        for family in sys.argv[2:] or CHIPS:
            for cases in SETS:
                for row in resources(op, kernel, family, cases):
                    print(line(row), "SPILLS" if row["spills"] else "", flush=True)
        return
    jobs = [(op, kernel, family, cases) for op, kernel in triton_kernels for family in CHIPS for cases in SETS]
    rows = [line(row) for job in track(jobs, "compiling") for row in resources(*job)]
    rule = "|---" * len(COLUMNS) + "|"
    TABLE.write_text(HEAD + "\n".join([f"| {' | '.join(COLUMNS)} |", rule, *rows]) + "\n")


if __name__ == "__main__":
    main()
