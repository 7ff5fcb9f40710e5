"""Scenarios and what is answered from them: compare, pareto, explain, report, on the command line and from Python."""

import csv
import io
import json

import pytest
from typer.testing import CliRunner

from kernomics.cli import SCENARIO, app
from kernomics.cost import CostError, compare, console, scenario
from kernomics.cost.model import Model
from kernomics.cost.price import Sources

RUN = CliRunner()


@pytest.fixture(scope="module")
def answered():
    asked = scenario.load(chip=["h200", "b200"], speed=40.0, records="/dev/null/none.jsonl")
    chips = [c for c in scenario.load(chip=["h200", "b200"]).load_chips(scenario.Measured([]))]
    return asked, chips, compare.compare(asked, Sources(), chips)


def test_every_field_has_an_option():
    assert set(SCENARIO) - {"scenario"} == set(scenario.Scenario.model_fields)


def test_file_and_options(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('model = "llama-3.1-70b"\nchip = ["h200"]\nspeed = 50\n[dollars_per_hour]\nh200 = 2\n')
    s = scenario.from_options(str(file), ["h100=1.5"], speed=70.0)
    assert (s.model, s.chip, s.speed, s.dollars_per_hour) == ("llama-3.1-70b", ["h200"], 70.0, {"h200": 2.0, "h100": 1.5})


@pytest.mark.parametrize("fields, text", [
    ({"sped": 1.0}, "field is 'sped', allowed: model"), ({"speed": -1.0}, "speed is -1.0, allowed: greater than or equal to 0"),
    ({"hit": 1.5}, "hit is 1.5"), ({"cache": "int4"}, "cache is 'int4', allowed: 'bf16' or 'fp8'"), ({"chips": 0}, "chips is 0"),
    ({"tokens_in": "many"}, "tokens_in is 'many'"), ({"micro_batches": 3}, "micro_batches is 3, allowed: 1 or 2"),
    ({"dollars_per_hour": {"h100": -1.0}}, "at least 0"),
])
def test_wrong_fields_are_named(fields, text):
    with pytest.raises(CostError) as error:
        scenario.load(**fields)
    assert text in str(error.value)


def test_prices_are_chip_time_at_the_rent(answered):
    _, _, (best, *_) = answered
    s, w = best.service, best.service.workload
    assert best.dollars_out == pytest.approx(best.dollars_per_hour / 3600 * s.decode_seconds / w.tokens_out * 1e6)
    whole = best.dollars_in * w.fresh + best.dollars_out * w.tokens_out
    assert best.dollars * (w.tokens_in + w.tokens_out) == pytest.approx(whole)
    assert best.joules_out == pytest.approx(best.chip.get("all_in_watts") * s.decode_seconds / w.tokens_out)
    assert s.speed >= 40


def test_cheapest_first_then_unpriced_then_unanswered():
    asked = scenario.load(chip=["trainium2", "h200", "rtx4090"], speed=20.0)
    rows = compare.compare(asked, Sources(), asked.load_chips(scenario.Measured([])))
    assert [a.chip.key for a in rows] == ["h200", "trainium2", "rtx4090"]
    assert rows[1].dollars is None and rows[2].service is None and rows[2].why


def test_idle_hours_are_paid(answered):
    asked, chips, rows = answered
    half = compare.compare(asked.model_copy(update={"utilisation": 0.5}), Sources(), chips)
    assert half[0].dollars == pytest.approx(2 * rows[0].dollars)


def test_the_tree_sums_at_every_level(answered):
    for answer in answered[2]:
        def check(node):
            if node.children:
                assert sum(c.seconds for c in node.children) == pytest.approx(node.seconds)
                for c in node.children:
                    check(c)

        root = compare.explain(answer)
        check(root)
        for phase, dollars in zip(root.children, (answer.dollars_in, answer.dollars_out)):
            assert phase.dollars == dollars
            assert sum(layer.dollars for layer in phase.children) == pytest.approx(dollars)


def test_compare_command():
    result = RUN.invoke(app, ["compare", "--chip", "h200", "--chip", "mi300x", "--chip", "trainium2", "--speed", "50"])
    assert result.exit_code == 0, result.output
    assert "Cheapest" in result.output and "$/h unknown: trainium2" in result.output and "bounds" in result.output
    assert max(map(len, result.output.splitlines())) <= 100


@pytest.mark.parametrize("command", ("compare", "pareto"))
def test_files(command):
    rows = json.loads(RUN.invoke(app, [command, "--chip", "h200", "--format", "json"]).stdout)
    text = RUN.invoke(app, [command, "--chip", "h200", "--format", "csv"]).stdout
    read = list(csv.DictReader(io.StringIO(text)))
    assert len(read) == len(rows) and {r["chip"] for r in read} == {"h200"}
    assert float(read[0]["tokens_per_s_per_chip"]) == rows[0]["tokens_per_s_per_chip"]


def test_explain_command():
    result = RUN.invoke(app, ["explain", "--chip", "h200", "--speed", "20"])
    assert result.exit_code == 0 and "MLA decode" in result.output and "roofline" in result.output
    tree = json.loads(RUN.invoke(app, ["explain", "--chip", "h200", "--format", "json"]).output)
    assert tree["children"][1]["children"][0]["children"][0]["mark"] == "bound"


@pytest.mark.parametrize("options, text", [
    (["--chip", "h300"], "chip is 'h300'"), (["--speed", "1e9"], "no plan gives"),
    (["--tables", "nowhere.csv"], "nowhere.csv"), (["--dollars-per-hour", "h200"], "chip=number"),
    (["--scenario", "none.toml"], "TOML file"), (["--format", "xml"], "json, csv"),
])
def test_refusals_on_the_command_line(options, text):
    command = ["compare"] if "--format" in options else ["explain", "--chip", "h200"]
    result = RUN.invoke(app, command + options)
    assert result.exit_code == 2 and text in result.output.replace("\n", " ")


def test_a_chip_of_ones_own(tmp_path):
    file = tmp_path / "dream.toml"
    file.write_text("flops_bf16 = 1e15\nflops_fp8 = 2e15\nbytes_per_s = 10e12\nmemory_bytes = 500e9\ndollars_per_hour = 1.0\n"
                    "scale_up_bytes_per_s = 500e9\nscale_up_domain = 8\nscale_out_bytes_per_s = 50e9\n")
    result = RUN.invoke(app, ["compare", "--chip", str(file), "--format", "json"])
    (row,) = json.loads(result.output)
    assert row["chip"] == "dream" and row["dollars_per_mtoken_out"] > 0


def test_report_is_one_file(tmp_path):
    pytest.importorskip("plotly")
    out = tmp_path / "report.html"
    result = RUN.invoke(app, ["report", "--chip", "h200", "--chip", "b200", "--speed", "30", "--out", str(out),
                              "--uncertain", "imbalance=1..1.4", "--uncertain", "utilisation=0.5..0.9"])
    assert result.exit_code == 0, result.output
    text = out.read_text()
    for title in ("Chips side by side", "Throughput against", "Where the money goes", "Rooflines", "hangs on", "figures"):
        assert title in text
    assert "<script src" not in text  # nothing is fetched


def test_shares_are_named_best_first(answered):
    assert str(console.shares(answered[2][0].share)) == "100% bound"
    output = RUN.invoke(app, ["price", "--chip", "h200", "--plot", ""]).output
    assert Model.load("deepseek-v3").text() in output.replace("\n", " ")
