"""Group-limited top-k routing."""

from itertools import combinations
from typing import Literal

import numpy as np

from kernomics.contract import BF16, F32, I32, Case, Kernel, op
from kernomics.numerics import DTYPES, UNIT


def scores_of(logits, score):
    """Expert scores in float64: sigmoid, or softmax over each row."""
    x = logits.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if score == "sigmoid":
            return 1 / (1 + np.exp(-x))
        p = np.exp(x - x.max(axis=1, keepdims=True, initial=-np.inf))
        return p / p.sum(axis=1, keepdims=True)


def _groups(choice, n_group, group_score):
    """Score of each group ``[t, n_group]``: its best choice, or the sum of its two best."""
    parts = np.sort(choice.reshape(len(choice), n_group, choice.shape[1] // n_group), axis=2)
    return parts[:, :, -1] if group_score == "max" else parts[:, :, -2:].sum(axis=2)


def _check(error, e, top_k, n_group, topk_group):
    if not 1 <= top_k <= e:
        raise error("top_k", top_k, f"from 1 to the {e} experts")
    if n_group < 1 or e % n_group:
        raise error("n_group", n_group, f"a divisor of the {e} experts")
    if not 1 <= topk_group <= n_group:
        raise error("topk_group", topk_group, f"from 1 to the {n_group} groups")
    if topk_group * e // n_group < top_k:
        raise error("topk_group", topk_group, f"enough groups of {e // n_group} experts for top_k = {top_k}")


def _sample(rng, t, e, logits="f32", bias=None):
    x = 2 * rng.standard_normal((t, e))
    small = t > 9 and t * e < 25_000
    if small:
        x[0, e // 2] = np.nan
        x[1] = 0.5  # one tie of all experts
        x[2, ::2] = -np.inf
        x[3:t:2] = np.round(x[3:t:2])  # many ties
    drawn = {"logits": x.astype(np.float32).astype(DTYPES[logits])}
    if bias:
        bias = np.round(rng.standard_normal(e) * 4) / 32 - small  # equal ones keep ties, low ones make choices negative
        drawn["bias"] = bias.astype(np.float32)
    return drawn


def _explains(row, ids, topk_group, n_group, group_score):
    """Whether ``ids`` are a right choice for a row ``(choice, tolerance, tie)`` up to near ties.

    Expert i must come before j where its choice exceeds j's by more than both tolerances, or where both have the
    same logit and bias and i < j; groups likewise.
    """
    choice, tolerance, tie = row
    size = len(choice) // n_group
    best = [sorted(range(g * size, (g + 1) * size), key=lambda i: (-choice[i], i))[: 2 if group_score == "top2" else 1]
            for g in range(n_group)]
    totals = [sum(choice[i] for i in b) for b in best]
    slack = [2 * sum(tolerance[i] for i in b) for b in best]  # the sum rounds as well
    ties = [[tie[i] for i in b] for b in best]

    def first(values, slacks, keys, i, j):
        return keys[i] == keys[j] and i < j or values[i] - values[j] > slacks[i] + slacks[j]

    ahead = [sum(first(totals, slack, ties, h, g) for h in range(n_group)) for g in range(n_group)]
    behind = [sum(first(totals, slack, ties, g, h) for h in range(n_group)) for g in range(n_group)]
    sure = [g for g in range(n_group) if n_group - 1 - behind[g] < topk_group]  # too few could stand before it
    maybe = [g for g in range(n_group) if g not in sure and ahead[g] < topk_group]
    for extra in combinations(maybe, max(topk_group - len(sure), 0)):
        kept = {*sure, *extra}
        if not all(i // size in kept for i in ids):
            continue
        rest = [i for i in range(len(choice)) if i // size in kept and i not in ids]
        order = [(ids[a], ids[b]) for a in range(len(ids)) for b in range(a + 1, len(ids))]
        if not any(first(choice, tolerance, tie, b, a) for a, b in [*order, *((a, b) for a in ids for b in rest)]):
            return True
    return False


def _judge(got, want, inputs):
    """Ids are equal wherever every deciding gap exceeds 8 f32 ulp; weights are those of the ids returned.

    An f32 softmax first rounds ``logit - max``: its exp is off by up to ``|logit - max|`` half ulps more. Scores
    below the smallest normal number may be flushed to 0.
    """
    weights, ids = got
    logits, bias, top_k = inputs["logits"].astype(np.float64), inputs["bias"], want[1].shape[1]
    bias = np.zeros(logits.shape[1]) if bias is None else bias.astype(np.float64)
    scores = scores_of(inputs["logits"], inputs["score"])
    choice = scores + bias
    odd = np.isnan(choice).any(axis=1)
    half_ulps = np.full(scores.shape, 16.0)
    if inputs["score"] == "softmax":
        with np.errstate(invalid="ignore"):
            half_ulps += np.nan_to_num(np.abs(logits - logits.max(axis=1, keepdims=True, initial=-np.inf)), posinf=0)
    size = np.where(np.isfinite(choice), np.maximum(np.abs(bias), np.abs(choice)), 0)
    tolerance = UNIT["f32"] * (half_ulps * scores + 16 * size) / 2 + 2.0**-126
    wrong = 0
    for t in np.flatnonzero(np.any(ids != want[1], axis=1)):
        row = [int(i) for i in ids[t]]
        fine = not odd[t] and len(set(row)) == top_k and all(0 <= i < len(bias) for i in row)
        wrong += not (fine and _explains(
            (choice[t].tolist(), tolerance[t].tolist(), list(zip(logits[t], bias, strict=True))), row, inputs["topk_group"],
            inputs["n_group"], inputs["group_score"]))
    inside = np.clip(ids, 0, max(len(bias) - 1, 0))
    expected, allowed = (np.take_along_axis(v, inside, axis=1) for v in (scores, half_ulps))
    floor = 2.0**-126 * abs(inputs["scaling"])
    if inputs["renormalize"]:
        expected = expected / (expected.sum(axis=1, keepdims=True) + 1e-20)
        allowed = allowed + allowed.max(axis=1, keepdims=True, initial=0) + 2 * top_k
        floor = 1e-17 * abs(inputs["scaling"])  # flushed scores over a sum that 1e-20 bounds
    expected = expected * inputs["scaling"]
    with np.errstate(invalid="ignore"):
        error = np.abs(weights - expected) / (allowed * UNIT["f32"] * np.abs(expected) + floor)
    error = np.where(np.isnan(error), np.inf, error)[~odd]
    return {
        "rows with wrong ids": (wrong, 0),
        "worst weight / its bound": (float(error.max(initial=0)), 1.0),
        "weights not NaN in NaN rows": (int(np.sum(~np.isnan(weights[odd]))), 0),
    }


@op(
    flops=lambda t, e: 4 * t * e,  # exp, add, divide, bias; then comparisons
    cases=[
        Case(t=1, e=256, top_k=8, n_group=8, topk_group=4, scaling=2.5, bias="f32", bench="decode"),
        Case(t=128, e=256, top_k=8, n_group=8, topk_group=4, scaling=2.5, bias="f32", bench="decode, 128 tokens"),
        Case(t=4096, e=256, top_k=8, n_group=8, topk_group=4, scaling=2.5, bias="f32", bench="prefill"),
        Case(t=9, e=8, top_k=3, n_group=8, topk_group=3, bias="f32"),  # groups of one expert
        Case(t=65, e=21, top_k=5, n_group=3, topk_group=2, bias="f32"),  # divides no vector
        Case(t=37, e=160, top_k=6, n_group=8, topk_group=3, score="softmax", group_score="max", renormalize=False,
             scaling=16.0),  # DeepSeek-V2
        Case(t=33, e=64, top_k=8, logits="bf16", score="softmax"),  # one group, many ties
        Case(t=40, e=256, top_k=8, n_group=8, topk_group=4, logits="bf16", bias="f32"),
        Case(t=1, e=1, top_k=1),  # one token, one expert
        Case(t=0, e=16, top_k=2),  # empty
        Case(t=131, e=300, top_k=17, n_group=4, topk_group=3, bias="f32"),  # crosses every tile
        Case(t=5, e=12, top_k=12, n_group=2, topk_group=2),  # every expert
    ],
    sample=_sample,
    check=_check,
    rows="t",
    judge=_judge,
    kernels=[
        Kernel("cuda", "kernomics._cuda:moe_route", on="sm", where=lambda e, **_: e <= 1024),  # a warp's registers
        Kernel("triton", "kernomics.triton_kernels.moe_route:launch", on="gpu"),
        Kernel("cpu", "kernomics._cpu:moe_route",
               workspace=lambda dims, chip: min(dims["t"], 256) * (-(-dims["e"] // 16) * 16) * 16),
    ],
)
def moe_route(logits: (F32 | BF16)["t e"], bias: F32["e"] | None = None, *, top_k: int, n_group: int = 1,
              topk_group: int = 1, score: Literal["sigmoid", "softmax"] = "sigmoid",
              group_score: Literal["top2", "max"] = "top2", renormalize: bool = True,
              scaling: float = 1.0) -> (F32["t top_k"], I32["t top_k"]):
    """The ``top_k`` experts with the highest ``score(logits) + bias`` in the ``topk_group`` best groups.

    Parameters
    ----------
    logits : router outputs; -inf never wins
    bias : added for the choice only, not to the weights
    top_k : experts a token
    n_group : groups of neighbouring experts, a divisor of e
    topk_group : groups that a token may use
    score : sigmoid (DeepSeek-V3), or softmax over all experts (V2)
    group_score : a group's rank: "top2" adds its two best choice scores (V3; one where it has one expert),
        "max" takes the best (V2)
    renormalize : divide the weights by their sum + 1e-20
    scaling : factor on the weights

    Returns
    -------
    weights : scores (without bias) of the chosen experts, renormalized and scaled
    experts : their ids, by descending choice score

    Raises
    ------
    ContractError : when n_group does not divide e, topk_group exceeds n_group, or the groups hold fewer than top_k

    Notes
    -----
    Ties go to the lowest expert, or group. Experts outside the chosen groups are out even where every choice score
    is negative. A row with NaN in logits or bias gets ids 0..top_k-1 and NaN weights. Scores in float32.

    References
    ----------
    DeepSeek-V3 technical report, section 2.1.2; DeepSeek-V3 inference code, ``Gate``.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> logits = np.float32([[9, -9, 2, 1]])
    >>> kx.moe_route(logits, top_k=1, n_group=2, topk_group=1, backend="reference")  # 2 and 1 together beat 9 and -9
    (array([[1.]], dtype=float32), array([[2]], dtype=int32))
    """
    t, e = logits.shape
    scores = scores_of(logits, score)  # [t, e]
    choice = scores if bias is None else scores + bias.astype(np.float64)
    best = np.argsort(-_groups(choice, n_group, group_score), axis=1, kind="stable")[:, :topk_group]
    kept = np.zeros((t, n_group), bool)
    np.put_along_axis(kept, best, True, axis=1)
    excluded = np.repeat(~kept, e // n_group, axis=1)  # [t, e]
    experts = np.lexsort((-choice, excluded))[:, :top_k]  # stable: ties to the lowest id
    weights = np.take_along_axis(scores, experts, axis=1)
    if renormalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    odd = np.isnan(choice).any(axis=1, keepdims=True)
    return np.where(odd, np.nan, weights * scaling), np.where(odd, np.arange(top_k), experts)
