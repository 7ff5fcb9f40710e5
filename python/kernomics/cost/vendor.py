"""What a chip costs to build and who earns on it: silicon, memory, package, then each gross margin up to the end price."""

from itertools import accumulate
from math import fsum
from typing import Literal

from pydantic import Field, field_validator

from kernomics.cost import economics
from kernomics.cost.fields import Checked, parse

PARTS = ("silicon", "hbm", "hbm_margin", "packaging", "test", "assembly")


def _dollars(description):
    return Field(ge=0, le=1e7, description=description)


class Vendor(Checked):
    """One package: its dies, memory and package, and the gross margins stacked on it."""

    die_mm2: float = Field(gt=0, le=1e5, description="mm2 of one compute die, to 1e5")
    dies: int = Field(1, ge=1, le=1000, description="compute dies in the package")
    wafer_dollars: float = Field(gt=0, le=1e6, description="$ of a processed wafer, to 1e6")
    wafer_mm: float = Field(300.0, ge=100, le=450, description="mm across the wafer")
    defects_per_cm2: float = Field(ge=0, le=10, description="defects per cm2, 0 to 10")
    yield_model: Literal["poisson", "murphy", "negative_binomial"] = "negative_binomial"
    alpha: float = Field(3.0, gt=0, le=1e6, description="clustering of defects, of negative_binomial only")  # assumption
    hbm_gb: float = Field(ge=0, le=1e5, description="GB of HBM in the package, 0 to 1e5")
    hbm_dollars_per_gb: float = Field(ge=0, le=1e4, description="$ per GB that the vendor pays, supplier's margin within")
    hbm_margin: float = Field(0.0, ge=0, lt=1, description="gross margin of the HBM supplier, share of its price")
    packaging_dollars: float = _dollars("$ of interposer, substrate and bonding, 0 to 1e7")
    test_dollars: float = _dollars("$ of tests, 0 to 1e7")
    assembly_dollars: float = _dollars("$ of module and board, 0 to 1e7")
    margins: dict[str, float] = Field({}, description="gross margin by who earns it, from the chip up to the end price")

    @field_validator("margins")
    @classmethod
    def _margins(cls, value):
        for name, margin in value.items():
            if not 0 <= margin < 1:
                raise ValueError(f"shares of at least 0 and below 1, {name} has {margin!r}")
            if name in PARTS:
                raise ValueError(f"names other than {', '.join(PARTS)}")
        return value


def silicon_dollars(vendor):
    """$ = dies * $ of a good die"""
    return vendor.dies * economics.die_dollars(vendor.wafer_dollars, vendor.die_mm2, vendor.defects_per_cm2, vendor.yield_model,
                                               vendor.alpha, vendor.wafer_mm)


def parts(vendor):
    """name -> $ of what goes into the package; the price of the HBM is split into its cost and its supplier's margin."""
    hbm = vendor.hbm_gb * vendor.hbm_dollars_per_gb
    return {"silicon": silicon_dollars(vendor), "hbm": hbm * (1 - vendor.hbm_margin), "hbm_margin": hbm * vendor.hbm_margin,
            "packaging": vendor.packaging_dollars, "test": vendor.test_dollars, "assembly": vendor.assembly_dollars}


def cost(vendor):
    """$ = sum of the parts: what the chip costs its vendor, before any margin but the HBM supplier's."""
    return fsum(parts(vendor).values())


def breakdown(vendor):
    """name -> $ of the end price: the parts, then each margin: $ = price before * margin / (1 - margin)."""
    shares, price = parts(vendor), cost(vendor)
    for name, margin in vendor.margins.items():
        shares[name] = price * margin / (1 - margin)
        price += shares[name]
    return shares


def end_price(vendor):
    """$ = sum of the breakdown"""
    return fsum(breakdown(vendor).values())


def steps(vendor):
    """[(name, $, $ of all so far)] of the breakdown, in order: the last sum is the end price."""
    shares = breakdown(vendor)
    return list(zip(shares, shares.values(), accumulate(shares.values())))


def from_chip(chip, **fields):
    """The Vendor of a Chip: its die_mm2 shared out among the dies, and its memory where that is HBM, unless ``fields`` say.

    Raises Unknown where nobody says.
    """
    found = {}
    if "die_mm2" not in fields:
        found["die_mm2"] = chip.need("die_mm2") / max(1, fields.get("dies", 1))
    if "hbm_gb" not in fields:
        found["hbm_gb"] = chip.need("memory_bytes") / 1e9 if chip.memory == "hbm" else 0.0
        if chip.memory != "hbm":
            fields.setdefault("hbm_dollars_per_gb", 0.0)
    return parse(Vendor, {**found, **fields}, f"vendor of {chip.key}")


def read(data):
    """The Vendor of a table of fields; a CostError says which field is wrong and what is allowed."""
    return parse(Vendor, data, "vendor")
