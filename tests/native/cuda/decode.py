"""Run by the native test executable: how mla_decode shares its work on Hopper, and long and broken sequences of every cache."""

import itertools

import numpy as np
from emulator import bits, defined, judge, run_tests, start

from kernomics import OPS, _cuda, numpy_ops
from kernomics.contract import Case

GAP = 2  # cost of a sequence and group of rows beside its tiles of 64 keys
OP = OPS["mla_decode"]


def test_shares():
    """Every tile of keys once, in order; an item cut by the ends of parts alone, its pieces in slots of their own where the
    kernel that joins them looks; no part above its share, 4 % more where that cuts no item."""
    rng = np.random.default_rng(0)
    for groups, parts in itertools.product((1, 3), (1, 2, 3, 66, 132)):
        for lens in ([], [0], [1], [64, 0, 65], [40000], [0] * 300, [4096] * 128, rng.integers(0, 9000, 130),
                     [3, *rng.integers(0, 200, 40), 30000, 0]):
            lens = [int(n) for n in lens]
            tiles = [max(1, -(-n // 64)) for n in lens]
            items, slots = {}, []
            shares = _cuda.decode_segments(lens, groups, 1 << 20, parts)
            assert len(shares) == parts
            for part, share in enumerate(shares):
                for seq, group, first, last, whole, slot in share:
                    assert first < last
                    items.setdefault((seq, group), []).append((part, first, last, whole, slot))
            assert list(items) == list(itertools.product(range(len(lens)), range(groups)))
            for (seq, _), pieces in items.items():
                assert [p[1] for p in pieces] + [tiles[seq]] == [0] + [p[2] for p in pieces]
                assert [p[0] for p in pieces] == list(range(pieces[0][0], pieces[0][0] + len(pieces)))
                assert all(whole == (len(pieces) == 1) for *_, whole, _ in pieces)
                if len(pieces) > 1:
                    assert [p[4] for p in pieces] == [2 * p[0] + (i == 0) for i, p in enumerate(pieces)]
                    slots += [p[4] for p in pieces]
            assert len(set(slots)) == len(slots)
            most = max((sum(s[3] - s[2] for s in share) for share in shares), default=0)
            even = -(-groups * sum(n + GAP for n in tiles) // parts)
            assert most <= even * 1.04, "a part does more than its share"


def test_lengths_beyond_the_table():
    """A length that the block table has no room for is cut to it, a negative one is none."""
    assert [s[3] for s in _cuda.decode_segments([10**6, -5], 1, 130, 1)[0]] == [3, 1]


def test_long_sequences():
    """Sequences over many parts, several tiles of rows, alone and two a cluster, pages of every kind, both caches."""
    for kind, (page, b, q, h, lens) in itertools.product(("bf16", "u8"), [
            (1, 2, 1, 16, (1500, 700)), (48, 1, 2, 70, (900,)), (64, 3, 1, 64, (400, 0, 1200)), (64, 2, 1, 128, (700, 129)),
            (128, 1, 4, 40, (330,)), (64, 2, 4, 64, (0, 259))]):
        pages = sum(-(-n // page) for n in lens) + 2
        case = Case(b=b, q=q, h=h, lens=lens, page=page, p=pages, n=-(-max(lens) // page), softmax_scale=0.05, kv_cache=kind,
                    sink="f32")
        inputs, scalars = numpy_ops.sample(OP, case)
        want = defined(OP, inputs, scalars)
        got = set()
        for schedule in ((24, 0, 1.0), (24, 1, 0.0), (5, 2, 0.5)):
            outs = start(OP, inputs, scalars, schedule)
            judge(OP, outs, want, inputs, scalars, f"{case.id} with {schedule}")
            if schedule[0] == 24:
                got.add(bits(outs))
        assert len(got) == 1, "other bits with another schedule"


def test_broken_tables():
    """A page that does not exist makes its own sequence NaN and no other, and nothing is read there."""
    for kind, page in itertools.product(("bf16", "u8"), (16, 64)):
        case = Case(b=3, q=1, h=8, lens=(100, 130, 90), page=page, p=40, n=-(-130 // page), softmax_scale=0.05, kv_cache=kind)
        inputs, scalars = numpy_ops.sample(OP, case)
        good = start(OP, inputs, scalars, (24, 1, 0.0))
        for wrong in (-1, 40, 2**31 - 1):
            table = inputs["block_table"].copy()
            table[1, 1] = wrong
            out, lse = start(OP, inputs | {"block_table": table}, scalars, (24, 1, 0.0))
            assert np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all()
            for i in (0, 2):
                assert out[i].tobytes() == good[0][i].tobytes() and lse[i].tobytes() == good[1][i].tobytes()


run_tests(globals())
