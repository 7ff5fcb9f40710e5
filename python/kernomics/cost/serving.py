"""A model served on a group of chips: does it fit, how long is a step, how many tokens per second, at what speed a user.

One *instance* is ``chips`` chips that hold the model once. Attention runs on groups of ``tp`` chips, each with its own
sequences; routed experts lie on ``ep`` chips; layers are cut into ``pp`` stages.
"""

from dataclasses import dataclass, field, replace
from math import ceil

from kernomics.cost import CostError, Unknown, wrong
from kernomics.cost import comm as links
from kernomics.cost.economics import tokens_per_step
from kernomics.cost.measured import BOUND, MARKS, weakest
from kernomics.cost.model import Moe, Shard, token_bytes

MEMORY_SHARE = 0.9  # of a chip's memory that weights and cache may take: the default of vLLM's gpu_memory_utilization


@dataclass(frozen=True)
class Plan:
    """How chips share a model, and what is overlapped.

    ``micro_batches`` = 2 runs one half's communication beside the other half's compute, and hides ``overlap`` of what can
    be hidden; ``comm_share`` of the compute
    units are then lost to communication (20 of 132 SMs for DeepSeek's kernels on an H800, 0 for RDMA without them).
    ``drafts`` tokens are guessed by the MTP module and right with probability ``acceptance`` each, until the first miss.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
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
            ("pp", self.pp >= 1, "an integer of at least 1"), ("drafts", 0 <= self.drafts <= 16, "0 to 16"),
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
        "KV cache": b * s * model.kv_bytes_per_token(plan.cache, plan.tp),  # a stage holds 1/pp of it for pp batches
        "activations": 2 * t * (4 * model.d + (model.moe.top_k if model.moe else 1) * model.d),
        "reserve": (1 - plan.memory_share) * room,
    }


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
    if decode and plan.drafts:
        parts += _drafting(model, parts, plan.drafts)
    compute, comm = (halves * sum(p.total for p in x) for x in (parts, moves))
    if halves == 2:
        compute /= 1 - plan.comm_share
        hidden = plan.overlap * min(compute, comm)
        seconds, exposed = compute + comm - hidden, comm - hidden
    else:
        seconds, exposed = compute + comm, comm
    every = tuple(replace(p, count=p.count * halves) for p in (*parts, *moves))
    seconds += plan.step_overhead
    tokens = b * plan.tokens_per_step if decode else t
    return Step(every, seconds, exposed, tokens, memory)


def _compute(model, chip, sources, plan, decode, b, s, q, prefix):
    rows = model.decode(b, s, q, plan.shard) if decode else model.prefill(b * s, b, prefix, plan.shard)
    for row in rows:
        timed = sources.time(row, chip)
        if timed.seconds is None:
            raise Unknown(timed.why)
        yield Part(row.layer, row.name, timed.seconds, row.count, timed.mark, timed.source, timed.sigma)


def _communication(model, chip, sources, plan, t, decode):
    """All-reduces of a TP group, dispatch and combine of experts, and what passes from stage to stage."""
    wires = links.Links.of(chip, plan.alpha)
    d, layers = model.d, model.layers
    moe = sum(block.count for block in model.blocks if isinstance(block.mlp, Moe))
    if plan.tp > 1:
        size = 2 * t * d
        count = layers + (layers - moe if plan.ep > 1 else layers)  # experts on ep chips are summed by combine
        yield _move(chip, sources, "all-reduce", "all_reduce", "bf16", {"bytes": size, "ranks": plan.tp}, count,
                    lambda: links.all_reduce_seconds(wires, size, plan.tp))
    if plan.ep > 1 and moe:
        top_k, own = model.moe.top_k, ceil(t / plan.tp)  # the tokens of a group are shared out among its chips
        for name, size in (("dispatch", token_bytes(d, plan.dispatch)), ("combine", token_bytes(d, "bf16"))):
            up, out = links.exchange_bytes(own, size, top_k, plan.ep, wires.domain)
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
        raise Unknown(f"{chip.key}: {error}") from None


def _drafting(model, parts, drafts):
    """The MTP module: one layer as the last and an output head for each draft."""
    count = max(b.count for b in model.blocks[-1:])
    for p in parts:
        if p.layer in ("attention", model.blocks[-1].name):
            yield replace(p, layer="MTP", count=1, seconds=drafts / (drafts + 1) * p.seconds * (p.count / (
                model.layers if p.layer == "attention" else count)))
        elif p.layer == "head":
            yield replace(p, layer="MTP", seconds=drafts / (drafts + 1) * p.seconds)


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
    def chip_seconds_per_token(self):
        return 1 / self.tokens_per_s_per_chip

    @property
    def mark(self):
        return self.step.mark


def decode_point(model, chip, sources, plan, b, s):
    """Decode with b sequences a group at s cached tokens. With pp stages as many batches are under way at once."""
    x = step(model, chip, sources, plan, decode=True, b=b, s=s)
    speed = x.tokens * plan.groups / x.seconds / max(plan.tp, plan.ep)  # each stage works on its own batch all the time
    return Point(plan, b, x.seconds, speed, plan.tokens_per_step / x.seconds, x)


def prefill_point(model, chip, sources, plan, tokens, prompt, prefix=0):
    """Prefill steps of ``tokens`` tokens a group: whole prompts, or chunks of one."""
    b, s = max(1, tokens // prompt), min(prompt, tokens)
    # A chunk sees the chunks before it: on average half of the prompt.
    seen = prefix + (prompt - s) // 2
    x = step(model, chip, sources, plan, decode=False, b=b, s=s, prefix=seen)
    speed = x.tokens * plan.groups / x.seconds / max(plan.tp, plan.ep)
    return Point(plan, b, x.seconds, speed, s / x.seconds, x)


def batches(most):
    """1, 2, 3, 4, 6, 8, 12 ... up to ``most`` and that itself."""
    sizes = sorted({k * 2**i for i in range(16) for k in (2, 3)} | {1})
    return [x for x in sizes if x < most] + ([most] if most else [])


def plans(model, chip, *, chips=None, base=Plan()):
    """Sensible plans: tp within the scale-up domain, experts on tp..chips chips, as the model's sizes divide."""
    domain = int(chip.get("scale_up_domain") or 1)
    limit = chips or max(domain, 8)
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
    return found


def decode_points(model, chip, sources, s, *, chips=None, base=Plan(), each=None):
    """Every sensible decode point at s cached tokens; plans that do not fit or lack a figure are left out.

    Raises DoesNotFit or Unknown where nothing is left. ``each(plan)`` is called before each plan.
    """
    found, why = [], None
    for plan in plans(model, chip, chips=chips, base=base):
        if each:
            each(plan)
        try:
            most = most_sequences(model, chip, plan, s, plan.drafts + 1)
            if not most:
                check_memory(model, chip, plan, 1, s, 1)
                continue
            for b in batches(min(most, 1024)):
                found.append(decode_point(model, chip, sources, plan, b, s))
        except (DoesNotFit, Unknown) as error:
            why = why if isinstance(why, DoesNotFit) and isinstance(error, Unknown) else error
    if not found:
        raise why or DoesNotFit(f"{model.name} does not fit on any number of {chip.key} up to {chips}")
    return found


def front(points):
    """The points that no other beats in both tokens/s/user and tokens/s/chip, fastest user first."""
    best, kept = 0.0, []
    for p in sorted(points, key=lambda p: (-p.tokens_per_s_per_user, -p.tokens_per_s_per_chip)):
        if p.tokens_per_s_per_chip > best:
            best = p.tokens_per_s_per_chip
            kept.append(p)
    return kept


# ---------------------------------------------------------------- a workload


@dataclass(frozen=True)
class Workload:
    """Requests of ``tokens_in`` prompt tokens, of which ``hit`` are found in a prefix cache, and ``tokens_out`` answers."""

    tokens_in: int = 4096
    tokens_out: int = 1024
    hit: float = 0.0
    speed: float = 0.0  # tokens/s that a user must get at least
    first: float = float("inf")  # seconds to the first token at most

    def __post_init__(self):
        for name, ok, allowed in (
            ("tokens_in", self.tokens_in >= 1, "an integer of at least 1"),
            ("tokens_out", self.tokens_out >= 1, "an integer of at least 1"),
            ("hit", 0 <= self.hit < 1, "0 to below 1"), ("speed", self.speed >= 0, "tokens/s of at least 0"),
            ("first", self.first > 0, "seconds above 0"),
        ):
            if not ok:
                raise wrong(name, getattr(self, name), allowed)

    @property
    def fresh(self):
        """Prompt tokens to prefill."""
        return max(1, round(self.tokens_in * (1 - self.hit)))

    @property
    def mean_context(self):
        """Cached tokens of a sequence in the middle of its answer."""
        return self.tokens_in + ceil(self.tokens_out / 2)


@dataclass(frozen=True)
class Service:
    """A workload served: chip-seconds a request by phase, and the pools' operating points."""

    model: object
    workload: Workload
    decode: Point
    prefill: Point
    prefill_seconds: float  # chip-seconds of a request
    decode_seconds: float
    speed: float  # tokens/s a user
    first: float  # seconds to the first token, without queueing
    disaggregated: bool

    def decode_rows(self):
        """The rows behind the decode point."""
        return self.model.decode(self.decode.b, self.workload.mean_context, self.decode.plan.drafts + 1, self.decode.plan.shard)

    def prefill_rows(self):
        """The rows behind the prefill point."""
        prefix = self.workload.tokens_in - self.workload.fresh
        return self.model.prefill(int(self.prefill.step.tokens), self.prefill.b, prefix, self.prefill.plan.shard)

    @property
    def chip_seconds(self):
        return self.prefill_seconds + self.decode_seconds

    @property
    def mark(self):
        return weakest([self.decode.mark, self.prefill.mark])

    @property
    def prefill_share(self):
        """Share of the chips that prefill, so that both pools finish as many requests a second."""
        return self.prefill_seconds / self.chip_seconds

    def fleet(self, requests_per_s, utilisation=1.0):
        """(prefill chips, decode chips), whole instances, for a load; ``utilisation`` is the share of time they work."""
        need = (self.prefill_seconds, self.prefill.plan.chips), (self.decode_seconds, self.decode.plan.chips)
        return tuple(ceil(requests_per_s * seconds / utilisation / chips - 1e-9) * chips for seconds, chips in need)


def serve(model, chip, sources, workload, *, chips=None, base=Plan(), prefill_base=None, disaggregated=True, points=None,
          each=None):
    """The cheapest service that meets the workload's speed: a Service.

    Disaggregated: each phase on its own pool. Aggregated: the same chips prefill between decode steps, and a user waits
    for both. Raises CostError where no plan reaches the speed.
    """
    points = points or decode_points(model, chip, sources, workload.mean_context, chips=chips, base=base, each=each)
    prefills = prefill_points(model, chip, sources, workload, chips=chips, base=prefill_base or replace(base, drafts=0))
    best = None
    for p in points:
        group = p.plan.tp
        if disaggregated:
            fill = min((f for f in prefills if _first(f, workload) <= workload.first), default=None,
                       key=lambda f: f.chip_seconds_per_token)
            speed = p.tokens_per_s_per_user
        else:
            fill = min((f for f in prefills if f.plan.chips == p.plan.chips and f.plan.tp == group
                        and _first(f, workload) <= workload.first), default=None, key=lambda f: f.chip_seconds_per_token)
            if fill:  # while a group makes b answers' tokens it prefills b prompts
                steps = workload.tokens_out / p.plan.tokens_per_step
                between = p.b * workload.fresh * fill.chip_seconds_per_token / group / steps
                speed = p.plan.tokens_per_step / (p.seconds + between)
        if not fill or speed < workload.speed:
            continue
        found = Service(model, workload, p, fill, workload.fresh * fill.chip_seconds_per_token,
                        workload.tokens_out * p.chip_seconds_per_token, speed, _first(fill, workload), disaggregated)
        if best is None or found.chip_seconds < best.chip_seconds:
            best = found
    if best is None:
        fastest = max(p.tokens_per_s_per_user for p in points)
        raise CostError(f"{model.name} on {chip.key}: no plan gives a user {workload.speed:g} tokens/s and a first token within "
                        f"{workload.first:g} s; the fastest decodes {fastest:.1f} tokens/s")
    return best


def _first(point, workload):
    """Seconds until a prompt is prefilled, steps of its chunks one after another."""
    tokens = point.step.tokens / point.b
    return ceil(workload.fresh / tokens) * point.seconds


def prefill_points(model, chip, sources, workload, *, chips=None, base=Plan(), tokens=(2048, 4096, 8192, 16384)):
    """Prefill points of every sensible plan and chunk."""
    found, why = [], None
    prefix = workload.tokens_in - workload.fresh
    for plan in plans(model, chip, chips=chips, base=base):
        for t in sorted({max(x, 1) for x in tokens} | {workload.fresh}):
            if t > 4 * max(workload.fresh, 4096):
                continue
            try:
                found.append(prefill_point(model, chip, sources, plan, t, workload.fresh, prefix))
            except (DoesNotFit, Unknown) as error:
                why = error
    if not found:
        raise why or DoesNotFit(f"{model.name} does not fit on {chip.key}")
    return found
