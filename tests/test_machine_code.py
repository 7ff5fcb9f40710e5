"""Registers that the compiler reads before it sets them."""

import pytest

import machine_code


def code(*lines):
    out = []
    for i, line in enumerate(lines):
        out.append(line if line.startswith(".L") else f"        /*{16 * i:04x}*/                   {line} ;")
    return "\n".join(out)


LOOP = ("UMOV UR54, 0x40", ".L_x_1:", "UIADD3 UR12, UP0, UR50, 0x40, URZ",
        "HGMMA.64x32x16.F32.BF16 R24, R100, gdesc[UR10].tnspB, R24", "UMOV UR50, UR54", "@P0 BRA `(.L_x_1)", "EXIT")


def test_a_register_that_the_end_of_a_loop_sets():
    found = machine_code.undefined(code("UMOV UR13, 0x8", *LOOP))
    assert found == ["UIADD3 UR12, UP0, UR50, 0x40, URZ"]
    assert not machine_code.undefined(code("UMOV UR13, 0x8", "UMOV UR50, URZ", *LOOP))


@pytest.mark.parametrize("lines, found", [
    (("R2UR UR4, R8", "IMAD.MOV.U32 R8, RZ, RZ, R3", "EXIT"), ["R2UR UR4, R8"]),
    (("LDG.E.64 R8, desc[UR4][R2.64]", "EXIT"), ["LDG.E.64 R8, desc[UR4][R2.64]"]),
    (("ULDC.64 UR4, c[0x0][0x208]", "LDG.E.64 R8, desc[UR4][R2.64]", "R2UR UR6, R9", "EXIT"), []),
    (("UIMAD.WIDE.U32 UR6, UR4, 0x8, URZ", "EXIT"), ["UIMAD.WIDE.U32 UR6, UR4, 0x8, URZ"]),
    (("S2UR UR4, SR_CTAID.X", "UIMAD.WIDE.U32 UR6, UR4, 0x8, URZ", "IMAD.U32 R5, RZ, RZ, UR7", "EXIT"), []),
    (("@P0 BRA `(.L_x_1)", "UMOV UR4, 0x1", ".L_x_1:", "STS [R2+UR4], R8", "EXIT"), ["STS [R2+UR4], R8"]),
    (("SHFL.BFLY PT, R8, R7, 0x10, 0x1f", "R2UR UR4, R8", "EXIT"), []),
], ids=["thread's", "both words", "pairs", "product", "product's pair", "one way", "behind a predicate"])
def test_what_counts_as_set(lines, found):
    assert machine_code.undefined(code(*lines)) == found


def test_nothing():
    assert machine_code.undefined("") == []
