"""What a model's step costs on a chip: operator inventory -> seconds -> dollars. Reads ops and bench records."""


class CostError(ValueError):
    """A wrong input to the cost model: names the field, the value and what is allowed."""


class Unknown(CostError):
    """A figure that nobody has sourced is needed; it is never replaced by a default."""


def wrong(field, value, allowed):
    """The CostError of a bad field."""
    return CostError(f"{field} is {value!r}, allowed: {allowed}")
