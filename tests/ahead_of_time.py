"""What the compiler makes of the Triton kernels for chips that are not there, and the committed table of it."""

import functools
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from kernomics.bench import gpu
from kernomics.triton_kernels import warmup
from rich.progress import track

import machine_code
from kernomics import OPS, chip
from kernomics.contract import Case

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
        sass = run([TOOLS / "nvdisasm", "-c", "-ndf", cubin]).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    # What a thread spills lies on its stack and moves by LDL and STL.
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    matrix = sorted(set(re.findall(MATRIX, sass)))
    single = len(re.findall(r"\bF2F\.", sass))  # conversions of one number, at a quarter of the rate of others and less
    return found | {"registers": registers, "spills": spills, "stack": stack, "matrix": matrix, "single": single,
                    "undefined": machine_code.undefined(sass) if {"HGMMA", "QGMMA"} & {*matrix} else []}


# ---------------------------------------------------------------- shapes


MANY = (1, 2, 3, 5, 8, 9, 16, 17, 24, 32, 33, 48, 64, 65, 96, 100, 128, 130, 192, 256, 300, 384, 512, 576, 1000, 1024, 1536, 2048,
        2112, 3000, 4096, 7168, 8192, 16384)
SOME = {"h": (1, 2, 3, 5, 8, 16, 17, 20, 32, 33, 40, 48, 64, 65, 96, 128, 130), "q": (1, 2, 3, 4, 5, 8, 16, 64),
        "page": (1, 7, 16, 32, 64), "e": (1, 2, 3, 4, 8, 16, 32, 64, 128, 160, 256, 300),
        "top_k": (1, 2, 3, 4, 6, 8, 9, 10, 12, 16), "b": (1, 2, 4, 32, 128), "n_experts": (1, 4, 64, 256, 300)}


def drawn(op, count=3000):
    """Shapes of the op's cases with some dims drawn anew."""
    rng = random.Random(op.name)
    for _ in range(count):
        case = {n: v for n, v in rng.choice(op.cases).items()
                if n not in ("lens", "keys", "ragged", "t_lens", "s_lens", "skipped", "active")}
        for name, value in case.items():
            if isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_group") and rng.random() < 0.6:
                case[name] = rng.choice(SOME.get(name, MANY))
        if op.name == "mla_decode":
            case["s"] = rng.choice((64, 100, 1024, 4096, 16384))
            case["n"] = -(-case["s"] // case["page"])
            case["p"] = case["b"] * case["n"]
        if "e" in case and "top_k" in case:
            case["top_k"] = min(case["top_k"], case["e"])
        if case.get("e", 0) % case.get("n_group", 1) == 0:
            yield Case(**case)


def alike(words):
    """A tile's words without those that are sizes of the model, of which there are any number."""
    return re.sub(r"\b(E|PARTS|K|TOP_K|N_GROUP|TOPK_GROUP|G|P|WIDE|BINS|D)=\d+", "", words)


# ---------------------------------------------------------------- the committed table


TABLE = Path(__file__).resolve().parents[1] / "docs/triton_kernels.md"
CHIPS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")
SETS = ("bench", "small", "drawn")
COLUMNS = ("op", "chip", "cases", "kernel", "tile", "registers", "shared", "spills", "matrix")
HEAD = f"""# What the compiler makes of the Triton kernels

One line for each kernel and tile (Triton {triton.__version__}, no GPU): registers a thread, bytes of shared memory, spills,
matrix instructions. Cases are those of the bench, small ones (odd sizes, single tokens), and for the tiles that neither launches
3000 drawn shapes an op; sizes of a model that are constants of a kernel (experts, groups, top_k) count as one.
Of small cases the most over their alignments on sm90; elsewhere, and of drawn ones, the least aligned. `make triton-table`
writes this file, `make test-long` compares it.

"""


def launches(op, kernel, family, cases):
    """{(kernel, tile): launches} of a set of cases: one of bench cases that differ in alignment; of small ones all on sm90, else
    that with the fewest arguments that 16 divides; of drawn ones that too, for the tiles that the others do not have."""
    shapes = {"bench": [*(c for c in op.cases if c.bench), *gpu.CASES.get(op.name, ())],
              "small": [c for c in op.cases if not c.bench], "drawn": drawn(op)}[cases]
    found = {}
    for (name, words, kinds), launch in warmup.distinct(op, kernel, shapes, chip.FAMILIES[family]).items():
        found.setdefault((name, words), []).append((sum(kind.endswith(":16") for kind in kinds), launch))
    if cases == "bench":
        return {key: [x[0][1]] for key, x in found.items()}
    if cases == "small" and family == "sm90":
        return {key: [launch for _, launch in x] for key, x in found.items()}
    if cases == "drawn":
        known = {(name, alike(words)) for others in SETS[:2] for name, words in launches(op, kernel, family, others)}
        groups = {}
        for (name, words), x in found.items():
            if (name, alike(words)) not in known:
                groups.setdefault((name, alike(words)), []).extend((aligned, words, launch) for aligned, launch in x)
        least = {name: min(x, key=lambda item: item[:2]) for name, x in groups.items()}
        return {(name, words): [launch] for (name, _), (_, words, launch) in least.items()}
    return {key: [min(x, key=lambda item: item[0])[1]] for key, x in found.items()}


def resources(op, kernel, family, cases):
    """A row for each kernel and tile of ``launches``, with the most over its launches."""
    rows = []
    for (name, words), tile in sorted(launches(op, kernel, family, cases).items(), key=lambda x: x[0]):
        compiled = [warmup.compiled(launch, chip.FAMILIES[family]) for launch in tile]
        reports = [report(k) for k in compiled]
        rows.append({"op": op.name, "chip": family, "cases": cases, "kernel": name, "tile": words,
                     "dots": any("tt.dot" in k.asm["ttir"] for k in compiled),
                     "matrix": sorted({x for r in reports for x in r["matrix"]}),
                     "undefined": [x for r in reports for x in r.get("undefined", ())],
                     "single": max(r.get("single", 0) for r in reports),
                     **{figure: max(r[figure] for r in reports) for figure in ("registers", "shared", "spills")}})
    return rows


def line(row):
    """The row in the table."""
    values = row | {"matrix": " ".join(row["matrix"])}
    return "| " + " | ".join(str(values[c]) for c in COLUMNS) + " |"


def committed(op, family, cases):
    return [text for text in TABLE.read_text().splitlines() if text.startswith(f"| {op} | {family} | {cases} |")]


def lines_of(name, family, cases):
    """The op's lines in the table."""
    kernel = next(k for k in OPS[name].kernels if k.name == "triton")
    return [line(row) for row in resources(OPS[name], kernel, family, cases)]


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
    jobs = [(op.name, family, cases) for op, _ in triton_kernels for family in CHIPS for cases in SETS]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [text for lines in track(pool.map(lines_of, *zip(*jobs)), "compiling", len(jobs)) for text in lines]
    rule = "|---" * len(COLUMNS) + "|"
    TABLE.write_text(HEAD + "\n".join([f"| {' | '.join(COLUMNS)} |", rule, *rows]) + "\n")


if __name__ == "__main__":
    main()
