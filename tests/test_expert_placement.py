"""Laws of expert_placement, and examples worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernomics as kx


def place(load, **words):
    return kx.expert_placement(np.asarray(load, np.float32), **words)


def busiest(load, expert_of, copies, gpus):
    """Load of the busiest GPU, by layer, when an expert's load splits evenly over its copies."""
    per_slot = np.take_along_axis(load / copies, expert_of, axis=1)
    return per_slot.reshape(len(load), gpus, -1).sum(axis=2).max(axis=1)


def test_published_example():
    """The worked example of EPLB's README: two layers of 12 experts in 4 groups, 16 replicas, 2 nodes of 4 GPUs."""
    load = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    expert_of, _, _ = place(load, replicas=16, groups=4, nodes=2, gpus=8)
    assert expert_of.tolist() == [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
                                  [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def test_by_hand():
    """Loads 8, 4, 2, 2 and six slots: the copies go to expert 0 (8), then, of 4 and 4, to the lower index again.

    Copies then weigh 8/3, 8/3, 8/3, 4, 2, 2. Heaviest first, each to the lighter GPU with room: 4 to GPU 0; the
    three of 8/3 to GPU 1, 1 (4 against 2.67), 0 (4 against 5.33); 2 to GPU 1 (6.67 against 5.33), the last 2 to GPU 0.
    """
    expert_of, replicas_of, copies = place([[8, 4, 2, 2]], replicas=6, groups=1, nodes=1, gpus=2)
    assert copies.tolist() == [[3, 1, 1, 1]]
    assert expert_of.tolist() == [[1, 0, 3, 0, 0, 2]]
    assert replicas_of.tolist() == [[[3, 4, 1], [0, -1, -1], [5, -1, -1], [2, -1, -1]]]


def test_ties_go_to_the_lower_index():
    expert_of, _, copies = place(np.ones((1, 4)), replicas=6, groups=1, nodes=1, gpus=2)
    assert copies.tolist() == [[2, 2, 1, 1]]
    # Slots 0..5 hold 0, 1, 2, 3, 0, 1; the whole experts 2 and 3 weigh most, then come the halves in slot order.
    assert expert_of.tolist() == [[2, 0, 0, 3, 1, 1]]


@settings(max_examples=40, deadline=None)
@given(l=st.integers(0, 3), groups=st.integers(1, 6), size=st.integers(1, 5), nodes=st.integers(1, 4), share=st.integers(1, 3),
       extra=st.integers(0, 3), seed=st.integers(0, 999))
def test_laws(l, groups, size, nodes, share, extra, seed):
    e, gpus = groups * size, nodes * share
    replicas = gpus * (-(-e // gpus) + extra)
    load = np.random.default_rng(seed).integers(0, 50, (l, e)).astype(np.float32)
    expert_of, replicas_of, copies = place(load, replicas=replicas, groups=groups, nodes=nodes, gpus=gpus)
    assert all(x.dtype == np.int32 for x in (expert_of, replicas_of, copies))
    assert expert_of.shape == (l, replicas) and replicas_of.shape == (l, e, copies.max(initial=1))
    assert (copies >= 1).all() and (copies.sum(1) == replicas).all()
    for i in range(l):
        assert np.array_equal(np.bincount(expert_of[i], minlength=e), copies[i])
        for x in range(e):  # replicas_of is the inverse of expert_of
            slots = replicas_of[i, x]
            assert (slots[: copies[i, x]] >= 0).all() and (slots[copies[i, x]:] == -1).all()
            assert sorted(slots[slots >= 0]) == np.flatnonzero(expert_of[i] == x).tolist()
        if groups % nodes == 0:  # a group's experts stay on one node
            node = np.arange(replicas) // (replicas // nodes)
            for g in range(groups):
                assert len(set(node[expert_of[i] // size == g])) == 1
    again = place(load, replicas=replicas, groups=groups, nodes=nodes, gpus=gpus)
    assert all(np.array_equal(x, y) for x, y in zip(again, (expert_of, replicas_of, copies), strict=True))


@pytest.mark.parametrize("nodes, policy", [(4, "hierarchical"), (16, "global")])
def test_better_than_naive(nodes, policy):
    """Against experts in order, the first ones twice, and against no redundancy."""
    load = np.random.default_rng(0).gamma(1.0, 100, (5, 256)).astype(np.float32)
    expert_of, _, copies = place(load, replicas=320, groups=8, nodes=nodes, gpus=32)
    naive = np.tile(np.concatenate([np.arange(256), np.arange(64)]), (5, 1))
    naive_copies = 1 + (np.arange(256) < 64) + np.zeros((5, 1), int)
    in_order = load.reshape(5, 32, 8).sum(2).max(1)
    ideal = load.sum(1) / 32
    got = busiest(load, expert_of, copies, 32)
    assert (got < busiest(load, naive, naive_copies, 32)).all() and (got < in_order).all()
    assert (got < (1.02 if policy == "global" else 1.25) * ideal).all()


@pytest.mark.parametrize("change, name", [({"groups": 5}, "groups"), ({"gpus": 3}, "gpus"), ({"replicas": 13}, "replicas"),
                                          ({"replicas": 8}, "replicas"), ({"nodes": 0}, "nodes"), ({"groups": -1}, "groups")])
def test_bad_keywords(change, name):
    with pytest.raises(kx.ContractError, match=f"expert_placement: {name} is"):
        place(np.ones((1, 12)), **{"replicas": 16, "groups": 4, "nodes": 2, "gpus": 4, **change})


@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_bad_load(value):
    load = np.ones((2, 4))
    load[1, 2] = value
    with pytest.raises(kx.ContractError, match="expert_placement: load is"):
        place(load, replicas=4, groups=2, nodes=1, gpus=2)
