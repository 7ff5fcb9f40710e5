"""Scenarios and what is answered from them: compare, pareto, explain, report, on the command line and from Python."""

import csv
import io
import json
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from kernomics.cli import SCENARIO, app
from kernomics.cost import CostError, chips, compare, console, scenario, serving
from kernomics.cost import economics as eco
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


def test_help_shows_tables_and_defaults_in_brackets():
    told = RUN.invoke(app, ["compare", "--help"], env={"COLUMNS": "400"}).output
    assert all(text in told for text in ("In a file: [tco], and [tco.h200] of one chip", "bf16 or fp8 [bf16].", "own [yes].",
                                         "a request [4096]."))


def test_file_and_options(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('model = "llama-3.1-70b"\nchip = ["h200"]\nspeed = 50\n[dollars_per_hour]\nh200 = 2\n')
    s = scenario.from_options(str(file), dollars_per_hour=["h100=1.5"], speed=70.0)
    assert (s.model, s.chip, s.speed, s.dollars_per_hour) == ("llama-3.1-70b", ["h200"], 70.0, {"h200": 2.0, "h100": 1.5})


@pytest.mark.parametrize("fields, text", [
    ({"sped": 1.0}, "field is 'sped', allowed: model"), ({"speed": -1.0}, "speed is -1.0, allowed: greater than or equal to 0"),
    ({"hit": 1.5}, "hit is 1.5, allowed: greater than or equal to 0 and less than 1"), ({"speed": float("inf")}, "speed is inf"),
    ({"imbalance": float("inf")}, "imbalance is inf, allowed: greater than or equal to 1 and less than or equal to 1024"),
    ({"step_overhead": float("inf")}, "step_overhead is inf"), ({"hit": "half"}, "a valid number, greater than or equal to 0"),
    ({"cache": "int4"}, "cache is 'int4', allowed: 'bf16' or 'fp8'"), ({"chips": 0}, "chips is 0"),
    ({"tokens_in": "many"}, "tokens_in is 'many'"), ({"micro_batches": 3}, "micro_batches is 3, allowed: 1 or 2"),
    ({"dollars_per_hour": {"h100": -1.0}}, "at least 0"),
])
def test_wrong_fields_are_named(fields, text):
    with pytest.raises(CostError) as error:
        scenario.load(**fields)
    assert text in str(error.value)


def test_prices_of_chips_that_nobody_knows_are_refused():
    none = scenario.Measured([])
    for fields, text in (({"dollars_per_hour": {"h20O": 2.0}}, "dollars_per_hour: chip is 'h20O', allowed: "),
                         ({"tco": {"h20O": {"chip_dollars": 3e4}}}, "tco: chip is 'h20O', allowed: ")):
        with pytest.raises(CostError, match=text):
            scenario.load(chip=["h200"], **fields).load_chips(none)
    scenario.load(chip=["h200"], dollars_per_hour={"h100": 2.0}).load_chips(none)  # a file may price more than is asked for


def test_this_machine_is_priced_by_its_short_name():
    measured = scenario.Measured(scenario.read())
    asked = scenario.load(chip=["this", "h200"], dollars_per_hour={"this": 0.25})
    this, h200 = asked.load_chips(measured)
    assert asked.rent(this) == (0.25, "given") and asked.hourly(this) == 0.25
    assert asked.rent(h200) == (h200.get("dollars_per_hour"), "rented")


def test_prices_are_chip_time_at_the_rent(answered):
    _, _, (best, *_) = answered
    s, w = best.service, best.service.workload
    assert best.dollars_out == pytest.approx(best.dollars_per_hour / 3600 * s.decode_seconds / w.tokens_out * 1e6)
    whole = best.dollars_in * w.fresh + best.dollars_out * w.tokens_out
    assert best.dollars * (w.tokens_in + w.tokens_out) == pytest.approx(whole)
    assert best.joules_out == pytest.approx(best.chip.get("all_in_watts") * s.decode_seconds / w.tokens_out)
    assert s.speed >= 40


def shares(answer):
    """$ of a million requests' tokens by kind: tokens of a request * $/Mtoken."""
    return {kind: answer.service.workload.tokens[kind] * dollars for kind, dollars in answer.mtoken.items()}


@pytest.mark.parametrize("disaggregated", (True, False))
def test_allocations_share_one_cost(disaggregated):
    base = dict(chip=["h200"], hit=0.5, dollars_per_hour={"h200": 2.0}, disaggregated=disaggregated, chips=16)
    sold = {"in": 1.0, "cached": 0.25, "out": 4.0}
    (time,), (price,) = (compare.compare(s, Sources(), s.load_chips(scenario.Measured([]))) for s in
                         (scenario.load(**base, allocation="time"), scenario.load(**base, allocation="price", sold=sold)))
    s = time.service
    whole = s.chip_seconds * 2 / 3600 * 1e6
    assert shares(time) == pytest.approx({"in": s.prefill_seconds * 2 / 3600 * 1e6, "cached": 0,
                                          "out": s.decode_seconds * 2 / 3600 * 1e6})
    # 2048 tokens at 1 $, 2048 at 0.25 $ and 1024 at 4 $: 2 : 0.5 : 4 of 6.5
    assert shares(price) == pytest.approx({"in": whole * 4 / 13, "cached": whole / 13, "out": whole * 8 / 13})
    assert price.dollars_in / 1.0 == pytest.approx(price.dollars_cached / 0.25) == pytest.approx(price.dollars_out / 4.0)
    assert time.dollars == pytest.approx(whole / 5120) == pytest.approx(price.dollars)


def test_pools_of_one_chip_pay_as_by_time():
    by = {}
    for allocation in ("time", "pool"):
        asked = scenario.load(chip=["h200"], allocation=allocation, chips=16)
        (by[allocation],) = compare.compare(asked, Sources(), asked.load_chips(scenario.Measured([])))
    assert by["pool"].mtoken == pytest.approx({k: v for k, v in by["time"].mtoken.items()})


@pytest.mark.parametrize("fields, text", [
    (dict(allocation="price"), "sold is {}, allowed: $/Mtoken of in, out"),
    (dict(allocation="price", hit=0.5, sold={"in": 1, "out": 4}), "of in, cached, out"),
    (dict(sold={"in": 1, "out": 4}), "allocation is None, allowed: price"),
    (dict(allocation="pool", disaggregated=False), "allocation is 'pool', allowed: time, price"),
    (dict(allocation="fair"), "allocation is 'fair', allowed: 'time', 'price' or 'pool'"),
])
def test_wrong_allocations_are_told(fields, text):
    with pytest.raises(CostError) as error:
        scenario.load(**fields)
    assert text in str(error.value)


def test_the_allocation_is_named():
    text = RUN.invoke(app, ["compare", "--chip", "h200", "--hit", "0.5", "--no-disaggregated", "--chips", "16"]).output
    assert "allocated by time" in text and "cached" in text and max(map(len, text.splitlines())) <= 100
    options = ["--allocation", "price", "--sold", "in=1", "--sold", "out=4"]
    for command in ("compare", "pareto"):
        text = RUN.invoke(app, [command, "--chip", "h200", *options]).output
        assert "allocated by price" in text and max(map(len, text.splitlines())) <= 100, text


@pytest.mark.parametrize("disaggregated", (True, False))
def test_a_front_of_services_holds_the_cheapest(disaggregated):
    asked = scenario.load(chip=["h200"], disaggregated=disaggregated, chips=16)
    (chip,) = asked.load_chips(scenario.Measured([]))
    front, (best,) = compare.pareto(asked, Sources(), chip), compare.compare(asked, Sources(), [chip])
    assert min(a.dollars for a in front) == pytest.approx(best.dollars)
    speeds, chips = ([getattr(a.service, n) for a in front] for n in ("tokens_per_s_per_user", "tokens_per_s_per_chip"))
    assert speeds == sorted(speeds, reverse=True) and chips == sorted(chips)


@pytest.mark.parametrize("load, requests", [("20 requests/s", 20), ("51.2k tokens/s", 50), ("2k requests/s", 2000),
                                            ("1.024M tokens/s", 1000)])
def test_loads(load, requests):
    assert scenario.load(load=load).requests_per_s == pytest.approx(requests)


@pytest.mark.parametrize("load", ["20", "many requests/s", "0 requests/s", "-1 requests/s", "1.2.3 requests/s", "5 cats/s"])
def test_wrong_loads_are_told(load):
    with pytest.raises(CostError, match=f"load is '{load}', allowed: above 0 requests/s, or tokens/s"):
        scenario.load(load=load)


def test_a_fleet_by_hand():
    asked = scenario.load(chip=["h200"], load="500 requests/s", utilisation=0.5, dollars_per_hour={"h200": 2.0}, chips=16)
    (a,) = compare.compare(asked, Sources(), asked.load_chips(scenario.Measured([])))
    s, f = a.service, a.fleet
    for count, seconds, plan in ((f.prefill, s.prefill_seconds, s.prefill.plan), (f.decode, s.decode_seconds, s.decode.plan)):
        assert count % plan.chips == 0 and count - plan.chips < 500 * seconds / 0.5 <= count
    assert f.nodes == -(-f.prefill // 8) + -(-f.decode // 8)
    assert f.dollars_per_hour == 2 * f.chips
    assert f.dollars == pytest.approx(2 * f.chips / (500 * 5120 * 3600) * 1e6)
    assert 1 <= f.dollars / a.dollars < 1.1  # the rest of the last instances is paid, too


KNOWN = chips.load()


def by_hand(chip, rents, work=serving.Workload(3000, 1000), waits=0.0, **more):
    """3 chip-seconds of prefill on 8 chips, 6 of decode on 16, for 3,000 tokens in and 1,000 out."""
    fill, decode = (serving.Point(serving.Plan(ep=ep), 1, 1.0, 1.0, 1.0, serving.Step((), 1.0, 0.0, 1.0)) for ep in (8, 16))
    service = serving.Service(Model.load("deepseek-v3"), chip, work, decode, fill, 3.0, 6.0, 20.0, 1.0, True, waits)
    return compare.Answer(chip, service, rents, **more)


def test_two_chips_by_hand():
    a = by_hand(chips.Pair(KNOWN["h100"], KNOWN["b200"]), (1.2, 2.4), allocation="pool", requests_per_s=10.0)
    assert a.chip.key == "h100+b200"
    assert a.service.prefill_share == pytest.approx(1 / 3)  # 3 of 9 chip-seconds: both pools end as many requests
    assert a.dollars_per_hour == pytest.approx(2.0)  # 1.2 / 3 + 2.4 * 2 / 3
    assert a.request_dollars == pytest.approx(0.005)  # (3 * 1.2 + 6 * 2.4) / 3600
    assert (a.dollars_in, a.dollars_out, a.dollars) == pytest.approx((0.001 / 3e-3, 4, 1.25))
    assert by_hand(a.chip, a.rents, allocation="time").dollars_in == pytest.approx(0.005 / 3 / 3e-3)  # a third of the time
    f = a.fleet
    assert (f.prefill, f.decode, f.nodes) == (32, 64, 12)  # 30 chips of 8, 60 of 16; domains of 8
    assert f.dollars_per_hour == pytest.approx(32 * 1.2 + 64 * 2.4) == pytest.approx(192)
    assert f.dollars == pytest.approx(192 / 3600 / 40e3 * 1e6)
    watts = 3 * KNOWN["h100"].get("all_in_watts") + 6 * KNOWN["b200"].get("all_in_watts")
    assert a.tokens_per_s_per_mw == pytest.approx(1000 / watts * 1e6)
    assert by_hand(a.chip, (None, 2.4)).dollars is None and by_hand(a.chip, (None, 2.4), requests_per_s=1.0).fleet.dollars is None


def test_a_tier_is_paid_by_what_it_keeps():
    work = serving.Workload(3000, 1000, hit=0.5, tier=serving.Tier("ssd", 730e9, 1e9, 1.0))  # $1 a chip-hour
    pool, time = (by_hand(KNOWN["h100"], (1.2, 2.4), work, waits=1.0, allocation=x, requests_per_s=10.0)
                  for x in ("pool", "time"))
    assert pool.request_dollars == pytest.approx((3 * 1.2 + 3 * 1 + 6 * 2.4) / 3600)
    assert (pool.dollars_in, pool.dollars_cached, pool.dollars_out) == pytest.approx(
        (3.6 / 3.6e-3 / 1500, 3.0 / 3.6e-3 / 1500, 14.4 / 3.6e-3 / 1000))
    whole = 21 / 3600 * 1e6  # of 9 chip-seconds 2 prefill, 1 waits for the tier, 6 decode
    assert (time.dollars_in, time.dollars_cached, time.dollars_out) == pytest.approx(
        (whole * 2 / 9 / 1500, whole / 9 / 1500, whole * 6 / 9 / 1000))
    assert pool.fleet.dollars_per_hour == pytest.approx(32 * (1.2 + 1) + 64 * 2.4)


@pytest.mark.parametrize("command", [["pareto"], ["sweep", "--context", "1k"]])
def test_long_plans_wrap_and_no_number_is_cut(command):
    options = ["--chip", "gb200", "--pp", "4", "--drafts", "2", "--micro-batches", "2", "--hit", "0.5"]
    text = RUN.invoke(app, [*command, *options]).output
    assert "PP4" in text and "…" not in text and max(map(len, text.splitlines())) <= 100


def test_margins_and_break_even_by_hand():
    a = by_hand(KNOWN["h100"], (1.2, 1.2), allocation="price", sold={"in": 0.5, "out": 3.0})
    # 3,000 tokens in and 1,000 out sell for $0.0045; 9 chip-seconds at $1.2 an hour are $0.003
    assert a.margins == pytest.approx({"gross_margin": 1 / 3, "margin_over_cost": 1 / 2})
    assert by_hand(KNOWN["h100"], (1.2, 1.2)).margins == {} == by_hand(KNOWN["h100"], (None, None), sold={"out": 1.0}).margins
    dear = by_hand(KNOWN["h100"], (1.8, 1.8))
    assert dear.beside(a) == pytest.approx((1, 1.5)) and by_hand(KNOWN["h100"], (None, 1.0)).beside(a) is None


def test_margins_and_break_even_on_the_command_line():
    options = ["compare", "--chip", "h200", "--chip", "h100", "--chips", "16", "--allocation", "price", "--sold", "in=0.55",
               "--sold", "out=2.19"]
    rows = {r["chip"]: r for r in json.loads(RUN.invoke(app, [*options, "--format", "json"]).stdout)}
    one, two = rows["h200"], rows["h100"]
    assert two["break_even_performance"] / two["performance_over_cheapest"] == pytest.approx(
        two["dollars_per_mtoken"] / one["dollars_per_mtoken"])
    assert one["margin_over_cost"] == pytest.approx(eco.over_cost_of_gross(one["gross_margin"]))
    text = " ".join(RUN.invoke(app, options).output.split())
    assert f"h200: gross margin {100 * one['gross_margin']:.1f} %, margin over cost" in text
    assert f"h100 {two['performance_over_cheapest']:.2f} ({two['break_even_performance']:.2f})" in text


def test_explain_as_csv_is_a_row_a_part():
    text = RUN.invoke(app, ["explain", "--chip", "h200", "--chips", "8", "--format", "csv"]).stdout
    rows = [*csv.DictReader(io.StringIO(text))]
    root, (core,) = rows[0], [r for r in rows if r["name"] == "MLA decode"]
    assert root["part_of"] == "" and core["part_of"].startswith(f"{root['name']} / decode, 8 chips")
    for whole in (root, *(r for r in rows if r["part_of"] == root["name"])):
        path = " / ".join(filter(None, (whole["part_of"], whole["name"])))
        assert sum(float(r["seconds"]) for r in rows if r["part_of"] == path) == pytest.approx(float(whole["seconds"]))


def test_a_tier_on_the_command_line():
    tier = ["--hit", "0.9", "--tier", "ssd", "--tier-gb", "2500", "--tier-gb-per-s", "1", "--tier-dollars-per-gb-month", "0.5"]
    text = RUN.invoke(app, ["compare", "--chip", "h200", "--chips", "16", *tier]).output
    assert "a hit is loaded from ssd in 259ms" in text and max(map(len, text.splitlines())) <= 100  # 3,686 * 70,272 B at 1 GB/s
    (row,) = json.loads(RUN.invoke(app, ["compare", "--chip", "h200", "--chips", "16", *tier, "--format", "json"]).stdout)
    assert row["tier_dollars_per_hour"] == pytest.approx(2500 * 0.5 / 730)
    text = RUN.invoke(app, ["explain", "--chip", "h200", "--chips", "16", *tier]).output
    assert "waits for ssd" in text
    told = RUN.invoke(app, ["sensitivity", "--chip", "h200", "--chips", "16", *tier, "--format", "json",
                            "--uncertain", "dollars_per_hour=1.6..1.6001"])
    assert json.loads(told.stdout)["p50"] == pytest.approx(row["dollars_per_mtoken"], rel=1e-4)


def test_moving_the_cache_on_the_command_line():
    options = ["--chip", "h200", "--chips", "16", "--speed", "20"]
    text = RUN.invoke(app, ["explain", *options]).output
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.replace("│", "").split())
    assert "KV cache to the decode pool 288 MB a request in 5.8 ms" in words and "50 GB/s a chip (h200: vendor" in words
    assert "KV cache moved 5.76ms" in words
    (row,) = json.loads(RUN.invoke(app, ["compare", *options, "--format", "json"]).stdout)
    assert (row["kv_bytes"], row["kv_stalls_s"]) == (4096 * 70_272, 0)
    tree = json.loads(RUN.invoke(app, ["explain", *options, "--kv-gb-per-s", "0.5", "--format", "json"]).stdout)
    nodes = {c["name"]: c for phase in tree["children"] for c in phase["children"]}
    assert nodes["KV cache to the decode pool"]["seconds"] > 0 and "given" in nodes["KV cache to the decode pool"]["source"]
    assert nodes["waits for the KV cache"]["mark"] == "bound"
    told = " ".join(RUN.invoke(app, ["compare", *options, "--kv-gb-per-s", "0.5"]).output.split())
    assert "h200: the links between the pools set the pace: 0.5 GB/s a chip (given)" in told
    loose = " ".join(RUN.invoke(app, ["compare", "--chip", "tpu-v5p", "--chips", "16"]).output.split())
    assert "moving the KV cache between the pools is not counted: tpu-v5p" in loose
    for bad, why in ((["--kv-gb-per-s", "0"], "kv_gb_per_s is 0.0, allowed: greater than 0"),
                     (["--kv-gb-per-s", "5", "--no-disaggregated"], "kv_gb_per_s is 5.0, allowed: none")):
        result = RUN.invoke(app, ["compare", *options, *bad])
        assert result.exit_code == 2 and why in result.output
    held = RUN.invoke(app, ["sensitivity", *options, "--kv-gb-per-s", "0.5", "--format", "json",
                            "--uncertain", "dollars_per_hour=1.6..1.6001"])
    (slow,) = json.loads(RUN.invoke(app, ["compare", *options, "--kv-gb-per-s", "0.5", "--format", "json"]).stdout)
    assert json.loads(held.stdout)["p50"] == pytest.approx(slow["dollars_per_mtoken"], rel=1e-4)
    assert slow["dollars_per_mtoken"] > row["dollars_per_mtoken"]


@pytest.mark.parametrize("fields, text", [
    (dict(hit=0.5, tier="ssd"), "tier_gb is None, allowed: GB of it a chip, as tier is given"),
    (dict(hit=0.5, tier_gb=5.0, tier_gb_per_s=5.0, tier_dollars_per_gb_month=1.0), "tier is None, allowed: memory that keeps"),
    (dict(tier="ssd", tier_gb=5.0, tier_gb_per_s=5.0, tier_dollars_per_gb_month=1.0), "hit is 0.0, allowed: above 0"),
    (dict(tier_gb=-1.0), "tier_gb is -1.0, allowed: greater than 0"),
])
def test_tiers_are_given_whole(fields, text):
    with pytest.raises(CostError) as error:
        scenario.load(**fields)
    assert text in str(error.value)


def test_two_chips_are_the_pools_of_each():
    asked = scenario.load(chip=["h100", "h200", "h100+h200", "h200+h200"], chips=16, speed=20.0)
    pools = {a.chip.key: a for a in compare.compare(asked, Sources(), asked.load_chips(scenario.Measured([])))}
    fill, decode, both = (pools[k] for k in ("h100", "h200", "h100+h200"))
    assert both.service.prefill_seconds == fill.service.prefill_seconds and both.dollars_in == pytest.approx(fill.dollars_in)
    assert both.service.decode_seconds == decode.service.decode_seconds and both.dollars_out == pytest.approx(decode.dollars_out)
    assert both.service.most_users == decode.service.most_users and both.service.first == fill.service.first
    front = compare.pareto(asked, Sources(), both.chip)
    assert min(a.dollars for a in front if a.service.speed >= 20) == pytest.approx(both.dollars)
    assert len(pools) == 3  # h200+h200 is h200


@pytest.mark.parametrize("options, text", [
    (["compare", "--chip", "h100+h200", "--no-disaggregated"], "allowed: one chip, as the same chips prefill and decode"),
    (["compare", "--chip", "h100+"], "chip is 'h100+', allowed: a chip, or two"),
    (["compare", "--chip", "h100+h200+b200"], "allowed: a chip, or two"), (["compare", "--chip", "h100+x"], "chip is 'x'"),
    (["sensitivity", "--chip", "h100+h200", "--uncertain", "imbalance=1..2"], "allowed: one chip"),
])
def test_wrong_pairs_are_told(options, text):
    assert text in " ".join(RUN.invoke(app, options).output.split())


def test_explain_names_both_chips():
    text = RUN.invoke(app, ["explain", "--chip", "h100+h200"]).output
    assert "prefill on h100" in text and "decode on h200" in text


OWNED = {"server_dollars": 10_000, "network_dollars": 0, "storage_dollars": 0, "install_dollars": 0, "life_years": 4,
         "dollars_per_kwh": 0.1, "uptime": 0.9}


def test_owned_chips_cost_what_the_tco_table_says(tmp_path):
    file = tmp_path / "owned.toml"
    file.write_text('chip = ["h100", "mi300x", "h200"]\n[tco]\n' + "".join(f"{k} = {v}\n" for k, v in OWNED.items()) +
                    "[tco.mi300x]\nserver_dollars = 20000\nwatts = 1000\n[dollars_per_hour]\nh200 = 5\n")
    asked = scenario.from_options(str(file))
    h100, mi300x, h200 = asked.load_chips(scenario.Measured([]))
    # ($28,000 + $10,000) / 4 years / 8,760 h + 1.73 kW * $0.1, over 90 % of the hours
    assert asked.rent(h100) == (pytest.approx((38_000 / 35_040 + 0.173) / 0.9), "owned")
    assert asked.rent(mi300x) == (pytest.approx((35_000 / 35_040 + 0.1) / 0.9), "owned")
    assert asked.rent(h200) == (5.0, "given")
    text = RUN.invoke(app, ["compare", "--scenario", str(file), "--speed", "20"]).output
    assert f"h100: owned at ${(38_000 / 35_040 + 0.173) / 0.9:.3f} an available hour, by the scenario's [tco]" in text
    assert "h200: owned" not in text and max(map(len, text.splitlines())) <= 100
    rows = json.loads(RUN.invoke(app, ["compare", "--scenario", str(file), "--format", "json"]).stdout)
    assert {r["chip"]: r["dollars_are"] for r in rows} == {"h100": "owned", "mi300x": "owned", "h200": "given"}


def test_what_is_owned_at_an_unknown_price_has_none():
    options = [x for k, v in OWNED.items() for x in ("--tco", f"{k}={v}")]
    text = " ".join(RUN.invoke(app, ["compare", "--chip", "h200", *options]).output.split())
    assert "h200: price_dollars unknown: give chip_dollars" in text and "$/h unknown: h200" in text
    for wrong, told in (("utilisation=0.5", "tco: utilisation is 0.5"), ("wacc=0.1", "tco of h200: field is 'wacc'"),
                        ("uptime=2", "uptime is 2.0"), ("uptime", "tco is 'uptime', allowed: field=number")):
        result = RUN.invoke(app, ["compare", "--chip", "h200", *options, "--tco", "chip_dollars=3e4", "--tco", wrong])
        assert result.exit_code == 2 and told in result.output


SRAM = ["compare", "--chip", "wse-3", "--chip", "h200", "--dollars-per-hour", "wse-3=60"]


def test_sram_machines_show_one_user_alone(tmp_path):
    (tmp_path / "none.jsonl").write_text("")  # rooflines on both sides: only one of the two has been measured
    rows = {r["chip"]: r for r in json.loads(RUN.invoke(app, [*SRAM, "--records", str(tmp_path), "--format", "json"]).stdout)}
    # 673.2 GB of weights are 17.0 wafers of 39.6 GB, full to the last 3 MB; 4,608 tokens of 70,272 B need an 18th
    wafer = rows["wse-3"]
    assert (wafer["chips_at_least"], wafer["plan_alone"], wafer["communication_counted"]) == (18, "18 chips PP18", False)
    assert wafer["dollars_per_mtoken_alone"] == pytest.approx(18 * 60 / 3600 / wafer["tokens_per_s_alone"] * 1e6)
    assert wafer["tokens_per_s_alone"] > rows["h200"]["tokens_per_s_alone"] > 500 and rows["h200"]["communication_counted"]
    assert wafer["dollars_per_mtoken_alone"] > wafer["dollars_per_mtoken_out"]
    text = RUN.invoke(app, SRAM).output
    assert "One user alone" in text and "communication is not counted: wse-3." in text
    assert max(map(len, text.splitlines())) <= 100
    assert "One user alone" not in RUN.invoke(app, ["compare", "--chip", "h200"]).output
    assert "PP18" in RUN.invoke(app, ["pareto", "--chip", "wse-3"]).output


def test_a_load_on_the_command_line():
    options = ["compare", "--chip", "h200", "--chip", "tpu-v5p", "--chips", "16", "--load", "100 requests/s"]
    text = RUN.invoke(app, options).output
    assert "A fleet for 100 requests/s" in text and max(map(len, text.splitlines())) <= 100
    rows = {r["chip"]: r for r in json.loads(RUN.invoke(app, [*options, "--format", "json"]).stdout)}
    row = rows["h200"]
    assert row["fleet_dollars_per_hour"] == pytest.approx(1.6 * (row["prefill_chips"] + row["decode_chips"]))


# ---------------------------------------------------------------- fleets over a day

FLAT, NIGHT = (1.0,) * 24, (0.0,) * 12 + (2.0,) * 12


def test_a_day_by_hand():
    pair = chips.Pair(KNOWN["h100"], KNOWN["b200"])
    flat = by_hand(pair, (1.2, 2.4), requests_per_s=10.0, profile=FLAT, hourly=(1.5, 3.0)).day
    assert flat.chips == [96] * 24 and flat.peak == 96 and flat.utilisation == 1  # 30 chips of 8, 60 of 16 a time: 32 + 64
    assert flat.owned_dollars == pytest.approx(24 * (32 * 1.2 + 64 * 2.4))
    assert flat.rented_dollars == pytest.approx(24 * (32 * 1.5 + 64 * 3.0)) and flat.break_even == pytest.approx(1)
    night = by_hand(pair, (1.2, 2.4), requests_per_s=10.0, profile=NIGHT, hourly=(1.2, 2.4)).day
    assert night.chips == [0] * 12 + [64 + 128] * 12 and night.peak == 192 and night.utilisation == 0.5
    assert (night.owned_dollars, night.break_even) == (pytest.approx(24 * (64 * 1.2 + 128 * 2.4)), pytest.approx(2))
    assert night.rented_dollars == pytest.approx(night.owned_dollars / 2)
    busy = by_hand(pair, (1.2, 2.4), requests_per_s=10.0, profile=FLAT, hourly=(1.2, 2.4), utilisation=0.5).day
    assert busy.peak == 64 + 128  # half of the time they serve
    assert by_hand(pair, (None, 2.4), requests_per_s=10.0, profile=FLAT, hourly=(None, 2.4)).day.owned_dollars is None
    assert by_hand(pair, (1.2, 2.4), requests_per_s=10.0).day is None and by_hand(pair, (1.2, 2.4), profile=FLAT).day is None


def test_a_day_bears_its_tier():
    work = serving.Workload(3000, 1000, hit=0.5, tier=serving.Tier("ssd", 730e9, 1e9, 1.0))  # $1 a chip-hour
    day = by_hand(KNOWN["h100"], (1.2, 2.4), work, requests_per_s=10.0, profile=FLAT, hourly=(1.2, 2.4)).day
    assert day.owned_dollars == pytest.approx(24 * day.answer.fleet.dollars_per_hour) == pytest.approx(day.rented_dollars)
    one = replace(day.answer, service=replace(day.answer.service, disaggregated=False)).day
    assert one.owned_dollars == pytest.approx(24 * one.answer.fleet.dollars_per_hour)


def test_deepseeks_day_6():
    shape = scenario.load(load="1 requests/s", day="day-6").profile
    nodes = [226.75 * x for x in shape]
    assert sum(nodes) / 24 == pytest.approx(226.75) and max(nodes) == nodes[0] == pytest.approx(278)
    assert eco.rented_day(nodes, 8 * 2.0) == pytest.approx(87_072) and eco.owned_day(nodes, 8 * 2.0) == pytest.approx(106_752)


def test_a_day_is_a_shape_of_any_scale(tmp_path):
    numbers = [float(h + 1) for h in range(24)]
    given = scenario.load(load="1 requests/s", day=numbers).profile
    assert given == scenario.load(load="1 requests/s", day=",".join(str(2 * x) for x in numbers)).profile
    assert sum(given) == pytest.approx(24) and given[23] == pytest.approx(24 / 12.5)
    file = tmp_path / "day.toml"
    file.write_text(f'load = "1 requests/s"\nday = {list(range(1, 25))}\n')
    assert scenario.load(str(file)).profile == given
    for bad in ("1,2,3", "night", [0.0] * 24, [-1.0] + [1.0] * 23, ",".join(["nan"] * 24), [float("inf")] * 24):
        with pytest.raises(CostError, match="day is .*, allowed: 24 numbers of at least 0, one above 0, or day-6"):
            scenario.load(load="1 requests/s", day=bad)
    with pytest.raises(CostError, match="load is None, allowed: the mean of the day"):
        scenario.load(day="day-6")


def test_a_day_on_the_command_line():
    options = ["compare", "--chip", "h200", "--chip", "trainium3", "--chips", "16", "--load", "500 requests/s", "--day", "day-6"]
    text = RUN.invoke(app, options).output
    assert "mean 226.75 and peak 278 nodes are published" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    row, unpriced = json.loads(RUN.invoke(app, [*options, "--format", "json"]).stdout)
    assert row["peak_chips"] == max(row["chips_by_hour"]) and len(row["chips_by_hour"]) == 24
    assert row["mean_utilisation"] == pytest.approx(226.75 / 278, abs=0.02)
    assert row["owned_dollars_per_day"] == pytest.approx(24 * 1.6 * row["peak_chips"])
    assert unpriced["owned_dollars_per_day"] is None
    assert row["rented_dollars_per_day"] == pytest.approx(1.6 * sum(row["chips_by_hour"]))
    owned = [x for k, v in {**OWNED, "chip_dollars": 30_000}.items() for x in ("--tco", f"{k}={v}")]
    (mine,) = (r for r in json.loads(RUN.invoke(app, [*options, *owned, "--format", "json"]).stdout) if r["chip"] == "h200")
    assert mine["rented_dollars_per_day"] == row["rented_dollars_per_day"]  # by chips.toml, whatever it costs to own
    assert mine["owned_dollars_per_day"] == pytest.approx(24 * mine["peak_chips"] * mine["dollars_per_hour"])


def test_a_sweep_is_a_compare_of_each_length():
    asked = scenario.load(chip=["h200"], chips=16)
    (chip,) = asked.load_chips(scenario.Measured([]))
    found = compare.sweep(asked, Sources(), chip, [1024, 65536])
    for tokens, answer in found:
        (alone,) = compare.compare(scenario.load(chip=["h200"], chips=16, tokens_in=tokens), Sources(), [chip])
        assert answer.dollars_out == alone.dollars_out and answer.service.workload.tokens_in == tokens
    long = found[1][1].service
    plan, cache = long.decode.plan, (65536 + 512) * 70_272
    free = 0.9 * 141e9 - long.model.chip_weight_bytes(plan.shard)
    assert long.most_users == pytest.approx(plan.groups * free / cache, abs=plan.groups)
    assert long.decode.b * long.decode.plan.groups <= long.most_users


def test_sweep_command():
    text = RUN.invoke(app, ["sweep", "--chip", "h200", "--context", "1k,2000k", "--chips", "8"]).output
    assert max(map(len, text.splitlines())) <= 100 and "2,048,000: deepseek-v3 does not fit" in text
    rows = json.loads(RUN.invoke(app, ["sweep", "--chip", "h200", "--context", "1k,2000", "--format", "json"]).stdout)
    assert [r["tokens_in"] for r in rows] == [1024, 2000]
    assert rows[0]["dollars_per_mtoken_out"] < rows[1]["dollars_per_mtoken_out"]
    for wrong in ("many", "1k,,2k", "0", "-1k"):
        result = RUN.invoke(app, ["sweep", "--chip", "h200", "--context", wrong])
        assert result.exit_code == 2 and f"context is '{wrong}'" in result.output


def test_cheapest_first_then_unpriced_then_unanswered():
    asked = scenario.load(chip=["trainium3", "h200", "rtx4090"], speed=20.0)
    rows = compare.compare(asked, Sources(), asked.load_chips(scenario.Measured([])))
    assert [a.chip.key for a in rows] == ["h200", "trainium3", "rtx4090"]
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


def test_bubbles_are_a_part_of_the_tree():
    asked = scenario.load(chip=["h200"], speed=20.0, pp=2, wave=3)
    (answer,) = compare.compare(asked, Sources(), asked.load_chips(scenario.Measured([])))
    prefill, _ = compare.explain(answer).children
    (bubbles,) = (c for c in prefill.children if c.name == "bubbles of 2 stages")
    assert bubbles.seconds == pytest.approx(prefill.seconds / 4)  # 3 microbatches in 4 turns
    assert sum(c.seconds for c in prefill.children) == pytest.approx(prefill.seconds)
    assert RUN.invoke(app, ["compare", "--chip", "h200", "--pp", "65"]).output.count("pp is 65, allowed: 1 to 61") == 1


def test_a_front_goes_on_past_a_chip_that_has_none():
    options = ["pareto", "--chip", "rtx4090", "--chip", "h200"]
    text = RUN.invoke(app, options).output
    assert "rtx4090: deepseek-v3 does not fit" in " ".join(text.split()) and "on h200" in text
    first, *front = json.loads(RUN.invoke(app, [*options, "--format", "json"]).stdout)
    assert first["chip"] == "rtx4090" and "does not fit" in first["why"] and {r["chip"] for r in front} == {"h200"}
    assert RUN.invoke(app, options[:3]).exit_code == 2


def test_compare_command():
    result = RUN.invoke(app, ["compare", "--chip", "h200", "--chip", "mi300x", "--chip", "trainium2", "--speed", "50"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "Cheapest" in words and "and the same options" in words and "$/h unknown" not in words and "bounds" in words
    assert max(map(len, result.output.splitlines())) <= 100
    result = RUN.invoke(app, ["compare", "--chip", "h200", "--chip", "trainium3", "--speed", "50"])
    assert result.exit_code == 0 and "$/h unknown: trainium3" in result.output
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


def test_a_report_without_plotly_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "kernomics.cost.page", raising=False)
    monkeypatch.delattr("kernomics.cost.page", raising=False)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    result = RUN.invoke(app, ["report", "--chip", "h200", "--chips", "8"])
    assert result.exit_code == 2 and "pip install 'kernomics[report]'" in " ".join(result.output.split())


def test_a_report_that_cannot_be_written_is_told(tmp_path):
    pytest.importorskip("plotly")
    result = RUN.invoke(app, ["report", "--chip", "h200", "--chips", "8", "--out", str(tmp_path)])
    assert result.exit_code == 2 and f"out is {str(tmp_path)!r}, allowed: a file that can be written" in result.output


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
