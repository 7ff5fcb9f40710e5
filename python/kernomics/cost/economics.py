"""The arithmetic of the cost model: every formula a function, its unit equation in its docstring."""

from math import ceil


def roofline_seconds(flops, peak, size, bandwidth):
    """s = max(FLOP / (FLOP/s), byte / (byte/s)): neither limit can be beaten, both may overlap."""
    return max(flops / peak, size / bandwidth)


def chips_needed(size, memory):
    """chips = ceil(byte / (byte/chip))"""
    return ceil(size / memory)


def shared_seconds(seconds, chips):
    """s = chip*s / chips: perfect balance, no communication, so a bound."""
    return seconds / chips


def tokens_per_second(tokens, seconds):
    """token/s = token / s"""
    return tokens / seconds


def dollars_per_mtoken(dollars_per_hour, tokens_per_s):
    """$/Mtoken = $/h / (3600 s/h) / (token/s) * 1e6 token/Mtoken"""
    return dollars_per_hour / 3600 / tokens_per_s * 1e6


def fleet_dollars(nodes, chips_per_node, hours, dollars_per_hour):
    """$ = node * chip/node * h * $/(chip*h)"""
    return nodes * chips_per_node * hours * dollars_per_hour


def expected_active(t, e, top_k):
    """Mean number of experts that t tokens reach when each draws top_k of e uniformly: e * (1 - (1 - top_k/e)**t)."""
    return e * (1 - (1 - top_k / e) ** t)
