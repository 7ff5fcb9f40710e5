"""Communication of one layer: bytes each chip sends, and seconds by latency and bandwidth (alpha-beta).

A chip has two links: *scale-up* to the chips of its domain (NVLink, Infinity Fabric, NeuronLink, ICI), *scale-out* to all
others. Bandwidths are one way. Without a table the latency is 0 and the peaks of the links hold: a bound.
"""

from dataclasses import dataclass
from math import ceil, comb

import numpy as np

from kernomics.cost import Unknown
from kernomics.cost.economics import expected_active


@dataclass(frozen=True)
class Links:
    """A chip's links; ``alpha`` is the latency of a message in seconds."""

    domain: int
    up: float | None  # bytes/s
    out: float | None
    alpha: float = 0.0

    @staticmethod
    def of(chip, alpha=0.0):
        domain = int(chip.get("scale_up_domain") or 1)
        return Links(domain, chip.get("scale_up_bytes_per_s"), chip.get("scale_out_bytes_per_s"), alpha)

    def seconds(self, up, out, messages=1):
        """s = alpha * messages + max(byte / (byte/s)) of the two links, which work at the same time."""
        times = []
        for size, speed, name in ((up, self.up, "scale_up_bytes_per_s"), (out, self.out, "scale_out_bytes_per_s")):
            if size > 0:
                if speed is None:
                    raise Unknown(f"{name} is unknown")
                times.append(size / speed)
        return self.alpha * messages + max(times, default=0.0)


def expected_distinct(places, draws):
    """Mean number of different places that ``draws`` uniform draws reach."""
    return expected_active(draws, places, 1)


def expected_places(places, top_k, n_group=1, topk_group=1):
    """Mean number of different places that hold a token's ``top_k`` experts, all within ``topk_group`` of ``n_group`` groups.

    Groups lie one after another on the places. Where a place holds m whole groups and j of those are chosen, a draw misses it
    with 1 - j/topk_group; j is hypergeometric.
    """
    if places >= n_group:
        return expected_distinct(places * topk_group / n_group, top_k)
    m = n_group // places
    chance = [comb(m, j) * comb(n_group - m, topk_group - j) / comb(n_group, topk_group) for j in range(min(m, topk_group) + 1)]
    return places * sum(p * (1 - (1 - j / topk_group) ** top_k) for j, p in enumerate(chance))


def exchange_bytes(t, token_bytes, top_k, ranks, domain, n_group=1, topk_group=1):
    """(scale-up, scale-out) bytes that a chip sends to hand t tokens to ``top_k`` experts each on ``ranks`` chips.

    A token goes once to each domain that needs it over scale-out, and from there once to each chip over scale-up. Routing that
    chooses groups first reaches fewer of both.
    """
    nodes = ceil(ranks / domain)
    chips = expected_places(ranks, top_k, n_group, topk_group) * (1 - 1 / ranks)  # copies that leave the chip
    outside = expected_places(nodes, top_k, n_group, topk_group) * (1 - 1 / nodes) if nodes > 1 else 0.0
    return t * token_bytes * max(chips - outside, 0.0), t * token_bytes * outside


def all_reduce_bytes(size, ranks):
    """Bytes a chip sends to sum ``size`` bytes over ``ranks`` chips: reduce-scatter and all-gather."""
    return 2 * size * (ranks - 1) / ranks


def all_reduce_seconds(links, size, ranks):
    """Within a domain over scale-up; across domains the shares of a chip cross scale-out once more."""
    if ranks <= 1:
        return 0.0
    inside = min(ranks, links.domain)
    nodes = ceil(ranks / links.domain)
    out = all_reduce_bytes(size / inside, nodes) if nodes > 1 else 0.0
    return links.seconds(all_reduce_bytes(size, inside), out, messages=2 if inside > 1 else 0)


def fit_alpha_beta(sizes, seconds):
    """(alpha s, bytes/s) of s = alpha + byte / beta with the least relative error, both positive."""
    sizes, seconds = np.asarray(sizes, float), np.asarray(seconds, float)
    from scipy.optimize import nnls

    (alpha, per_byte), _ = nnls(np.column_stack([1 / seconds, sizes / seconds]), np.ones(len(sizes)))
    return float(alpha), float("inf") if per_byte == 0 else float(1 / per_byte)
