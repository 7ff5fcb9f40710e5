"""Run by the native test executable: how mla_decode shares its work on Hopper, and long and broken sequences of every cache."""

import itertools

import numpy as np
from emulator import bits, defined, judge, run_tests, start, workspace

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
    few = [(64, 3, 2, 16, (900, 0, 63)), (16, 2, 3, 8, (2, 700)), (64, 40, 1, 8, tuple(range(40, 80))), (32, 1, 1, 32, (1300,))]
    for kind, (page, b, q, h, lens) in (*itertools.product(("bf16", "u8"), [
            (1, 2, 1, 16, (1500, 700)), (48, 1, 2, 70, (900,)), (64, 3, 1, 64, (400, 0, 1200)), (64, 2, 1, 128, (700, 129)),
            (128, 1, 4, 40, (330,)), (64, 2, 4, 64, (0, 259))]), *(("u8", shape) for shape in few)):
        pages = sum(-(-n // page) for n in lens) + 2
        case = Case(b=b, q=q, h=h, lens=lens, page=page, p=pages, n=-(-max(lens) // page), softmax_scale=0.05, kv_cache=kind,
                    sink="f32")
        inputs, scalars = numpy_ops.sample(OP, case)
        want = defined(OP, inputs, scalars)
        got = set()
        for schedule in ((12, 0, 1.0), (12, 1, 0.0), (5, 2, 0.5)):
            outs = start(OP, inputs, scalars, schedule)
            judge(OP, outs, want, inputs, scalars, f"{case.id} with {schedule}")
            if schedule[0] == 12:
                got.add(bits(outs))
        assert len(got) == 1, "other bits with another schedule"


def test_keys_of_nan():
    """A key with a NaN makes the queries that see it NaN; those that do not see it keep their bits, beside infinite keys too."""
    for kind, h, page in (("bf16", 8, 64), ("bf16", 70, 16), ("u8", 8, 16), ("u8", 70, 64)):
        case = Case(b=2, q=3, h=h, lens=(130, 67), page=page, p=20, n=-(-130 // page), softmax_scale=0.05, kv_cache=kind)
        inputs, scalars = numpy_ops.sample(OP, case)
        good = start(OP, inputs, scalars, (24, 1, 0.0))
        for back, at, value in ((1, 300, 0x7fc0), (2, 0, 0x7f80)) if kind == "bf16" else (
                (1, 3, 0x7f), (2, 500, 0xff), (2, 515, 0x7f)):
            cache = inputs["kv_cache"].copy()
            key = 130 - back
            cache.view(np.uint16 if kind == "bf16" else np.uint8)[inputs["block_table"][0, key // page], key % page, at] = value
            if at == 515:  # of a scale
                cache[inputs["block_table"][0, key // page], key % page, 512:516] = 0xff
            out, lse = start(OP, inputs | {"kv_cache": cache}, scalars, (24, 1, 0.0))
            blind = 3 - back  # queries of the first sequence that do not see it
            assert np.isnan(out[0, blind:].astype(np.float32)).all() or value == 0x7f80
            assert out[0, :blind].tobytes() == good[0][0, :blind].tobytes() and out[1].tobytes() == good[0][1].tobytes()
            assert lse[0, :, :blind].tobytes() == good[1][0, :, :blind].tobytes()


def test_orders():
    """The same bits in many orders of warps, copies and products, of a sequence in many parts."""
    for kind, h, page, most in (("u8", 16, 64, 6), ("u8", 32, 32, 3), ("bf16", 16, 64, 3)):
        case = Case(b=1, q=1, h=h, lens=(1400,), page=page, p=50, n=44, softmax_scale=0.05, kv_cache=kind)
        inputs, scalars = numpy_ops.sample(OP, case)
        judge(OP, good := start(OP, inputs, scalars, (12, 0, 1.0)), defined(OP, inputs, scalars), inputs, scalars, case.id)
        assert all(bits(start(OP, inputs, scalars, (12, seed, 0.0))) == bits(good) for seed in range(1, most + 1))


def test_workspace_serves_again():
    """Whatever lies in the workspace, a call before included, the results are the same; counts of blocks are left at 0."""
    for h, kind, parts in ((8, "u8", 24), (8, "bf16", 24), (128, "bf16", 12)):
        case = Case(b=2, q=1, h=h, lens=(1500, 700), page=64, p=40, n=24, softmax_scale=0.05, kv_cache=kind)
        inputs, scalars = numpy_ops.sample(OP, case)
        space = workspace(OP, OP.bind(*inputs.values(), *scalars.values())[0])
        first = bits(start(OP, inputs, scalars, (24, 1, 0.5), space=space))
        assert {0} < set(space[:16 * parts].view(np.uint64).tolist()) <= {0, 2**64 - 1}
        for fill in (None, 0x5A):
            if fill:
                space[...] = fill
            assert bits(start(OP, inputs, scalars, (24, 2, 0.0), space=space)) == first


def test_scales_of_any_size():
    """Rows that see other keys than the next row, with scales 2^24 apart: as exact for the smallest as for the largest."""
    rng = np.random.default_rng(0)
    for h, lens in ((8, (200, 70)), (24, (130,)), (70, (200,))):
        case = Case(b=len(lens), q=1, h=h, lens=lens, page=64, p=6, n=4, softmax_scale=1.0, kv_cache="u8")
        inputs, scalars = numpy_ops.sample(OP, case)
        scale = inputs["kv_cache"][..., 512:528].view(np.float32)
        scale[...] = np.ldexp(rng.uniform(1, 2, scale.shape), rng.integers(-12, 13, scale.shape))
        rotated = inputs["kv_cache"][..., 528:].view(np.uint16)
        q = inputs["q"].view(np.uint16)
        rotated[...] = q[...] = 0
        for i in range(min(h, 64)):
            q[..., i, 512 + i] = 0x4100  # 8
            rotated[:, i, i] = 0x4100  # of each page
        want = defined(OP, inputs, scalars)
        for schedule in ((1, 0, 1.0), (24, 1, 0.0), (1, 2, 0.0), (1, 3, 0.0), (1, 4, 0.0)):
            out, lse = start(OP, inputs, scalars, schedule)
            got, right = (x.astype(np.float64).reshape(-1, 4, 128) for x in (out, want[0]))  # 128 columns have a scale
            assert (np.abs(got - right).max(-1) <= 2**-7 * np.abs(right).max(-1)).all()
            assert np.abs(lse - want[1]).max() < 1e-5


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
