"""A model served on a group of chips: does it fit, how long is a step, how many tokens per second, at what speed a user.

One *instance* is ``chips`` chips that hold the model once. Attention runs on groups of ``tp`` chips, each with its own
sequences; routed experts lie on ``ep`` chips; layers are cut into ``pp`` stages.
"""

from dataclasses import dataclass, field, replace
from math import ceil, inf

from kernomics.cost import CostError, Unknown, wrong
from kernomics.cost import comm as links
from kernomics.cost.economics import HOURS_PER_MONTH, memory_dollars, pipeline_busy, tokens_per_step
from kernomics.cost.measured import BOUND, MARKS, weakest
from kernomics.cost.model import SLOTS, Moe, Shard, token_bytes
from kernomics.cost.price import times

UNCOUNTED = "links unknown: not counted"
WAVE = 4  # microbatches a stage, from which bubbles are small: Huang et al., GPipe, arXiv:1811.06965 (2019), section 2.3
MEMORY_SHARE = 0.9  # of a chip's memory that weights and cache may take: the default of vLLM's gpu_memory_utilization


@dataclass(frozen=True)
class Plan:
    """How chips share a model, and what is overlapped.

    ``micro_batches`` = 2 runs one half's communication beside the other half's compute (see ``elapsed``), and hides
    ``overlap`` of what can be hidden; ``comm_share`` of the compute units are then lost to communication (24 of 132 SMs in
    DeepSeek's prefill on an H800, 0 for RDMA without them).
    ``drafts`` tokens are guessed by the MTP module, a layer with a cache of its own, which prefill fills too, and right with
    probability ``acceptance`` each, until the first miss.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    flight: int = 0  # batches under way in the pp stages; 0: one in each
    wave: int = 0  # microbatches of prefill that follow each other before the stages run empty; 0: WAVE a stage
    redundant: int = 0
    imbalance: float = 1.0
    cache: str = "bf16"
    drafts: int = 0
    acceptance: float = 0.85
    micro_batches: int = 1
    comm_share: float = 0.0
    overlap: float = 1.0
    dispatch: str = "fp8"
    alpha: float = 0.0  # seconds a message, where no table knows
    step_overhead: float = 0.0  # seconds a step of host and launch time
    memory_share: float = MEMORY_SHARE

    def __post_init__(self):
        for name, ok, allowed in (
            ("pp", self.pp >= 1, "an integer of at least 1"),
            ("flight", 0 <= self.flight <= self.pp, f"0 to pp = {self.pp}"),
            ("wave", self.wave >= 0, "an integer of at least 0"), ("drafts", 0 <= self.drafts <= 16, "0 to 16"),
            ("acceptance", 0 <= self.acceptance <= 1, "0 to 1"), ("micro_batches", self.micro_batches in (1, 2), "1, 2"),
            ("comm_share", 0 <= self.comm_share < 1, "0 to below 1"), ("overlap", 0 <= self.overlap <= 1, "0 to 1"),
            ("dispatch", self.dispatch in ("fp8", "bf16"), "fp8, bf16"),
            ("alpha", 0 <= self.alpha < 1, "seconds, 0 to below 1"), ("step_overhead", self.step_overhead >= 0, "seconds"),
            ("memory_share", 0 < self.memory_share <= 1, "above 0 to 1"),
            ("ep", self.ep == 1 or self.ep % self.tp == 0, f"1 or a multiple of tp = {self.tp}"),
        ):
            if not ok:
                raise wrong(name, getattr(self, name), allowed)
        self.shard  # noqa: B018  checks the rest

    @property
    def shard(self):
        return Shard(self.tp, self.ep, self.redundant, self.imbalance, self.cache)

    @property
    def chips(self):
        """Chips of one instance."""
        return max(self.tp, self.ep) * self.pp

    @property
    def busy(self):
        """Share of the stages that have a batch to work on: decode needs one a stage, as a batch's next step awaits its last."""
        return self.flight / self.pp if self.flight else 1.0

    @property
    def filled(self):
        """Share of the time that stages work in prefill: they fill up and run empty once a wave of microbatches."""
        return pipeline_busy(self.wave or WAVE * self.pp, self.pp)

    @property
    def groups(self):
        """Attention groups of one instance and stage, each with its own sequences."""
        return max(self.tp, self.ep) // self.tp

    @property
    def tokens_per_step(self):
        """Mean tokens that a sequence gains in a step."""
        return tokens_per_step(self.acceptance, self.drafts)

    def text(self):
        parts = [f"{self.chips} chips"] if self.chips > 1 else ["1 chip"]
        parts += [f"{name.upper()}{value}" for name, value in (("tp", self.tp), ("ep", self.ep), ("pp", self.pp)) if value > 1]
        if self.groups > 1:
            parts.append(f"DP{self.groups}")
        parts += [f"MTP{self.drafts}"] * (self.drafts > 0) + ["two batches"] * (self.micro_batches == 2)
        return " ".join(parts)


# ---------------------------------------------------------------- memory


def memory_parts(model, chip, plan, b, s, t):
    """Bytes on one chip by part: weights, cache of b sequences of s tokens, activations of t tokens, reserve."""
    room = chip.need("memory_bytes")
    drafter = model.mtp_params / max(plan.tp, plan.ep) if plan.drafts else 0
    return {
        "weights": model.chip_weight_bytes(plan.shard) / plan.pp + drafter,
        "KV cache": b * s * cached_bytes(model, plan) * plan.busy,  # a stage holds 1/pp of each batch's
        "activations": 2 * t * (4 * model.d + (model.moe.top_k if model.moe else 1) * model.d),
        "reserve": (1 - plan.memory_share) * room,
    }


def cached_bytes(model, plan):
    """Bytes of a cached token on each chip of a TP group, over all stages."""
    return model.kv_bytes_per_token(plan.cache, plan.tp, plan.drafts > 0)


def check_memory(model, chip, plan, b, s, t):
    """A CostError with the bytes by part where they do not fit."""
    parts, room = memory_parts(model, chip, plan, b, s, t), chip.need("memory_bytes")
    if sum(parts.values()) > room:
        text = ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in parts.items())
        raise DoesNotFit(f"{model.name} does not fit on {plan.text()} of {chip.key}: {text}; "
                         f"{sum(parts.values()) / 1e9:.1f} of {room / 1e9:.1f} GB a chip")
    return parts


class DoesNotFit(CostError):
    """Weights, cache, activations and reserve exceed a chip's memory."""


def most_sequences(model, chip, plan, s, q=1):
    """The most sequences of s tokens that an attention group holds; 0 where not even the weights fit."""
    one = memory_parts(model, chip, plan, 1, s, q)
    free = chip.need("memory_bytes") - one["weights"] - one["reserve"]
    each = one["KV cache"] + one["activations"]
    return max(0, int(free / each))


# ---------------------------------------------------------------- a step


@dataclass(frozen=True)
class Part:
    """``count`` times ``seconds`` of a step on a chip, and how they are known."""

    layer: str
    name: str
    seconds: float
    count: int
    mark: str
    source: str = ""
    sigma: float | None = None
    slot: str = ""  # of model.Row

    @property
    def total(self):
        return self.count * self.seconds


@dataclass(frozen=True)
class Step:
    """One step of an instance: ``tokens`` new tokens a group."""

    parts: tuple
    seconds: float
    exposed: float  # seconds of communication that no compute hides
    tokens: float
    memory: dict = field(default_factory=dict)

    @property
    def mark(self):
        return weakest([p.mark for p in self.parts])

    @property
    def share(self):
        """Part of the summed seconds by mark."""
        total = sum(p.total for p in self.parts) or 1.0
        return {m: sum(p.total for p in self.parts if p.mark == m) / total for m in MARKS}


def step(model, chip, sources, plan, *, decode, b, s, q=1, prefix=0, check=True):
    """One decode step (b sequences a group, q tokens each, s cached) or prefill step (b prompts of s tokens, prefix cached).

    Raises DoesNotFit, and Unknown where a chip's figure that is needed has no source.
    """
    if decode and plan.drafts:
        q = plan.drafts + 1
    t = b * q if decode else b * s
    memory = check_memory(model, chip, plan, b, s if decode else prefix + s, t) if check else {}
    halves = plan.micro_batches if b >= plan.micro_batches else 1
    parts = [*_compute(model, chip, sources, plan, decode, ceil(b / halves), s, q, prefix)]
    moves = [*_communication(model, chip, sources, plan, ceil(t / halves), decode)]
    if plan.drafts:
        parts += _drafting(model, parts, plan.drafts, decode)
    every = tuple(replace(p, count=p.count * halves) for p in (*parts, *moves))
    seconds, exposed = elapsed(every, plan, decode, halves)
    tokens = b * plan.tokens_per_step if decode else t
    return Step(every, seconds + plan.step_overhead, exposed, tokens, memory)


def elapsed(parts, plan, decode, halves):
    """(seconds of a step made of these parts, of its communication that no compute hides).

    Of two halves one computes while the other communicates, as DeepSeek publishes it (profile-data, assets/prefill.jpg and
    decode.jpg, 2025-02-27 and 2025-03-21): in prefill combine runs beside attention and shared experts of the other half,
    dispatch beside attention, dispatch beside routed experts, combine beside routed and shared experts; in decode dispatch
    beside shared experts and projections, combine beside the core of attention and what follows. The longer of such a pair
    sets its time. Other communication hides behind what compute is left.
    """
    moves, work = ([p for p in parts if (p.layer == "communication") == c] for c in (True, False))
    comm, compute = (sum(p.total for p in x) for x in (moves, work))
    if halves == 1:
        return compute + comm, comm
    compute /= 1 - plan.comm_share
    hidden, paired = 0.0, {p.name: p for p in moves if p.name in ("dispatch", "combine")}
    if paired:
        once = dict.fromkeys(SLOTS, 0.0)  # seconds of one half in a MoE layer
        for p in work:
            if p.slot:
                once[p.slot] += p.seconds / (1 - plan.comm_share)
        projections, core, shared, routed = (once[slot] for slot in SLOTS)
        dispatch, combine = paired["dispatch"], paired["combine"]
        beside = ([(shared + projections, dispatch), (core, combine)] * 2 if decode else
                  [(projections + core + shared, combine), (projections + core, dispatch), (routed, dispatch),
                   (routed + shared, combine)])
        hidden = dispatch.count / halves * sum(min(seconds, move.seconds) for seconds, move in beside)
    hidden += min(compute - hidden, sum(p.total for p in moves if p.name not in paired))
    hidden *= plan.overlap
    return compute + comm - hidden, comm - hidden


def _compute(model, chip, sources, plan, decode, b, s, q, prefix):
    rows = model.decode(b, s, q, plan.shard) if decode else model.prefill(b * s, b, prefix, plan.shard)
    for timed in times(rows, chip, sources):
        row = timed.row
        if timed.seconds is None:
            raise Unknown(timed.why)
        yield Part(row.layer, row.name, timed.seconds, row.count, timed.mark, timed.source, timed.sigma, row.slot)


def _communication(model, chip, sources, plan, t, decode):
    """All-reduces of a TP group, dispatch and combine of experts, and what passes from stage to stage."""
    wires = links.Links.of(chip, plan.alpha)
    d, share = model.d, _drafted(plan.drafts, decode)
    sparse = isinstance(model.blocks[-1].mlp, Moe)
    layers, moe = model.layers + share, sum(b.count for b in model.blocks if isinstance(b.mlp, Moe)) + share * sparse
    if plan.tp > 1:
        size = 2 * t * d
        count = layers + (layers - moe if plan.ep > 1 else layers)  # experts on ep chips are summed by combine
        yield _move(chip, sources, "all-reduce", "all_reduce", "bf16", {"bytes": size, "ranks": plan.tp}, count,
                    lambda: links.all_reduce_seconds(wires, size, plan.tp))
    if plan.ep > 1 and moe:
        top_k, own = model.moe.top_k, ceil(t / plan.tp)  # the tokens of a group are shared out among its chips
        for name, size in (("dispatch", token_bytes(d, plan.dispatch)), ("combine", token_bytes(d, "bf16"))):
            up, out = links.exchange_bytes(own, size, top_k, plan.ep, wires.domain, model.moe.n_group, model.moe.topk_group)
            dims = {"t": own, "d": d, "top_k": top_k, "e": model.moe.e, "ranks": plan.ep}
            yield _move(chip, sources, name, name, plan.dispatch if name == "dispatch" else "bf16", dims, moe,
                        lambda up=up, out=out: wires.seconds(up, out), ("low_latency" if decode else "normal",))
    if plan.pp > 1:
        yield _move(chip, sources, "to the next stage", None, "bf16", {}, plan.pp - 1, lambda: wires.seconds(0.0, 2 * t * d))


def _move(chip, sources, name, kind, units, dims, count, seconds, variants=()):
    found = sources.imported(kind, units, dims, chip, variants)
    if found:
        return Part("communication", name, found.seconds, count, found.mark, found.source, found.sigma)
    try:
        return Part("communication", name, seconds(), count, BOUND, "link peaks")
    except Unknown as error:
        if chip.memory == "sram":  # their links are published for none of them: still a bound
            return Part("communication", name, 0.0, count, BOUND, UNCOUNTED)
        raise Unknown(f"{chip.key}: {error}") from None


def _drafted(drafts, decode):
    """Passes of the MTP module over those of the model, by tokens: each draft of a decode step; a prompt once, for its cache."""
    return drafts / (drafts + 1) if decode else float(drafts > 0)


def _drafting(model, parts, drafts, decode):
    """The MTP module: one layer as the last and, in decode, an output head for each draft."""
    share = _drafted(drafts, decode)
    for p in parts:
        if p.layer in ("attention", model.blocks[-1].name):
            count = model.layers if p.layer == "attention" else model.blocks[-1].count
            yield replace(p, layer="MTP", count=1, slot="", seconds=share * p.seconds * p.count / count)
        elif p.layer == "head" and decode:
            yield replace(p, layer="MTP", seconds=share * p.seconds)


# ---------------------------------------------------------------- operating points


@dataclass(frozen=True)
class Point:
    """An operating point of an instance."""

    plan: Plan
    b: int  # sequences of an attention group (decode), prompts of a step (prefill)
    seconds: float  # of a step
    tokens_per_s_per_chip: float
    tokens_per_s_per_user: float
    step: Step

    @property
    def users(self):
        """Sequences of an instance: of each group, and of each batch under way in its stages."""
        return self.b * self.plan.groups * (self.plan.flight or self.plan.pp)

    @property
    def chip_seconds_per_token(self):
        return 1 / self.tokens_per_s_per_chip

    @property
    def mark(self):
        return self.step.mark


def decode_point(model, chip, sources, plan, b, s):
    """Decode with b sequences a group and batch at s cached tokens, ``plan.flight`` batches under way in the stages."""
    x = step(model, chip, sources, plan, decode=True, b=b, s=s)
    speed = x.tokens * plan.groups / x.seconds / max(plan.tp, plan.ep) * plan.busy
    return Point(plan, b, x.seconds, speed, plan.tokens_per_step / x.seconds, x)


def prefill_point(model, chip, sources, plan, tokens, prompt, prefix=0):
    """Prefill steps of ``tokens`` tokens a group: whole prompts, or chunks of one; each a microbatch of the stages."""
    b, s = max(1, tokens // prompt), min(prompt, tokens)
    # A chunk sees the chunks before it: on average half of the prompt.
    seen = prefix + (prompt - s) // 2
    x = step(model, chip, sources, plan, decode=False, b=b, s=s, prefix=seen)
    speed = x.tokens * plan.groups / x.seconds / max(plan.tp, plan.ep) * plan.filled
    return Point(plan, b, x.seconds, speed, s / x.seconds, x)


def batches(most):
    """1, 2, 3, 4, 6, 8, 12 ... up to ``most`` and that itself."""
    sizes = sorted({k * 2**i for i in range(16) for k in (2, 3)} | {1})
    return [x for x in sizes if x < most] + ([most] if most else [])


def plans(model, chip, *, chips=None, base=Plan(), s=1):
    """Sensible plans: tp within the scale-up domain, experts on tp..chips/pp chips, as the model's sizes divide; pp of base.

    Where SRAM is the only memory ``chips`` share a stage, in as few stages as hold the model and a sequence of s tokens.
    """
    sram = chip.memory == "sram"
    domain = int(chip.get("scale_up_domain") or (chips or 64 if sram else 1))
    limit = chips or max(domain, 8)
    if base.pp > min(limit, model.layers) and not sram:
        raise wrong("pp", base.pp, f"1 to {min(limit, model.layers)}: chips of an instance, layers")
    limit = limit if sram else limit // base.pp
    found = []
    for tp in (1, 2, 4, 8, 16, 32, 64):
        if tp > min(domain, limit) or model.h % tp:
            continue
        if not model.moe:
            found.append(replace(base, tp=tp, ep=1))
            continue
        if model.moe.n % tp == 0 and tp > 1 or tp == 1:
            found.append(replace(base, tp=tp, ep=1))
        for ep in (2, 4, 8, 16, 32, 64, 128, 256):
            if ep >= tp and ep <= limit and model.moe.e % ep == 0:
                found.append(replace(base, tp=tp, ep=ep))
    return _staged(model, chip, found, s) if sram else found


def _staged(model, chip, found, s):
    """The plans with the stages they need; where links are unknown those of the fewest chips a stage, as the others' are free."""
    found = [replace(p, pp=stages(model, chip, p, s)) for p in found]
    if chip.get("scale_up_bytes_per_s") and chip.get("scale_up_domain"):
        return found
    fitting = [p for p in found if most_sequences(model, chip, replace(p, flight=1), s)]
    fewest = min((max(p.tp, p.ep) for p in fitting), default=None)
    return [p for p in fitting if max(p.tp, p.ep) == fewest] or found


def stages(model, chip, plan, s):
    """The fewest stages, all alike, that hold the model and one sequence of s tokens; all layers apart where none do."""
    enough = (pp for pp in range(1, model.layers) if most_sequences(model, chip, replace(plan, pp=pp, flight=1), s))
    return next(enough, model.layers)


def decode_points(model, chip, sources, s, *, chips=None, base=Plan(), each=None):
    """Every sensible decode point at s cached tokens; plans that do not fit or lack a figure are left out.

    Raises DoesNotFit or Unknown where nothing is left. ``each(plan)`` is called before each plan.
    """
    found, why = [], None
    for plan in plans(model, chip, chips=chips, base=base, s=s):
        if each:
            each(plan)
        one = replace(plan, flight=1)  # a batch alone; where there is room, one in each stage
        try:
            most = most_sequences(model, chip, one, s, plan.drafts + 1)
            if not most:
                check_memory(model, chip, one, 1, s, 1)
                continue
            for b in batches(min(most, 1024)):
                found.append(decode_point(model, chip, sources, replace(plan, flight=min(plan.pp, most // b)), b, s))
        except (DoesNotFit, Unknown) as error:
            why = _cause(why, error)
    if not found:
        raise why or DoesNotFit(f"{model.name} does not fit on any number of {chip.key} up to {chips}")
    return found


def _cause(why, error):
    """Of two errors what keeps a chip from serving: a figure that a plan with room lacks, else the later plan without room."""
    return why if isinstance(why, Unknown) and isinstance(error, DoesNotFit) else error


def front(points):
    """The points (or services) that no other beats in both speeds, a user's and a chip's, fastest user first."""
    best, kept = 0.0, []
    for p in sorted(points, key=lambda p: (-p.tokens_per_s_per_user, -p.tokens_per_s_per_chip)):
        if p.tokens_per_s_per_chip > best:
            best = p.tokens_per_s_per_chip
            kept.append(p)
    return kept


# ---------------------------------------------------------------- a workload


@dataclass(frozen=True)
class Tier:
    """Memory beside the chips that keeps the prefix cache: a chip's share of the host's memory, of an SSD, of a network's."""

    name: str
    bytes: float  # a chip
    bytes_per_s: float  # into a chip
    dollars_per_gb_month: float

    def __post_init__(self):
        for name, ok, allowed in (
            ("bytes", 0 < self.bytes < inf, "above 0"), ("bytes_per_s", 0 < self.bytes_per_s < inf, "above 0"),
            ("dollars_per_gb_month", 0 <= self.dollars_per_gb_month < inf, "$ of at least 0"),
        ):
            if not ok:
                raise wrong(f"tier: {name}", getattr(self, name), allowed)

    @property
    def dollars_per_hour(self):
        """$/(chip*h) = byte / (1e9 byte/GB) * $/(GB*month) / (730 h/month)"""
        return memory_dollars(self.bytes, self.dollars_per_gb_month) / HOURS_PER_MONTH


@dataclass(frozen=True)
class Workload:
    """Requests of ``tokens_in`` prompt tokens, of which ``hit`` are found in a prefix cache, and ``tokens_out`` answers.

    Hits lie in the chips' memory, ready and for nothing, or in ``tier``, whence they are loaded. Where prefill and decode have
    pools of their own the cache moves between them at ``kv_bytes_per_s`` a chip, by default that of its scale-out link.
    """

    tokens_in: int = 4096
    tokens_out: int = 1024
    hit: float = 0.0
    speed: float = 0.0  # tokens/s that a user must get at least
    first: float = inf  # seconds to the first token at most
    tier: Tier | None = None
    kv_bytes_per_s: float | None = None

    def __post_init__(self):
        for name, ok, allowed in (
            ("kv_bytes_per_s", self.kv_bytes_per_s is None or 0 < self.kv_bytes_per_s < inf, "byte/s above 0"),
            ("tokens_in", self.tokens_in >= 1, "an integer of at least 1"),
            ("tokens_out", self.tokens_out >= 1, "an integer of at least 1"),
            ("hit", 0 <= self.hit < 1, "0 to below 1"), ("speed", self.speed >= 0, "tokens/s of at least 0"),
            ("first", self.first > 0, "seconds above 0"),
            ("hit", self.hit or not self.tier, "above 0 to below 1, as a tier keeps what is found"),
        ):
            if not ok:
                raise wrong(name, getattr(self, name), allowed)

    @property
    def tokens(self):
        """{kind: tokens of a request}: prompt tokens to prefill (in), found in the cache, and of the answer (out)."""
        return {"in": self.fresh, "cached": self.tokens_in - self.fresh, "out": self.tokens_out}

    @property
    def fresh(self):
        """Prompt tokens to prefill."""
        return max(1, round(self.tokens_in * (1 - self.hit)))

    @property
    def mean_context(self):
        """Cached tokens of a sequence in the middle of its answer."""
        return self.tokens_in + ceil(self.tokens_out / 2)


@dataclass(frozen=True)
class Move:
    """The cache of a request's prompt, moved from the chips that prefilled it to those that decode it."""

    bytes: float  # into all chips that decode it
    seconds: float  # after prefill, before the first token
    sending: float  # chip-seconds that links of the prefill pool are busy with it
    receiving: float  # those of the decode pool
    source: str


def move_cache(model, workload, fill, decode, chip):
    """The Move of a request between groups of these plans, all chips of each at the same time.

    A decoding chip takes in what it keeps: token * byte/token / stages, of a latent cache all of it on each chip of a TP group.
    Nothing of the move hides behind prefill. Where a link is unknown it is not counted.
    """
    each = workload.tokens_in * cached_bytes(model, decode) / decode.pp
    size = each * decode.tp * decode.pp
    speeds = [workload.kv_bytes_per_s or c.get("scale_out_bytes_per_s") for c in chip.pools]
    if None in speeds:
        return Move(size, 0.0, 0.0, 0.0, UNCOUNTED)
    out, into = speeds
    figures = {c.key: c.figures["scale_out_bytes_per_s"] for c in chip.pools} if workload.kv_bytes_per_s is None else {}
    source = "; ".join(f"{key}: {f.status}, {f.source}, {f.date}" for key, f in figures.items()) or "given"
    return Move(size, max(size / (fill.tp * fill.pp) / out, each / into), size / out, size / into,
                f"{' to '.join(f'{x / 1e9:g}' for x in dict.fromkeys(speeds))} GB/s a chip ({source})")


@dataclass(frozen=True)
class Service:
    """A workload served: chip-seconds a request by phase, and the pools' operating points; ``chip`` may be a Pair."""

    model: object
    chip: object
    workload: Workload
    decode: Point
    prefill: Point
    prefill_seconds: float  # chip-seconds of a request
    decode_seconds: float
    tokens_per_s_per_user: float
    first: float  # seconds to the first token, without queueing
    disaggregated: bool
    waits: float = 0.0  # of the prefill chip-seconds: the tier is slower than the prefill of what it does not hold
    move: Move | None = None  # of the cache between the pools
    stalls: tuple = (0.0, 0.0)  # of the prefill and decode chip-seconds: the links between the pools are slower than the work

    @property
    def most_users(self):
        """Sequences that an instance's memory holds at the middle of their answers."""
        plan, (_, decoder) = replace(self.decode.plan, flight=1), self.chip.pools
        return plan.groups * most_sequences(self.model, decoder, plan, self.workload.mean_context, plan.drafts + 1)

    def decode_rows(self):
        """The rows behind the decode point."""
        return self.model.decode(self.decode.b, self.workload.mean_context, self.decode.plan.drafts + 1, self.decode.plan.shard)

    def prefill_rows(self):
        """The rows behind the prefill point."""
        prefix = self.workload.tokens_in - self.workload.fresh
        return self.model.prefill(int(self.prefill.step.tokens), self.prefill.b, prefix, self.prefill.plan.shard)

    @property
    def speed(self):
        return self.tokens_per_s_per_user

    @property
    def chip_seconds(self):
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_s_per_chip(self):
        """Answer tokens/s of a chip: of those that decode, or of all where they prefill too."""
        return self.workload.tokens_out / (self.decode_seconds if self.disaggregated else self.chip_seconds)

    @property
    def mark(self):
        return weakest([self.decode.mark, self.prefill.mark] + [BOUND] * any(self.stalls))

    @property
    def pools(self):
        """{kind of token: chips of its pool at a request a second}; aggregated serving has one pool, and CostError."""
        if not self.disaggregated:
            raise wrong("allocation", "pool", "time, price: aggregated serving has one pool")
        return {"in": self.prefill_seconds, "cached": self.tiered_seconds, "out": self.decode_seconds}

    @property
    def prefill_share(self):
        """Share of the chips that prefill, so that both pools finish as many requests a second."""
        return self.prefill_seconds / self.chip_seconds

    @property
    def load(self):
        """Seconds to load a request's hit from its tier; 0 without one."""
        return load_seconds(self.model, self.workload, self.prefill.plan)

    @property
    def prefixes(self):
        """Hits that the tier of an instance holds: of each of its groups, as each group loads its own."""
        plan, w = self.prefill.plan, self.workload
        return plan.groups * int(w.tier.bytes / hit_bytes(self.model, w, plan))

    @property
    def tiered_seconds(self):
        """Chip-seconds of a request on chips that have the tier: those that prefill."""
        return 0.0 if not self.workload.tier else self.prefill_seconds if self.disaggregated else self.chip_seconds

    def fleet(self, requests_per_s, utilisation=1.0):
        """(prefill chips, decode chips), whole instances, for a load; ``utilisation`` is the share of time they work.

        Aggregated serving has decode chips alone, which do both.
        """
        need = [(self.prefill_seconds, self.prefill.plan.chips), (self.decode_seconds, self.decode.plan.chips)]
        if not self.disaggregated:
            need = [(0.0, 1), (self.chip_seconds, self.decode.plan.chips)]
        return tuple(ceil(requests_per_s * seconds / utilisation / chips - 1e-9) * chips for seconds, chips in need)


def services(model, chip, sources, workload, *, chips=None, base=Plan(), prefill_base=None, disaggregated=True, points=None,
             each=None):
    """[Service] of every decode point with the cheapest prefill that goes with it, whatever speed a user gets.

    Disaggregated: each phase on its own pool. Aggregated: the same chips prefill between decode steps, and a user waits
    for both. Raises CostError where no prefill is in time for the first token.
    """
    filler, decoder = chip.pools
    if chip.mixed and not disaggregated:
        raise wrong("chip", chip.key, "one chip, as the same chips prefill and decode")
    points = points or decode_points(model, decoder, sources, workload.mean_context, chips=chips, base=base, each=each)
    prefills = prefill_points(model, filler, sources, workload, chips=chips, base=prefill_base or base)
    roomy = [f for f in prefills if not workload.tier or hit_bytes(model, workload, f.plan) <= workload.tier.bytes]
    if not roomy:
        load_seconds(model, workload, prefills[-1].plan)  # raises
    prefills = sorted(roomy, key=lambda f: sum(prefill_seconds(model, workload, f)))
    found, cheapest = [], {}

    def fitting(plan):
        """The cheapest prefill in time before decode on a plan, by any chips of its pool; or by the same chips."""
        for f in prefills:
            if disaggregated or (f.plan.chips, f.plan.tp) == (plan.chips, plan.tp):
                move = move_cache(model, workload, f.plan, plan, chip) if disaggregated else None
                if _first(model, f, workload, move) <= workload.first:
                    return f
        return None

    for p in points:
        key = p.plan.chips, p.plan.tp, p.plan.pp
        if key not in cheapest:
            cheapest[key] = fitting(p.plan)
        if cheapest[key]:
            found.append(service(model, chip, workload, p, cheapest[key], disaggregated))
    if not found:
        raise CostError(f"{model.name} on {chip.key}: no plan gives a first token within {workload.first:g} s")
    return found


def service(model, chip, workload, decode, fill, disaggregated=True):
    """The Service of a decode and a prefill point; the links between two pools may hold up either."""
    work, waits = prefill_seconds(model, workload, fill)
    seconds, answer = work + waits, workload.tokens_out * decode.chip_seconds_per_token
    speed, move, stalls = decode.tokens_per_s_per_user, None, (0.0, 0.0)
    if disaggregated:
        move = move_cache(model, workload, fill.plan, decode.plan, chip)
        stalls = max(0.0, move.sending - seconds), max(0.0, move.receiving - answer)
    else:  # while a group makes b answers' tokens it prefills b prompts
        steps = workload.tokens_out / decode.plan.tokens_per_step
        speed = decode.plan.tokens_per_step / (decode.seconds + decode.b * seconds / decode.plan.tp / steps)
    return Service(model, chip, workload, decode, fill, seconds + stalls[0], answer + stalls[1], speed,
                   _first(model, fill, workload, move), disaggregated, waits, move, stalls)


def serve(model, chip, sources, workload, **options):
    """The Service of least chip time that meets the workload's speed; CostError where no plan reaches it."""
    found = services(model, chip, sources, workload, **options)
    fast = [s for s in found if s.speed >= workload.speed]
    if not fast:
        raise CostError(f"{model.name} on {chip.key}: no plan gives a user {workload.speed:g} tokens/s and a first token within "
                        f"{workload.first:g} s; the fastest gives {max(s.speed for s in found):.1f} tokens/s")
    return min(fast, key=lambda s: s.chip_seconds)


def hit_bytes(model, workload, plan):
    """byte = token * byte/token / stages: what a chip loads of a request's cached prefix."""
    return workload.tokens["cached"] * cached_bytes(model, plan) / plan.pp


def load_seconds(model, workload, plan):
    """s = byte / (byte/s) of a hit, all chips of a group at the same time; DoesNotFit where the tier is too small for one."""
    tier, size = workload.tier, hit_bytes(model, workload, plan)
    if not tier:
        return 0.0
    if size > tier.bytes:
        raise DoesNotFit(f"a hit of {workload.tokens['cached']:,} tokens does not fit in {tier.name}: {size / 1e9:.2f} of "
                         f"{tier.bytes / 1e9:.2f} GB a chip")
    return size / tier.bytes_per_s


def prefill_seconds(model, workload, point):
    """(chip-seconds of work, of waiting) of a request: while a group prefills one prompt it loads the next one's hit."""
    work = workload.fresh * point.chip_seconds_per_token
    return work, max(0.0, load_seconds(model, workload, point.plan) * point.plan.tp * point.plan.pp - work)


def _first(model, point, workload, move=None):
    """Seconds to the first token: its hit loaded, then steps of its chunks one after another, then its cache moved."""
    chunks = ceil(workload.fresh / (point.step.tokens / point.b))
    steps = (1 + (chunks - 1) / point.plan.pp) * point.seconds
    return load_seconds(model, workload, point.plan) + steps + (move.seconds if move else 0.0)


SMALL_CHUNKS = (16, 64, 256, 1024)  # tokens, where activations must lie in SRAM


def prefill_points(model, chip, sources, workload, *, chips=None, base=Plan(), tokens=(2048, 4096, 8192, 16384)):
    """Prefill points of every sensible plan and chunk."""
    found, why = [], None
    prefix = workload.tokens_in - workload.fresh
    sram = chip.memory == "sram"
    for plan in plans(model, chip, chips=chips, base=base, s=workload.tokens_in):
        for t in sorted({*tokens, workload.fresh, *(SMALL_CHUNKS if sram else ())}):
            if t > 4 * max(workload.fresh, 4096):
                continue
            if sram:  # the chunks of a prompt follow each other through the stages, then those of the next one
                plan = replace(plan, flight=ceil(plan.pp / ceil(workload.fresh / t)))
            try:
                found.append(prefill_point(model, chip, sources, plan, t, workload.fresh, prefix))
            except (DoesNotFit, Unknown) as error:
                why = _cause(why, error)
    if not found:
        raise why or DoesNotFit(f"{model.name} does not fit on {chip.key}")
    return found
