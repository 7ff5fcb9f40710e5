"""Attention over a paged latent cache: the kernels of ``mla_decode`` and ``mla_decode_sparse``.

Queries and heads are one dimension of rows, tiled by BM; the keys of an item (a sequence, or a sparse query) come in
blocks of BN. A key is read once and serves as K (576 columns) and V (its first 512). Of the 656-byte tokens the codes
enter the products as bf16, which holds them exactly; their f32 scales multiply the scores and the weights.

A schedule lays the blocks of all items on a line, GAP blocks between items for what each costs beyond its keys, and
cuts the line into ``parts`` of equal length. A program takes one part for one tile of rows: it looks its items up from
the lengths, gives out the items that lie within the part, and leaves of others out, maximum and total in the
workspace, at most two of them, for ``merge_kernel``. ``span[i]``: the programs of the first and the last part of item i
that have its first tile of rows.

Weights are rounded to bf16 for the product with the values. SWAP: keys take the rows of the products, for few rows on
chips whose instructions have 64 or more; the free half of the columns takes what the rounding leaves. EARLY: conditions
that always hold keep a block's work behind the loads of the next block, and the compiler from chaining products.
"""

import torch
import triton
import triton.language as tl
from kernomics.triton_kernels.common import LOG2E, OLD_PTXAS, cdiv, chip_of, run

GAP = 2  # blocks that an item costs beyond its keys: first loads that nothing hides, and its results


# ---------------------------------------------------------------- schedule


@triton.jit
def sizes(lens, i, b, uniform, most, BN: tl.constexpr, GAP: tl.constexpr):
    """Blocks of the items ``i``, at least one, and GAP; 0 beyond the last."""
    if lens is not None:
        length = tl.minimum(tl.maximum(tl.load(lens + i, mask=i < b, other=0), 0), most)
        return tl.where(i < b, tl.maximum(tl.cdiv(length, BN), 1) + GAP, 0)
    else:
        return tl.where(i < b, tl.maximum(tl.cdiv(uniform, BN), 1) + GAP, 0)


@triton.jit
def schedule(lens, b, uniform, most, parts, part, BN: tl.constexpr, GAP: tl.constexpr, LEAST: tl.constexpr):
    """Of a part: where it begins and ends on the line, its items [first, last), and where the first of them begins."""
    work, longest = 0, 1
    for at in range(0, b, 256):
        n = sizes(lens, at + tl.arange(0, 256), b, uniform, most, BN, GAP)
        work += tl.sum(n, axis=0)
        longest = tl.maximum(longest, tl.max(n, axis=0))
    size = tl.maximum(tl.cdiv(work, parts), LEAST)
    whole = tl.cdiv(size, longest) * longest
    size = tl.where(whole * 24 <= size * 25, whole, size)  # up to 4 % longer so as to cut no item where all are alike
    begin = part * size
    end = begin + size
    first, last, start, before = 0, 0, 0, 0
    for at in range(0, b, 256):
        i = at + tl.arange(0, 256)
        n = sizes(lens, i, b, uniform, most, BN, GAP)
        ends = before + tl.cumsum(n, axis=0)
        passed = (ends - GAP <= begin) & (i < b)
        first += tl.sum(passed.to(tl.int32), axis=0)
        start += tl.sum(tl.where(passed, n, 0), axis=0)
        last += tl.sum(((ends - n < end) & (i < b)).to(tl.int32), axis=0)
        before += tl.sum(n, axis=0)
    return begin, end, first, last, start


# ---------------------------------------------------------------- keys


@triton.jit
def lookup(places, item, n, stop, width, pages, PAGE: tl.constexpr, BN: tl.constexpr, SPARSE: tl.constexpr,
           RUN: tl.constexpr):
    """Slots in the cache of the BN keys from ``n`` on, -1 for none, or the first one for a RUN; and a sign of a wrong page.
    A slot fits 32 bits: 2**31 tokens are more than a terabyte."""
    key = n + tl.arange(0, BN)
    inside = key < stop
    if SPARSE:
        slot = tl.load(places + item * width + key, mask=inside, other=-1)
        return tl.where(slot < pages * PAGE, slot, -1), 0
    elif RUN:
        page = tl.load(places + item * width + n // PAGE, mask=n < stop, other=0)
        ok = (page >= 0) & (page < pages)
        return tl.where(ok, page, 0) * PAGE + n % PAGE, tl.where(ok, 0, 1)
    else:
        page = tl.load(places + item * width + key // PAGE, mask=inside, other=0)
        ok = (page >= 0) & (page < pages)
        return tl.where(inside & ok, page * PAGE + key % PAGE, -1), tl.where(inside, tl.where(ok, 0, 1), 0)


@triton.jit
def there(slot, n, stop, BN: tl.constexpr):
    """Which of the keys of ``lookup`` there are."""
    if len(slot.shape) == 0:
        return n + tl.arange(0, BN) < stop
    else:
        return slot >= 0


@triton.jit
def row_starts(x, slot, stride: tl.constexpr, BN: tl.constexpr):
    """Pointers to the keys of ``lookup``. From one slot on they take one register and constant offsets, in 64 bits as the
    compiler must see that nothing wraps."""
    slot = slot.to(tl.int64)
    if len(slot.shape) == 0:
        return x + slot * stride + tl.arange(0, BN).to(tl.int64) * stride
    else:
        return x + slot * stride


WIDEN = tl.constexpr("""{
    .reg .b16 a, b, p, q, r, s; .reg .b32 x, y; .reg .f32 f, g, h, i;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 x, a;
    cvt.rn.f16x2.e4m3x2 y, b;
    mov.b32 {p, q}, x;
    mov.b32 {r, s}, y;
    cvt.f32.f16 f, p;
    cvt.f32.f16 g, q;
    cvt.f32.f16 h, r;
    cvt.f32.f16 i, s;
    cvt.rn.bf16x2.f32 $0, g, f;
    cvt.rn.bf16x2.f32 $1, i, h;
}""")


@triton.jit
def widen(x, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Codes as bf16, exactly their values. In PTX as Triton's own goes by single f16, at an eighth of the speed, and
    converts anew for each of two layouts."""
    if ASM:
        return tl.inline_asm_elementwise(WIDEN, "=r,=r,r", [x], tl.bfloat16, is_pure=False, pack=4)
    elif NATIVE:
        return x.to(tl.bfloat16)
    else:
        x = x.to(tl.uint32)
        size = x & 0x7F
        value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # the bias grows by 120
        x = value.to(tl.uint32, bitcast=True) >> 16 | (x & 0x80) << 8 | (size + 1 >> 7) * 0x7FC0  # the last: 0x7f is NaN
        return x.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def load_part(latent, slot, ok, c: tl.constexpr, W: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Operand ``c`` of ``load_latent``."""
    at = row_starts(latent, slot, 656 if FP8 else 576, ok.shape[0])[:, None]
    return tl.load(at + (c * W + tl.arange(0, W))[None, :], mask=ok[:, None], other=0.0 if NATIVE or not FP8 else 0)


@triton.jit
def load_latent(latent, slot, ok, C: tl.constexpr, W: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """The 512 columns of the keys in ``slot`` as C operands [BN, W]; zeros for keys without ``ok``."""
    out = ()
    for c in tl.static_range(C):
        out = out + (load_part(latent, slot, ok, c, W, FP8, NATIVE),)
    return out


@triton.jit
def wide(k, C: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """The parts of ``load_latent`` as bf16."""
    out = ()
    for c in tl.static_range(C):
        out = out + (widen(k[c], NATIVE, ASM) if FP8 else k[c],)
    return out


@triton.jit
def load_rope(rope, slot, ok, FP8: tl.constexpr, SWAP: tl.constexpr):
    """The 64 rotated columns of the keys [BN, 64] if SWAP, else [64, BN]."""
    at = row_starts(rope + (264 if FP8 else 512), slot, 328 if FP8 else 576, ok.shape[0])
    x = tl.load(at[:, None] + tl.arange(0, 64)[None, :], mask=ok[:, None], other=0.0)
    return x if SWAP else tl.trans(x)


@triton.jit
def load_scale(scale, slot, ok, c: tl.constexpr):
    """The scale of 128 columns of each key; 0 for keys without ``ok``."""
    return tl.load(row_starts(scale + 128 + c, slot, 164, ok.shape[0]), mask=ok, other=0.0)


@triton.jit
def load_scales(scale, slot, ok, C: tl.constexpr, FP8: tl.constexpr):
    out = ()
    for c in tl.static_range(C if FP8 else 0):
        out = out + (load_scale(scale, slot, ok, c),)
    return out


# ---------------------------------------------------------------- softmax


@triton.jit
def by_row(x, SWAP: tl.constexpr):
    """A value a row as a matrix [rows, 1], or [1, rows] if SWAP."""
    return x[None, :] if SWAP else x[:, None]


@triton.jit
def scores(q_latent, q_rope, k_latent, k_rope, k_scale, factor, C: tl.constexpr, FP8: tl.constexpr, SWAP: tl.constexpr):
    """``q @ k.T * factor`` in f32, or its transpose. Sums of products, as chained products would meet what `add_one` avoids."""
    if SWAP:
        s = tl.dot(k_rope, tl.trans(q_rope)) * factor
    else:
        s = tl.dot(q_rope, k_rope) * factor
    for c in tl.static_range(C):
        x = score(q_latent[c], k_latent[c], SWAP)
        if FP8:
            s += x * by_row(k_scale[c] * factor, not SWAP)
        else:
            s += x * factor
    return s


@triton.jit
def score(q, k, SWAP: tl.constexpr):
    """``q @ k.T``, or its transpose."""
    if SWAP:
        return tl.dot(k, tl.trans(q))
    else:
        return tl.dot(q, tl.trans(k))


@triton.jit
def weigh(s, top, total, SWAP: tl.constexpr):
    """Scores (times log2(e); -inf for unseen) enter a softmax: the weights, what former sums fade by, the new maximum and
    total."""
    axis: tl.constexpr = 0 if SWAP else 1
    new = tl.maximum(top, tl.max(s, axis=axis))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - by_row(base, SWAP))
    fade = tl.exp2(top - base)
    return p, fade, new, total * fade + tl.sum(p, axis=axis)


@triton.jit
def hold(x, HOLD: tl.constexpr):
    """x itself, bf16; the compiler moves nothing across, so that operands pass through shared memory one by one."""
    if HOLD:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, is_pure=False, pack=2)
    else:
        return x


@triton.jit
def add(acc, p, fade, v, scale, slot, ok, go, C: tl.constexpr, FP8: tl.constexpr, SWAP: tl.constexpr,
        EARLY: tl.constexpr, HOLD: tl.constexpr):
    """``acc * fade + p @ v``, v times its scales. ``go`` is true, which the compiler does not know. The scales are read anew:
    that takes less registers."""
    out = ()
    slot = tl.where(go, slot, slot + 1)  # `slot`: it would keep the pointers of `load_scales` in registers
    for c in tl.static_range(C):
        out = out + (add_part(acc[c], p, fade, v[c], scale, slot, ok, go, c, FP8, SWAP, EARLY, HOLD),)
    return out


@triton.jit
def add_part(acc, p, fade, v, scale, slot, ok, go, c: tl.constexpr, FP8: tl.constexpr, SWAP: tl.constexpr, EARLY: tl.constexpr,
             HOLD: tl.constexpr):
    """Operand ``c`` of ``add``."""
    if FP8:
        x = load_scale(scale, slot, ok, c)
        p *= by_row(tl.where(x == x, x, 0.0), not SWAP)  # NaN is in p where a row sees the key
    if SWAP:
        return add_swapped(acc, p, fade, v)
    else:
        return add_one(acc, p, fade, v, go, EARLY, HOLD)


@triton.jit
def add_one(acc, w, fade, v, go, EARLY: tl.constexpr, HOLD: tl.constexpr):
    w = hold(w.to(tl.bfloat16), HOLD)
    acc *= fade[:, None]
    if EARLY:
        if go:  # hides from the compiler that products are chained: it would have each warp compute all columns
            acc = tl.dot(w, v, acc)
    else:
        acc = tl.dot(w, v, acc)
    return acc


@triton.jit
def add_swapped(acc, w, fade, v):
    """``[W, 2 * rows]``: the products with both parts of a weight side by side, so that v passes once."""
    high = w.to(tl.bfloat16)
    low = (w - high.to(tl.float32)).to(tl.bfloat16)
    BN: tl.constexpr = w.shape[0]
    BM: tl.constexpr = w.shape[1]
    both = tl.reshape(tl.join(high, low), (BN, 2 * BM))
    fade = tl.reshape(tl.join(fade, fade), (2 * BM,))
    return tl.dot(tl.trans(v), both, acc * fade[None, :])


@triton.jit
def block(acc, top, total, q_latent, q_rope, k, k_rope, k_scale, scale, slot, ok, factor, go, C: tl.constexpr,
          FP8: tl.constexpr, NATIVE: tl.constexpr, SWAP: tl.constexpr, EARLY: tl.constexpr, HOLD: tl.constexpr,
          ASM: tl.constexpr):
    """A block of keys that every row sees, where there are keys. ``go`` is true."""
    if SWAP:
        k = wide(k, C, FP8, NATIVE, ASM)
    if EARLY:
        p, fade = tl.zeros((k_rope.shape[0], top.shape[0]) if SWAP else (top.shape[0], k_rope.shape[1]), tl.float32), total
        if go:  # as in `add_one`
            s = scores(q_latent, q_rope, k, k_rope, k_scale, factor, C, FP8, SWAP)
            p, fade, top, total = weigh(tl.where(by_row(ok, not SWAP), s, float("-inf")), top, total, SWAP)
    else:
        s = scores(q_latent, q_rope, k, k_rope, k_scale, factor, C, FP8, SWAP)
        p, fade, top, total = weigh(tl.where(by_row(ok, not SWAP), s, float("-inf")), top, total, SWAP)
    return add(acc, p, fade, k, scale, slot, ok, go, C, FP8, SWAP, EARLY, HOLD), top, total


@triton.jit
def small_edge(acc, top, total, q_latent, q_rope, latent, rope, scale, slot, ok, n, limit, factor, go, C: tl.constexpr,
               W: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, SWAP: tl.constexpr, EARLY: tl.constexpr,
               HOLD: tl.constexpr, ASM: tl.constexpr):
    """A block of keys that not every row sees, held in registers. ``go`` is true."""
    k = wide(load_latent(latent, slot, ok, C, W, FP8, NATIVE), C, FP8, NATIVE, ASM)
    k_rope = load_rope(rope, slot, ok, FP8, SWAP)
    k_scale = load_scales(scale, slot, ok, C, FP8)
    s = scores(q_latent, q_rope, k, k_rope, k_scale, factor, C, FP8, SWAP)
    seen = by_row(n + tl.arange(0, ok.shape[0]), not SWAP) < by_row(limit, SWAP)
    p, fade, top, total = weigh(tl.where(seen, s, float("-inf")), top, total, SWAP)
    v = ()  # 0 * NaN of a key that a row does not see; those that see it have NaN in s
    for c in tl.static_range(C):
        v = v + (tl.where(k[c] == k[c], k[c], 0.0),)
    return add(acc, p, fade, v, scale, slot, ok, go, C, FP8, SWAP, EARLY, HOLD), top, total


@triton.jit
def large_edge(acc, top, total, q_latent, q_rope, latent, rope, scale, slot, ok, n, limit, factor, go, C: tl.constexpr,
               W: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, SWAP: tl.constexpr, EARLY: tl.constexpr,
               HOLD: tl.constexpr, ASM: tl.constexpr):
    """``small_edge`` for more keys than registers hold: they come part by part, and once more for the sums."""
    if SWAP:
        s = tl.dot(load_rope(rope, slot, ok, FP8, SWAP), tl.trans(q_rope)) * factor
    else:
        s = tl.dot(q_rope, load_rope(rope, slot, ok, FP8, SWAP)) * factor
    for c in tl.static_range(C):
        k = load_part(latent, slot, ok, c, W, FP8, NATIVE)
        x = score(q_latent[c], widen(k, NATIVE, ASM) if FP8 else k, SWAP)
        s += x * (by_row(load_scale(scale, slot, ok, c) * factor, not SWAP) if FP8 else factor)
    seen = by_row(n + tl.arange(0, ok.shape[0]), not SWAP) < by_row(limit, SWAP)
    p, fade, top, total = weigh(tl.where(seen, s, float("-inf")), top, total, SWAP)
    out = ()
    slot = tl.where(go, slot, slot + 1)  # `slot`: the compiler would keep the keys
    for c in tl.static_range(C):
        v = load_part(latent, slot, ok, c, W, FP8, NATIVE)
        v = widen(v, NATIVE, ASM) if FP8 else v
        v = tl.where(v == v, v, 0.0)  # 0 * NaN of a key that a row does not see; those that see it have NaN in s
        out = out + (add_part(acc[c], p, fade, v, scale, slot, ok, go, c, FP8, SWAP, EARLY, HOLD),)
    return out, top, total


@triton.jit
def sink_weight(lse, sink, head, inside):
    """``exp(lse) / (exp(lse) + exp(sink))``; 0 where lse is -inf."""
    logit = tl.load(sink + head, mask=inside, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(logit - lse)))


@triton.jit
def lse_place(item, row, n_q, h, spread):
    """Where the lse of a row lies in ``[b h q]``; ``spread`` items have a batch index in common, each with n_q queries."""
    return (item // spread * h + row % h) * (spread * n_q) + item % spread * n_q + row // h


@triton.jit
def finish(acc, top, total, sink, out, lse, item, tile, row, inside, n_q, h, spread, C: tl.constexpr, W: tl.constexpr):
    """The results of a tile of rows."""
    x_lse = top * 0.6931471805599453 + tl.log(total)
    tl.store(lse + lse_place(item, row, n_q, h, spread), x_lse, mask=inside)
    weight = 1.0 / tl.where(total == 0.0, 1.0, total)
    if sink is not None:
        weight *= sink_weight(x_lse, sink, row % h, inside)
    for c in tl.static_range(C):
        x = out + ((item * n_q * h + row) * 512)[:, None]
        x += (c * W + tl.arange(0, W))[None, :]
        tl.store(x, (acc[c] * weight[:, None]).to(tl.bfloat16), mask=inside[:, None])


@triton.jit
def leave(acc, top, total, out, stat, C: tl.constexpr, W: tl.constexpr):
    """A tile's sums, maximum and total for ``merge_kernel``."""
    row = tl.arange(0, top.shape[0])
    tl.store(stat + row * 2, top)
    tl.store(stat + row * 2 + 1, total)
    for c in tl.static_range(C):
        tl.store(out + (row * 512)[:, None] + (c * W + tl.arange(0, W))[None, :], acc[c])


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["b", "n_q", "h", "spread", "width", "pages", "uniform", "parts"])
def kernel(q, latent, rope, scale, places, lens, sink, out, lse, part_out, part_stat, span, b, n_q, h, spread, width, pages,
           uniform, parts, factor, PAGE: tl.constexpr, SPARSE: tl.constexpr, CAUSAL: tl.constexpr, MIXED: tl.constexpr,
           FP8: tl.constexpr, NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
           BT: tl.constexpr, AGAIN: tl.constexpr, GAP: tl.constexpr, LEAST: tl.constexpr, SWAP: tl.constexpr, EARLY: tl.constexpr,
           HOLD: tl.constexpr, ASM: tl.constexpr):
    """One part of the schedule for one tile of rows. MIXED: the rows of a tile may see different keys."""
    tl.static_assert(C == 4 or not FP8)  # a scale for each part
    W: tl.constexpr = 512 // C
    # Keys of a block that lie in a row are a RUN. Two loops over runs would spill where they pass through registers.
    RUN: tl.constexpr = PAGE % BN == 0 and not (MIXED and SWAP and FP8)
    EDGE_RUN: tl.constexpr = PAGE % BT == 0 and not (MIXED and SWAP and FP8)
    count = n_q * h  # rows of an item
    tiles = tl.cdiv(count, BM)
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    most = uniform if SPARSE else width * PAGE
    begin, end, first, last, start = schedule(lens, b, uniform, most, parts, part, BN, GAP, LEAST)
    if RUN and not SPARSE:  # counted from the part's begin: a register less; for single keys the compiler does worse with it
        begin, end, start = 0, end - begin, start - begin
    for i in tl.range(first, last, disable_licm=True):
        item = tl.where(i < b, i, 0).to(tl.int64)  # i, which the compiler would count in 64 bits
        # `tile`, which the compiler does not know: it would keep what follows in registers from item to item.
        here = tl.where(i < b, tile, tile + 1)
        row = here * BM + tl.arange(0, BM)
        inside = row < count
        length = uniform
        wrong = 0
        if not SPARSE:
            given = tl.load(lens + item)
            length = tl.minimum(tl.maximum(given, 0), most)
            wrong = (given != length).to(tl.int32)
        n_blocks = tl.maximum(tl.cdiv(length, BN), 1)
        from_, to = tl.maximum(begin - start, 0), tl.minimum(end - start, n_blocks)
        start += n_blocks + GAP
        # Keys [from_ * BN, stop), of which every row of the tile sees those before `whole`.
        stop = tl.minimum(to * BN, length)
        if CAUSAL:
            stop = tl.minimum(stop, length - n_q + tl.minimum(here * BM + BM - 1, count - 1) // h + 1)
        whole = stop
        if MIXED:
            whole = tl.maximum(tl.minimum(stop, length - n_q + here * BM // h + 1) // BN, from_) * BN

        q_at = (q + (item * count + row) * 576)[:, None]
        q_latent = ()
        for c in tl.static_range(C):
            x = tl.load(q_at + (c * W + tl.arange(0, W))[None, :], mask=inside[:, None], other=0.0)
            q_latent = q_latent + (x,)
        q_rope = tl.load(q_at + (512 + tl.arange(0, 64))[None, :], mask=inside[:, None], other=0.0)
        acc = ()
        for _ in tl.static_range(C):
            acc = acc + (tl.zeros((W, 2 * BM) if SWAP else (BM, W), tl.float32),)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)

        slot, bad = lookup(places, item, from_ * BN, stop, width, pages, PAGE, BN, SPARSE, RUN)
        bad |= wrong  # one register for both
        for n in tl.range(from_ * BN, whole, BN, num_stages=STAGES, disable_licm=True):
            # The next block's slots come while this one is at work.
            next_slot, next_bad = lookup(places, item, n + BN, stop, width, pages, PAGE, BN, SPARSE, RUN)
            ok = there(slot, n, stop, BN)
            k = load_latent(latent, slot, ok, C, W, FP8, NATIVE)
            if not SWAP:  # swapped products leave registers for codes alone
                k = wide(k, C, FP8, NATIVE, ASM)
            k_rope = load_rope(rope, slot, ok, FP8, SWAP)
            k_scale = load_scales(scale, slot, ok, C, FP8)
            if EARLY:
                if n < whole:  # always; what depends on the block comes after the loads of the next one
                    acc, top, total = block(acc, top, total, q_latent, q_rope, k, k_rope, k_scale, scale, slot, ok, factor,
                                            n <= whole, C, FP8, NATIVE, SWAP, EARLY, HOLD, ASM)
            else:
                acc, top, total = block(acc, top, total, q_latent, q_rope, k, k_rope, k_scale, scale, slot, ok, factor, True, C,
                                        FP8, NATIVE, SWAP, EARLY, HOLD, ASM)
            slot, bad = next_slot, bad | next_bad
        if MIXED:  # in small blocks, as they pass through registers
            for n in tl.range(whole, stop, BT, num_stages=1, disable_licm=True):
                few, next_bad = lookup(places, item, n, stop, width, pages, PAGE, BT, SPARSE, EDGE_RUN)
                has = there(few, n, stop, BT)
                bad |= next_bad if EDGE_RUN else tl.max(next_bad, axis=0)
                row = tl.where(n <= stop, here, here + 1) * BM + tl.arange(0, BM)  # `here`, as above
                limit = length - n_q + row // h + 1
                if AGAIN:
                    acc, top, total = large_edge(acc, top, total, q_latent, q_rope, latent, rope, scale, few, has, n, limit,
                                                 factor, n <= stop, C, W, FP8, NATIVE, SWAP, EARLY, HOLD, ASM)
                else:
                    acc, top, total = small_edge(acc, top, total, q_latent, q_rope, latent, rope, scale, few, has, n, limit,
                                                 factor, n <= stop, C, W, FP8, NATIVE, SWAP, EARLY, HOLD, ASM)
        if SWAP:
            summed = ()
            for c in tl.static_range(C):
                summed = summed + (tl.trans(tl.sum(tl.reshape(acc[c], (W, BM, 2)), axis=2)),)
            acc = summed
        if not SPARSE:
            total = tl.where((bad if RUN else tl.max(bad, axis=0)) != 0, float("nan"), total)

        item = tl.where(start > 0, i, i + 1).to(tl.int64)  # as `tile` above: nothing stays in registers across the keys
        row = tl.where(start > 0, tile, tile + 1) * BM + tl.arange(0, BM)
        inside = row < count
        if span is None:
            finish(acc, top, total, sink, out, lse, item, tile, row, inside, n_q, h, spread, C, W)
        else:
            if (from_ == 0) & (start - GAP <= end):
                finish(acc, top, total, sink, out, lse, item, tile, row, inside, n_q, h, spread, C, W)
            else:
                place = (2 * tl.program_id(0) + (from_ == 0).to(tl.int32)).to(tl.int64) * BM
                leave(acc, top, total, part_out + place * 512, part_stat + place * 2, C, W)
            if tile == 0:
                if from_ == 0:
                    tl.store(span + 2 * item, tl.program_id(0))
                if start - GAP <= end:
                    tl.store(span + 2 * item + 1, tl.program_id(0))


@triton.jit(do_not_specialize=["n_q", "h", "spread", "tiles", "each"])
def merge_kernel(part_out, part_stat, span, sink, out, lse, n_q, h, spread, tiles, each, BM: tl.constexpr, PARTS: tl.constexpr):
    """Rows ``each * j`` on of an item from its parts, PARTS at a time."""
    count = n_q * h
    groups = tl.cdiv(count, each)
    item, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    first, last = tl.load(span + 2 * item), tl.load(span + 2 * item + 1)
    if first == last:
        return
    col = tl.arange(0, 512)
    for row in range(group * each, tl.minimum(group * each + each, count)):
        acc = tl.zeros((512,), tl.float32)
        top, total = float("-inf"), 0.0
        for at in range(first, last + 1, PARTS * tiles):
            i = at + tl.arange(0, PARTS) * tiles
            ok = i <= last
            place = (2 * i + (i == first).to(tl.int32)).to(tl.int64) * BM + row // BM * BM + row
            x_top = tl.load(part_stat + place * 2, mask=ok, other=float("-inf"))
            x_total = tl.load(part_stat + place * 2 + 1, mask=ok, other=0.0)
            x = tl.load(part_out + place[:, None] * 512 + col[None, :], mask=ok[:, None], other=0.0)
            new = tl.maximum(top, tl.max(x_top, axis=0))
            base = tl.where(new == float("-inf"), 0.0, new)
            fade, w = tl.exp2(top - base), tl.exp2(x_top - base)
            acc = acc * fade + tl.sum(x * w[:, None], axis=0)
            total = total * fade + tl.sum(x_total * w, axis=0)
            top = new
        x_lse = top * 0.6931471805599453 + tl.log(total)
        tl.store(lse + lse_place(item, row, n_q, h, spread), x_lse)
        if sink is not None:
            acc *= sink_weight(x_lse, sink, row % h, True)
        tl.store(out + (item * count + row) * 512 + col, (acc / tl.where(total == 0.0, 1.0, total)).to(tl.bfloat16))


# ---------------------------------------------------------------- launch


def tile(rows, fp8, page, alike, chip):
    """Rows, keys, operands of the latent, warps, stages, SWAP, EARLY, and programs of the chip at a time. On sm90 with
    pages of 64 the quickest of those in bench/tiles/h200.jsonl that do not spill with the ptxas at hand; all others are by the
    arithmetic below.
    ``page``: keys that lie in a row, 0 for a list of keys; ``alike``: so many rows see the same keys, then so many others; 0:
    all do.

    The sums take rows x 512 f32 registers: 32768 for 64 rows, 128 a thread of 8 warps. sm90, per 64 keys and clock counts
    of its tensor cores (4096 FLOP) and shared memory (128 bytes): 64 rows 1725 for the scores, whose operands both lie in
    shared memory, 1030 for the product with the values and about 700 for the softmax, that is 63 % of the peak for the
    op's own FLOPs; up to 32 rows wgmma takes keys for rows (SWAP), and its 1400 are less than the 4140 in which an SM's
    share of memory brings 64 keys of bf16, or 2360 of the 656-byte tokens, whose widening takes 1000 more. Tiles of 64
    rows read 73728 bytes a block through L2, 50 a clock and SM at the peak; smaller ones more for the same work.

    So 33 to 63 rows cost what 64 do: in bf16 they wait for memory all the same (3455 clocks against 4140), and with 656-byte
    tokens a tile of 64 rows takes 368 us (128 x 4k), but the quickest ones of 32 and 16 rows, of which they would need two or
    three, 277 and 218 each. Where the rows of a tile see different keys, the last blocks take registers. Swapped tiles of 16
    rows leave them, and those of 64 over pages: with 656-byte tokens at the price of the next block's loads, about 6200 in all.
    Rows just over a multiple of 64 (all queries of a sequence count together) pay for one more tile: 80 cost 6910, in five
    swapped tiles of 16 7000.

    Elsewhere 16 rows read 1152 bytes a key for 30 FLOPs a byte: at full speed 68 bytes a clock and unit on an MI300X, whose L2
    gives 54, or about 36 on an RTX PRO 6000, whose memory gives 4. Tiles of 32 rows read half, with fewer instructions in sum;
    they are for rows that are ``alike``, as the others' last keys take registers that they do not leave.
    """
    c, scattered = 4 if fp8 else 1, page % 64 > 0 or page == 0
    if chip.family == "sm90" and alike % (32 if rows <= 32 else 64):
        if rows > 16 and not fp8 and not scattered:
            return 64, 64, 1, 8, 2, False, True, chip.units
        if rows > 32 and fp8 and page % 32 == 0 < page:
            return 64, 32, 4, 8, 1, False, True, chip.units
        return 16, 64, 4, 8, 3 if fp8 and alike % 16 else 2, True, True, chip.units
    if chip.family in ("sm90", "sm100", "sm103"):
        if OLD_PTXAS and chip.family == "sm90" and page % 64 == 0 < page and alike % (16 if rows <= 16 else 32) == 0:
            if fp8 and rows <= 32:  # no wgmma; two programs a multiprocessor
                return (16, 64, 4, 4, 1, False, False, 2 * chip.units) if rows <= 16 else (
                    32, 32, 4, 4, 2, False, False, 2 * chip.units)
            if rows <= 16:
                return 16, 64, 4, 4, 2, True, True, chip.units
        if rows <= (32 if fp8 else 16):
            c = 4 if alike % 16 and chip.family != "sm90" else c  # 1 would spill
            return 16, 64, c, 8, 3 if fp8 and page == 0 and chip.family == "sm90" else 2, True, True, chip.units
        if rows <= 32 and chip.family == "sm90":
            return 32, 64, 4 if page == 0 else c, 8, 2, True, True, chip.units  # 1 would spill for a list of keys
        tight = fp8 and scattered if chip.family == "sm90" else fp8 or scattered  # of registers
        stages = 1 if chip.family == "sm90" and fp8 and page % 64 == 0 else 2
        return 64, 32 if tight else 64, c, 8, stages, False, True, chip.units
    decoded = fp8 and not chip.e4m3 and not chip.amd
    if rows > 16 and (chip.family == "sm80" or decoded):  # in registers: 64 of sums, the operands as they come
        return 32, 16 if page % 16 and chip.family != "sm80" else 32, c, 8, 3, False, False, chip.units
    if chip.family == "sm80":
        return 16, 64, 4 if fp8 else 2, 8, 2, False, True, chip.units
    if chip.amd:  # others would spill scalar registers, which lists and odd pages take
        c, warps, stages = 4 if fp8 else 2 if scattered else 1, 8 if scattered and not fp8 else 4, 1 if fp8 or scattered else 2
        swap = fp8 and (page % 16 > 0 or scattered and alike % 16 > 0)
        if rows > 16 and alike % 32 == 0:
            return 32, 16, c, warps, stages, swap, fp8 and not swap, chip.units
        bn = 16 if scattered or (chip.family == "gfx942" and not fp8 and alike % 16) else 32
        return 16, bn, c, warps, stages, swap, False, chip.units
    if rows > 16 and alike % 32 == 0:
        return 32, 64 if fp8 else 32, 4 if fp8 else 2, 8, 2, False, fp8, chip.units
    return 16, 64 if fp8 and not decoded else 32, c, 8, 2 if fp8 else 3, False, True, chip.units


def parts(items, rows, most, bm, bn, units):
    """Parts that the schedule is cut into: with the tiles of rows they fill the chip in whole waves."""
    tiles, longest = max(-(-rows // bm), 1), items * (-(-most // bn) + GAP)
    for waves in (1, 2, 3, 4):
        found = max(waves * units // tiles, 1)
        if found * tiles >= 0.9 * -(-found * tiles // units) * units:
            break
    return max(min(found, longest), 1)


def spaces(items, rows, most, bm, bn, units):
    """Bytes of the partial results: out, maximum and total, and the spans."""
    n = parts(items, rows, most, bm, bn, units)
    padded = -(-rows // bm) * bm
    return (0, 0, 0) if n == 1 else (2 * n * padded * 2048, 2 * n * padded * 8, items * 8)


def launch(q, kv_cache, places, lens, sink, out, lse, workspace, factor, causal, choice):
    """``choice``: what ``tile`` gives."""
    (b, n_q, h, _), (p, page, _), width, chip = q.shape, kv_cache.shape, places.shape[-1], chip_of(q)
    (bm, bn, c, warps, stages, swap, early, units), sparse, fp8 = choice, lens is None, kv_cache.dtype == torch.uint8
    items, queries, spread = (b * n_q, 1, n_q) if sparse else (b, n_q, 1)
    p, page = (p, page) if page else (0, 1)
    if p == 0 and not sparse:
        width = 0
    rows, most = queries * h, width if sparse else width * page
    if items * rows == 0:
        return
    compiled = isinstance(kernel, triton.JITFunction)  # the interpreter knows no PTX
    mixed = causal and queries > 1 and h % bm > 0
    # Of blocks of 64 keys ptxas 12.8 makes wrong code (tests/machine_code.py), of 32 that of Triton 3.9 spills.
    edge = 16 if bm >= 64 else min(bn, 32) if mixed and swap and not fp8 and chip.family == "sm90" and OLD_PTXAS else bn
    n, tiles = parts(items, rows, most, bm, bn, units), cdiv(rows, bm)
    part_out = part_stat = span = None
    if n > 1:
        sizes = spaces(items, rows, most, bm, bn, units)
        part_out, part_stat, span = (
            workspace[sum(sizes[:i]): sum(sizes[: i + 1])].view(torch.int32 if i == 2 else torch.float32) for i in range(3))
    latent, rope, scale = kv_cache, kv_cache, None
    if fp8:
        rope, scale = kv_cache.view(torch.bfloat16), kv_cache.view(torch.float32)
        latent = kv_cache.view(torch.float8_e4m3fn) if chip.e4m3 else kv_cache
    run(kernel, (n * tiles,), q, latent, rope, scale, places, lens, sink, out, lse, part_out, part_stat, span, items, queries,
        h, spread, width, p, most, n, factor * LOG2E, PAGE=page, SPARSE=sparse, CAUSAL=causal and queries > 1,
        MIXED=mixed, FP8=fp8, NATIVE=chip.e4m3, BM=bm, BN=bn, C=c, STAGES=stages,
        BT=edge, AGAIN=bm < 64 or stages == 1, GAP=GAP, LEAST=max(128 // bn, 1), SWAP=swap, EARLY=early,
        HOLD=compiled and chip.family == "sm90" and bm >= 64,
        ASM=compiled and fp8 and chip.family in ("sm90", "sm100", "sm103"), num_warps=warps)
    if n > 1:
        each = max(1, items * rows // (chip.units * 8))
        run(merge_kernel, (items * cdiv(rows, each),), part_out, part_stat, span, sink, out, lse, queries, h, spread,
            tiles, each, BM=bm, PARTS=8, num_warps=4)
