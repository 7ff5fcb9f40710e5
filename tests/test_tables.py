"""Tables of measured operators: the schema, marks and their errors, the adapters, and accuracy on tables that are there."""

import importlib
import os
import time

import numpy as np
import pytest

from kernomics.contract import OPS
from kernomics.cost import CostError, aic, infersim, scenario, tables
from kernomics.cost.tables import IMPORTED, KINDS, TRANSFERRED, Table, Tables

REAL = aic.systems()
real = pytest.mark.skipif(REAL is None, reason="no aiconfigurator-core here (install it, or set KERNOMICS_AIC)")
BENCH_DATA = os.environ.get("KERNOMICS_INFERSIM")


def product(dtype, scale=1.0, chip="h200", seed=None):
    """A GEMM table of a chip with 1e15 FLOP/s in bf16, twice that in fp8."""
    axis = 2 ** np.arange(4, 15, 2)
    m, n, k = (a.reshape(-1) for a in np.meshgrid(axis, axis, axis, indexing="ij"))
    wide = tables.BITS[dtype][0] / 16
    seconds = scale * (5e-6 + (n * k + m * k) * 2 * wide / 4e12 + 2 * m * n / 4e12 + 2.0 * m * n * k * wide / 1e15)
    return Table(chip, "gemm", dtype, {"m": m, "n": n, "k": k}, seconds, "made up", "2026-11-25")


def experts(dtype, classes, variant="balanced"):
    """A MoE table of shape classes (d, n, e, top_k) on 1 to 8 ranks."""
    rows = [(t, *c, 1, ep) for c in classes for t in 2 ** np.arange(0, 15) for ep in (1, 2, 4, 8)]
    dims = dict(zip(KINDS["moe"].dims, np.array(rows).T))
    parts = KINDS["moe"].work(*tables.BITS[dtype], *(v.astype(float) for v in dims.values()))
    seconds = 1e-5 + parts[1] / 4e12 + parts[2] / 4e12 + parts[3] / 8e14
    return Table("h200", "moe", dtype, dims, seconds, "made up", variant=variant)


V3 = {"t": 100, "d": 7168, "n": 2048, "e": 256, "top_k": 8, "tp": 1, "ep": 8}

@pytest.mark.parametrize("kind, op, asked, call", [
    ("gemm", "fp8_gemm", dict(m=3, n=256, k=512), dict(m=3, n=256, k=512)),
    ("mla_decode", "mla_decode", dict(b=3, s=100, h=16), dict(b=3, q=1, s=100, h=16, page=64)),
    ("mla_prefill", "mla_prefill", dict(b=2, t=5, prefix=7, h=16), dict(b=2, t=10, s=24, h=16)),
    ("moe", "moe_experts_bf16", dict(t=5, d=256, n=128, e=8, top_k=2, tp=1, ep=1), dict(t=5, d=256, n=128, e=8, top_k=2)),
])
def test_the_products_of_a_surface_are_those_of_the_op(kind, op, asked, call):
    features = KINDS[kind].work(16, 16, *(asked[d] for d in KINDS[kind].dims))
    assert features[3] == OPS[op].work(**call).flops


# ---------------------------------------------------------------- answers


def test_a_measured_call_is_exact_and_one_between_is_imported():
    t = Tables([product("bf16")])
    exact = t.seconds("h200", "gemm", "bf16", {"m": 256, "n": 4096, "k": 4096})
    assert (exact.mark, exact.sigma, exact.source, exact.note) == (IMPORTED, 0.0, "made up", "")
    between = t.seconds("h200", "gemm", "bf16", {"m": 700, "n": 4096, "k": 4096})
    assert between.mark == IMPORTED and 0 < between.sigma < 0.1
    assert exact.seconds < between.seconds < t.seconds("h200", "gemm", "bf16", {"m": 1024, "n": 4096, "k": 4096}).seconds


def test_outside_is_transferred_with_growing_sigma_and_then_nothing():
    t = Tables([product("bf16")])
    near, far = (t.seconds("h200", "gemm", "bf16", {"m": m, "n": 4096, "k": 4096}) for m in (20000, 200000))
    assert near.mark == far.mark == TRANSFERRED and "utilisation held" in near.note and near.sigma < far.sigma
    assert t.seconds("h200", "gemm", "bf16", {"m": 10**9, "n": 4096, "k": 4096}) is None


def test_another_dtype_is_scaled_by_work():
    t = Tables([product("bf16"), product("int8")])
    call = {"m": 4096, "n": 4096, "k": 4096}
    found = t.seconds("h200", "gemm", "fp8", call)
    assert found.mark == TRANSFERRED and "scaled by work" in found.note
    assert found.seconds == pytest.approx(t.seconds("h200", "gemm", "int8", call).seconds, rel=0.05)
    assert found.sigma < 0.1  # each of the two predicts the other
    alone = Tables([product("bf16")]).seconds("h200", "gemm", "fp8", call)
    assert alone.seconds == pytest.approx(found.seconds, rel=0.1) and alone.sigma == 0.5


def test_a_transfers_error_is_what_leaving_out_shows():
    t = Tables([product("bf16"), product("int8", scale=1.5)])
    assert t.seconds("h200", "gemm", "fp8", {"m": 256, "n": 256, "k": 256}).sigma == pytest.approx(np.log(1.5), abs=0.1)


def test_another_shape_class_is_scaled_by_work():
    known = [(7168, 2048, 384, 8), (4096, 2048, 256, 8), (2048, 768, 128, 8)]
    t = Tables([experts("fp8", known)])
    found = t.seconds("h200", "moe", "fp8", V3, "balanced")
    true = Tables([experts("fp8", [(7168, 2048, 256, 8)])]).seconds("h200", "moe", "fp8", V3, "balanced")
    assert found.mark == TRANSFERRED and "e 384" in found.note
    assert abs(np.log(found.seconds / true.seconds)) < 2 * found.sigma < 0.5


def test_another_class_and_dtype_and_no_class_at_all():
    t = Tables([experts("bf16", [(7168, 2048, 384, 8), (4096, 2048, 256, 8)])])
    found = t.seconds("h200", "moe", "fp8", V3, "balanced")
    assert found.mark == TRANSFERRED and "bf16" in found.note and "e 384" in found.note
    assert Tables([experts("fp8", [(4096, 2048, 256, 8)])]).seconds("h200", "moe", "fp8", V3, "balanced").sigma >= 0.5


def test_nothing_is_said_of_other_chips_kinds_and_variants():
    t = Tables([product("bf16"), experts("fp8", [(7168, 2048, 256, 8)])])
    call = {"m": 1, "n": 16, "k": 16}
    assert t.seconds("b200", "gemm", "bf16", call) is None
    assert t.seconds("h200", "mla_decode", "bf16", {"b": 1, "s": 1, "h": 1}) is None
    assert t.seconds("h200", "moe", "fp8", V3, "power_law_1.01") is None
    assert t.seconds("h200", "moe", "fp8", V3).mark == IMPORTED  # the preferred variant there is


def test_dtype_left_open_takes_the_first_of_bits():
    t = Tables([product("int8", scale=2), product("bf16")])
    assert t.seconds("h200", "gemm", None, {"m": 16, "n": 16, "k": 16}) == t.seconds(
        "h200", "gemm", "bf16", {"m": 16, "n": 16, "k": 16})


@pytest.mark.parametrize("kind, dtype, dims, says", [
    ("conv", "bf16", {}, "kind is 'conv', allowed: gemm"),
    ("gemm", "fp7", {"m": 1, "n": 1, "k": 1}, "dtype is 'fp7', allowed: bf16"),
    ("gemm", "bf16", {"m": 1, "n": 1}, "gemm dims is 'm, n', allowed: m, n, k"),
    ("gemm", "bf16", {"m": 0, "n": 1, "k": 1}, "gemm.m is 0, allowed: an integer of at least 1"),
    ("gemm", "bf16", {"m": 1.5, "n": 1, "k": 1}, "gemm.m is 1.5, allowed: an integer of at least 1"),
])
def test_wrong_calls(kind, dtype, dims, says):
    with pytest.raises(CostError) as error:
        Tables([product("bf16")]).seconds("h200", kind, dtype, dims)
    assert str(error.value).startswith(says)


def test_many_is_seconds():
    t = Tables([product("bf16"), experts("fp8", [(7168, 2048, 384, 8), (4096, 2048, 256, 8)])])
    rng = np.random.default_rng(0)
    dims = {d: rng.integers(1, 40000, 50) for d in "mnk"}
    want = [t.seconds("h200", "gemm", "bf16", {d: int(v[i]) for d, v in dims.items()}).seconds for i in range(50)]
    np.testing.assert_allclose(t.many("h200", "gemm", "bf16", dims), want, rtol=1e-12)
    moe = {**V3, "e": np.array([256, 384]), "t": np.array([5, 500])}
    want = [t.seconds("h200", "moe", "fp8", {**V3, "e": e, "t": n}).seconds for e, n in ((256, 5), (384, 500))]
    np.testing.assert_allclose(t.many("h200", "moe", "fp8", moe), want, rtol=1e-12)
    assert np.isnan(t.many("b200", "gemm", "bf16", dims)).all()


def test_only_what_is_asked_is_read_and_once():
    read = []

    def reader(kind, table):
        return lambda: (read.append(kind), [table])[1]

    t = Tables(lazy={("h200", "gemm"): reader("gemm", product("bf16")), ("h200", "moe"): reader("moe", None)})
    assert t.chips() == ["h200"] and t.keys() == [("h200", "gemm"), ("h200", "moe")] and not read
    for _ in range(2):
        t.seconds("h200", "gemm", "bf16", {"m": 16, "n": 16, "k": 16})
    assert read == ["gemm"]


def test_of_two_tables_the_left_one_answers():
    a, b = Tables([product("bf16")]), Tables([product("bf16", scale=2), product("int8", scale=2), product("bf16", chip="b200")])
    both, call = a + b, {"m": 256, "n": 256, "k": 256}
    assert both.seconds("h200", "gemm", "bf16", call) == a.seconds("h200", "gemm", "bf16", call)
    assert both.seconds("h200", "gemm", "int8", call) == b.seconds("h200", "gemm", "int8", call)
    assert both.chips() == ["b200", "h200"]
    assert both.describe()[-1] == "h200 gemm int8: 216 points, made up"


def test_every_kinds_work_rises_with_its_ordered_dims():
    rng = np.random.default_rng(0)
    for spec in KINDS.values():
        small = {d: rng.integers(1, 200, 300).astype(float) for d in spec.dims}
        if "e" in small:
            small["top_k"] = np.minimum(small["top_k"], small["e"])
        for d in spec.axes:
            if d not in spec.free:
                large = {**small, d: small[d] + rng.integers(1, 100, 300)}
                for a, b in zip(spec.work(8, 8, *small.values()), spec.work(8, 8, *large.values())):
                    assert (np.asarray(b) >= np.asarray(a) * (1 - 1e-12)).all(), (spec, d)


# ---------------------------------------------------------------- files

CSV = """chip,kind,dtype,variant,m,n,k,b,s,h,latency_ms,source,date
h200,gemm,bf16,,16,4096,4096,,,,0.012,mine,2026-11-25
h200,gemm,bf16,,32,4096,4096,,,,0.013,mine,2026-11-25
h200,mla_decode,fp8,,,,,64,4096,128,0.15,mine,2026-11-25
"""


def written(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path):
    t = tables.read(written(tmp_path, CSV))
    assert t.describe() == ["h200 gemm bf16: 2 points, mine", "h200 mla_decode fp8: 1 points, mine"]
    assert t.seconds("h200", "gemm", "bf16", {"m": 16, "n": 4096, "k": 4096}).seconds == pytest.approx(12e-6)
    assert t.seconds("h200", "mla_decode", "fp8", {"b": 64, "s": 4096, "h": 128}).seconds == pytest.approx(150e-6)


def test_parquet_is_csv(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    csv = importlib.import_module("pyarrow.csv")
    pq.write_table(csv.read_csv(written(tmp_path, CSV)), tmp_path / "mine.parquet")
    call = {"b": 64, "s": 4096, "h": 128}
    got, want = (tables.read(tmp_path / f"mine.{e}").seconds("h200", "mla_decode", "fp8", call) for e in ("parquet", "csv"))
    assert got == want


@pytest.mark.parametrize("old, new, says", [
    ("h200,gemm,bf16,,32", "H200,gemm,bf16,,32", "mine.csv line 3: chip is 'H200', allowed: a key"),
    ("h200,gemm,bf16,,32", "h200,gem,bf16,,32", "mine.csv line 3: kind is 'gem', allowed: gemm, mla_decode"),
    ("h200,gemm,bf16,,32", "h200,gemm,fp32,,32", "mine.csv line 3: dtype is 'fp32', allowed: bf16"),
    (",,32,4096", ",,32.5,4096", "mine.csv line 3: m is '32.5', allowed: an integer of at least 1"),
    (",,32,4096", ",,,4096", "mine.csv line 3: m is '', allowed: an integer of at least 1"),
    ("0.013", "-1", "mine.csv line 3: latency_ms is '-1', allowed: a number over 0"),
    ("0.013", "nan", "mine.csv line 3: latency_ms is 'nan', allowed: a number over 0"),
    ("0.013,mine,", "0.013,,", "mine.csv line 3: source is '', allowed: where"),
    ("0.013,mine,2026-11-25", "0.013,mine,yesterday", "mine.csv line 3: date is 'yesterday', allowed: a day"),
    ("latency_ms", "latency", "mine.csv: columns is 'chip, kind, dtype, variant, m, n, k, b, s, h, latency, source, date', "
     "allowed: chip, kind"),
])
def test_wrong_files(tmp_path, old, new, says):
    with pytest.raises(CostError) as error:
        tables.read(written(tmp_path, CSV.replace(old, new)))
    assert str(error.value).startswith(says)


def test_no_file(tmp_path):
    with pytest.raises(CostError, match="none.csv"):
        tables.read(tmp_path / "none.csv")


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(CostError, match=r"kernomics\[tables\]"):
        tables.parquet()


# ---------------------------------------------------------------- aiconfigurator


@pytest.fixture
def core(tmp_path):
    """A folder laid out as aiconfigurator-core, with one or two rows a table."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pa = importlib.import_module("pyarrow")

    def write(place, **columns):
        path = tmp_path / "aiconfigurator_core" / "systems" / "data" / "h200_sxm" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)

    def gemm(version, dtypes, latency):
        count = len(dtypes)
        write(f"gemm/sglang/{version}/gemm_perf.parquet", gemm_dtype=dtypes, m=[16] * count, n=[32] * count, k=[64] * count,
              latency=[latency] * count)

    gemm("0.5.9", ["bfloat16", "fp8"], 9.0)
    gemm("0.5.14", ["bfloat16"], 14.0)
    write("gemm/trtllm/1.0.0/gemm_perf.parquet", gemm_dtype=["fp8_block"], m=[1], n=[1], k=[1], latency=[1.0])
    write("mla/trtllm/1.3.0rc20/generation_mla_perf.parquet", kv_cache_dtype=["fp8"], num_heads=[128], batch_size=[64], isl=[1],
          step=[4095], latency=[0.2])
    write("comm/nccl/2.29.2/nccl_perf.parquet", op_name=["all_reduce", "alltoall"], nccl_dtype=["half", "int8"], num_gpus=[8, 8],
          message_size=[1024, 1024], latency=[0.01, 0.02])
    sms = [4, 20]
    write("comm/sglang/0.5.12/wideep_deepep_normal_perf.parquet", node_num=[2, 2], hidden_size=[7168] * 2, num_token=[4096] * 2,
          num_topk=[8] * 2, num_experts=[256] * 2, dispatch_sms=sms, dispatch_transmit_us=[900.0, 500.0],
          dispatch_notify_us=[10.0, 10.0], combine_sms=sms, combine_transmit_us=[1800.0, 1000.0], combine_notify_us=[0.0, 0.0])
    return tmp_path


def test_aic_units_and_dims(core):
    t = aic.load("h200", core)
    assert aic.chips(core).keys() == {"h200"}
    decode = t.seconds("h200", "mla_decode", "fp8", {"b": 64, "s": 4096, "h": 128})  # no SGLang table: the next framework's
    assert (decode.seconds, decode.sigma) == (pytest.approx(200e-6), 0)
    assert decode.source == "aiconfigurator trtllm 1.3.0rc20 generation_mla_perf"
    assert t.seconds("h200", "all_reduce", "bf16", {"bytes": 2048, "ranks": 8}).seconds == pytest.approx(10e-6)
    assert t.seconds("h200", "all_to_all", "int8", {"bytes": 1024, "ranks": 8}).seconds == pytest.approx(20e-6)
    exchange = {"t": 4096, "d": 7168, "top_k": 8, "e": 256, "ranks": 16}
    assert t.seconds("h200", "dispatch", "fp8", exchange, "normal").seconds == pytest.approx(510e-6)
    assert t.seconds("h200", "combine", None, exchange).seconds == pytest.approx(1000e-6)


def test_aic_newer_versions_count_and_older_ones_fill(core):
    t = aic.load("h200", core)
    call = {"m": 16, "n": 32, "k": 64}
    assert t.seconds("h200", "gemm", "bf16", call).seconds == pytest.approx(14e-3)
    assert t.seconds("h200", "gemm", "fp8", call).seconds == pytest.approx(9e-3)
    assert "sglang 0.5.9" in t.seconds("h200", "gemm", "fp8", call).source
    assert aic.load("h200", core, "trtllm").seconds("h200", "gemm", "fp8_block", {"m": 1, "n": 1, "k": 1}).sigma == 0


def test_aic_is_found_by_the_environment(core, monkeypatch):
    monkeypatch.setenv("KERNOMICS_AIC", str(core))
    assert aic.load("h200").chips() == ["h200"]


@pytest.mark.parametrize("chip, framework, says", [
    ("h20", None, "chip is 'h20', allowed: h200"), ("h200", "tgi", "framework is 'tgi', allowed: sglang, trtllm, vllm")])
def test_aic_wrong(core, chip, framework, says):
    with pytest.raises(CostError, match=says):
        aic.load(chip, core, framework)


def test_aic_absent(tmp_path):
    with pytest.raises(CostError, match="aiconfigurator tables is .*, allowed: an installed aiconfigurator-core"):
        aic.load("h200", tmp_path)


# ---------------------------------------------------------------- InferSim


@pytest.fixture
def bench_data(tmp_path):
    files = {
        "gemm/h800/data.csv": "m,k,n,latency_us,mfu\n16,7168,1536,16.4,0.01\n",
        "mla/decode/h800/128-512-64.csv": "dtype,kv_dtype,batch_size,kv_len,latency_us,mfu\nbf16,bf16,1,1024,20.9,0.01\n",
        "mla/prefill/h800/128-128-64.csv": "dtype,seq_len,latency_us,mfu\nbf16,1024,116.9,0.3\n",
        "mha/decode/h800/64-2-128.csv": "bf16,bf16,1,1024,25.5,0.009\n",
        "grouped_gemm/decode/h800/data.csv": "num_experts,num_gpus,num_local_experts,topk,hidden_size,intermediate_size,"
        "batch_size_per_gpu,tokens_per_expert,up_proj_us,up_mfu,down_proj_us,down_mfu\n256,8,32,8,7168,2048,32,8,100,0,50,0\n",
    }
    for name, text in files.items():
        path = tmp_path / "bench_data" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize("kind, dtype, dims, us", [
    ("gemm", "fp8_block", {"m": 16, "n": 1536, "k": 7168}, 16.4),
    ("mla_decode", "bf16", {"b": 1, "s": 1024, "h": 128}, 20.9),
    ("mla_prefill", "bf16", {"b": 1, "t": 1024, "prefix": 0, "h": 128}, 116.9),
    ("gqa_decode", "bf16", {"b": 1, "s": 1024, "h": 64, "kv_heads": 2, "head_dim": 128}, 25.5),  # a file without a header
    ("moe", "fp8_block", {**V3, "t": 256}, 150),  # 32 tokens on each of 8 ranks
])
def test_infersim(bench_data, kind, dtype, dims, us):
    found = infersim.load(bench_data, "h800").seconds("h800", kind, dtype, dims)
    assert (found.mark, found.sigma) == (IMPORTED, 0) and found.seconds == pytest.approx(us / 1e6)


def test_infersim_beside_chips_that_it_lacks(bench_data):
    (table,) = scenario.open_tables(f"infersim:{bench_data}", ["h200", "h800"])
    assert {chip for chip, _ in table._lazy} == {"h800"}
    with pytest.raises(CostError, match="chip is 'h200', allowed: h800"):
        scenario.open_tables(f"infersim:{bench_data}", ["h200"])


def test_files_that_cannot_be_read(tmp_path):
    pytest.importorskip("pyarrow")
    for name in ("table.csv", "table.parquet"):
        (tmp_path / name).write_bytes(b"chip,\xff\xfe\n")
        with pytest.raises(CostError, match=f"table is '.*{name}', allowed: a .csv or .parquet file that can be read"):
            tables.read(tmp_path / name)


def test_infersim_wrong(bench_data):
    with pytest.raises(CostError, match="chip is 'h200', allowed: h800"):
        infersim.load(bench_data, "h200")
    path = bench_data / "bench_data" / "gemm" / "h800" / "data.csv"
    path.write_text(path.read_text() + "32,7168,many,1,1\n")
    with pytest.raises(CostError, match="gemm/h800/data.csv line 3: n is 'many', allowed: a number"):
        infersim.load(bench_data, "h800").describe()


@pytest.mark.skipif(not BENCH_DATA, reason="no InferSim bench_data here (set KERNOMICS_INFERSIM)")
def test_infersim_data():
    h800, h20 = (infersim.load(BENCH_DATA, chip) for chip in ("h800", "h20"))
    step = h800.seconds("h800", "mla_decode", "bf16", {"b": 128, "s": 4096, "h": 128})
    assert step.mark == IMPORTED and 2e-4 < step.seconds < 4e-4
    assert len(h20.describe()) >= 5


@real
def test_aiconfigurators_experts_include_activation_and_permutation():
    for variant in ("balanced", "deepep_prefill_uniform"):
        assert aic.load("h200").seconds("h200", "moe", "fp8_block", V3, variant).includes == ("activation", "permutation")
    assert aic.load("h200").seconds("h200", "gemm", "fp8_block", {"m": 8, "n": 7168, "k": 2048}).includes == ()


@pytest.mark.skipif(not BENCH_DATA, reason="no InferSim tables here")
def test_infersims_experts_are_products_alone():
    h800 = infersim.load(BENCH_DATA, "h800")
    for variant, includes in (("balanced_prefill", ()), ("balanced_decode", ("permutation",))):
        assert h800.seconds("h800", "moe", "fp8_block", {**V3, "t": 8192, "ep": 32}, variant).includes == includes


def test_experts_of_a_file_include_the_activation_and_transfers_keep_it():
    known = [(7168, 2048, 384, 8), (4096, 2048, 256, 8)]
    for t, dtype in ((Tables([experts("fp8", known)]), "fp8"), (Tables([experts("bf16", known)]), "fp8")):
        assert t.seconds("h200", "moe", dtype, V3, "balanced").includes == ("activation",)


# ---------------------------------------------------------------- accuracy on a table whose 80 % are left out

LAWS = ("balanced", "power_law_1.01", "power_law_1.2")
GATES = {  # what -> (kind, dtypes or any, variants or any, median, 90th percentile)
    "MLA decode": ("mla_decode", None, None, 0.05, 0.15),
    "MLA context": ("mla_prefill", None, None, 0.06, 0.25),
    "FP8 GEMM": ("gemm", ("fp8", "fp8_block"), None, 0.07, 0.20),
    "MoE": ("moe", None, LAWS, 0.06, 0.18),
}


def left_out(chip, framework, kind, dtypes, variants, seeds):
    """|relative error| on four fifths of a kind's tables, predicted from a random fifth."""
    errors = []
    for (dtype, variant), shapes in aic.load(chip, framework=framework)._of(chip, kind).items():
        if dtypes and dtype not in dtypes or variants and variant not in variants:
            continue
        table = shapes.table
        for seed in range(seeds):
            kept = np.random.default_rng(seed).random(len(table.seconds)) < 0.2
            part, rest = (Table(chip, kind, dtype, {d: v[rows] for d, v in table.dims.items()}, table.seconds[rows],
                                table.source, variant=variant) for rows in (kept, ~kept))
            got = Tables([part]).many(chip, kind, dtype, rest.dims, variant)
            errors.append(np.abs(got / rest.seconds - 1))
    return np.concatenate(errors)


def judge(what, chip, framework, seeds):
    kind, dtypes, variants, median, most = GATES[what]
    error = left_out(chip, framework, kind, dtypes, variants, seeds)
    assert not np.isnan(error).any()
    got = np.median(error), np.quantile(error, 0.9)
    assert got[0] <= median and got[1] <= most, f"{what}, {chip} {framework}: median {got[0]:.1%}, 90th percentile {got[1]:.1%}"


@real
@pytest.mark.parametrize("what", GATES)
def test_a_fifth_of_a_table_predicts_the_rest(what):
    judge(what, "h200", "sglang", 1)


@real
@pytest.mark.long
@pytest.mark.parametrize("framework", ["sglang", "trtllm"])
@pytest.mark.parametrize("chip", ["h100", "h200", "b200"])
@pytest.mark.parametrize("what", GATES)
def test_a_fifth_of_any_table_predicts_the_rest(what, chip, framework):
    judge(what, chip, framework, 5)


@real
def test_opening_and_asking_is_fast():
    start = time.thread_time()  # other processes' work does not count
    t = aic.load("h200")
    assert time.thread_time() - start < 2
    call = {"m": 100, "n": 7168, "k": 2048}
    start = time.thread_time()
    assert t.seconds("h200", "gemm", "fp8_block", call).mark == IMPORTED
    assert time.thread_time() - start < 4  # reading 100,000 rows and building one dtype's surface
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for m in range(100, 300):
            t.seconds("h200", "gemm", "fp8_block", call | {"m": m})
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 50e-6


@real
def test_known_readings():
    t = aic.load("h200")
    step = t.seconds("h200", "mla_decode", "bf16", {"b": 128, "s": 4096, "h": 128})
    assert (step.mark, step.sigma) == (IMPORTED, 0) and step.seconds == pytest.approx(262e-6, rel=0.01)
    assert "slower" in t.seconds("h200", "mla_decode", "fp8", {"b": 128, "s": 4096, "h": 128}).note
    gemm = t.seconds("h200", "gemm", "fp8_block", {"m": 1024, "n": 7168, "k": 16384})
    assert 2 * 1024 * 7168 * 16384 / gemm.seconds == pytest.approx(1148e12, rel=0.01)
    moe = aic.load("h200", framework="trtllm").seconds("h200", "moe", "fp8_block", {**V3, "t": 1024}, "power_law_1.01")
    assert moe.sigma == 0
