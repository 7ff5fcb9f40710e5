"""Inputs checked by pydantic, with errors that name the field, its value and what is allowed."""

from pydantic import BaseModel, ConfigDict, ValidationError

from kernomics.cost import CostError, wrong


class Checked(BaseModel):
    """Base of every checked input: no coercion from text or bool to number, unknown fields refused, frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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
        raise wrong(f"{where}: {field}" if field else where, first["input"], allowed) from None
