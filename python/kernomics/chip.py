"""What a kernel must know of the GPU it runs on: a small record per family, complete without a GPU."""

import dataclasses
import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Chip:
    """A GPU. ``family`` is "sm90" or "gfx942"; a kernel's choices depend on these fields and on nothing else of it."""

    family: str
    units: int  # streaming multiprocessors, or compute units
    shared: int  # bytes of shared memory that one block may use
    e4m3: bool  # matrix instructions take e4m3fn, and the compiler converts to it
    tma: bool  # copies of tiles by descriptor

    @property
    def amd(self):
        return self.family.startswith("gfx")


KIB = 1024
FAMILIES = {c.family: c for c in (
    Chip("sm80", 108, 163 * KIB, False, False),  # A100
    Chip("sm86", 84, 99 * KIB, False, False),  # RTX 3090, A40
    Chip("sm89", 142, 99 * KIB, True, False),  # L40S, RTX 4090
    Chip("sm90", 132, 227 * KIB, True, True),  # H100, H200
    Chip("sm100", 148, 227 * KIB, True, True),  # B200
    Chip("sm103", 148, 227 * KIB, True, True),  # B300
    Chip("sm120", 188, 99 * KIB, True, True),  # RTX PRO 6000, RTX 5090
    Chip("gfx942", 304, 64 * KIB, False, False),  # MI300X: its own FP8 has another bias, and 0x80 is NaN there
    Chip("gfx950", 256, 160 * KIB, True, False),  # MI355X
)}
FAMILY_OF = {  # key in chips.toml, which names a file of bench/results, -> family
    "a100": "sm80", "h100": "sm90", "h200": "sm90", "h800": "sm90", "h20": "sm90", "b200": "sm100", "gb200": "sm100",
    "b300": "sm103", "gb300": "sm103", "rtx4090": "sm89", "rtx5090": "sm120", "mi300x": "gfx942", "mi325x": "gfx942",
    "mi355x": "gfx950",
}


def results():
    """The folder of bench records that the installed package ships, or that of the source tree; None without one."""
    spec = importlib.util.find_spec("kernomics.bench")
    places = map(Path, spec.submodule_search_locations or ()) if spec else ()
    return next((p / "results" for p in places if (p / "results").is_dir()), None)


@functools.cache
def proved(family):
    """(op, kernel) pairs with a record on a chip of this family: the bench records results that it has judged right."""
    folder, records = results(), []
    for name, of in FAMILY_OF.items():
        if folder and of == family and (folder / f"{name}.jsonl").exists():
            records += map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return frozenset((r["op"], r["kernel"]) for r in records)


@functools.cache
def current(index):
    """The chip of torch's GPU ``index``."""
    import torch

    found = torch.cuda.get_device_properties(index)
    family = found.gcnArchName.split(":")[0] if torch.version.hip else f"sm{found.major}{found.minor}"
    known = FAMILIES.get(family) or Chip(family, 0, 64 * KIB, False, False)
    return dataclasses.replace(known, units=found.multi_processor_count)
