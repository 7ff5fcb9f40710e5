"""Dispatch and combine on the H800, from the bandwidths that DeepEP publishes, as a source of seconds.

github.com/deepseek-ai/DeepEP, README of the commits below, read 2026-11-26; measured on H800 with one 400 Gb/s card each,
hidden 7168, top 8, dispatch in fp8, combine in bf16. *normal*: 4096 tokens a rank, 24 SMs; the bandwidth is that of the
narrower link, over bytes as tests/test_internode.py counts them: to every domain that needs a token, the own one within.
*low_latency*: 128 tokens a rank, no SMs, a token sent once to each of its experts. Other numbers of tokens take the
same bandwidth, between two numbers of ranks it is interpolated.
"""

from dataclasses import dataclass
from math import log

from kernomics.cost import comm, wrong
from kernomics.cost.measured import IMPORTED, TRANSFERRED
from kernomics.cost.model import token_bytes
from kernomics.cost.tables import EXCHANGE, Found

CHIP, DOMAIN, GROUPS = "h800", 8, 4  # GPUs of a node; nodes that V3's routing sends a token to at most
TOKENS = {"normal": 4096, "low_latency": 128}
SPREAD = 0.04  # of the bandwidths over numbers of ranks: the error of one that was not measured
LOW_LATENCY = {  # ranks -> seconds of 128 tokens: dispatch, combine
    8: (163e-6, 318e-6), 16: (173e-6, 329e-6), 32: (182e-6, 350e-6), 64: (186e-6, 353e-6), 128: (192e-6, 369e-6),
    256: (194e-6, 360e-6),
}
RELEASES = {  # commit, and ranks -> byte/s of normal kernels: dispatch, combine
    "2025-02": ("84d3d6f of 2025-02-25", {8: (153e9, 158e9), 16: (43e9, 43e9), 32: (44e9, 47e9), 64: (46e9, 45e9)}),
    "2025-04": ("3b1045d of 2025-04-22", {8: (153e9, 158e9), 16: (43e9, 43e9), 32: (58e9, 57e9), 64: (51e9, 50e9)}),
}
NEWEST = "2025-04"


@dataclass(frozen=True)
class Exchange:
    """Answers as ``tables.Tables`` does, for the kinds dispatch and combine."""

    release: str = NEWEST

    def __post_init__(self):
        if self.release not in RELEASES:
            raise wrong("deepep", self.release, ", ".join(RELEASES))

    def seconds(self, chip, kind, dtype, dims, variant=None):
        """The Found of an exchange on the H800; None for any other call."""
        if chip != CHIP or kind not in ("dispatch", "combine") or dims["ranks"] < 2:
            return None
        mode, which = variant or EXCHANGE.prefer[0], ("dispatch", "combine").index(kind)
        if mode not in TOKENS:
            return None
        commit, normal = RELEASES[self.release]
        size = dims["t"] * token_bytes(dims["d"], "fp8" if dtype == "fp8" else "bf16")
        if mode == "normal":
            size *= copies(dims["top_k"], dims["ranks"])
            speeds = {ranks: pair[which] for ranks, pair in normal.items()}
        else:
            size *= dims["top_k"]
            full = TOKENS[mode] * 8 * token_bytes(7168, ("fp8", "bf16")[which])
            speeds = {ranks: full / pair[which] for ranks, pair in LOW_LATENCY.items()}
        measured = (dims["t"], dims["d"], dims["top_k"]) == (TOKENS[mode], 7168, 8) and dims["ranks"] in speeds
        speed = between(speeds, dims["ranks"])
        return Found(size / speed, IMPORTED if measured else TRANSFERRED, f"DeepEP {mode.replace('_', ' ')}, README {commit}",
                     0.0 if measured else SPREAD, "" if measured else f"{speed / 1e9:.1f} GB/s held")


def copies(top_k, ranks):
    """Times that normal mode sends a token: to each chip of one node that needs it, or to each node, the own ones within."""
    if ranks <= DOMAIN:
        return comm.expected_distinct(ranks, top_k)
    nodes = -(-ranks // DOMAIN)
    return comm.expected_distinct(min(nodes, GROUPS), top_k)


def between(speeds, ranks):
    """byte/s at a number of ranks: linear in its logarithm between two, held outside; one node is no neighbour of several."""
    if ranks <= DOMAIN:
        return speeds[DOMAIN]
    known = sorted(r for r in speeds if r > DOMAIN)
    low = max((r for r in known if r <= ranks), default=known[0])
    high = min((r for r in known if r >= ranks), default=known[-1])
    part = log(ranks / low) / log(high / low) if low < ranks < high else 0.0
    return speeds[low] + part * (speeds[high] - speeds[low])
