"""Every claim runs, and its verdict turns where it says."""

import pytest

from kernomics.cost import CostError, claims

IDS = {
    "Q1", "Q2", "Q4", "Q5", "Q7", "Q8", "Q9", "Q12", "Q13", "Q16", "Q20", "Q21", "Q22", "Q30", "Q35", "Q36", "Q37", "Q38", "Q39",
    "Q42", "Q43", "Q44", "Q55", "Q56", "Q59", "Q61", "Q62", "Q64", "Q66", "Q67", "Q72", "Q74", "Q75", "Q76", "Q77", "Q78", "Q80",
    "Q81", "Q82", "Q83", "Q84", "Q86", "Q87", "Q88", "Q91", "Q92", "Q93", "Q94", "Q97", "Q101", "Q102", "Q103", "Q105", "Q106",
    "Q108", "Q109", "Q110", "Q114", "Q117", "Q118", "Q120", "Q121", "Q122", "Q123", "Q124", "Q126", "Q127", "Q128", "Q129",
    "Q131", "Q132", "Q133", "Q134", "Q137", "Q138", "Q139", "Q140", "Q142", "Q143", "Q144", "Q145", "Q146", "Q147", "Q148",
    "Q149", "Q154",
}
TESTABLE = [c for c in claims.CLAIMS if c.check]


def by_id(each):
    return [c.id for c in each]


def test_the_claims_are_all_there():
    assert len(claims.CLAIMS) == len(IDS)
    assert set(by_id(claims.CLAIMS)) == IDS


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=by_id(claims.CLAIMS))
def test_a_claim_evaluates(claim):
    (found,) = claims.evaluate(claim.id)
    assert found.verdict in claims.VERDICTS
    assert claim.file in claims.FILES
    assert (found.verdict == "not testable") == (claim.check is None)
    if claim.check is None:
        assert claim.why
        return
    assert claim.decides in claim.inputs
    assert found.result.value == pytest.approx(found.result.value)  # a number, not NaN
    assert found.result.unit and found.result.words
    if found.verdict == "holds only if":
        assert claim.assumptions


@pytest.mark.parametrize("claim", TESTABLE, ids=by_id(TESTABLE))
def test_the_deciding_input_turns_the_verdict(claim):
    (before,), (after,) = claims.evaluate(claim.id), claims.evaluate(claim.id, {claim.decides: claim.flip})
    assert before.verdict != after.verdict
    assert before.result.holds != after.result.holds


@pytest.mark.parametrize("claim", TESTABLE, ids=by_id(TESTABLE))
def test_the_edge_lies_between(claim):
    edge = claim.edge()
    if claim.inputs[claim.decides].origin == claims.CHOICE:
        assert edge is None
        return
    value = claim.inputs[claim.decides].value
    assert min(value, claim.flip) <= edge <= max(value, claim.flip)
    assert claim.run({claim.decides: edge}).holds != claim.run().holds


@pytest.mark.parametrize(("id", "value"), [
    ("Q7", 1e9), ("Q35", 250e9), ("Q36", 2), ("Q37", 10e9), ("Q38", 60e9), ("Q61", 56.79), ("Q76", 5.576e6), ("Q86", 71.1),
    ("Q88", 28), ("Q110", 5), ("Q132", 49.5), ("Q133", 100), ("Q140", 30), ("Q143", 5.73e6),
])
def test_a_value_by_hand(id, value):
    assert claims.find(id).run().value == pytest.approx(value, rel=1e-3)


def test_slips_are_contradicted():
    verdicts = {e.claim.id: e.verdict for e in claims.evaluate()}
    assert {id for id, v in verdicts.items() if v == "contradicted"} == {"Q2", "Q62", "Q78", "Q88", "Q133", "Q134", "Q143"}
    assert sum(v == "not testable" for v in verdicts.values()) <= 6


def test_claims_of_all_take_their_own_overrides():
    found = {e.claim.id: e for e in claims.evaluate(overrides={"Q35": {"margin": 0.3}})}
    assert found["Q35"].verdict == "contradicted"
    assert found["Q36"].verdict == "reproduced"
    assert "given" in found["Q35"].decided_by


def test_wrong_names_are_refused():
    with pytest.raises(CostError, match="claim is 'Q999'"):
        claims.evaluate("Q999")
    with pytest.raises(CostError, match="margin"):
        claims.evaluate("Q35", {"margins": 0.3})
    with pytest.raises(CostError, match="claim is 'Q999'"):
        claims.evaluate(overrides={"Q999": {}})
    with pytest.raises(CostError, match="Q140"):
        claims.evaluate("Q140", {"margin": 1.0})


def test_a_figure_comes_from_the_chip_file():
    origins = {x.origin for c in claims.CLAIMS for x in c.inputs.values()}
    assert {"chips.toml: h100.flops_fp8", "chips.toml: h800.dollars_per_hour", claims.SAID, claims.ASSUMED} <= origins


def test_the_table_has_a_row_a_claim():
    rows = claims.table()
    assert len(rows) == len(IDS)
    assert all(len(row) == 5 and all(isinstance(x, str) for x in row) for row in rows)
    assert rows[0][0] == "Q1"


@pytest.mark.parametrize("both", claims.CONTRADICTIONS, ids=by_id(claims.CONTRADICTIONS))
def test_a_contradiction_says_what_the_arithmetic_supports(both):
    assert both.first and both.second and both.first != both.second
    assert any(c.isdigit() for c in both.supports)
    assert both.file in claims.FILES
