"""Dispatch and combine by DeepEP's published bandwidths: its own rows, what is carried over, and what is refused."""

import pytest

from kernomics.cost import CostError, deepep, scenario
from kernomics.cost.model import token_bytes

SHAPE = {"d": 7168, "top_k": 8, "e": 256}


def ask(kind, t, ranks, variant=None, release="2025-02", chip="h800"):
    dtype = {"dispatch": "fp8", "combine": "bf16"}[kind]
    return deepep.Exchange(release).seconds(chip, kind, dtype, {"t": t, "ranks": ranks, **SHAPE}, variant)


@pytest.mark.parametrize("ranks, dispatch, combine", [(8, 163e-6, 318e-6), (128, 192e-6, 369e-6)])
def test_low_latency_rows_are_reproduced(ranks, dispatch, combine):
    found = [ask(kind, 128, ranks, "low_latency") for kind in ("dispatch", "combine")]
    assert [f.seconds for f in found] == pytest.approx([dispatch, combine])
    assert {(f.mark, f.sigma) for f in found} == {("imported", 0.0)} and "84d3d6f of 2025-02-25" in found[0].source


def test_the_readmes_bandwidth_is_that_of_its_bytes():
    """128 tokens to 8 experts each, fp8 with a scale per 128: the 46 GB/s beside the 163 us."""
    assert 128 * 8 * token_bytes(7168, "fp8") / 163e-6 == pytest.approx(46e9, rel=0.01)
    assert 128 * 8 * token_bytes(7168, "bf16") / 369e-6 == pytest.approx(39e9, rel=0.03)


def test_normal_rows_by_hand():
    # 4 nodes, 8 draws: 4 * (1 - (3/4)**8) = 3.5995 of them, the own one within, at 44 and 47 GB/s
    assert ask("dispatch", 4096, 32).seconds == pytest.approx(4096 * 3.5995 * 7392 / 44e9, rel=1e-4)
    assert ask("combine", 4096, 32).seconds == pytest.approx(4096 * 3.5995 * 14336 / 47e9, rel=1e-4)
    assert ask("combine", 4096, 32, release="2025-04").seconds == pytest.approx(4096 * 3.5995 * 14336 / 57e9, rel=1e-4)
    assert ask("dispatch", 4096, 64).seconds == pytest.approx(4096 * 3.5995 * 7392 / 46e9, rel=1e-4)  # 4 nodes of 8 at most
    assert ask("dispatch", 4096, 8).seconds == pytest.approx(4096 * 8 * (1 - (7 / 8) ** 8) * 7392 / 153e9, rel=1e-4)


def test_other_calls_are_transferred_at_the_same_bandwidth():
    more, less = ask("dispatch", 8192, 32), ask("dispatch", 4096, 32)
    assert more.seconds == pytest.approx(2 * less.seconds) and more.mark == "transferred" and "44.0 GB/s held" in more.note
    speeds = deepep.RELEASES["2025-02"][1]
    between = deepep.between({r: x for r, (_, x) in speeds.items()}, 48)
    assert 45e9 < between < 47e9 and deepep.between({16: 43e9, 64: 46e9}, 500) == 46e9


def test_what_it_does_not_know():
    assert ask("dispatch", 128, 32, chip="h100") is None and ask("dispatch", 128, 1) is None
    assert ask("dispatch", 128, 32, "power_law") is None
    assert deepep.Exchange().seconds("h800", "gemm", "fp8", {"m": 1, "n": 1, "k": 1}) is None
    with pytest.raises(CostError, match="deepep is '2024', allowed: 2025-02, 2025-04"):
        scenario.open_tables("deepep:2024", ["h800"])
    assert scenario.open_tables("deepep", ["h800"]) == [deepep.Exchange("2025-04")]
