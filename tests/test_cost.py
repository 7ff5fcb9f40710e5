"""The cost model: hand-derived parameter counts, work, marks, chips, dollars, and the errors of wrong input."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from kernomics.cost import CostError, chips, economics, report
from kernomics.cost.measured import BOUND, INTERPOLATED, MEASURED, Measured, log_log, read, weakest
from kernomics.cost.model import Model, Shard
from kernomics.cost.price import Request, bound, price, time, times

V3 = Model.load("deepseek-v3")
CPU = "cpu-test-avx2-2t"
CEILINGS = {"flops_f32": 100e9, "bytes_read": 20e9}


def config(**changes):
    text = (report.Path(report.__file__).parent / "configs" / "deepseek-v3.json").read_text()
    return {**json.loads(text), **changes}


def record(op, seconds, chip=CPU, **case):
    return {"op": op, "chip": chip, "dims": case, "seconds_median": seconds, "ceilings": CEILINGS, "date": "2026-11-22"}


def row_of(rows, name):
    return next(r for r in rows if r.name == name)


# ---------------------------------------------------------------- measured, interpolated, bound


def machine(*records):
    measured = Measured(list(records))
    return chips.from_records(CPU, measured.ceilings(CPU) or CEILINGS, "2026-11-22"), measured


def test_an_exact_record_is_reproduced():
    row = row_of(V3.decode(4, 512), "q_b")
    chip, measured = machine(record("fp8_gemm", 0.0123, **row.dims), record("fp8_gemm", 9.0, m=4, n=1, k=1))
    timed = time(row, chip, measured)
    assert (timed.seconds, timed.mark) == (0.0123, MEASURED)


def test_cold_records_win_then_the_fastest_kernel():
    dims = {"m": 4, "n": 24576, "k": 1536}
    warm = {**record("fp8_gemm", 0.001, **dims), "cache_state": "warm"}
    cold = [{**record("fp8_gemm", s, **dims), "cache_state": "cold"} for s in (0.005, 0.004)]
    assert Measured([warm, *cold]).seconds(CPU, "fp8_gemm", dims) == (0.004, MEASURED)
    assert Measured([warm]).seconds(CPU, "fp8_gemm", dims) == (0.001, MEASURED)
    assert Measured([warm]).seconds("cpu-other", "fp8_gemm", dims) is None


def test_between_two_records_seconds_rise_with_the_dim():
    chip, measured = machine(record("fp8_gemm", 0.02, m=16, n=24576, k=1536), record("fp8_gemm", 0.32, m=256, n=24576, k=1536))
    rows = {m: row_of(V3.decode(m, 512), "q_b") for m in (16, 17, 32, 64, 128, 255, 256)}
    timed = {m: time(row, chip, measured) for m, row in rows.items()}
    assert [t.mark for t in timed.values()] == [MEASURED] + [INTERPOLATED] * 5 + [MEASURED]
    seconds = [t.seconds for t in timed.values()]
    assert seconds == sorted(seconds) and len(set(seconds)) == len(seconds)
    assert timed[64].seconds == pytest.approx(0.08)  # half way in log-log: sqrt(0.02 * 0.32)


def test_outside_the_records_only_the_roofline_is_left():
    chip, measured = machine(record("fp8_gemm", 1.0, m=16, n=24576, k=1536), record("fp8_gemm", 2.0, m=256, n=24576, k=1536))
    for m in (1, 15, 257, 4096):
        row = row_of(V3.decode(m, 512), "q_b")
        timed = time(row, chip, measured)
        assert timed.mark == BOUND
        assert timed.seconds == pytest.approx(max(row.work.flops / 100e9, row.work.bytes / 20e9))
    other = row_of(V3.decode(64, 512), "o")  # between in m, but another n and k
    assert time(other, chip, measured).mark == BOUND


def test_an_interpolation_never_beats_the_roofline():
    chip, measured = machine(record("fp8_gemm", 1e-9, m=16, n=24576, k=1536), record("fp8_gemm", 1e-9, m=256, n=24576, k=1536))
    row = row_of(V3.decode(64, 512), "q_b")
    timed = time(row, chip, measured)
    assert (timed.seconds, timed.mark) == (bound(row, chip), INTERPOLATED)


def test_attention_interpolates_in_context_and_experts_in_tokens():
    decode = [{**row_of(V3.decode(4, s), "MLA decode").dims, "p": 999} for s in (1024, 4096)]
    measured = Measured([record("mla_decode", 1.0, **decode[0]), record("mla_decode", 4.0, **decode[1])])
    seconds, mark = measured.seconds(CPU, "mla_decode", row_of(V3.decode(4, 2048), "MLA decode").dims)
    assert (pytest.approx(seconds), mark) == (2.0, INTERPOLATED)
    one, four, sixteen = (row_of(V3.decode(t, 8), "routed experts").dims for t in (1, 4, 16))
    low = record("moe_experts", 1.0, **{**one, "e": 32, "active": 8})  # idle experts are not read, however many there are
    few = record("moe_experts", 9.0, **{**sixteen, "e": 32, "active": 32})  # 256 experts: 16 tokens would reach 102
    seconds, mark = Measured([low, record("moe_experts", 9.0, **sixteen)]).seconds(CPU, "moe_experts", four)
    assert (pytest.approx(seconds), mark) == (3.0, INTERPOLATED)
    assert Measured([low, few]).seconds(CPU, "moe_experts", four) is None
    assert Measured([low]).seconds(CPU, "moe_experts", one) == (1.0, MEASURED)
    del low["dims"]["active"]
    assert Measured([low]).seconds(CPU, "moe_experts", one) == (1.0, MEASURED)
    prefill = [row_of(V3.prefill(t), "MLA prefill").dims for t in (256, 4096)]
    measured = Measured([record("mla_prefill", s, **d) for s, d in zip((1.0, 256.0), prefill, strict=True)])
    seconds, mark = measured.seconds(CPU, "mla_prefill", row_of(V3.prefill(1024), "MLA prefill").dims)
    assert (pytest.approx(seconds), mark) == (16.0, INTERPOLATED)


def test_a_different_scalar_or_dtype_is_a_different_call():
    dims = row_of(V3.decode(4, 512), "q_b").dims
    other = {**record("fp8_gemm", 1.0, **dims), "scalars": {"out_dtype": "f32"}}
    assert Measured([other]).seconds(CPU, "fp8_gemm", dims) is None
    block = {**record("fp8_quantize", 1.0, m=1, k=7168), "scalars": {"block": [128, 128]}}
    assert Measured([block]).seconds(CPU, "fp8_quantize", {"m": 1, "k": 7168}) is None
    same = {**record("fp8_quantize", 1.0, m=1, k=7168, block0=1), "dtypes": {"x": "bf16", "out": "fp8"}}
    same["scalars"] = {"block": [1, 128], "floor": 1e-4}
    assert Measured([same]).seconds(CPU, "fp8_quantize", {"m": 1, "k": 7168}) == (1.0, MEASURED)


def test_marks_add_up_to_the_weakest():
    assert weakest([MEASURED, MEASURED]) == MEASURED
    assert weakest([MEASURED, INTERPOLATED]) == INTERPOLATED
    assert weakest([BOUND, INTERPOLATED, MEASURED]) == BOUND
    assert log_log(10, (1, 1.0), (100, 9.0)) == pytest.approx(3.0)


def test_measured_experts_include_activation_and_permutation():
    rows = V3.decode(64, 512, shard=Shard(ep=8))
    parts = {"expert SwiGLU", "to expert order", "from expert order"}
    chip, measured = machine(record("moe_experts", 0.25, **row_of(rows, "routed experts").dims))
    timed = {t.row.name: t for t in times(rows, chip, measured)}
    assert timed["routed experts"].seconds == 0.25 and {n for n in parts if timed[n].seconds} == set()
    assert all(t.seconds for t in times(rows, chip, Measured([])))  # a roofline of the products includes nothing


def test_a_step_of_measured_rows_is_measured():
    rows = [r for r in V3.decode(2, 64) if r.op]
    chip, measured = machine(*(record(r.op, 0.001, **r.dims) for r in rows))
    p = price(rows, chip, measured, tokens=2, users=2, memory=1e9, dollars_per_hour=1.0)
    assert p.mark == MEASURED and p.share[MEASURED] == pytest.approx(1)
    assert p.seconds == pytest.approx(0.001 * sum(r.count for r in rows))
    assert p.chips is None  # no record says how much memory the machine has


def test_the_machine_is_the_cpu_measured_last():
    old = {**record("fp8_gemm", 1.0, chip="cpu-old", m=1, n=1, k=1), "date": "2026-11-01"}
    slow = {**record("fp8_gemm", 1.0, chip="cpu-new-portable", m=1, n=1, k=1), "ceilings": {"flops_f32": 1e9}}
    fast = record("fp8_gemm", 1.0, chip="cpu-new-avx2", m=1, n=1, k=1)
    gpu = {**record("fp8_gemm", 1.0, chip="h200", m=1, n=1, k=1), "date": "2026-12-01"}
    assert Measured([old, slow, fast, gpu]).machine() == "cpu-new-avx2"
    assert Measured([gpu]).machine() is None


def test_records_are_read_and_bad_ones_named(tmp_path):
    good = record("fp8_gemm", 1.0, m=1, n=1, k=1)
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n\n" + json.dumps(good) + "\n")
    assert len(read(tmp_path)) == len(read(tmp_path / "a.jsonl")) == 2
    for bad, text in (({**good, "seconds_median": 0}, "seconds_median"), ({**good, "op": None}, "op"), ([], "op")):
        (tmp_path / "b.jsonl").write_text(json.dumps(bad))
        with pytest.raises(CostError, match=f"b.jsonl line 1: {text} is"):
            read(tmp_path)
    with pytest.raises(CostError, match="records is"):
        read(tmp_path / "none")


# ---------------------------------------------------------------- dollars


def test_arithmetic_by_hand():
    assert economics.dollars_per_mtoken(3.6, 1000) == pytest.approx(1.0)  # $3.6/h is $0.001/s, for 1000 tokens
    assert economics.roofline_seconds(2e12, 1e12, 5e9, 1e10) == 2.0
    assert economics.roofline_seconds(2e11, 1e12, 5e9, 1e10) == 0.5
    assert economics.chips_needed(673e9, 141e9) == 5 and economics.chips_needed(141e9, 141e9) == 1
    assert economics.shared_seconds(10.0, 5) == 2.0
    assert economics.tokens_per_second(64, 0.5) == 128.0


def test_deepseek_day_6_costs_87072_dollars():
    assert economics.fleet_dollars(226.75, 8, 24, 2) == 87_072  # deepseek-ai/open-infra-index, day 6


def test_price_of_a_step_by_hand():
    h200 = chips.load()["h200"]
    held = V3.memory_bytes(64, 4096)
    p = price(V3.decode(64, 4096), h200, Measured([]), tokens=64, users=64, memory=held, dollars_per_hour=3.6)
    want = sum(r.count * bound(r, h200) for r in V3.decode(64, 4096))
    assert p.chips == 5 and p.mark == BOUND
    assert p.chip_seconds == pytest.approx(want) and p.seconds == pytest.approx(want / 5)
    assert p.tokens_per_s_per_chip == pytest.approx(64 / want)
    assert p.tokens_per_s_per_user == pytest.approx(5 / want)
    assert p.dollars_per_mtoken == pytest.approx(0.001 * want / 64 * 1e6)
    one = p.layer_seconds("attention", "moe")
    assert p.chip_seconds == pytest.approx(58 * one + 3 * p.layer_seconds("attention", "dense") + p.layer_seconds("head"))


def priced_request(hit=0.5, **fields):
    """3,000 + 1,000 tokens on an H200 at $3.60/h: prefill of 1,000 tokens in one step, decode of 64."""
    h200 = chips.load()["h200"]
    fill = price(V3.prefill(1000), h200, Measured([]), tokens=1000, users=1, memory=1e9, dollars_per_hour=3.6)
    decode = price(V3.decode(64, 4096), h200, Measured([]), tokens=64, users=64, memory=1e9, dollars_per_hour=3.6)
    tokens = {"in": 3000 - round(3000 * hit), "cached": round(3000 * hit), "out": 1000}
    return Request(fill, decode, tokens, **fields), 0.001 * fill.chip_seconds / 1000, 0.001 * decode.chip_seconds / 64


def test_a_request_by_hand():
    request, each_in, each_out = priced_request()
    whole = 1500 * each_in + 1000 * each_out
    assert request.dollars == pytest.approx(whole) and request.blended == pytest.approx(whole / 4000 * 1e6)
    for allocation in ("pool", "time"):  # one kind of chip: its time is its pool
        found = priced_request(allocation=allocation)[0].mtoken
        assert found == {"in": pytest.approx(each_in * 1e6), "cached": 0.0, "out": pytest.approx(each_out * 1e6)}
    sold = {"in": 0.55, "cached": 0.14, "out": 2.19}
    found = priced_request(allocation="price", sold=sold)[0].mtoken
    share = whole / (1500 * 0.55 + 1500 * 0.14 + 1000 * 2.19)  # one margin for all
    assert found == {kind: pytest.approx(dollars * share * 1e6) for kind, dollars in sold.items()}
    assert set(priced_request(hit=0.0)[0].mtoken) == {"in", "out"}


@pytest.mark.parametrize("allocation, sold", [("pool", {}), ("time", {}), ("price", {"in": 1.0, "cached": 0.1, "out": 4.0})])
def test_a_request_pays_for_all_its_tokens_under_any_allocation(allocation, sold):
    request, *_ = priced_request(allocation=allocation, sold=sold)
    paid = sum(n * request.mtoken[kind] for kind, n in request.tokens.items()) / 1e6
    assert paid == pytest.approx(request.dollars)


def test_a_request_without_a_price_has_none():
    request, *_ = priced_request()
    unpriced = replace(request, decode=replace(request.decode, dollars_per_hour=None))
    assert (unpriced.dollars, unpriced.mtoken, unpriced.blended) == (None, {}, None)


# ---------------------------------------------------------------- the command


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [r for r in V3.decode(64, 4096) if r.op]
    lines = [{**record(r.op, 0.01, **r.dims), "flops": r.work.flops, "bytes": r.work.bytes} for r in rows]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(*arguments):
    from typer.testing import CliRunner

    from kernomics.cli import app

    return CliRunner().invoke(app, ["price", *map(str, arguments)])


def test_price_prints_tables_that_fit(records):
    result = run("--records", records, "--plot", "", "--batch", 64)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 100
    for text in ("671.03 B", "671B / 37B", "37.55 B", "70,272 B", "this CPU", "trainium2", "●", "routed experts", "$/Mtok out"):
        assert text in result.output


def test_price_as_json(records):
    dollars = ("--dollars-per-hour", "this=0.1", "--dollars-per-hour", "h200=2.5")
    chips = ("--chip", CPU, "--chip", "h200", "--chip", "trainium3")
    result = run("--records", records, "--json", "--phase", "decode", *dollars, *chips)
    data = json.loads(result.output)
    assert data["model"]["total_params"] == V3.total_params
    [one, many] = data["steps"]
    assert one["at"] == "batch 1, context 4096" and many["tokens"] == 64
    on = many["chips"]
    assert on[CPU]["dollars_per_hour"] == 0.1 and on["h200"]["dollars_per_hour"] == 2.5
    assert on["trainium3"]["dollars_per_mtoken"] is None
    marks = {r["name"]: r["chips"][CPU]["mark"] for r in many["rows"]}
    assert marks["routed experts"] == MEASURED and marks["router"] == BOUND


REQUEST = ("--tokens-in", 3000, "--tokens-out", 500, "--hit", 0.4)
SOLD = ("--allocation", "price", "--sold", "in=0.55", "--sold", "cached=0.14", "--sold", "out=2.19")


@pytest.mark.parametrize("options", [(), REQUEST, REQUEST + ("--allocation", "time"), REQUEST + SOLD])
def test_price_of_a_request(records, options):
    text = run("--records", records, "--plot", "", *options).output
    assert "request" in text and max(map(len, text.splitlines())) <= 100
    assert ("$/Mtok cached" in text) == bool(options)
    found = json.loads(run("--records", records, "--json", *options).stdout)["request"]["h200"]
    assert found["tokens"] == ({"in": 1800, "cached": 1200, "out": 500} if options else {"in": 4096, "cached": 0, "out": 1024})
    assert found["allocation"] == (options[options.index("--allocation") + 1] if "--allocation" in options else "pool")
    mtoken = found["dollars_per_mtoken"]
    paid = sum(n * mtoken.get(kind, 0.0) for kind, n in found["tokens"].items()) / 1e6
    assert paid == pytest.approx(found["dollars"]) == pytest.approx(mtoken["all"] * sum(found["tokens"].values()) / 1e6)


def test_a_request_takes_the_largest_steps_and_needs_both(records):
    text = " ".join(run("--records", records, "--plot", "", "--batch", 64, "--batch", 8, "--chunk", 512).output.split())
    assert "Prefill as a prompt of 512 tokens, decode at batch 64, context 4096" in text
    assert json.loads(run("--records", records, "--json", "--phase", "decode").stdout)["request"] == {}


@pytest.mark.parametrize("arguments, names", [
    (["--hit", "1"], ["hit is 1.0", "less than 1"]), (["--tokens-in", "0"], ["tokens_in is 0", "greater than or equal to 1"]),
    (["--allocation", "luck"], ["allocation is 'luck'", "time", "price", "pool"]),
    (["--allocation", "price"], ["sold is {}", "$/Mtoken of in, out"]), (["--sold", "in=1"], ["allocation is None", "price"]),
    (["--phase", "decode", "--hit", "0.5"], ["phase is 'decode'", "both"]),
    (["--chip", "h2000"], ["chip", "h2000", "h200"]),
    (["--model", "nothing"], ["model", "nothing", "deepseek-v3"]),
    (["--phase", "train"], ["phase", "train", "prefill"]),
    (["--batch", "0"], ["batch", "0", "1"]),
    (["--batch", "2", "--chunk", "-5"], ["chunk", "-5", "1"]),
    (["--dollars-per-hour", "h300=1"], ["dollars-per-hour", "h300", "h200"]),
    (["--dollars-per-hour", "h200=cheap"], ["dollars-per-hour", "h200=cheap"]),
    (["--records", "nowhere"], ["records", "nowhere"]),
])
def test_bad_arguments_name_field_value_and_allowed(arguments, names):
    result = run(*arguments, "--plot", "")
    assert result.exit_code == 2
    assert all(name in result.output for name in names), result.output


def test_price_without_measurements(tmp_path):
    result = run("--records", tmp_path, "--plot", "")
    assert result.exit_code == 0 and "No measurements found" in result.output and "this CPU" not in result.output


def test_roofline_plot(records, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("--records", records, "--plot", tmp_path / "sub" / "roofline.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sub" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_leaves_the_tables(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--records", tmp_path, "--plot", tmp_path / "file" / "x.png", "--phase", "decode")
    assert result.exit_code == 0 and "roofline: not drawn" in result.output and "trainium2" in result.output


def test_cost_imports_no_torch_and_no_matplotlib():
    code = ("import sys; from kernomics.cost import chips, economics, measured, model, price, report, roofline; "
            "model.Model.load('deepseek-v3').decode(1, 8); print({'torch', 'triton', 'matplotlib'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
