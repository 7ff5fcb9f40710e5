"""What nvcc makes of the CUDA kernels, read from the built module without a GPU, and the committed table of it."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import triton

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TABLE = Path(__file__).resolve().parents[1] / "docs/cuda_kernels.md"
COLUMNS = ("kernel", "chip", "registers", "instructions")
WORDS = ("HGMMA", "QGMMA", "UTMALDG", "UBLKCP", "LDGSTS")  # matrix products, copies by map, of bytes, by threads
HEAD = """# What nvcc makes of the CUDA kernels

One line for each kernel and chip (nvcc {nvcc}): registers a thread, and of the instructions that matter how many stand in the
code: {words}. None uses local memory or spills. `make cuda-table` writes this file, `make test` compares it.

"""


def run(*command, text=None):
    return subprocess.run([*map(str, command)], input=text, capture_output=True, text=True, check=True).stdout


def nvcc():
    """The version that CMake found, or None without one."""
    for path in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        try:
            return re.search(r"release ([\d.]+)", run(path, "--version")).group(1)
        except FileNotFoundError:
            pass


def short(names):
    """Mangled name -> its name and template arguments, without namespaces and parameters."""
    plain = run("c++filt", text="\n".join(names)).splitlines()
    plain = [re.sub(r"\([\w:]+\)(?=\d)", "", p.replace("unsigned short", "bf16")) for p in plain]  # (Enum)0 is 0
    return {n: re.sub(r"\(.*", "", re.sub(r"kn::cuda::|\(anonymous namespace\)::|^void ", "", p)) for n, p in zip(names, plain)}


def resources(module):
    """A row for each kernel and chip of the built module."""
    found = {}
    chip = None
    for text in run(TOOL, "-res-usage", module).splitlines():
        if m := re.match(r"arch = (\w+)", text):
            chip = m.group(1)
        elif m := re.match(r" Function (\S+):", text):
            name = m.group(1)
        elif m := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text):
            registers, stack, _, local = map(int, m.groups())
            found[name, chip] = {"registers": registers, "stack": stack, "local": local, "words": Counter()}
    for text in run(TOOL, "-sass", module).splitlines():
        if m := re.match(r"arch = (\w+)", text):
            chip = m.group(1)
        elif m := re.match(r"\s+Function : (\S+)", text):
            row = found[m.group(1), chip]
        elif m := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z0-9]+)", text):
            row["words"][m.group(1)] += 1
    names = short(sorted({name for name, _ in found}))
    rows = [{"kernel": names[name], "chip": chip, **row} for (name, chip), row in found.items()]
    return sorted(rows, key=lambda row: (row["kernel"], row["chip"]))


def line(row):
    """The row in the table."""
    words = " ".join(f"{row['words'][w]} {w}" for w in WORDS if row["words"][w])
    return f"| `{row['kernel']}` | {row['chip']} | {row['registers']} | {words} |"


def text(rows):
    head = HEAD.format(nvcc=nvcc(), words=", ".join(WORDS))
    return head + "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(line, rows)]) + "\n"


if __name__ == "__main__":
    import kernomics._cuda

    TABLE.write_text(text(resources(kernomics._cuda.__file__)))
