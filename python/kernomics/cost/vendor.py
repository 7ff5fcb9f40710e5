"""What a chip costs to build and who earns on it: silicon, memory, package, then each gross margin up to the end price."""

from math import exp, expm1, fsum
from typing import Literal

from pydantic import Field, field_validator

from kernomics.cost import CostError, economics
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


def dies_per_wafer(die_mm2, wafer_mm=300.0):
    """dies = pi * (d/2)**2 / A - pi * d / sqrt(2 * A): wafer area over die area, less the dies cut by the edge.

    Not rounded down, so costs change smoothly with the area. Raises CostError where no die fits.
    """
    dies = economics.dies_per_wafer(die_mm2, wafer_mm)
    if dies < 1:
        raise CostError(f"die_mm2 is {die_mm2!r}, allowed: an area that fits a wafer of {wafer_mm:g} mm once at least")
    return dies


def die_yield(die_mm2, defects_per_cm2, yield_model="negative_binomial", alpha=3.0):
    """Share of good dies, with x = defects/cm2 * cm2: exp(-x), ((1 - exp(-x)) / x)**2 or (1 + x/alpha)**-alpha."""
    x = defects_per_cm2 * die_mm2 / 100
    if yield_model == "poisson" or x == 0:
        return exp(-x)
    if yield_model == "murphy":
        return (-expm1(-x) / x) ** 2
    return (1 + x / alpha) ** -alpha


def silicon_dollars(vendor):
    """$ = dies * $/wafer / (dies/wafer * yield): good dies pay for the bad ones."""
    good = dies_per_wafer(vendor.die_mm2, vendor.wafer_mm) * die_yield(
        vendor.die_mm2, vendor.defects_per_cm2, vendor.yield_model, vendor.alpha)
    return vendor.dies * vendor.wafer_dollars / good


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


def read(data):
    """The Vendor of a table of fields; a CostError says which field is wrong and what is allowed."""
    return parse(Vendor, data, "vendor")
