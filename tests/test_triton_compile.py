"""Every Triton kernel and tile compiled for every chip, without one, as ``docs/triton_kernels.md`` lists.

sm_90 alone in ``make test``, small cases of a few ops, drawn ones of none; all in ``make test-long``. The table is of one version
of Triton. Interpreter and compiler need processes of their own.
"""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on", allow_module_level=True)

from kernomics.bench import gpu  # noqa: E402
from kernomics.triton_kernels import mla_decode, warmup  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import ahead_of_time as aot  # noqa: E402
from kernomics import OPS, chip  # noqa: E402
from kernomics.cli import app  # noqa: E402
from kernomics.contract import Case  # noqa: E402
from kernomics.cost.model import Model  # noqa: E402

TRITON = [(op, k) for op in OPS.values() for k in op.kernels if k.name == "triton"]
# The matrix instruction of each chip's widest path, which the main kernel of an op with such operands must use.
FP8 = {"sm80": "HMMA", "sm90": "QGMMA", "sm100": "UTCQMMA", "sm120": "QMMA", "gfx942": "v_mfma", "gfx950": "v_mfma"}
BF16 = FP8 | {"sm90": "HGMMA", "sm100": "UTCHMMA", "sm120": "HMMA"}
MUST = {name: FP8 for name in ("fp8_gemm", "fp8_grouped_gemm", "fp8_linear", "mla_index", "moe_experts")} | {
    name: BF16 for name in ("fp8_grouped_wgrad", "mla_decode", "mla_decode_sparse", "mla_prefill", "mla_prefill_backward",
                            "moe_experts_bf16")}

OLDER = "3.6.0"  # what CUDA machines have with torch 2.11; ``make test-long`` runs what ``make test`` does with it too
QUICK = ["fp8_quantize", "fp8_gemm", "fp8_grouped_wgrad"]  # whose addresses once filled the registers in small cases
if aot.triton.__version__ == OLDER:
    QUICK.append("mla_decode")  # where its ptxas leaves registers unset


def everything():
    for op, kernel in TRITON:
        for family in aot.CHIPS:
            for cases in aot.SETS:
                quick = family == "sm90" and (cases == "bench" or cases == "small" and op.name in QUICK)
                yield pytest.param(op, kernel, family, cases, marks=[] if quick else [pytest.mark.long],
                                   id=f"{op.name}-{family}-{cases}")


@pytest.mark.parametrize("op, kernel, family, cases", list(everything()))
def test_compiles(op, kernel, family, cases):
    """No spills, shared memory that a block may have, matrix instructions where the kernel multiplies matrices, and the
    rows of the committed table."""
    found = aot.resources(op, kernel, family, cases)
    for row in found:
        name = f"{row['kernel']} {row['tile']}"
        assert row["spills"] == 0, f"{name} spills"
        assert not row["undefined"], f"{name} reads registers that are not set: {row['undefined'][:3]}"
        assert row["shared"] <= chip.FAMILIES[family].shared, f"{name} takes {row['shared']} bytes of shared memory"
        assert row["single"] <= 16 or cases != "bench", f"{name} converts {row['single']} numbers of a thread one by one"
        assert row["matrix"] or not row["dots"], f"{name} multiplies matrices without matrix instructions"
    if op.name in MUST and cases == "bench":
        assert any(x.startswith(MUST[op.name][family]) for row in found for x in row["matrix"]), found
    if aot.triton.__version__ != OLDER:
        assert [aot.line(row) for row in found] == aot.committed(op.name, family, cases), \
            "make triton-table, and look at the difference"


@pytest.mark.parametrize("page", [7, 16])
@pytest.mark.parametrize("cache", ["bf16", "u8"])
def test_tiles_of_several_queries_compile_for_any_page(cache, page):
    """Rows of a tile that see different keys take a loop of their own over smaller blocks."""
    op = OPS["mla_decode"]
    case = Case(b=2, q=2, h=48, s=128, page=page, p=64, n=-(-128 // page), softmax_scale=0.1, kv_cache=cache)
    kernel = next(k for k in op.kernels if k.name == "triton")
    for launch in warmup.distinct(op, kernel, [case], chip.FAMILIES["sm90"]).values():
        row = aot.report(warmup.compiled(launch, chip.FAMILIES["sm90"]))
        assert row["shared"] <= chip.FAMILIES["sm90"].shared and row["spills"] == 0 and not row["undefined"]


@pytest.mark.parametrize("family, q, h, page, fp8, rows", [
    ("sm90", 1, 128, 64, True, 64), ("sm90", 1, 16, 64, True, 16), ("sm90", 2, 128, 64, True, 64),
    ("sm90", 64, 16, 64, False, 64), ("sm90", 3, 20, 64, True, 64), ("sm90", 2, 48, 7, False, 16), ("sm90", 3, 10, 64, False, 64),
    ("sm90", 2, 8, 64, False, 16), ("sm90", 2, 16, 64, True, 16), ("sm90", 3, 20, 16, True, 16),
    ("sm90", 1, 30, 64, False, 32),
    ("sm120", 2, 48, 64, False, 16), ("sm120", 2, 64, 64, False, 32), ("gfx942", 3, 20, 64, True, 16),
    ("sm86", 3, 20, 64, True, 32), ("sm86", 3, 20, 64, False, 16)])
def test_rows_of_a_decode_tile(family, q, h, page, fp8, rows):
    """Large tiles where the queries of a sequence divide into them, 16 rows where the others would spill."""
    found = mla_decode.tile({"q": q, "h": h, "page": page, "fp8": fp8}, chip.FAMILIES[family])
    assert found[0] == rows


def all_cases(op):
    return [*op.cases, *gpu.CASES.get(op.name, ())]


@pytest.mark.parametrize("family", chip.FAMILIES)
@pytest.mark.parametrize("op, kernel", TRITON, ids=lambda x: getattr(x, "name", ""))
def test_launches_follow_from_shapes_alone(op, kernel, family):
    """On every chip and for every case, empty and huge ones too: tensors without memory give launches, the same twice,
    with a grid that the chip takes and tiles of powers of two."""
    for case in all_cases(op):
        first, again = (warmup.launches(op, kernel, case, chip.FAMILIES[family]) for _ in range(2))
        assert [(f.__name__, o) for f, _, o in first] == [(f.__name__, o) for f, _, o in again]
        for _, _, options in first:
            tiles = [v for n, v in options.items() if n in ("BM", "BN", "BK", "COLS", "ROWS", "num_warps")]
            assert all(v > 0 and v & (v - 1) == 0 for v in tiles), options
        assert len(first) <= 6


@pytest.mark.parametrize("op, kernel", TRITON, ids=lambda x: getattr(x, "name", ""))
def test_a_launch_costs_little_on_the_host(op, kernel):
    """What a call computes beside Triton's own launches: tiles, workspace, views. The bound is some three times what it takes."""
    from time import perf_counter

    target, took = chip.FAMILIES["sm90"], []
    case = [c for c in op.cases if c.bench][-1]
    call = warmup.prepared(op, kernel, case, target)
    for _ in range(200):
        start = perf_counter()
        call()
        took.append(perf_counter() - start)
    assert min(took) < 200e-6, f"{min(took) * 1e6:.0f} us"


def test_experts_take_six_launches_at_most():
    op = OPS["moe_experts"]
    kernel = next(k for k in op.kernels if k.name == "triton")
    for t, most in ((1, 5), (128, 5), (4096, 6)):
        case = Case(t=t, d=7168, n=2048, e=32, top_k=8)
        assert len(warmup.launches(op, kernel, case, chip.FAMILIES["sm90"])) <= most


def test_warmup_names_the_kernels_of_a_model():
    jobs = warmup.jobs(Model.load("deepseek-v3"), chip.FAMILIES["sm90"], tokens=(1, 64), context=4096)
    assert {"fp8_gemm", "mla_decode", "mla_prefill", "moe_route", "moe_experts", "swiglu_quantize"} <= {key[0] for key in jobs}
    assert not {"mla_index", "fp8_grouped_wgrad"} & {key[0] for key in jobs}  # V3 has no indexer and does not train here


@pytest.mark.parametrize("options, words", [
    (["--chip", "sm91"], "chip is 'sm91'"), (["--chip", "sm90", "--tokens", "0"], "tokens is '0'"), ([], "sees no GPU")])
def test_warmup_refuses(options, words):
    if not options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["warmup", *options])
    assert result.exit_code == 2 and words in result.output


def test_the_bench_compiles_in_processes():
    """What the bench's processes do for an op, where no GPU is: the kernels of its rows."""
    assert gpu.compile_op("swiglu_quantize", chip.FAMILIES["sm90"]) >= 2


def test_dry_bench_lists_every_row(capsys):
    on_gpu = [(op, k) for op in OPS.values() for k in op.kernels if k.on != "cpu"]
    assert gpu.dry() == sum(1 for op, _ in on_gpu for c in all_cases(op) if c.bench)
    assert "grouped" in capsys.readouterr().out


def test_other_tiles_are_launched():
    """What ``bench.tiles`` times takes the tile's options, whatever a room would choose, and its processes compile it."""
    from kernomics.bench import tiles

    seen = set()
    for name, case, found in tiles.everything(132):
        if name in seen:
            continue
        seen.add(name)
        kernel, launches = next(k for k in OPS[name].kernels if k.name == "triton"), []
        for _, changes in found[:3] + found[-3:]:
            with tiles.replaced(changes):
                launches.append(str([(fn.__name__, options) for fn, _, options in
                                     warmup.launches(OPS[name], kernel, case, chip.FAMILIES["sm90"])]))
        assert len(set(launches)) > 1, name
    assert len(seen) == 9
    assert tiles.compile_share(["swiglu_quantize"], chip.FAMILIES["sm90"], 0, 2) == 3
