"""What the machine can do at most, measured, and what it is called."""

import os
import re
import time
from pathlib import Path

import numpy as np

from kernomics import _cpu


def best_rate(work, budget_s):
    """The highest rate of ``work() -> amount``, per second; a ceiling is what the machine reaches undisturbed."""
    best, stop = 0.0, time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        amount = work()
        end = time.perf_counter()
        best = max(best, amount / (end - start))
        if end > stop:
            return best


def fma_peak(isa, threads, budget_s=0.2):
    """FLOP/s of f32 multiply-adds in registers."""
    before = _cpu.isa()
    _cpu.use_isa(isa)
    try:
        return best_rate(lambda: _cpu.ceiling_fma(threads, 200_000), budget_s)
    finally:
        _cpu.use_isa(before)


def read_buffer(least=1 << 30):
    """An f32 array that no cache holds: at least 1 GiB and four times the L3, less where memory is short."""
    size = max(least, 4 * l3_bytes())
    size = min(size, free_bytes() // 4)
    return np.ones(size // 4, np.float32)  # zeros would be one page of memory read again and again


def read_bandwidth(buffer, threads, budget_s=0.3):
    """Bytes/s of summing ``buffer``."""
    view = (buffer.ctypes.data, 0, buffer.shape)

    def work():
        _cpu.ceiling_read(view, threads)
        return buffer.nbytes

    return best_rate(work, budget_s)


# ---------------------------------------------------------------- the machine


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def l3_bytes():
    """Size of the last-level cache of one core, 32 MiB where the system does not tell."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [line for index in sorted(caches.glob("index*")) for line in _lines(index / "size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=32 << 20)


def free_bytes():
    """Memory that can be taken without swapping."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 << 30


def cpu_model(cpuinfo=None):
    """A short name of the CPU, as in ``amd-epyc-7763``; its family and model numbers where the name has none."""
    fields = {}
    for line in _lines("/proc/cpuinfo") if cpuinfo is None else cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or fields.get("Processor") or os.uname().machine
    name = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\d+-Core", " ", name, flags=re.I)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.search(r"\d", slug) and "cpu family" in fields:
        slug += f"-f{fields['cpu family']}m{fields.get('model', 0)}"
    return slug


def chip_key(isa, threads):
    return f"cpu-{cpu_model()}-{isa}-{threads}t"
