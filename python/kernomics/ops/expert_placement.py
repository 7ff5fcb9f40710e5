"""Placement of redundant experts on GPUs (EPLB)."""

import numpy as np

from kernomics.contract import F32, I32, Case, op


def _check(error, e, replicas, groups, nodes, gpus):
    for name, value in (("groups", groups), ("nodes", nodes), ("gpus", gpus)):
        if value < 1:
            raise error(name, value, "at least 1")
    if replicas < e:
        raise error("replicas", replicas, f"at least one an expert ({e})")
    if e % groups:
        raise error("groups", groups, f"a divisor of the {e} experts")
    if gpus % nodes:
        raise error("gpus", gpus, f"a multiple of the {nodes} nodes")
    if replicas % gpus:
        raise error("replicas", replicas, f"a multiple of the {gpus} gpus")
    if e < 1 and replicas:
        raise error("load", "without experts", "at least one expert")


def _check_data(error, load):
    if not np.all(np.isfinite(load) & (load >= 0)):
        raise error("load", "negative or not finite somewhere", "at least 0")


def _pack(load, packs):
    """Equally many items a pack, heaviest first, each to the lightest pack with room: (pack, rank within it)."""
    room = len(load) // packs
    if room == 1:
        return np.arange(packs), np.zeros(packs, int)
    pack, rank = np.zeros((2, len(load)), int)
    weight, items = np.zeros(packs), np.zeros(packs, int)
    for i in np.argsort(-load, kind="stable"):
        p = np.argmin(np.where(items < room, weight, np.inf))  # ties: the lowest pack
        pack[i], rank[i] = p, items[p]
        weight[p] += load[i]
        items[p] += 1
    return pack, rank


def _replicate(load, slots):
    """Every expert once, then one more copy of the expert with the highest load a copy: (expert of slot, copies)."""
    expert, copies = list(range(len(load))), np.ones(len(load), int)
    for _ in range(slots - len(load)):
        i = int(np.argmax(load / copies))  # ties: the lowest expert
        expert.append(i)
        copies[i] += 1
    return np.array(expert, int), copies


def _place(load, replicas, groups, nodes, gpus):
    """One layer: (expert of each slot, the copy's number)."""
    group = len(load) // groups
    node, rank = _pack(load.reshape(groups, group).sum(1), nodes)  # whole groups to nodes
    expert_of, copy_of = np.zeros((2, replicas), int)
    slots, share = replicas // nodes, gpus // nodes
    for n in range(nodes):
        mine = np.flatnonzero(node == n)
        mine = mine[np.argsort(rank[mine])]  # groups in the order they were packed
        experts = (mine[:, None] * group + np.arange(group)).ravel()  # [e / nodes]
        local, copies = _replicate(load[experts], slots)
        seen = np.zeros(len(experts), int)
        number = np.zeros(slots, int)  # which copy of its expert a slot holds
        for s, i in enumerate(local):
            number[s], seen[i] = seen[i], seen[i] + 1
        gpu, place = _pack((load[experts] / copies)[local], share)
        position = n * slots + gpu * (slots // share) + place
        expert_of[position], copy_of[position] = experts[local], number
    return expert_of, copy_of


def _bytes(l, e, replicas):
    return 4 * (2 * l * e + 2 * l * replicas)  # load and copies; each replica stands in both maps


@op(
    flops=lambda l, e, replicas: l * (replicas - e) * e,  # one search of e loads a redundant copy
    bytes=_bytes,
    cases=[
        Case(l=1, e=256, replicas=288, groups=8, nodes=4, gpus=32, bench="prefill, one layer on 32 GPUs"),
        Case(l=4, e=256, replicas=288, groups=8, nodes=18, gpus=144, bench="decode, global policy"),
        Case(l=3, e=12, replicas=16, groups=4, nodes=2, gpus=8),
        Case(l=2, e=15, replicas=18, groups=3, nodes=2, gpus=6),  # groups do not divide by nodes: global
        Case(l=1, e=1, replicas=1, groups=1, nodes=1, gpus=1),
        Case(l=0, e=4, replicas=4, groups=2, nodes=1, gpus=2),  # empty
    ],
    sample=lambda rng, l, e: {"load": rng.gamma(0.5, 100, (l, e)).astype(np.float32)},
    check=_check,
    check_data=_check_data,
    host=True,
)
def expert_placement(load: F32["l e"], *, replicas: int, groups: int, nodes: int,
                     gpus: int) -> (I32["l replicas"], I32["l e max_copies"], I32["l e"]):
    """Redundant copies of the busiest experts, spread so that the busiest GPU has little to do (EPLB).

    Parameters
    ----------
    load : measured load of each expert, by layer; finite, at least 0
    replicas : slots of all GPUs together, a multiple of gpus and at least e
    groups : expert groups; a group's experts stay on one node (a token is routed to few groups)
    nodes : machines
    gpus : a multiple of nodes; GPU g holds slots ``g * replicas / gpus`` on

    Returns
    -------
    expert_of : the expert in each slot
    replicas_of : the slots that hold each expert, -1 beyond its copies; max_copies is the most over all layers
    copies : number of slots of each expert

    Raises
    ------
    ContractError : when groups do not divide e, nodes gpus, gpus replicas; fewer replicas than experts; bad load

    Notes
    -----
    Host code in NumPy. Hierarchical where nodes divide groups: whole groups are packed onto nodes, copies are made
    within a node, then packed onto its GPUs; otherwise global, as if there were one group and one node. Ties go to
    the lower index throughout.

    References
    ----------
    EPLB, github.com/deepseek-ai/EPLB, ``rebalance_experts``; DeepSeek-V3 technical report, section 3.4.

    Examples
    --------
    >>> import numpy as np, kernomics as kx
    >>> expert_of, replicas_of, copies = kx.expert_placement(
    ...     np.float32([[10, 30, 20]]), replicas=4, groups=1, nodes=1, gpus=2)
    >>> expert_of  # GPU 0: 20 + 10, GPU 1: 15 + 15
    array([[2, 0, 1, 1]], dtype=int32)
    >>> replicas_of[0]
    array([[ 1, -1],
           [ 2,  3],
           [ 0, -1]], dtype=int32)
    >>> copies
    array([[1, 2, 1]], dtype=int32)
    """
    l, e = load.shape
    if groups % nodes:
        groups = nodes = 1
    expert_of, copy_of = np.zeros((2, l, replicas), int)
    for i in range(l):
        expert_of[i], copy_of[i] = _place(load[i].astype(np.float64), replicas, groups, nodes, gpus)
    copies = np.array([np.bincount(row, minlength=e) for row in expert_of], int).reshape(l, e)
    replicas_of = np.full((l, e, copies.max(initial=1)), -1)
    layer = np.arange(l)[:, None]
    replicas_of[layer, expert_of, copy_of] = np.arange(replicas)
    return expert_of.astype(np.int32), replicas_of.astype(np.int32), copies.astype(np.int32)
