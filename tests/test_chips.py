"""Chips: every figure sourced and in range, what the checker refuses, and a chip of the user's own."""

import datetime
import re
from pathlib import Path

import pytest

from kernomics.cost import CostError, Unknown, chips
from kernomics.cost.measured import Measured
from kernomics.cost.model import Model
from kernomics.cost.price import bound, price

V3 = Model.load("deepseek-v3")
KNOWN = chips.load()
NAMED = """
    a100 h100 h200 h800 h20 b200 b300 gb200 gb300 r200 cpx rtx4090 rtx5090 mi300x mi325x mi355x
    tpu-v3 tpu-v4 tpu-v5e tpu-v5p tpu-v6e tpu-v7 trainium2 trainium3 inferentia2 gaudi3
    groq wse-2 wse-3 sn40l gc200 dojo-d1 ascend-910b ascend-910c""".split()


def test_every_chip_has_every_demanded_figure_with_source_date_and_status():
    assert list(KNOWN) == NAMED
    for chip in KNOWN.values():
        assert set(chips.REQUIRED) <= set(chip.figures) <= set(chips.RANGE)
        for name, figure in chip.figures.items():
            assert len(figure.source) > 20 and figure.date.year >= 2024 and figure.status in chips.STATUS
            assert (figure.value is None) == (figure.status == "unknown")
            assert figure.dense is (True if name.startswith("flops_") and figure.value else None)


def test_every_source_and_note_of_the_file_is_cited():
    tables, sources, notes = chips._parse(Path(chips.__file__).with_suffix(".toml").read_text(encoding="utf-8"), "chips.toml")
    cited = [figure.get(field) for table in tables.values() for figure in table.values() if isinstance(figure, dict)
             for field in ("source", "note")]
    assert set(sources) | set(notes) <= set(cited)
    assert not any(re.search(r"/work|/home|COST\.md", entry["text"]) for entry in sources.values())


def test_sram_machines_hold_their_model_in_sram():
    sram = {key for key, chip in KNOWN.items() if chip.memory == "sram"}
    assert sram == {"groq", "wse-2", "wse-3", "gc200", "dojo-d1"}
    assert all("SRAM" in KNOWN[key].figures["memory_bytes"].note for key in sram)
    chip = KNOWN["groq"]
    p = price(V3.decode(1, 64), chip, Measured([]), tokens=1, users=1, memory=671e9)
    assert p.chips == 2918 and p.seconds > 0  # ceil(671 GB / 230 MB)


def test_an_absent_figure_is_unknown():
    assert KNOWN["rtx4090"].get("flops_fp4") is None
    with pytest.raises(Unknown, match="rtx4090: flops_fp4 is unknown"):
        KNOWN["rtx4090"].need("flops_fp4")


TOML = """
[sources]
sheet = { text = "the data sheet", date = 2026-11-23 }
[notes]
why = "because"
[x]
flops_bf16 = { value = 1e15, dense = true, status = "vendor", source = "s", date = 2026-11-22 }
flops_fp8 = { value = 2e15, dense = true, status = "vendor", source = "s", date = 2026-11-22 }
bytes_per_s = { value = 4e12, status = "measured", source = "s", date = 2026-11-22 }
memory_bytes = { value = 8e10, status = "vendor", source = "sheet", note = "why" }
dollars_per_hour = { status = "unknown", source = "s", date = 2026-11-22 }
sm_count = { value = 132, status = "vendor", source = "sheet", note = "SMs" }
"""


def test_sources_and_notes_are_looked_up():
    figures = chips.load(TOML)["x"].figures
    held = figures["memory_bytes"]
    assert (held.source, held.date, held.note) == ("the data sheet", datetime.date(2026, 11, 23), "because")
    assert figures["sm_count"].note == "SMs" and figures["bytes_per_s"].source == "s"


@pytest.mark.parametrize("old, new, names", [
    ("2e15, dense = true,", "4e15, dense = true,", ["x.flops_fp8.value", "4000000000000000.0", "2.05"]),
    ('1e15, dense = true,', '1e15,', ["x.flops_bf16.dense", "None", "true"]),
    ('1e15, dense = true,', '1e15, dense = false,', ["x.flops_bf16.dense", "False", "true"]),
    ('status = "measured"', 'status = "rumour"', ["x.bytes_per_s.status", "rumour", "vendor"]),
    ('4e12, status = "measured", source = "s"', '4e12, status = "measured"', ["x.bytes_per_s.source", "[sources]"]),
    ("date = 2026-11-22 }\nmemory", 'date = "today" }\nmemory', ["x.bytes_per_s.date", "today"]),
    ('source = "sheet", note = "why"', 'source = "sheets"', ["x.memory_bytes.date", "None", "[sources]"]),
    ('text = "the data sheet", ', "", ["sources.sheet", "text = where"]),
    ('status = "unknown"', 'value = 2.0, status = "unknown"', ["x.dollars_per_hour.value", "2.0"]),
    ("value = 8e10, ", "", ["x.memory_bytes.value", "None", "unknown"]),
    ("8e10", "-1", ["x.memory_bytes.value", "-1"]),
    ("8e10", "80", ["x.memory_bytes.value", "80", "1e+07 to 1e+13"]),
    ("4e12", "4e3", ["x.bytes_per_s.value", "4000.0", "1e+09 to 1e+17"]),
    ("4e12", "inf", ["x.bytes_per_s.value", "inf"]),
    ("4e12", "nan", ["x.bytes_per_s.value", "nan"]),
    ("132", "132.5", ["x.sm_count.value", "132.5", "whole"]),
    ("132", "true", ["x.sm_count.value", "True"]),
    ('note = "SMs"', "note = 1", ["x.sm_count.note", "1"]),
    ('note = "SMs"', "remark = 1", ["x.sm_count", "remark", "note"]),
    ("[x]\n", '[x]\nmemory = "tape"\n', ["x.memory", "tape", "sram"]),
    ("[x]\n", "[x]\ntdp_watts = 700\n", ["x.tdp_watts", "700", "a table"]),
    ("memory_bytes", "memory_byte", ["memory_byte", "memory_bytes"]),
    ("dollars_per_hour", "price_dollars", ["x.dollars_per_hour", "None", "unknown"]),
    ("[x]", "[x", ["chips.toml"]),
])
def test_the_checker_refuses(old, new, names):
    assert chips.load(TOML)["x"].get("flops_fp8") == 2e15
    assert old in TOML
    with pytest.raises(CostError) as error:
        chips.load(TOML.replace(old, new, 1))
    assert all(name in str(error.value) for name in names), str(error.value)


def test_a_note_explains_an_unusual_fp8_peak():
    noted = TOML.replace("value = 2e15,", 'value = 4e15, note = "why",', 1)
    assert chips.load(noted)["x"].get("flops_fp8") == 4e15


def test_unknown_stays_unknown():
    text = TOML.replace('flops_fp8 = { value = 2e15, dense = true, status = "vendor"', 'flops_fp8 = { status = "unknown"')
    chip = chips.load(text)["x"]
    rows = V3.decode(1, 64)
    with pytest.raises(Unknown, match="x: flops_fp8 is unknown"):
        bound(next(r for r in rows if r.name == "q_b"), chip)
    p = price(rows, chip, Measured([]), tokens=1, users=1, memory=1e9)
    assert p.seconds is None and p.tokens_per_s_per_chip is None and p.dollars_per_mtoken is None
    assert p.unknown == ["x: flops_fp8 is unknown"] and p.layer_seconds("head") > 0
    p = price(rows, chips.load(TOML)["x"], Measured([]), tokens=1, users=1, memory=1e9)
    assert p.seconds > 0 and p.dollars_per_hour is None and p.dollars_per_mtoken is None


# ---------------------------------------------------------------- a chip of the user's own


MINE = """
name = "Mine"
flops_bf16 = 400e12
flops_fp8 = { value = 800e12, note = "on paper" }
bytes_per_s = 2e12
memory_bytes = 128e9
scale_up_domain = 16
"""


def file(tmp_path, text=MINE):
    path = tmp_path / "My_Chip.toml"
    path.write_text(text)
    return str(path)


def test_a_users_file_needs_only_numbers(tmp_path):
    chip = chips.find(file(tmp_path))
    assert (chip.key, chip.name, chip.memory) == ("my_chip", "Mine", "hbm")
    assert {chip.figures[f].status for f in ("flops_bf16", "flops_fp8", "scale_up_domain")} == {"estimate"}
    assert chip.figures["bytes_per_s"].source == "user's file My_Chip.toml"
    assert chip.figures["flops_fp8"].note == "on paper" and chip.figures["flops_bf16"].dense is True
    assert isinstance(chip.figures["bytes_per_s"].date, datetime.date)
    assert chip.figures["dollars_per_hour"].status == "unknown" and chip.get("dollars_per_hour") is None
    p = price(V3.decode(4, 64), chip, Measured([]), tokens=4, users=4, memory=671e9, dollars_per_hour=1.0)
    assert p.chips == 6 and p.dollars_per_mtoken > 0


@pytest.mark.parametrize("old, new, names", [
    ("400e12", "400", ["My_Chip.toml: my_chip.flops_bf16.value", "400", "SI units"]),
    ("400e12", '"fast"', ["my_chip.flops_bf16.value", "fast"]),
    ("800e12", "1600e12, dense = false", ["my_chip.flops_fp8.dense", "False"]),
    ('800e12, note = "on paper"', "1600e12", ["my_chip.flops_fp8.value", "2.05"]),
    ("bytes_per_s", "bandwidth", ["my_chip", "bandwidth", "bytes_per_s"]),
    ('"Mine"', "1", ["my_chip.name", "1"]),
    ("= 128e9", "= ", ["My_Chip.toml"]),
    (MINE, "", ["My_Chip.toml", "figures", "bytes_per_s"]),
])
def test_a_users_file_is_checked(tmp_path, old, new, names):
    assert old in MINE
    with pytest.raises(CostError) as error:
        chips.find(file(tmp_path, MINE.replace(old, new, 1)))
    assert all(name in str(error.value) for name in names), str(error.value)


def test_find_by_key_by_path_or_not_at_all(tmp_path):
    mine = chips.find(file(tmp_path))
    assert chips.find("h200") == KNOWN["h200"] and chips.find("here", {"here": mine}) is mine
    for name, names in (("h2000", ["chip is 'h2000'", "h200,", "here", "TOML file"]), ("no.toml", ["no.toml", "can be read"])):
        with pytest.raises(CostError) as error:
            chips.find(name, {"here": mine})
        assert all(text in str(error.value) for text in names), str(error.value)


def test_a_users_file_may_cite_as_the_builtin_one_does(tmp_path):
    cited = MINE + 'tdp_watts = { value = 700, status = "vendor", source = "sheet", note = "why" }\n'
    tables = '[sources]\nsheet = { text = "the data sheet", date = 2026-11-23 }\n[notes]\nwhy = "because"\n'
    watts = chips.find(file(tmp_path, cited + tables)).figures["tdp_watts"]
    assert (watts.status, watts.source, watts.date.day, watts.note) == ("vendor", "the data sheet", 23, "because")
