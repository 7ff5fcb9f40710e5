"""Inputs checked by pydantic, with errors that name the field, its value and what is allowed."""

from pydantic import BaseModel, ConfigDict, ValidationError

from kernomics.cost import CostError, wrong


class Checked(BaseModel):
    """Base of every checked input: no coercion from text or bool to number, unknown fields refused, frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


BOUNDS = {"gt": "greater than", "ge": "greater than or equal to", "lt": "less than", "le": "less than or equal to"}


def bounds(field):
    """'greater than or equal to 0 and less than 1': the range of a field's numbers; empty where it has none."""
    return " and ".join(f"{text} {getattr(rule, name):.12g}" for rule in field.metadata for name, text in BOUNDS.items()
                        if hasattr(rule, name))


def parse(kind, data, where):
    """``kind(**data)``; a CostError ``<where>: <field> is <value>, allowed: <what>`` for the first bad field."""
    if not isinstance(data, dict):
        raise wrong(where, data if isinstance(data, (str, int, float)) else type(data).__name__, "a table of fields")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"] if p not in ("int", "float", "bool"))
        if first["type"] == "extra_forbidden":
            raise wrong(f"{where}: field", field, ", ".join(kind.model_fields)) from None
        if first["type"] == "missing":
            raise CostError(f"{where}: {field} is missing, allowed: {kind.model_fields[field].description or 'a value'}"
                            if field in kind.model_fields else f"{where}: {field} is missing") from None
        allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        span = bounds(kind.model_fields[field]) if field in kind.model_fields else ""
        if span:
            allowed = span if first["type"].startswith(("greater_than", "less_than")) else f"{allowed}, {span}"
        if not field:  # fields that do not go together: the error names them
            raise CostError(allowed) from None
        raise wrong(f"{where}: {field}", first["input"], allowed) from None
