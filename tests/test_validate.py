"""Published figures: the gates, what is fitted (nothing), and the commands that show them."""

import json
import math
import os

import pytest
from typer.testing import CliRunner

from kernomics.cli import app
from kernomics.cost import CostError, aic, validate

ENV = validate.Env(os.environ.get("KERNOMICS_INFERSIM"))
RUN = CliRunner()


def middle(target):
    return validate.Outcome(target, target.predict(ENV, **{k: validate.centre(v) for k, v in target.inputs.items()}))


def of(tables):
    return [pytest.param(t, id=t.id) for t in validate.TARGETS if t.tables == tables]


def needs(name):
    return pytest.mark.skipif(not ENV.has(name), reason=f"needs the tables of {name}")


@pytest.mark.parametrize("target", of(""))
def test_accounts_and_limits(target):
    assert middle(target).verdict in ("met", "within the limit")


@needs("infersim")
@pytest.mark.parametrize("target", [p for p in of("infersim") if p.values[0].gate])
def test_on_infersim_tables(target):
    assert middle(target).verdict == "met"


@needs("infersim")
def test_the_prefill_gate_hangs_on_the_release_of_deepep(monkeypatch):
    """The profile's own days' kernels meet it; those of two months later, hidden whole, would not."""
    (target,) = (t for t in validate.TARGETS if t.id == "B5 in")
    monkeypatch.setattr(validate, "RELEASE", "2025-04")
    env = validate.Env(os.environ["KERNOMICS_INFERSIM"])
    later = target.predict(env, **{k: validate.centre(v) for k, v in target.inputs.items()}) / target.published - 1
    assert middle(target).error == pytest.approx(0.078, abs=0.01) and later == pytest.approx(0.160, abs=0.01)


@needs("aic")
@pytest.mark.parametrize("target", of("aic"))
def test_on_aiconfigurator_tables(target):
    assert middle(target).verdict == "met"


@needs("aic")
def test_decode_lies_between_hiding_nothing_and_all_communication():
    (target,) = (t for t in validate.TARGETS if t.id == "B7 out")
    inputs = {k: validate.centre(v) for k, v in target.inputs.items()}
    none, everything = (target.predict(ENV, **inputs | {"overlap": x}) for x in (0.0, 1.0))
    assert none < target.published < everything


@needs("aic")
def test_tables_of_two_frameworks_differ_as_stated():
    from kernomics.cost import aic

    shapes = [(m, n, k) for m in (64, 128, 256, 1024, 4096, 8192)
              for n, k in ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048))]
    a, b = (aic.load("h100", framework=f) for f in ("sglang", "trtllm"))
    ratios = [math.log(a.seconds("h100", "gemm", "fp8_block", d).seconds / b.seconds("h100", "gemm", "fp8_block", d).seconds)
              for d in (dict(zip("mnk", s)) for s in shapes)]
    rms = math.sqrt(sum(x * x for x in ratios) / len(ratios))
    assert rms / math.sqrt(2) == pytest.approx(validate.KERNELS["sigma"], abs=0.02)


def test_gates_are_those_asked_for():
    gates = {t.id: t.gate for t in validate.TARGETS}
    assert gates["B2 cost"] <= 1e-9 and gates["B24"] <= 1e-9 and gates["B2 revenue"] == 5e-4 and gates["B3"] == 2e-3
    assert gates["B2 margin"] * 545 <= 1 and gates["B5 in"] == gates["B5 out"] == 0.12
    assert gates["B7 in"] == gates["B7 out"] == 0.2
    listed = {t.id.split()[0] for t in validate.TARGETS} | set(validate.OPEN)
    assert listed >= {f"B{i}" for i in (*range(1, 14), *range(17, 28))}


def test_a_missing_table_is_said_and_not_passed():
    (outcome,) = validate.validate(validate.Env(), samples=10, only="B5 in")
    assert outcome.predicted is None and outcome.verdict == "not run" and "infersim" in outcome.why
    with pytest.raises(CostError, match="target is 'B99'"):
        validate.validate(ENV, only="B99")
    told = RUN.invoke(app, ["validate", "--only", "B5", "--infersim", "/none"]).output
    assert "B5 in: InferSim tables is '/none', allowed: a folder" in told and "B5 in  prefill, H800" in told


def test_ranges_give_p10_and_p90():
    (outcome,) = validate.validate(ENV, samples=50, only="B11 GB300")
    assert outcome.low <= outcome.predicted <= outcome.high and outcome.inside


def test_commands():
    rows = json.loads(RUN.invoke(app, ["validate", "--only", "B2", "--format", "json"]).stdout)
    assert [r["verdict"] for r in rows] == ["met"] * 3
    result = RUN.invoke(app, ["claims", "Q22"])
    assert result.exit_code == 0 and "Q22" in result.output
    words = " ".join(result.output.split())  # what it stands on: the file, the inputs with their origin, the formula
    assert "from 002_433794f484b7f4da.txt: $" in words and "held = 600 (assumption)" in words and "eco.restore_dollars(" in words
    assert "context = 40000 (claim)" in words and max(map(len, result.output.splitlines())) <= 100
    (row,) = json.loads(RUN.invoke(app, ["claims", "Q22", "--format", "json"]).stdout)
    assert row["inputs"]["held"] == {"value": 600, "origin": "assumption"}
    assert row["result"] == f"{row['value']:.4g} {row['unit']}"
    rows = {r["id"]: r for r in json.loads(RUN.invoke(app, ["claims", "--format", "json"]).stdout)}
    assert rows["two-cards"]["verdict"] == "the source contradicts itself" and rows["two-cards"]["file"].startswith("003")
    assert RUN.invoke(app, ["claims", "Q999"]).exit_code == 2
    dollars = [f"--set={n}_dollars=1000" for n in ("chip", "server", "network", "storage", "install")]
    parts = json.loads(RUN.invoke(app, ["tco", "h100", *dollars, "--format", "json"]).stdout)
    assert sum(p["dollars_per_hour"] for p in parts) > 5000 / 5 / 8760
    assert RUN.invoke(app, ["tco", "h100", "--set", "chip_dollars=-1"]).exit_code == 2


def test_sensitivity_command():
    options = ["sensitivity", "--chip", "h200", "--speed", "20", "--samples", "40"]
    ranges = [f"--uncertain={x}" for x in ("dollars_per_hour=1..2", "bytes_per_s=4e12..4.8e12", "utilisation=0.5..0.9")]
    found = json.loads(RUN.invoke(app, options + ranges + ["--format", "json"]).stdout)
    assert found["p10"] < found["p50"] < found["p90"]
    slopes = {r["input"]: r["elasticity"] for r in found["inputs"]}
    assert slopes["dollars_per_hour"] == pytest.approx(1, rel=1e-3) and slopes["utilisation"] == pytest.approx(-1, rel=1e-3)
    assert -1 < slopes["bytes_per_s"] < 0
    again = json.loads(RUN.invoke(app, options + ranges + ["--format", "json"]).stdout)
    assert again == found
    assert RUN.invoke(app, options).exit_code == 2
    assert "input is 'luck'" in RUN.invoke(app, options + ["--uncertain", "luck=0..1"]).output


@pytest.mark.skipif(aic.systems() is None, reason="no aiconfigurator-core here (install it, or set KERNOMICS_AIC)")
def test_sensitivity_to_tables_that_are_off(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    options = ["sensitivity", "--chip", "h200", "--records", str(tmp_path),
               "--speed", "20", "--samples", "20", "--format", "json", "--uncertain"]
    slope = {}
    for tables in ([], ["--tables", "aic"]):
        found = json.loads(RUN.invoke(app, [*options, "kernel_times=0.8..1.2", *tables]).stdout)
        slope[bool(tables)] = found["inputs"][0]["elasticity"]
    assert slope[False] == 0 and 0.7 < slope[True] < 1  # bounds are not measured


def test_sensitivity_to_how_long_requests_are():
    options = ["sensitivity", "--chip", "h200", "--speed", "20", "--samples", "20", "--format", "json", "--uncertain"]
    found = json.loads(RUN.invoke(app, [*options, "tokens_in=2000..40000", "--uncertain", "tokens_out=500..2000"]).stdout)
    assert found["p10"] < found["p50"] < found["p90"]  # sequences that no longer fit are decoded fewer at a time
    assert all(0 < r["elasticity"] < 1 for r in found["inputs"])
    assert "tokens_out is 0, allowed: greater than or equal to 1" in RUN.invoke(app, [*options, "tokens_out=0..9"]).output


def test_sensitivity_to_what_an_owner_pays():
    spent = {"chip": 30000, "server": 6000, "network": 3000, "storage": 500, "install": 500}
    options = ["sensitivity", "--chip", "h200", "--samples", "40", *(f"--tco={k}_dollars={v}" for k, v in spent.items())]
    ranges = [f"--uncertain={x}" for x in ("chip_dollars=25000..35000", "dollars_per_kwh=0.05..0.11", "all_in_watts=1530..1930")]
    found = json.loads(RUN.invoke(app, [*options, *ranges, "--format", "json"]).stdout)
    slopes = {r["input"]: r["elasticity"] for r in found["inputs"]}
    power, capital = 1.73 * 0.08, 40000 / 5 / 8760  # $/h at the medians
    assert slopes["chip_dollars"] == pytest.approx(0.75 * capital / (capital + power), rel=1e-3)
    assert slopes["dollars_per_kwh"] == pytest.approx(power / (capital + power), rel=1e-3) == slopes["all_in_watts"]
    told = RUN.invoke(app, [*options, "--uncertain", "pue=0.5..1.5"]).output
    assert "pue is 0.5, allowed: greater than or equal to 1 and less than or equal to 5" in " ".join(told.split())
    assert "input is 'pue', allowed: " in RUN.invoke(app, ["sensitivity", "--chip", "h200", "--uncertain", "pue=1.1..1.5"]).output


def test_sensitivity_to_a_share_of_whole_tokens():
    options = ["sensitivity", "--chip", "h200", "--samples", "40", "--uncertain", "hit=0..0.9", "--format", "json"]
    found = json.loads(RUN.invoke(app, options).stdout)
    (row,) = found["inputs"]  # the price falls in a straight line, so its slope follows from the two ends, 0.72 apart
    slope = (row["at_p90"] - row["at_p10"]) / 0.72
    assert slope < 0 and row["elasticity"] == pytest.approx(slope * 0.45 / found["p50"], rel=0.05)


@pytest.mark.parametrize("entry, told", [
    ("utilisation=-1..1", "utilisation is -1.0, allowed: greater than 0 and less than or equal to 1"),
    ("hit=0.5..1.2", "hit is 1.2, allowed: "), ("dollars_per_hour=-1..2", "dollars_per_hour is -1.0, allowed: 0.001 to 10000"),
    ("bytes_per_s=1..2", "bytes_per_s is 1.0, allowed: 1e+09 to 1e+17"),
])
def test_ranges_keep_within_what_their_input_allows(entry, told):
    result = RUN.invoke(app, ["sensitivity", "--chip", "h200", "--samples", "10", "--uncertain", entry])
    assert result.exit_code == 2 and told in result.output.replace("\n", " ")


def test_payback_command(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    call = {"op": "mla_decode", "chip": "h200", "dims": {"b": 8, "q": 1, "h": 128, "s": 4096, "page": 64}, "date": "2026-11-25"}
    old.write_text(json.dumps(call | {"seconds_median": 2e-4}) + "\n")
    new.write_text(json.dumps(call | {"seconds_median": 1e-4}) + "\n")
    options = ["payback", str(old), str(new), "mla_decode", "--chip", "h200", "--speed", "20", "--fleet", "1000"]
    found = json.loads(RUN.invoke(app, [*options, "--format", "json"]).stdout)
    assert found["speedup"] == pytest.approx(2) and 0 < found["share"] < 1
    year = 1000 * 1.6 * 8760
    assert found["dollars_per_year"] == pytest.approx(year * found["share"] / 2, rel=0.01)
    assert "no call of moe_route" in RUN.invoke(app, [*options[:3], "moe_route", *options[4:]]).output
