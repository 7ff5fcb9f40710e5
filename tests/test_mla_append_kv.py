"""Laws of mla_append_kv."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernomics as kx
from kernomics.contract import Case
from kernomics.numerics import judge_attention, pack_fp8_cache, unpack_fp8_cache
from kernomics.numpy_ops import sample

BF16 = ml_dtypes.bfloat16
OP = kx.OPS["mla_append_kv"]
FULL = dict(norm_weight="bf16", cos="f32", sin="f32")


def draw(seed=0, **case):
    inputs, scalars = sample(OP, Case(**{"t": 11, "p": 4, "page": 5, **case}), seed)
    return inputs | scalars


def append(x, backend):
    """The cache after the call, ``[slots, bytes or values]``; the arguments stay as they were."""
    cache = x["kv_cache"].copy()
    assert kx.mla_append_kv(**x | {"kv_cache": cache}, backend=backend) is None
    return cache.reshape(-1, cache.shape[2])


def judged(cache, x):
    want = x["kv_cache"].copy()
    OP.define(**x | {"kv_cache": want})
    return OP.judge((cache.reshape(want.shape),), (want,), x)


def value(x):
    return np.asarray(x).astype(np.float64)


both_caches = pytest.mark.parametrize("kv_cache", ["bf16", "u8"])


@both_caches
def test_append_then_decode_equals_decode_on_the_packed_cache(backend, kv_cache):
    t, page = 37, 8
    rng = np.random.default_rng(0)
    latent, rope = (rng.standard_normal((t, d)).astype(BF16) for d in (512, 64))
    q, pages = rng.standard_normal((1, 2, 5, 576)).astype(BF16), np.array([[4, 0, 3, 1, 2]], np.int32)
    slots = pages[0, np.arange(t) // page] * np.int64(page) + np.arange(t) % page
    cache = np.full((5, page, 656 if kv_cache == "u8" else 1152), 0xFF, np.uint8).view(np.uint8 if kv_cache == "u8" else BF16)
    for part in np.array_split(np.random.default_rng(1).permutation(t), 4):  # in any order, in several calls
        kx.mla_append_kv(latent[part], rope[part], cache, slots[part], backend=backend)
    tokens = pack_fp8_cache(latent, rope) if kv_cache == "u8" else np.concatenate([latent, rope], axis=1)
    packed = np.zeros((5 * page, cache.shape[2]), cache.dtype)
    packed[:t] = tokens
    lens, straight = np.array([t], np.int32), np.arange(5, dtype=np.int32)[None]
    got = kx.mla_decode(q, cache, pages, lens, softmax_scale=0.1, backend=backend)
    want = kx.mla_decode(q, packed.reshape(cache.shape), straight, lens, softmax_scale=0.1, backend=backend)
    for measure, (error, bound) in judge_attention(*got, *want).items():
        assert error <= bound, (measure, error, bound)


@both_caches
def test_skipped_tokens_and_other_slots_keep_their_bytes(backend, kv_cache):
    x = draw(skipped=4, kv_cache=kv_cache, **FULL)
    before, after = x["kv_cache"].reshape(20, -1).view(np.uint8), append(x, backend).view(np.uint8)
    touched = x["slots"][x["slots"] >= 0]
    assert len(touched) == 7
    changed = np.flatnonzero((before != after).any(axis=1))
    assert np.array_equal(changed, np.sort(touched))
    assert np.array_equal(append(x | {"slots": np.full(11, -1)}, backend).view(np.uint8), before)


@both_caches
def test_of_duplicate_slots_one_wins_whole(backend, kv_cache):
    x = draw(t=9, kv_cache=kv_cache, **FULL)
    alone = append(x | {"slots": np.arange(9)}, backend).view(np.uint8)
    x["slots"] = np.array([3, 3, 7, 3, 7, 3, 3, 7, 3])
    both = append(x, backend).view(np.uint8)
    for slot, tokens in ((3, (0, 1, 3, 5, 6, 8)), (7, (2, 4, 7))):
        assert any(np.array_equal(both[slot], alone[i]) for i in tokens)


@pytest.mark.parametrize("scale", ["pow2", "f32"])
def test_quantization_is_within_half_a_step(backend, scale):
    x = draw(kv_cache="u8", scale=scale)
    x["kv_c"] = (value(x["kv_c"]) * np.exp2(np.arange(-5, 6))[:, None]).astype(BF16)
    tokens, latent = append(x, backend)[x["slots"]], value(x["kv_c"])
    scales = np.ascontiguousarray(tokens[:, 512:528]).view(np.float32)
    amax = np.abs(latent).reshape(11, 4, 128).max(axis=2)
    exact = (amax.astype(np.float32) / np.float32(448)).astype(np.float64)
    assert np.array_equal(scales, exact if scale == "f32" else np.exp2(np.ceil(np.log2(exact))))
    wide, restored = np.repeat(value(scales), 128, axis=1), unpack_fp8_cache(tokens)
    assert (np.abs(restored[:, :512] - latent) <= np.maximum(2.0**-4 * np.abs(latent), 2.0**-10 * wide) * (1 + 1e-6)).all()
    assert np.array_equal(restored[:, 512:], value(x["k_pe"]))
    again = append(x | {"kv_c": restored[:, :512].astype(BF16)}, backend)[x["slots"]] if scale == "pow2" else tokens
    assert np.array_equal(unpack_fp8_cache(again), restored)  # what was quantized once stays


def test_zeros_take_the_floor(backend):
    x = draw(kv_cache="u8")
    x["kv_c"][:] = 0
    tokens = append(x, backend)[x["slots"]]
    assert not tokens[:, :512].any()
    assert (np.ascontiguousarray(tokens[:, 512:528]).view(np.float32) == 2.0**-22).all()  # 1e-4 / 448, rounded up


def test_norm_makes_unit_mean_squares(backend):
    x = draw(norm_weight="f32")
    x["norm_weight"][:] = 1
    x["kv_c"] = (value(x["kv_c"]) * np.exp2(np.arange(11))[:, None]).astype(BF16)
    latent = value(append(x, backend)[x["slots"], :512])
    np.testing.assert_allclose(np.mean(latent**2, axis=1), 1, rtol=2e-3)
    doubled = append(x | {"norm_weight": 2 * x["norm_weight"]}, backend)[x["slots"], :512]
    assert np.array_equal(value(doubled), 2 * latent)


def test_rope_turns_pairs(backend):
    x = draw(cos="f32", sin="f32")
    pe, turned = value(x["k_pe"]).reshape(11, 32, 2), value(append(x, backend)[x["slots"], 512:]).reshape(11, 32, 2)
    np.testing.assert_allclose(np.hypot(*np.moveaxis(turned, 2, 0)), np.hypot(*np.moveaxis(pe, 2, 0)), rtol=2.0**-7)
    want = (pe[..., 0] + 1j * pe[..., 1]) * (x["cos"] + 1j * x["sin"])
    np.testing.assert_allclose(turned[..., 0] + 1j * turned[..., 1], want, rtol=2.0**-7)
    still = append(x | {"cos": np.ones_like(x["cos"]), "sin": np.zeros_like(x["sin"])}, backend)
    assert np.array_equal(value(still[x["slots"], 512:]), value(x["k_pe"]))


@both_caches
def test_both_rope_layouts_turn_the_same_pairs(backend, kv_cache):
    x = draw(kv_cache=kv_cache, **FULL)
    halves = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])  # pair (2i, 2i+1) -> (i, i+32)
    apart = append(x | {"k_pe": x["k_pe"][:, halves], "interleaved": False}, backend)[x["slots"]]
    paired = append(x, backend)[x["slots"]]
    if kv_cache == "u8":
        assert np.array_equal(apart[:, :528], paired[:, :528])
        apart, paired = (np.ascontiguousarray(c[:, 528:]).view(BF16) for c in (apart, paired))
    else:
        assert np.array_equal(apart[:, :512], paired[:, :512])
        apart, paired = apart[:, 512:], paired[:, 512:]
    assert np.array_equal(apart, paired[:, halves])


def test_nan_and_inf_become_nan_codes(backend):
    x = draw(kv_cache="u8")
    want = append(x, backend)
    x["kv_c"][2, 5], x["kv_c"][3, 200] = np.nan, np.inf
    got = append(x, backend)
    assert got[x["slots"][2], 5] == 0x7F and got[x["slots"][3], 200] == 0x7F
    assert (got != want).sum() <= 2 + 2 * (128 + 4)  # themselves, and their blocks if they held the largest value
    normed = append(x | {"norm_weight": np.ones(512, np.float32)}, backend)[x["slots"][2], :512]
    assert np.isnan(unpack_fp8_cache(np.concatenate([normed, want[0, 512:]]))[:512]).all()  # NaN in the mean square


@both_caches
def test_the_judge_takes_f32_arithmetic_and_no_wrong_byte(kv_cache):
    x = draw(t=200, p=4, page=64, kv_cache=kv_cache, **FULL)
    kv_c, k_pe = (x[n].astype(np.float32) for n in ("kv_c", "k_pe"))
    latent = kv_c / np.sqrt(np.mean(kv_c**2, axis=1, keepdims=True) + np.float32(1e-6)) * x["norm_weight"].astype(np.float32)
    pe = k_pe.copy()
    pe[:, ::2] = k_pe[:, ::2] * x["cos"] - k_pe[:, 1::2] * x["sin"]
    pe[:, 1::2] = k_pe[:, ::2] * x["sin"] + k_pe[:, 1::2] * x["cos"]
    tokens = (latent.astype(BF16), pe.astype(BF16))
    tokens = pack_fp8_cache(*tokens) if kv_cache == "u8" else np.concatenate(tokens, axis=1)
    cache = x["kv_cache"].reshape(256, -1).copy()
    cache[x["slots"]] = tokens
    assert all(error <= bound for error, bound in judged(cache, x).values())
    other = np.setdiff1d(np.arange(256), x["slots"])[0]
    for slot, byte in ((x["slots"][3], 100), (x["slots"][3], 515), (x["slots"][7], -3), (other, 9)):
        wrong = cache.copy()
        row = wrong[slot].view(np.uint8)
        row[byte | 1 if kv_cache == "bf16" else byte] ^= 2 if byte != 515 else 1
        assert any(error > bound for error, bound in judged(wrong, x).values()), byte


@pytest.mark.parametrize("bad, says", [(-2, "-2 for token 4"), (20, "20 for token 4"), (2**40, "-1 or 0 to 19")])
def test_slots_out_of_range_raise_and_write_nothing(backend, bad, says):
    x = draw()
    x["slots"][4] = bad
    before = x["kv_cache"].copy()
    with pytest.raises(kx.ContractError, match=says):
        kx.mla_append_kv(**x, backend=backend)
    assert np.array_equal(before, x["kv_cache"])


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_cos_without_sin_raises(backend, name):
    x = draw(**FULL)
    with pytest.raises(kx.ContractError, match=f"{name} is missing"):
        kx.mla_append_kv(**x | {name: None}, backend=backend)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    t=st.integers(0, 40), page=st.integers(1, 20), kv_cache=st.sampled_from(["bf16", "u8"]),
    scale=st.sampled_from(["pow2", "f32"]), norm_weight=st.sampled_from([None, "bf16", "f32"]),
    rope=st.sampled_from([None, "f32"]), interleaved=st.booleans(), seed=st.integers(0, 9),
)
def test_any_shape(backend, t, page, kv_cache, scale, norm_weight, rope, interleaved, seed):
    x = draw(seed, t=t, p=-(-t // page) + 1, page=page, kv_cache=kv_cache, scale=scale, norm_weight=norm_weight, cos=rope,
             sin=rope, interleaved=interleaved, skipped=t // 3)
    for measure, (error, bound) in judged(append(x, backend), x).items():
        assert error <= bound, (measure, error)
