"""Run by the native test executable: the plans of the FP8 products on Hopper, and each tile of theirs on sizes that cross it."""

import itertools

import numpy as np
from emulator import bits, defined, judge, run_tests, start

from kernomics import OPS, _cuda, numpy_ops
from kernomics.contract import Case

LIMIT = 227 * 1024  # bytes of shared memory of a block, and with 1 KiB each for two blocks beside each other


def test_places():
    """Every tile of the grid once, for any band; the tiles of a band before those of the next."""
    for tiles_m, tiles_n, band in itertools.product((1, 2, 7, 8, 9, 33), (1, 3, 17), (1, 3, 8)):
        places = [tuple(_cuda.gemm_place(i, tiles_m, tiles_n, band)) for i in range(tiles_m * tiles_n)]
        assert sorted(places) == list(itertools.product(range(tiles_m), range(tiles_n)))
        bands = [m // band for m, _ in places]
        assert bands == sorted(bands)


def test_splits_cover_k_once():
    for blocks, splits in itertools.product((0, 1, 2, 7, 56, 57), (1, 2, 4, 8)):
        starts = [_cuda.gemm_split_start(blocks, splits, r) for r in range(splits + 1)]
        assert starts[0] == 0 and starts[-1] == blocks
        sizes = np.diff(starts)
        assert sizes.min() >= 0 and sizes.max() - sizes.min() <= 1


def test_ring():
    for stages in (3, 4, 8):
        assert _cuda.gemm_ring(50, stages) == [[i % stages, i // stages % 2] for i in range(50)]


def test_tiles():
    """They fit into shared memory, the ring keeps a product busy, and copies land where the swizzle asks."""
    for swapped, x, y, cluster, stages, shared in (*_cuda.gemm_tiles(False), *_cuda.gemm_tiles(True)):
        assert x % 128 == 0 and y % 8 == 0 and 8 <= y <= 256 and (x // cluster) * 128 % 1024 == 0 and x // cluster <= 256
        assert stages >= 3 and shared <= LIMIT
        assert not swapped or 2 * (shared + 1024) <= LIMIT + 1024
        assert not swapped or stages * (x + y) * 128 >= y * x * 4, "a split's sums lie in the ring"


def test_plans():
    """A tile there is, splits that leave no block without k, few tokens swapped, and all of the chip where weights allow."""
    tiles = _cuda.gemm_tiles(False)
    weights = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (5, 3)]
    for m, (n, k), units in itertools.product((1, 8, 9, 31, 32, 64, 65, 128, 500, 4096), weights, (132, 114, 4)):
        tile, splits = _cuda.gemm_plan(m, n, k, units)
        swapped, x, y, _, _, _ = tiles[tile]
        assert splits in (1, 2, 4, 8) and splits <= -(-k // 128) and (swapped or splits == 1)
        assert swapped or m > 32, f"{m} rows in a slot of 64"
        assert not swapped or y >= min(m, 32), "up to 32 rows weights are read once"
        if swapped and splits < 8 and splits * 4 <= -(-k // 128):
            assert -(-n // x) * -(-m // y) * splits * 2 > units // 2, f"{m} {n} {k}: most of {units} multiprocessors idle"


def test_swizzle():
    """It permutes the 16-byte chunks of 1024 bytes, and eight rows' chunks of one column lie in eight banks of 16 bytes."""
    at = np.array([_cuda.swizzle128(i) for i in range(2048)])
    assert sorted(at) == list(range(2048)) and (at % 16 == np.arange(2048) % 16).all()
    for column in range(8):
        assert len({at[1024 + row * 128 + column * 16] % 128 // 16 for row in range(8)}) == 8


def test_fragments():
    """The 128 threads' registers hold each place of the tile once."""
    places = {tuple(_cuda.fragment(t, i)) for t in range(128) for i in range(16)}
    assert places == set(itertools.product(range(64), range(32)))


def test_every_dense_tile():
    """Sizes beyond one tile and one ring in each dim, rows that a tensor map addresses (k 16 i) or not, stored 8 columns
    at a time or one (n odd), both types."""
    op = OPS["fp8_gemm"]
    for tile, (swapped, x, y, _, stages, _) in enumerate(_cuda.gemm_tiles(False)):
        tokens, weights = (y, x) if swapped else (x, y)
        sizes = [(tokens + 3, 2 * weights + 24, (stages + 2) * 128 - 32, 1, "bf16"),
                 (tokens + 1, weights + 5, 128 + 48, 1, "f32"), (5, weights - 3, 300, 1, "bf16"),
                 (tokens + 3, 2 * weights + 5, 3 * 128, 1, "bf16")]
        if swapped:
            sizes += [(tokens, 3 * weights + 8, 9 * 128, 8, "f32"), (tokens + 2, weights + 8, 5 * 128, 2, "bf16"),
                      (tokens + 9, weights + 16, 3 * 128 + 5, 4, "bf16")]
        for m, n, k, splits, dtype in sizes:
            inputs, scalars = numpy_ops.sample(op, Case(m=m, n=n, k=k, out_dtype=dtype))
            want, got = defined(op, inputs, scalars), set()
            for schedule in ((3, 1, 0.0), (3, 2, 0.3)):
                outs = start(op, inputs, scalars, schedule, _cuda.fp8_gemm_sm90_plan, (tile, splits))
                judge(op, outs, want, inputs, scalars, f"tile {tile}, {m} x {n} x {k}, {splits} splits, {schedule}")
                got.add(bits(outs))
            assert len(got) == 1, "other bits with another schedule"


def test_every_grouped_tile():
    """Groups of no row, of one, of several tiles, at any offset, and rows past all groups."""
    op = OPS["fp8_grouped_gemm"]
    for tile, (swapped, x, y, _, _, _) in enumerate(_cuda.gemm_tiles(True)):
        tokens, weights = (y, x) if swapped else (x, y)
        rows = [0, 1, tokens + 3, 0, 7, tokens - 1, 0]
        for n, k in ((weights + 24, 384), (weights - 3, 200), (weights + 5, 144)):
            t, e = sum(rows) + 5, len(rows)
            inputs, scalars = numpy_ops.sample(op, Case(t=t, e=e, n=n, k=k))
            inputs["offsets"] = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
            want = defined(op, inputs, scalars)
            for schedule in ((3, 1, 0.0), (132, 2, 0.3)):
                outs = start(op, inputs, scalars, schedule, _cuda.fp8_grouped_gemm_sm90_plan, (tile, 1))
                judge(op, outs, want, inputs, scalars, f"tile {tile}, {n} x {k}, {schedule}")
                assert not outs[0][sum(rows):].astype(np.float32).any()


run_tests(globals())
