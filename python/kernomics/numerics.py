"""FP8 codecs, block scales and error measures, in NumPy. Every rounding rule of the project is defined here."""

import ml_dtypes
import numpy as np

from kernomics import contract

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = {"f32": np.dtype(np.float32), "bf16": BF16, "fp8": FP8, "u8": np.dtype(np.uint8),
          "i32": np.dtype(np.int32), "i64": np.dtype(np.int64)}
contract.CODES.update({DTYPES[name]: code for code, name in enumerate(contract.NAMES)})
# A dtype keyword may be spelled as a name, a NumPy dtype or its scalar type.
contract.CODES.update({name: code for code, name in enumerate(contract.NAMES)})
contract.CODES.update({DTYPES[name].type: code for code, name in enumerate(contract.NAMES)})

E4M3_MAX, E5M2_MAX = 448.0, 57344.0
E4M3_NAN = 0x7F  # and 0xFF
# FP8 tensor cores keep about 14 bits of a sum over 128 products, after which kernels add in f32: judge_sums' derivation
# with sqrt(128) terms and that unit. A judge adds inputs.get("tensor_core", 0) to its ``extra``.
TENSOR_CORE = 4 * 128**0.5 * 2.0**-14
# Kernels for tensor cores round softmax weights p to bf16: sum(p v) of values N(0, 1), as drawn, errs by a standard
# deviation of at most 2**-9 * sqrt(sum p**2) <= 2**-9; four of these.
BF16_WEIGHTS = 4 * 2.0**-9
UNIT = {"f32": 2.0**-24, "bf16": 2.0**-8, "fp8": 2.0**-4}  # unit roundoff: |rounded - x| <= UNIT * |x|


# ---------------------------------------------------------------- codecs


def _encode(x, mantissa, bias, largest, nan):
    """Codes of a small float format, round-to-nearest-even, saturating; NaN and Inf give the NaN code."""
    x = np.asarray(x, np.float64)
    finite = np.isfinite(x)
    a = np.minimum(np.abs(np.where(finite, x, 0)), largest)
    exponent = np.where(a > 0, np.maximum(np.frexp(a)[1] - 1, 1 - bias), 1 - bias)
    # Steps per binade 2**mantissa; a carry out of the mantissa runs into the exponent by itself.
    steps = np.rint(np.ldexp(a, mantissa - exponent)).astype(np.int64)
    code = ((exponent + bias - 1) << mantissa) + steps
    code = np.where(np.signbit(x), code | 0x80, code)
    return np.where(finite, code, nan).astype(np.uint8)


def _decode_table(mantissa, bias, nans, infs=()):
    code = np.arange(256)
    exponent, fraction = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
    normal = np.ldexp((1 << mantissa) + fraction.astype(float), exponent - bias - mantissa)
    value = np.where(exponent > 0, normal, np.ldexp(fraction.astype(float), 1 - bias - mantissa))
    value[[c for c in infs]] = np.inf
    value[[c for c in nans]] = np.nan
    return np.where(code & 0x80, -value, value)


_E4M3 = _decode_table(3, 7, nans=(0x7F, 0xFF))
_E5M2 = _decode_table(2, 15, nans=(0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF), infs=(0x7C, 0xFC))


def e4m3_encode(x):
    """uint8 e4m3fn codes of ``x``: nearest even, saturating at 448; NaN and Inf give 0x7f."""
    return _encode(x, 3, 7, E4M3_MAX, E4M3_NAN)


def e4m3_decode(codes):
    """float64 values of e4m3fn codes (uint8, or an ml_dtypes array); 0x7f and 0xff are NaN."""
    return _E4M3[np.asarray(codes).view(np.uint8)]


def e5m2_encode(x):
    """uint8 e5m2 codes of ``x``: nearest even, saturating at 57344; NaN and Inf give 0x7f."""
    return _encode(x, 2, 15, E5M2_MAX, 0x7F)


def e5m2_decode(codes):
    """float64 values of e5m2 codes."""
    return _E5M2[np.asarray(codes).view(np.uint8)]


def ue8m0_encode(scale):
    """uint8 exponents of positive powers of two: ``2**(code - 127)``; other input raises ValueError."""
    fraction, exponent = np.frexp(np.asarray(scale, np.float64))
    if not np.all((fraction == 0.5) & (exponent >= -126) & (exponent <= 128)):
        raise ValueError("ue8m0 holds powers of two from 2**-127 to 2**127 only")
    return (exponent + 126).astype(np.uint8)


def ue8m0_decode(codes):
    """float64 scales of ue8m0 codes; 255 is NaN."""
    codes = np.asarray(codes)
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(np.int64) - 127))


def round_bf16(x):
    """``x`` rounded to bf16 (through f32, as kernels do), as float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x).astype(np.float32).astype(BF16).astype(np.float64)


# ---------------------------------------------------------------- block scales


def spread(scale, block, shape):
    """A block scale repeated to one value per element: ``[m/block0, k/block1] -> [m, k]``."""
    for axis, size in enumerate(block, start=scale.ndim - len(block)):
        scale = np.repeat(scale, size, axis=axis)
    return scale[tuple(slice(s) for s in shape)]


def dequantize(codes, scale, block):
    """float64 ``codes * scale`` with one scale per ``block`` of the last two dims."""
    x, (b0, b1) = e4m3_decode(codes), block
    columns = np.repeat(np.asarray(scale, np.float64), b1, axis=-1)[..., : x.shape[-1]]
    for i in range(columns.shape[-2]) if b0 > 1 else ():  # in place: `spread` over both dims takes ten times as long
        x[..., i * b0 : (i + 1) * b0, :] *= columns[..., i : i + 1, :]
    return x if b0 > 1 else np.multiply(x, columns, out=x)


def block_scale(x, block, scale="f32", floor=1e-4):
    """f32 scales of ``fp8_quantize``: ``max(amax of finite values, floor) / 448``, by block of ``[m, k]``."""
    x = np.asarray(x, np.float32)
    (m, k), (b0, b1) = x.shape, block
    rows, cols = -(-m // b0), -(-k // b1)
    padded = np.zeros((rows * b0, cols * b1), np.float32)
    padded[:m, :k] = np.where(np.isfinite(x), np.abs(x), 0)
    amax = padded.reshape(rows, b0, cols, b1).max(axis=(1, 3), initial=0)
    s = np.maximum(amax, np.float32(floor)) / np.float32(E4M3_MAX)
    if scale == "pow2":
        fraction, exponent = np.frexp(s)
        s = np.ldexp(np.float32(1), exponent - (fraction == 0.5)).astype(np.float32)
        s = np.where(fraction == 0, np.float32(0), s)
    return np.where(s == 0, np.float32(1), s).astype(np.float32)


def quantize(x, block, scale="f32", floor=1e-4):
    """e4m3 codes and f32 scales of ``x[m, k]``: see ``fp8_quantize``."""
    x = np.asarray(x).astype(np.float32)
    s = block_scale(x, block, scale, floor)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = e4m3_encode(x / spread(s, block, x.shape))  # a true f32 division
    return codes.view(FP8), s


# ---------------------------------------------------------------- error measures
#
# A judge is ``judge(got, want, inputs) -> {measure: (value, bound)}`` on tuples of arrays; a result passes
# when every value is at most its bound. ``want`` is float64 (or exact integers). Bounds are derived, see below.


def norm_error(y, r):
    """``norm(y - r) / norm(r)``; where r holds NaN or infinities y must hold the same, else infinity."""
    y, r = np.asarray(y, np.float64), np.asarray(r, np.float64)
    odd = ~np.isfinite(r)
    if not np.array_equal(y[odd], r[odd], equal_nan=True) or not np.all(np.isfinite(y[~odd])):
        return np.inf
    difference = np.linalg.norm(y[~odd] - r[~odd])
    return float(difference / max(np.linalg.norm(r[~odd]), 1e-300)) if difference else 0.0


def cos_diff(y, r):
    """``1 - 2 x.y / (x.x + y.y)``, DeepGEMM's and FlashMLA's measure."""
    y, r = (np.nan_to_num(np.asarray(v, np.float64).ravel(), posinf=0, neginf=0) for v in (y, r))
    whole = y @ y + r @ r
    return float(1 - 2 * (y @ r) / whole) if whole else 0.0


def rounded(r, dtype):
    """``r`` rounded to the output's dtype, as float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(r).astype(np.float32).astype(dtype).astype(np.float64)


def judge_sums(y, r, *, k, noise, unit_acc=UNIT["f32"], extra=0.0):
    """Judge sums of ``k`` products; ``noise = sqrt(sum (a_i b_i)**2)`` per element, broadcastable to r.

    Rounding the partial sums, each about sqrt(i/k) * noise, adds sqrt(k/2)/sqrt(3) * unit * noise of standard
    deviation (uniform rounding errors); ten of these hold for 1e9 outputs, hence c = 10/sqrt(6) = 4.
    ``extra`` is a further relative error that the definition allows (a rounded intermediate).
    """
    y64, r = np.asarray(y).astype(np.float64), np.asarray(r, np.float64)
    unit = UNIT[contract.NAMES[contract.CODES[y.dtype]]]
    acc = 4 * np.sqrt(k) * unit_acc * np.broadcast_to(noise, r.shape)
    whole = 2 * norm_error(rounded(r, y.dtype), r)
    finite = np.isfinite(r)
    size = max(np.linalg.norm(r[finite]), 1e-300)
    whole += float(np.linalg.norm(np.nan_to_num(acc[finite])) / size) + extra
    with np.errstate(invalid="ignore"):
        over = np.abs(y64 - r) / (2 * unit * np.abs(r) + acc + extra * noise + 1e-300)
    over = over[finite & (y64 != r)]
    return {"norm error": (norm_error(y64, r), whole), "worst element / its bound": (float(over.max(initial=0)), 1.0)}


def judge_equal(y, r, name="unequal elements"):
    """Judge results that must be bit-equal; NaN equals NaN."""
    y, r = np.asarray(y), np.asarray(r)
    if y.dtype == FP8:
        y, r = y.view(np.uint8), r.view(np.uint8)
    y, r = (v.astype(np.float64) for v in (y, r))
    same = (y == r) | (np.isnan(y) & np.isnan(r))
    return {name: (int(np.sum(~same)), 0)}


def judge_attention(out, lse, want_out, want_lse, rounding=0.0):
    """FlashMLA's public rule: out within abs 8e-4 or rel 2.01/128 and cos-diff 5e-6; lse abs 1e-6 or rel 8.01/65536.

    Its abs is for values of 0.1; ``rounding`` takes its place where a kernel rounds the weights for larger values
    (BF16_WEIGHTS).
    """

    def worst(y, r, absolute, relative):
        y, r = np.asarray(y).astype(np.float64), np.asarray(r, np.float64)
        same = (y == r) | (np.isnan(y) & np.isnan(r))
        with np.errstate(invalid="ignore"):
            over = np.abs(y - r) / np.maximum(absolute, relative * np.abs(r))
        return float(np.where(same, 0, np.where(np.isnan(over), np.inf, over)).max(initial=0))

    return {
        "out norm error": (norm_error(np.asarray(out).astype(np.float64), want_out), 2 * UNIT["bf16"]),
        "out worst element / its bound": (worst(out, want_out, max(8e-4, rounding), 2.01 / 128), 1.0),
        "out cos-diff": (cos_diff(np.asarray(out).astype(np.float64), want_out), 5e-6),
        "lse worst element / its bound": (worst(lse, want_lse, 1e-6, 8.01 / 65536), 1.0),
    }


def judge_default(got, want, inputs):
    """Without a judge of its own an op's results may err twice what rounding the reference errs; integers are equal."""
    measures = {}
    for i, (y, r) in enumerate(zip(got, want)):
        name = contract.NAMES[contract.CODES[y.dtype]]
        if name in ("f32", "bf16"):
            bound = 2 * norm_error(rounded(r, y.dtype), np.asarray(r, np.float64)) + 8 * UNIT["f32"]
            measures[f"output {i} norm error"] = norm_error(y.astype(np.float64), r), bound
        else:
            measures |= judge_equal(y, r, f"output {i} unequal elements")
    return measures


# ---------------------------------------------------------------- attention and its caches


def softmax(scores):
    """``(p, lse)`` over the last axis; -inf is a masked score, and a row of those gives p = 0 and lse = -inf."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        top = np.where(np.isfinite(top), top, 0)
        lse = top + np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))
        p = np.where(lse == -np.inf, 0, np.exp(scores - lse))
    return p, lse[..., 0]


def sink_weight(lse, sink):
    """``exp(lse) / (exp(lse) + exp(sink))``; 0 where lse is -inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(lse == -np.inf, 0, 1 / (1 + np.exp(np.asarray(sink, np.float64) - lse)))


def pack_fp8_cache(latent, rope, scale="pow2"):
    """uint8 ``[t 656]`` of ``latent[t 512]`` and ``rope[t 64]``: 512 e4m3 codes, four f32 scales, 64 bf16 values."""
    codes, scales = quantize(latent, (1, 128), scale)
    parts = codes, scales, np.asarray(rope).astype(np.float32).astype(BF16)
    return np.concatenate([np.ascontiguousarray(x).view(np.uint8) for x in parts], axis=1)


def unpack_fp8_cache(tokens):
    """float64 ``[... 576]`` of uint8 ``tokens[... 656]``."""
    scales = np.ascontiguousarray(tokens[..., 512:528]).view(np.float32).astype(np.float64)
    rope = np.ascontiguousarray(tokens[..., 528:]).view(BF16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        latent = e4m3_decode(tokens[..., :512]) * np.repeat(scales, 128, axis=-1)
    return np.concatenate([latent, rope], axis=-1)


def cache_values(tokens):
    """float64 ``[... 576]`` of cache entries in either layout."""
    return unpack_fp8_cache(tokens) if tokens.dtype == np.uint8 else tokens.astype(np.float64)


def draw_cache(rng, p, page, used, dtype):
    """A "bf16" or "u8" cache of ``p`` pages: tokens of about N(0, 1) in the flat slots ``used``, NaN everywhere else."""
    cache = np.full((p * page, 656 if dtype == "u8" else 1152), 0xFF, np.uint8)  # 0xff.. is NaN in e4m3, f32 and bf16
    count = len(used)
    rope = rng.standard_normal((count, 64), np.float32).astype(BF16)
    if dtype == "u8":
        pool = e4m3_encode(64 * rng.standard_normal(1 << 14))
        codes = pool[rng.integers(0, 1 << 14, (count, 512), dtype=np.uint16)]
        scales = rng.uniform(0.5, 1.5, (count, 4)).astype(np.float32) / 64
        cache[used] = np.concatenate([codes, scales.view(np.uint8), rope.view(np.uint8)], axis=1)
        return cache.reshape(p, page, 656)
    latent = rng.standard_normal((count, 512), np.float32).astype(BF16)
    cache[used] = np.concatenate([latent, rope], axis=1).view(np.uint8)
    return cache.view(BF16).reshape(p, page, 576)


# ---------------------------------------------------------------- SwiGLU, index data


def silu(x):
    """``x / (1 + exp(-x))`` in float64."""
    x = np.asarray(x).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return x / (1 + np.exp(-x))


def swiglu(h):
    """``silu(gate) * up`` of rows ``gate | up``, rounded to bf16, as float64."""
    gate, up = np.split(np.asarray(h).astype(np.float64), 2, axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return round_bf16(silu(gate) * up)


def check_offsets(error, offsets, t):
    """Group offsets start at 0, do not decrease and end within the ``t`` rows."""
    if offsets[0] != 0:
        raise error("offsets", f"{offsets[0]} at the start", "0 at the start")
    if np.any(offsets[1:] < offsets[:-1]):
        i = int(np.argmax(offsets[1:] < offsets[:-1]))
        raise error("offsets", f"{offsets[i]}, then {offsets[i + 1]}", "not decreasing")
    if offsets[-1] > t:
        raise error("offsets", f"{offsets[-1]} at the end", f"at most {t} rows")


def check_index(error, name, index, size, lowest=-1):
    """Every entry of ``index`` lies in ``[lowest, size)``."""
    odd = (index < lowest) | (index >= size)
    if odd.any():
        raise error(name, f"{index[odd][0]} somewhere", f"within [{lowest}, {size})")


def draw_offsets(rng, t, e, active=None):
    """Offsets of ``e`` groups in ``t`` rows: ragged, one empty, some rows past the end; or ``active`` even groups."""
    if active is not None:
        ends = np.zeros(e, np.int64)
        ends[np.sort(rng.permutation(e)[:active])] = np.diff(np.arange(active + 1) * t // active)
        ends = np.cumsum(ends)
    else:
        ends = np.sort(rng.integers(t // 2, t + 1, e)) * np.arange(1, e + 1) // max(e, 1)
        if e > 2:
            ends[e // 2] = ends[e // 2 - 1]
    return np.concatenate([[0], ends]).astype(np.int32)


def draw_experts(rng, t, e, top_k, active=None, dropped=0.0):
    """``top_k`` distinct ids a token; exactly ``active`` (by default as many as t * top_k can reach) occur.

    A share ``dropped`` of the slots then becomes -1.
    """
    pool = rng.permutation(e)[: active or min(e, max(t, 1) * top_k)]
    ids = pool[rng.permuted(np.tile(np.arange(len(pool)), (t, 1)), axis=1)[:, :top_k]].reshape(t, top_k)
    if top_k:
        deal = min(t, -(-len(pool) // top_k))  # these tokens go through the whole pool once
        ids[:deal] = pool[np.arange(deal * top_k).reshape(deal, top_k) % len(pool)]
    return np.where(rng.random(ids.shape) < dropped, -1, ids).astype(np.int32)


def draw_weights(rng, t, top_k):
    """Positive routing weights that sum to about 1."""
    w = rng.uniform(0.2, 1, (t, top_k))
    return (w / w.sum(1, keepdims=True, initial=1e-20)).astype(np.float32)
