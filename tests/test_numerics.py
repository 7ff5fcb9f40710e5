"""The codecs against every code and against ml_dtypes; the quantizer's rules; the judges do fail."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernomics import numerics as nm

ALL = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("decode, encode, dtype", [
    (nm.e4m3_decode, nm.e4m3_encode, ml_dtypes.float8_e4m3fn), (nm.e5m2_decode, nm.e5m2_encode, ml_dtypes.float8_e5m2)])
def test_every_code(decode, encode, dtype):
    values = decode(ALL)
    assert np.array_equal(values, ALL.view(dtype).astype(np.float64), equal_nan=True)
    finite = np.isfinite(values)
    assert np.array_equal(encode(values[finite]), ALL[finite])


@pytest.mark.parametrize("decode, encode, largest", [
    (nm.e4m3_decode, nm.e4m3_encode, 448), (nm.e5m2_decode, nm.e5m2_encode, 57344)])
def test_rounds_to_nearest_even(decode, encode, largest):
    values = np.unique(decode(ALL)[np.isfinite(decode(ALL))])
    middle = (values[1:] + values[:-1]) / 2
    codes = encode(middle)
    assert np.all(codes & 1 == 0), "ties go to the even code"
    assert np.array_equal(decode(encode(np.nextafter(middle, -np.inf))), values[:-1])
    assert np.array_equal(decode(encode(np.nextafter(middle, np.inf))), values[1:])
    assert np.array_equal(decode(encode([1e30, -1e30])), [largest, -largest])
    assert np.array_equal(encode([np.nan, np.inf, -np.inf]), [0x7F] * 3)
    assert np.array_equal(encode([0.0, -0.0]), [0, 0x80])


def test_ue8m0():
    assert np.array_equal(nm.ue8m0_decode(nm.ue8m0_encode(2.0 ** np.arange(-127, 128))), 2.0 ** np.arange(-127, 128))
    assert np.isnan(nm.ue8m0_decode(np.uint8(255)))
    for bad in (3.0, 0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError):
            nm.ue8m0_encode(bad)


def test_round_bf16():
    x = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    assert np.array_equal(nm.round_bf16(x), x.astype(ml_dtypes.bfloat16).astype(np.float64))


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1)])
@pytest.mark.parametrize("shape", [(300, 387), (2, 129, 200), (0, 128), (3, 0), (0, 129, 200)])
def test_dequantize_is_a_product_with_the_spread_scale(shape, block):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, shape, np.uint8)
    s = rng.random((*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], block))), np.float32)
    want = nm.e4m3_decode(codes) * nm.spread(s.astype(np.float64), block, shape)
    assert nm.dequantize(codes, s, block).tobytes() == want.tobytes()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(1, 128), (128, 128), (128, 1)]),
       st.sampled_from(["f32", "pow2"]), st.integers(0, 2**32 - 1))
def test_quantization_error(m, k, block, scale, seed):
    """A value comes back within half a step: 2**-4 of itself, or half the smallest step of its block."""
    x = np.random.default_rng(seed).standard_normal((m, k), np.float32) * np.float32(10) ** (seed % 7 - 3)
    codes, s = nm.quantize(x, block, scale, floor=0.0)
    error = np.abs(nm.dequantize(codes, s, block) - x)
    step = nm.spread(s.astype(np.float64), block, x.shape)
    assert np.all(error <= np.maximum(2.0**-4 * np.abs(x), step * 2.0**-10) * (1 + 1e-6))
    if scale == "pow2":
        assert np.all(np.frexp(s)[0] == 0.5)
        exact = nm.block_scale(x, block, "f32", 0.0)
        assert np.all((s >= exact) & (s < 2 * exact))


def test_quantizer_rules():
    x = np.array([[np.nan, 1, -np.inf, 448] + [0] * 124, [0] * 128], np.float32)
    codes, s = nm.quantize(x, (1, 128), floor=0.0)
    assert list(codes.view(np.uint8)[0, :4]) == [0x7F, 0x38, 0x7F, 0x7E] and list(s.ravel()) == [1, 1]
    tiny = np.full((1, 128), 1e-45, np.float32)
    assert nm.quantize(tiny, (1, 128), floor=0.0)[1][0, 0] == 1, "a scale that underflows becomes 1"
    assert nm.quantize(np.zeros((1, 4), np.float32), (1, 128))[1][0, 0] == np.float32(1e-4) / np.float32(448)


def test_judges_fail():
    rng = np.random.default_rng(0)
    r = rng.standard_normal((8, 8))
    y = r.astype(np.float32)

    def passes(measures):
        return all(v <= bound for v, bound in measures.values())

    noise = np.ones((8, 8))
    assert passes(nm.judge_sums(y, r, k=100, noise=noise))
    for wrong in (y * np.float32(1.001), np.where(np.arange(64).reshape(8, 8) == 5, np.float32(np.nan), y), -y):
        assert not passes(nm.judge_sums(wrong, r, k=100, noise=noise))
    assert not passes(nm.judge_equal(np.array([1, 2]), np.array([1, 3])))
    assert passes(nm.judge_equal(np.array([1.0, np.nan]), np.array([1.0, np.nan])))
    lse = np.zeros(8)
    assert passes(nm.judge_attention(y, lse, r, lse))
    assert not passes(nm.judge_attention(y, lse + 0.01, r, lse))
    assert not passes(nm.judge_attention(y * np.float32(1.02), lse, r, lse))
    assert nm.norm_error([np.inf, 1], [np.inf, 1]) == 0 and nm.norm_error([1, 1], [np.inf, 1]) == np.inf
