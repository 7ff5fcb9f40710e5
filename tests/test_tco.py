"""Chip-hours and chip prices: hand arithmetic, parts that sum, laws, and wrong inputs told by field, value and allowed."""

import csv
import io
import json
from math import exp, fsum

import pytest
from typer.testing import CliRunner

from kernomics.cli import VENDOR, app
from kernomics.cost import CostError, Unknown, chips, economics, tco, vendor

OWNED = dict(chip_dollars=20000, server_dollars=5000, network_dollars=3000, storage_dollars=1000,
             install_dollars=1000, watts=1000)
FULL = dict(OWNED, life_years=4, residual=0.1, spares=0.05, rate=0.1, load=0.8, pue=1.25, dollars_per_kwh=0.1,
            hosting_dollars_per_kw_month=146, opex_share=0.02, staff_dollars_per_chip_year=438, uptime=0.98,
            utilisation=0.7, margin=0.4)
BUILD = dict(die_mm2=100, wafer_dollars=10000, defects_per_cm2=0.1, hbm_gb=80, hbm_dollars_per_gb=10, hbm_margin=0.6,
             packaging_dollars=700, test_dollars=50, assembly_dollars=100, margins={"vendor": 0.75, "server": 0.1})


def test_straight_line_by_hand():
    t = tco.read(dict(OWNED, dollars_per_kwh=0.1))
    parts = tco.breakdown(t)
    assert parts["chip"] == pytest.approx(20000 / 5 / 8760)
    assert parts["power"] == pytest.approx(0.1)  # 1 kW all hours
    assert parts["interest"] == parts["spares"] == parts["hosting"] == parts["staff"] == parts["upkeep"] == 0
    assert tco.cost_per_hour(t) == pytest.approx(30000 / 5 / 8760 + 0.1)
    assert tco.price_per_hour(t) == tco.cost_per_used_hour(t) == tco.cost_per_hour(t)


def test_every_field_by_hand():
    t = tco.read(FULL)
    spares = 0.05 * 29000
    spent, left = 30000 + spares, 0.1 * (29000 + spares)
    payment = (spent - left / 1.1**4) * 0.1 / (1 - 1.1**-4)  # the present value of what is got back repays a part
    yearly = payment + 0.02 * spent + 438
    owned = yearly / 8760 + 0.8 * 1.25 * 0.1 + 146 / 730
    assert tco.breakdown(t)["hosting"] == pytest.approx(0.2)
    assert tco.breakdown(t)["staff"] == pytest.approx(0.05)
    assert tco.cost_per_hour(t) == pytest.approx(owned)
    assert tco.cost_per_available_hour(t) == pytest.approx(owned / 0.98)
    assert tco.cost_per_used_hour(t) == pytest.approx(owned / 0.98 / 0.7)
    assert tco.price_per_hour(t) == pytest.approx(owned / 0.98 / 0.7 / 0.6)


@pytest.mark.parametrize("fields", [OWNED, FULL])
def test_parts_of_an_hour_sum(fields):
    t = tco.read(fields)
    assert fsum(tco.breakdown(t).values()) == tco.cost_per_hour(t)
    assert fsum(tco.price_breakdown(t).values()) == pytest.approx(tco.price_per_hour(t), rel=1e-14)
    assert list(tco.breakdown(t))[:6] == ["chip", "server", "network", "storage", "install", "spares"]
    assert min(tco.price_breakdown(t).values()) >= 0


def test_idle_is_shown_apart():
    t = tco.read(dict(OWNED, uptime=0.5, utilisation=0.25))
    parts, owned = tco.price_breakdown(t), tco.cost_per_hour(t)
    assert (parts["down"], parts["idle"], parts["margin"]) == pytest.approx((owned, 6 * owned, 0))


def test_a_rate_near_zero_meets_straight_line():
    line, least = (tco.cost_per_hour(tco.read(dict(FULL, rate=r))) for r in (0, tco.RATE_MIN))
    assert least > line and least == pytest.approx(line, rel=1e-5)
    assert tco.interest_per_year(tco.read(dict(FULL, rate=0))) == 0


@pytest.mark.parametrize("field", ["chip_dollars", "server_dollars", "network_dollars", "storage_dollars", "install_dollars",
                                   "watts", "spares", "rate", "load", "pue", "dollars_per_kwh", "opex_share", "margin",
                                   "hosting_dollars_per_kw_month", "staff_dollars_per_chip_year"])
def test_price_rises_with_each_cost(field):
    assert tco.price_per_hour(tco.read({**FULL, field: FULL[field] * 1.1})) > tco.price_per_hour(tco.read(FULL))


@pytest.mark.parametrize("field", ["life_years", "residual", "uptime", "utilisation"])
def test_price_falls_with_each_relief(field):
    assert tco.price_per_hour(tco.read({**FULL, field: FULL[field] * 1.01})) < tco.price_per_hour(tco.read(FULL))


@pytest.mark.parametrize("field, value, allowed", [
    ("chip_dollars", -1, "0"), ("watts", 0, "greater than 0"), ("life_years", 0, "greater than 0"),
    ("residual", 1, "less than 1"),
    ("rate", 1e-9, "1e-06"), ("rate", 7, "1"), ("load", 0, "greater than 0"), ("pue", 0.9, "1"), ("uptime", 1.01, "1"),
    ("utilisation", 0, "greater than 0"), ("margin", 1, "less than 1"), ("watts", "700", "number"), ("pue", True, "number"),
    ("dollars_per_kwh", float("nan"), "0"), ("network_dollars", float("inf"), "1000000"),
])
def test_a_wrong_tco_field_is_told(field, value, allowed):
    with pytest.raises(CostError) as error:
        tco.read({**FULL, field: value})
    told = str(error.value)
    assert f"tco: {field} is {value!r}, allowed: " in told and allowed in told.split("allowed: ")[1]


def test_rental_by_hand():
    t = tco.read(dict(OWNED, life_years=3, residual=0.1, uptime=0.9, utilisation=0.8, dollars_per_kwh=0.1))
    found = tco.rental(t, 2.0)
    year = 2 * 0.72 * 8760 - 0.1 * 8760  # rent of the hours sold, less 1 kW of all
    assert found["flows"] == pytest.approx([-30000, year, year, year + 2900])
    assert economics.npv(found["irr"], found["flows"]) == pytest.approx(0, abs=1e-6)
    assert found["dollars_per_year"] == pytest.approx(year - (30000 - 2900) / 3)
    assert found["payback_years"] == pytest.approx(2 + (30000 - 2 * year) / (year + 2900))
    falling = tco.rental(t, 2.0, 0.3)
    assert falling["irr"] < found["irr"] and falling["dollars_per_year"] == found["dollars_per_year"]
    never = tco.rental(tco.read(OWNED), 0.0)
    assert never["irr"] is None and never["payback_years"] == float("inf")
    for fields, args, text in (({}, (float("nan"),), "rent is nan"), ({}, (2.0, 99.0), "decline is 99.0, allowed: a year"),
                               ({"life_years": 4.5}, (2.0,), "life_years is 4.5, allowed: whole years")):
        with pytest.raises(CostError, match=text):
            tco.rental(tco.read(dict(OWNED, **fields)), *args)


def test_rental_on_the_command_line():
    options = ["tco", "h100", *(f"--set={k}={v}" for k, v in OWNED.items()), "--rent"]
    text = " ".join(CliRunner().invoke(app, [*options, "2"]).output.split())
    assert "rented out at 2 $/h:" in text and "% a year on the money, paid back in" in text
    found = json.loads(CliRunner().invoke(app, [*options, "0.01", "--format", "json"]).stdout, parse_constant=pytest.fail)
    assert found["rental"]["payback_years"] is None and found["rental"]["irr"] is None and len(found["rental"]["flows"]) == 6


def test_missing_and_unknown_tco_fields_are_told():
    with pytest.raises(CostError, match="tco: storage_dollars is missing, allowed: "):
        tco.read({k: v for k, v in OWNED.items() if k != "storage_dollars"})
    with pytest.raises(CostError, match="tco: field is 'wacc', allowed: chip_dollars, "):
        tco.read(dict(OWNED, wacc=0.1))
    with pytest.raises(CostError, match="tco of h200: field is 'wacc', allowed: chip_dollars, "):
        tco.from_chip(chips.load()["h200"], wacc=0.1)  # before its price, which nobody sourced


def test_from_chip_takes_its_price_and_watts():
    rest = {k: v for k, v in OWNED.items() if k not in ("chip_dollars", "watts")}
    h100 = chips.load()["h100"]
    t = tco.from_chip(h100, **rest)
    assert (t.chip_dollars, t.watts) == (h100.get("price_dollars"), h100.get("all_in_watts"))
    assert tco.from_chip(h100, **rest, watts=900.0).watts == 900
    default = {"source": "test", "date": h100.figures["tdp_watts"].date}
    bare = chips.check("bare", {"tdp_watts": 300}, default=default)
    assert tco.from_chip(bare, **rest, chip_dollars=5000).watts == 300
    with pytest.raises(Unknown, match="bare: price_dollars unknown: give chip_dollars"):
        tco.from_chip(bare, **rest)
    with pytest.raises(CostError, match="tco of h100: server_dollars is missing"):
        tco.from_chip(h100)


def test_a_build_by_hand():
    v = vendor.read(dict(BUILD, defects_per_cm2=0.0))
    dies = 3.141592653589793 * (22500 / 100 - 300 / 200**0.5)  # 640.2
    built = 10000 / dies + 800 + 700 + 50 + 100
    parts = vendor.breakdown(v)
    assert economics.dies_per_wafer(100) == pytest.approx(dies) == pytest.approx(640.2, abs=0.1)
    assert (parts["hbm"], parts["hbm_margin"]) == pytest.approx((320, 480))
    assert vendor.cost(v) == pytest.approx(built)
    assert parts["vendor"] == pytest.approx(3 * built)  # 75 % of the price is three times the cost
    assert vendor.end_price(v) == pytest.approx(built / 0.25 / 0.9)
    assert list(parts) == [*vendor.PARTS, "vendor", "server"]


def test_yields_by_hand():
    assert economics.die_yield(100, 0.5, "poisson") == pytest.approx(exp(-0.5))
    assert economics.die_yield(100, 0.5, "murphy") == pytest.approx(((1 - exp(-0.5)) / 0.5) ** 2)
    assert economics.die_yield(100, 0.5, "negative_binomial", 2.0) == pytest.approx(1 / 1.25**2)


@pytest.mark.parametrize("model", ["poisson", "murphy", "negative_binomial"])
def test_yield_laws(model):
    assert economics.die_yield(814, 0.0, model) == 1
    assert economics.die_yield(814, 1e-12, model) == pytest.approx(1)
    falling = [economics.die_yield(814, d / 20, model) for d in range(40)]
    assert falling == sorted(falling, reverse=True) and falling[-1] > 0


def test_much_scattered_defects_are_poisson_and_clusters_yield_more():
    poisson, spread, clustered = (economics.die_yield(814, 0.1, m, a) for m, a in
                                  (("poisson", 1), ("negative_binomial", 1e6), ("negative_binomial", 1)))
    assert spread == pytest.approx(poisson, rel=1e-5) and clustered > poisson


def test_parts_of_a_price_sum():
    for margins in ({}, BUILD["margins"], {"partner": 0.5, "vendor": 0.1, "server": 0.0, "cloud": 0.4, "api": 0.6}):
        v = vendor.read(dict(BUILD, margins=margins))
        price = vendor.cost(v)
        for margin in margins.values():
            price /= 1 - margin
        assert fsum(vendor.breakdown(v).values()) == vendor.end_price(v) == pytest.approx(price)


@pytest.mark.parametrize("field", ["die_mm2", "wafer_dollars", "defects_per_cm2", "hbm_gb", "hbm_dollars_per_gb",
                                   "packaging_dollars", "test_dollars", "assembly_dollars"])
def test_end_price_rises_with_each_cost(field):
    assert vendor.end_price(vendor.read({**BUILD, field: BUILD[field] * 1.1})) > vendor.end_price(vendor.read(BUILD))


def test_two_dies_cost_twice_and_the_hbm_margin_only_splits():
    one, two = vendor.read(BUILD), vendor.read(dict(BUILD, dies=2))
    assert vendor.parts(two)["silicon"] == 2 * vendor.parts(one)["silicon"]
    assert vendor.cost(vendor.read(dict(BUILD, hbm_margin=0.0))) == pytest.approx(vendor.cost(one))


@pytest.mark.parametrize("field, value, allowed", [
    ("die_mm2", 0, "greater than 0"), ("dies", 0, "1"), ("dies", 1.5, "integer"), ("wafer_mm", 12, "100"),
    ("defects_per_cm2", -0.1, "0"), ("yield_model", "seeds", "'poisson', 'murphy' or 'negative_binomial'"),
    ("alpha", 0, "greater than 0"), ("hbm_margin", 1, "less than 1"), ("wafer_dollars", "16k", "number"),
])
def test_a_wrong_vendor_field_is_told(field, value, allowed):
    with pytest.raises(CostError) as error:
        vendor.read({**BUILD, field: value})
    told = str(error.value)
    assert f"vendor: {field} is {value!r}, allowed: " in told and allowed in told.split("allowed: ")[1]


def test_wrong_margins_and_dies_that_do_not_fit_are_told():
    with pytest.raises(CostError, match="vendor: margins is .* below 1, cloud has 1.0"):
        vendor.read(dict(BUILD, margins={"vendor": 0.5, "cloud": 1.0}))
    with pytest.raises(CostError, match="allowed: names other than silicon, "):
        vendor.read(dict(BUILD, margins={"hbm": 0.5}))
    with pytest.raises(CostError, match="die_mm2 is 50000.0, allowed: an area that fits a wafer of 300 mm"):
        vendor.end_price(vendor.read(dict(BUILD, die_mm2=50000.0)))


def test_an_h100_build_comes_near_the_published_cost():
    """$3,320 is the estimate of siliconanalysts.com, which also gives $750 for the package; 814 mm2 is the vendor's.

    Assumptions: $16,500 a wafer, 0.1 defects per cm2 clustered with alpha 3, every defect kills a die (none is sold with
    units off), 80 GB at $16, and $100 and $200 of test and assembly.
    """
    v = vendor.read(dict(die_mm2=814, wafer_dollars=16500, defects_per_cm2=0.1, hbm_gb=80, hbm_dollars_per_gb=16,
                         packaging_dollars=750, test_dollars=100, assembly_dollars=200))
    assert vendor.cost(v) == pytest.approx(chips.load()["h100"].get("cogs_dollars"), rel=0.25)


# ---------------------------------------------------------------- the command

H100 = ["--wafer-dollars", "16500", "--defects-per-cm2", "0.1", "--hbm-dollars-per-gb", "16", "--packaging-dollars", "750",
        "--test-dollars", "100", "--assembly-dollars", "200"]
CHAIN = ["--margins", "partner=0.2", "--margins", "vendor=0.75", "--margins", "cloud=0.5"]


def told(*options):
    return CliRunner().invoke(app, ["vendor", *map(str, options)])


def test_every_field_of_a_vendor_has_an_option():
    assert set(VENDOR) == set(vendor.Vendor.model_fields)


def test_the_command_prints_a_stack_that_sums():
    rows = json.loads(told("h100", *H100, *CHAIN, "--format", "json").output)
    dollars = {r["part"]: r["dollars"] for r in rows}
    assert dollars["hbm"] == 80 * 16  # chips.toml: 80 GB
    good = economics.die_yield(814, 0.1, "negative_binomial", 3.0) * economics.dies_per_wafer(814)
    assert dollars["silicon"] == pytest.approx(16500 / good)
    built = sum(dollars[n] for n in vendor.PARTS)
    assert dollars["partner"] == pytest.approx(built / 4) and dollars["vendor"] == pytest.approx(3 * built / 0.8)
    assert rows[-1]["part"] == "cloud"
    assert rows[-1]["dollars_so_far"] == pytest.approx(sum(dollars.values())) == pytest.approx(built / 0.8 / 0.25 / 0.5)
    lines = list(csv.DictReader(io.StringIO(told("h100", *H100, *CHAIN, "--format", "csv").output)))
    assert [float(x["dollars"]) for x in lines] == [r["dollars"] for r in rows]
    text = told("h100", *H100, *CHAIN).output
    assert f"{rows[-1]['dollars_so_far']:,.2f}" in text and "cost to build" in text and "vendor, 75 % margin" in text
    assert "gross margin 90.0 %, margin over cost 900.0 %" in text  # 1 - 0.8 * 0.25 * 0.5, and 1 / 0.1 - 1
    assert max(map(len, text.splitlines())) <= 100


def test_dies_share_the_chips_area_and_sram_machines_have_no_hbm():
    rest = dict(wafer_dollars=1e4, defects_per_cm2=0.1, packaging_dollars=0.0, test_dollars=0.0, assembly_dollars=0.0)
    two = vendor.from_chip(chips.load()["b200"], dies=2, hbm_dollars_per_gb=15.0, **rest)
    assert (two.die_mm2, two.hbm_gb) == (800, 180)
    assert vendor.parts(vendor.from_chip(chips.load()["gc200"], **rest))["hbm"] == 0
    assert vendor.from_chip(chips.load()["gc200"], die_mm2=400.0, **rest).die_mm2 == 400
    with pytest.raises(Unknown, match="h20: die_mm2 is unknown"):
        vendor.from_chip(chips.load()["h20"], hbm_dollars_per_gb=15.0, **rest)


@pytest.mark.parametrize("options, text", [
    (["h300"], "chip is 'h300'"), (["h100"], "wafer_dollars is missing, allowed: $ of a processed wafer"),
    (["h100", *H100, "--margins", "cloud"], "margins is 'cloud', allowed: name=share"),
    (["h100", *H100, "--margins", "cloud=1.5"], "cloud has 1.5"),
    (["h100", *H100, "--defects-per-cm2", "20"],
     "defects_per_cm2 is 20.0, allowed: greater than or equal to 0 and less than or equal to 10"),
    (["h100", *H100, "--yield-model", "seeds"], "'poisson', 'murphy' or 'negative_binomial'"),
    (["h100", *H100, "--die-mm2", "60000"], "die_mm2 is 60000.0, allowed: an area that fits a wafer of 300 mm"),
    (["h100", *H100, "--format", "xml"], "allowed: json, csv"), ([], "die_mm2 is missing"),
])
def test_wrong_options_are_told(options, text):
    result = told(*options)
    assert result.exit_code == 2 and text in result.output.replace("\n", " ")
