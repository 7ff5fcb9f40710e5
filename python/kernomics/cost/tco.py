"""What a chip-hour costs its owner: capital, power, hosting and people of one chip, per hour owned, available and used."""

from math import fsum

from pydantic import Field, field_validator

from kernomics.cost import CostError, Unknown, economics, wrong
from kernomics.cost.economics import HOURS_PER_MONTH, HOURS_PER_YEAR, annuity, price_at_margin, straight_line
from kernomics.cost.fields import Checked, parse

RATE_MIN = 1e-6  # a rate between 0 and this is taken for a slip
CAPITAL = ("chip", "server", "network", "storage", "install")  # each a field <name>_dollars


def _dollars(description):
    return Field(ge=0, le=1e8, description=description)


def _share(default, description, **bounds):
    return Field(default, **{"ge": 0, "le": 1, **bounds}, description=description)


class Tco(Checked):
    """What owning one chip takes: dollars at the start, then a year of power, hosting and people."""

    chip_dollars: float = _dollars("$ of the chip, 0 to 1e8")
    server_dollars: float = _dollars("$ of a chip's share of its server, without chips, 0 to 1e8")
    network_dollars: float = _dollars("$ of a chip's share of the network, 0 to 1e8")
    storage_dollars: float = _dollars("$ of a chip's share of storage, 0 to 1e8")
    install_dollars: float = _dollars("$ to install a chip, 0 to 1e8; never sold again")
    watts: float = Field(gt=0, le=1e5, description="IT watts of a chip with its share of server and network, to 1e5")
    life_years: float = Field(5.0, gt=0, le=30, description="years in use")  # assumption
    residual: float = _share(0.0, "share of the hardware's price got back at the end", lt=1)  # assumption: scrapped
    spares: float = _share(0.0, "hardware kept as spares, share of the hardware in use")  # assumption: none
    rate: float = _share(0.0, "cost of capital a year; 0: straight line")  # assumption: money is free
    load: float = _share(1.0, "share of the watts drawn on average", gt=0)  # assumption: full power at all hours
    pue: float = Field(1.0, ge=1, le=5, description="facility watts per IT watt")  # assumption: IT power only
    dollars_per_kwh: float = Field(0.08, ge=0, le=10, description="$ per kWh at the meter")  # assumption
    hosting_dollars_per_kw_month: float = Field(0.0, ge=0, le=1e5, description="$ per IT kW and month, power apart")  # assumption
    opex_share: float = _share(0.0, "upkeep a year, share of the capital")  # assumption
    staff_dollars_per_chip_year: float = Field(0.0, ge=0, le=1e7, description="$ of people a chip and year")  # assumption
    uptime: float = _share(1.0, "share of all hours the chip is available", gt=0)  # assumption
    utilisation: float = _share(1.0, "share of the available hours sold", gt=0)  # assumption
    margin: float = _share(0.0, "gross margin of the provider, share of its price", lt=1)  # assumption: sold at cost

    @field_validator("rate")
    @classmethod
    def _rate(cls, value):
        if 0 < value < RATE_MIN:
            raise ValueError(f"0, or {RATE_MIN:g} to 1")
        return value


def capital(tco):
    """name -> $ spent at the start; spares are a share of all hardware, which is all but the installation."""
    parts = {name: getattr(tco, f"{name}_dollars") for name in CAPITAL}
    return {**parts, "spares": tco.spares * fsum(v for name, v in parts.items() if name != "install")}


def interest_per_year(tco):
    """$/year = annuity - straight line, both less what is got back: the price of the money tied up."""
    spent = capital(tco)
    left = tco.residual * fsum(v for name, v in spent.items() if name != "install")
    dollars, life = fsum(spent.values()), tco.life_years
    return annuity(dollars, tco.rate, life, left) - straight_line(dollars, life, left)


def breakdown(tco):
    """name -> $ per chip-hour owned, all hours counted; the sum is ``cost_per_hour``.

    Capital is straight line, less what is got back; ``interest`` is what the cost of capital adds.
    Power: $/h = W * load * pue / 1000 * $/kWh. Hosting: $/h = W / 1000 * $/(kW*month) / (730 h/month), of all watts.
    """
    spent = capital(tco)
    lost = {name: v if name == "install" else v * (1 - tco.residual) for name, v in spent.items()}
    return {
        **{name: v / tco.life_years / HOURS_PER_YEAR for name, v in lost.items()},
        "interest": interest_per_year(tco) / HOURS_PER_YEAR,
        "power": tco.watts * tco.load * tco.pue / 1000 * tco.dollars_per_kwh,
        "hosting": tco.watts / 1000 * tco.hosting_dollars_per_kw_month / HOURS_PER_MONTH,
        "upkeep": tco.opex_share * fsum(spent.values()) / HOURS_PER_YEAR,
        "staff": tco.staff_dollars_per_chip_year / HOURS_PER_YEAR,
    }


def cost_per_hour(tco):
    """$/h owned = sum of the parts"""
    return fsum(breakdown(tco).values())


def cost_per_available_hour(tco):
    """$/h available = $/h owned / uptime"""
    return cost_per_hour(tco) / tco.uptime


def cost_per_used_hour(tco):
    """$/h used = $/h available / utilisation: unsold hours are paid by the sold ones."""
    return cost_per_available_hour(tco) / tco.utilisation


def price_per_hour(tco):
    """$/h sold = $/h used / (1 - margin)"""
    return price_at_margin(cost_per_used_hour(tco), tco.margin)


def price_breakdown(tco):
    """name -> $ per hour sold: the parts of an hour owned, the hours down, the hours idle, then the margin."""
    owned, available, used = cost_per_hour(tco), cost_per_available_hour(tco), cost_per_used_hour(tco)
    return {**breakdown(tco), "down": available - owned, "idle": used - available, "margin": price_per_hour(tco) - used}


def rental(tco, dollars_per_hour, decline=0.0):
    """What a chip rented out at $/h, falling by exp(-decline) a year, earns over its life: name -> figure.

    ``dollars_per_year``: rent at today's price less all costs, interest too. ``flows``: $ of year 0 (paid at the start), 1,
    2 ..., the last with what is got back; ``irr`` their rate of return (None where there is none), ``payback_years`` until
    they sum to 0. The rent is paid for the hours available and sold; power, hosting, upkeep and staff always.
    """
    for name, value, ok, allowed in (("rent", dollars_per_hour, 0 <= dollars_per_hour <= 1e4, "$/h, 0 to 1e4"),
                                     ("decline", decline, -1 <= decline <= 10, "a year, -1 to 10"),
                                     ("life_years", tco.life_years, tco.life_years == int(tco.life_years), "whole years")):
        if not ok:
            raise wrong(name, value, allowed)
    share, parts, spent = tco.uptime * tco.utilisation, breakdown(tco), capital(tco)
    running = fsum(parts[name] for name in ("power", "hosting", "upkeep", "staff"))
    flows = economics.rental_flows(fsum(spent.values()), dollars_per_hour, share, running, int(tco.life_years), decline)
    flows[-1] += tco.residual * fsum(v for name, v in spent.items() if name != "install")
    try:
        rate = economics.irr(flows)
    except CostError:
        rate = None
    profit = economics.rental_profit(dollars_per_hour, share, cost_per_hour(tco))
    return {"rent_dollars_per_hour": dollars_per_hour, "dollars_per_year": profit, "irr": rate,
            "payback_years": economics.flows_payback_years(flows), "flows": flows}


def read(data):
    """The Tco of a table of fields; a CostError says which field is wrong and what is allowed."""
    return parse(Tco, data, "tco")


def from_chip(chip, **fields):
    """The Tco of a Chip: its price_dollars and all_in_watts, else tdp_watts, where ``fields`` do not say.

    tdp_watts leave out the chip's share of server and network. Raises Unknown where neither says.
    """
    for field in fields:
        if field not in Tco.model_fields:
            raise wrong(f"tco of {chip.key}: field", field, ", ".join(Tco.model_fields))
    watts = chip.get("all_in_watts")
    found = {"chip_dollars": chip.get("price_dollars"), "watts": chip.get("tdp_watts") if watts is None else watts}
    names = {"chip_dollars": "price_dollars", "watts": "all_in_watts and tdp_watts"}
    for field, value in found.items():
        if value is None and field not in fields:
            raise Unknown(f"{chip.key}: {names[field]} unknown: give {field}")
    return parse(Tco, {**found, **fields}, f"tco of {chip.key}")
