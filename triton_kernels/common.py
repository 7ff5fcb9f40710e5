"""What the Triton kernels share: the launch, the chip of a tensor, and e4m3 from and to bytes."""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from kernomics import chip

ASSUMED = None  # a chip.Chip that stands for the tensors' own where there is none: the interpreter, ahead-of-time compiles
FLOOR = 1e-4  # the default floor of fp8_quantize, of every op that quantizes on its way
LOG2E = 1.4426950408889634
# Triton before 3.9 brings ptxas 12.8: bench/tiles/h200.jsonl is measured with it, and in some of those tiles that of 3.9 spills.
OLD_PTXAS = tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 9)
COLLECT = None  # a list takes launches in place of the GPU: (kernel, grid, arguments, options)


def cdiv(a, b):
    """Triton's own takes 2 us on the host, and a launch needs many."""
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length() if n > 0 else 0


def chip_of(x):
    """The chip that tensor ``x`` lies on."""
    return ASSUMED or chip.current(x.device.index)


def run(kernel, grid, *args, **options):
    """Launch ``kernel`` over ``grid``; an empty grid is no launch."""
    if 0 in grid:
        return
    options.setdefault("enable_fp_fusion", True)  # Triton's default until 3.10
    if COLLECT is not None:
        COLLECT.append((kernel, grid, args, options))
    else:
        kernel[grid](*args, **options)


def raw(x):
    """An FP8 tensor as bytes: every chip can hold those."""
    import torch

    return x.view(torch.uint8)


def codes(x, native):
    """An FP8 operand of a matrix product as the chip takes it: e4m3 where ``native``, else bytes for ``e4m3_decode``."""
    return x if native else raw(x)


TWO_TO_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")


@triton.jit
def to_bf16(x):
    """x rounded to bf16, on NVIDIA two f32 at a time: the compiler converts FP8, f16 and what goes on as f32 one by one, at a
    quarter of the rate."""
    if is_cuda():
        return tl.inline_asm_elementwise(TWO_TO_BF16, "=r,f,f", [x.to(tl.float32)], tl.bfloat16, is_pure=True, pack=2)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def e4m3_decode(b):
    """e4m3 bytes as f16, exactly ``value / 256``: sign, exponent and mantissa move to their places, and f16 has eight more
    in the bias; a code of NaN is NaN. No comparison: those of many bytes at a time fill gfx942's scalar registers."""
    b = b.to(tl.uint16)
    x = (b & 0x7F) << 7
    nan = (x + 0x80) & 0x4000  # of 0x7f: the sum carries into the exponent's highest bit, whose others are set
    return (x | nan | (b & 0x80) << 8).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def e4m3_encode(x, native: tl.constexpr):
    """f32 as e4m3 bytes: to nearest even, saturating at 448; NaN becomes 0x7f. x is no Inf."""
    if native:
        if is_cuda():  # cvt.satfinite
            out = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            out = tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            out = tl.where(x == x, out, 0x7F).to(tl.uint8)
    else:
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.uint32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1) >> 20) - (120 << 3)  # rounds at bit 20; the bias falls from 127 to 7
        small = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xF  # the last bit of 2**14 counts 2**-9
        out = tl.where(x == x, tl.where(size < 0.015625, small, normal) | sign, 0x7F).to(tl.uint8)
    return out


@triton.jit
def block_scale(amax, floor, pow2: tl.constexpr):
    """``max(amax, floor) / 448``, for ``pow2`` the next power of two; 1 where that is 0 (see ``fp8_quantize``)."""
    scale = tl.div_rn(tl.maximum(amax, floor), 448.0)
    if pow2:
        bits = scale.to(tl.uint32, bitcast=True)
        whole = bits.to(tl.float32).to(tl.uint32, bitcast=True)  # a subnormal counts steps of 2**-149: its bits as a number
        small = ((whole + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True).to(tl.uint32)
        bits = tl.where(bits < 0x800000, small, (bits + 0x7FFFFF) & 0x7F800000)
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def quotients(v, scale, STEPS: tl.constexpr):
    """``v / scale`` for a block's scales, the bits of a true division; NaN for NaN and Inf, whose remainder is Inf - Inf.

    From the rounded reciprocal: a first guess is off by an ulp or two, and each step takes its remainder off: after two the
    result is the rounded quotient (Markstein's theorem), for values of bf16 after one. Values and scales are multiplied by
    2**64 where remainders of tiny ones would underflow."""
    up = tl.where(scale < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)
    scale *= up
    inverse = tl.div_rn(1.0, scale)
    v *= up
    q = v * inverse
    for _ in tl.static_range(STEPS):
        q = tl.fma(-tl.fma(q, scale, -v), inverse, q)
    return q


@triton.jit
def finite_size(v):
    """Magnitudes; 0 for NaN and Inf, which an amax does not count."""
    size = tl.abs(v)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def quantize(v, codes, scales, row, rows, first, k, floor, ROWS: tl.constexpr, BLOCKS: tl.constexpr, POW2: tl.constexpr,
             NATIVE: tl.constexpr):
    """Codes and scales, one a row and 128 columns, of bf16 values in f32 ``[ROWS, BLOCKS * 128]`` from column ``first * 128``
    on."""
    scale = block_scale(tl.max(tl.reshape(finite_size(v), (ROWS, BLOCKS, 128)), axis=2), floor, POW2)
    each = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, BLOCKS, 128)), (ROWS, BLOCKS * 128))
    col = first * 128 + tl.arange(0, BLOCKS * 128)
    inside = (row < rows)[:, None] & (col < k)[None, :]
    tl.store(codes + row[:, None] * k + col[None, :], e4m3_encode(quotients(v, each, 1), NATIVE), mask=inside)
    block = first + tl.arange(0, BLOCKS)
    inside = (row < rows)[:, None] & (block < tl.cdiv(k, 128))[None, :]
    tl.store(scales + row[:, None] * tl.cdiv(k, 128) + block[None, :], scale, mask=inside)
