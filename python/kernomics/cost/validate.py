"""Published figures reproduced: predicted, published, error, and what the prediction stands on. Nothing here is fitted.

Figures of *accounts* follow from other published figures by the model's arithmetic. *Predictions* time a model's
operators on a chip. Calls that no table covers take their roofline at a share of the bandwidth and a latency a call:
0.8 and 3 us, the constants in the system files of aiconfigurator (mem_bw_empirical_scaling_factor,
mem_empirical_constant_latency). Every prediction carries ranges for what its source leaves open.
"""

from dataclasses import dataclass, field, replace
from math import fsum

from kernomics.cost import CostError, chips, serving, wrong
from kernomics.cost import economics as e
from kernomics.cost.measured import IMPORTED, TRANSFERRED
from kernomics.cost.model import Model
from kernomics.cost.price import Sources
from kernomics.cost.serving import Plan

CALL, SHARE = "2e-6..3e-6..5e-6", "0.7..0.8..0.9"
INFERSIM = "github.com/alibaba/InferSim, README"
DAY6 = "DeepSeek, open-infra-index, day 6"
PROFILE = "DeepSeek, profile-data, README"
LMSYS = "lmsys.org/blog/2025-05-05-large-scale-ep"
IX, V3_REPORT = "SemiAnalysis InferenceX v2", "arXiv:2412.19437"
RELEASE = "2025-02"  # of DeepEP: that of the days of the profile and of day 6
PREFILL_SMS = 24 / 132  # DeepSeek's prefill: 24 SMs communicate beside 108 that compute (profile-data, assets/prefill.jpg)


@dataclass(frozen=True)
class Target:
    """A published figure and how it is predicted from ``inputs`` (name -> number or range)."""

    id: str
    what: str
    published: float
    unit: str
    source: str
    predict: object  # predict(env, **inputs) -> number
    inputs: dict = field(default_factory=dict)
    gate: float | None = None  # relative error allowed
    tables: str = ""  # infersim, aic: imported tables that it stands on
    note: str = ""
    kind: str = "account"  # or prediction, limit (published must not exceed it)


class Env:
    """Where imported tables lie; opened when first needed."""

    def __init__(self, infersim=None, aic=None):
        self.paths, self._open = {"infersim": infersim, "aic": aic}, {}
        self.chips = chips.load()

    def has(self, name):
        if name == "aic":
            from kernomics.cost import aic

            return aic.systems(self.paths["aic"]) is not None
        return name == "" or self.paths[name] is not None

    def tables(self, name, chip):
        if (name, chip) not in self._open:
            if name == "aic":
                from kernomics.cost import aic

                self._open[name, chip] = [aic.load(chip, path=self.paths["aic"])]
            else:
                from kernomics.cost import deepep, infersim

                self._open[name, chip] = [infersim.load(self.paths["infersim"], chip), deepep.Exchange(RELEASE)]
        return self._open[name, chip]

    def model(self, name, **dtypes):
        key = name, tuple(dtypes.items())
        if key not in self._open:
            self._open[key] = Model.load(name, **dtypes)
        return self._open[key]


# ---------------------------------------------------------------- predictions


def _speed(env, model, chip, tables, plan, call=3e-6, share=0.8, comm=1.0, kernels=1.0, **step):
    """Tokens/s of a chip at one operating point; ``comm`` scales communication, ``kernels`` the times of tables."""
    chip = env.chips[chip]
    sources = Sources(None, env.tables(tables, chip.key) if tables else (), call, share)
    x = serving.step(env.model(model), chip, sources, plan, check=False, **step)

    def scale(p):
        return comm if p.layer == "communication" else kernels if p.mark in (IMPORTED, TRANSFERRED) else 1.0

    parts = [replace(p, seconds=p.seconds * scale(p)) for p in x.parts]
    seconds, _ = serving.elapsed(parts, plan, step["decode"], 2)  # two batches, as every plan here
    return x.tokens * plan.groups / seconds / max(plan.tp, plan.ep)


def _day6_prefill(env, imbalance, overlap, **ranges):
    """EP32; 56.3 % of the prompt tokens are cache hits and cost nothing."""
    plan = Plan(ep=32, redundant=32, micro_batches=2, comm_share=PREFILL_SMS, imbalance=imbalance, overlap=overlap)
    fresh = _speed(env, "deepseek-v3", "h800", "infersim", plan, decode=False, b=4, s=4096, **ranges)
    return 8 * fresh / (1 - 0.563)


def _day6_decode(env, b, imbalance, overlap, **ranges):
    plan = Plan(ep=144, redundant=32, micro_batches=2, imbalance=imbalance, overlap=overlap)
    return 8 * _speed(env, "deepseek-v3", "h800", "infersim", plan, decode=True, b=round(b), s=4989, **ranges)


def _profile_prefill(env, **ranges):
    plan = Plan(ep=32, micro_batches=2, comm_share=PREFILL_SMS)
    return _speed(env, "deepseek-v3", "h800", "infersim", plan, decode=False, b=4, s=4096, **ranges)


def _profile_decode(env, **ranges):
    return _speed(env, "deepseek-v3", "h800", "infersim", Plan(ep=128, micro_batches=2), decode=True, b=128, s=4096,
                  **ranges)


def _sglang_prefill(env, s, overlap, imbalance, **ranges):
    plan = Plan(ep=32, redundant=32, micro_batches=2, comm_share=20 / 132, overlap=overlap, imbalance=imbalance)
    return 8 * _speed(env, "deepseek-v3", "h100", "aic", plan, decode=False, b=round(16384 / s), s=s, **ranges)


def _sglang_decode(env, b, overlap, imbalance, **ranges):
    plan = Plan(ep=72, redundant=32, micro_batches=2, overlap=overlap, imbalance=imbalance)
    return 8 * _speed(env, "deepseek-v3", "h100", "aic", plan, decode=True, b=round(b), s=2050, **ranges)


def _limit(env, chip, s, chips=64, cache="bf16", experts=None, prefill=False):
    """The most a chip's rooflines allow on any plan and batch that fits: an upper limit."""
    model, sources = env.model("deepseek-v3", experts=experts), Sources()
    plan = Plan(cache=cache, micro_batches=2)
    if prefill:
        work = serving.Workload(s, 1)
        points = serving.prefill_points(model, env.chips[chip], sources, work, chips=chips, base=plan)
    else:
        points = serving.decode_points(model, env.chips[chip], sources, s, chips=chips, base=plan)
    return max(p.tokens_per_s_per_chip for p in points)


def _fits(env, chip, s, cache, gb):
    """Sequences a chip of a DEP8 group holds where weights and cache take all of its memory."""
    model = env.model("deepseek-v3", experts="nvfp4")
    known = env.chips[chip]
    sized = replace(known, figures=known.figures | {"memory_bytes": replace(known.figures["memory_bytes"], value=gb * 1e9)})
    return float(serving.most_sequences(model, sized, Plan(ep=8, cache=cache, memory_share=1.0), s))


def _revenue():
    """$ of the day: token * $/token of cache hits, misses and answers."""
    return fsum(n / 1e6 * price for n, price in ((342e9, 0.14), (266e9, 0.55), (168e9, 2.19)))


# ---------------------------------------------------------------- targets

# Capacities of a GB200 and a GB300 are published as 186 to 192 and 279 to 288 GB; drivers report 198.7 and 298.
CONTEXT = "131072..135168..139264"  # of 128k + 8k requests: first token, middle, last
# Tables come from other software than the published runs. On one chip the FP8 GEMM tables of SGLang and TRT-LLM differ by
# 0.25 (root mean square of the logarithm; V3's shapes, H100 and H200): 0.25 / sqrt(2) of each.
KERNELS = {"dist": "lognormal", "median": 1.0, "sigma": 0.18}
TABLED = {"call": CALL, "share": SHARE, "kernels": KERNELS}
RANGES = {**TABLED, "comm": "0.76..1.0..1.0"}  # DeepEP's next release, two months later, takes 44/58 of the time at 32 ranks

TARGETS = (
    Target("B2 cost", "a day of 226.75 nodes at $2 a GPU-hour", 87_072, "$/day", DAY6,
           lambda env: e.fleet_dollars(226.75, 8, 24, 2.0), gate=1e-9),
    Target("B2 revenue", "tokens of the day at R1 prices", 562_027, "$/day", DAY6,
           lambda env: _revenue(), gate=5e-4),
    Target("B2 margin", "profit over cost", 545, "%", DAY6,
           lambda env: 100 * e.margin_over_cost(_revenue(), e.fleet_dollars(226.75, 8, 24, 2.0)), gate=1 / 545,
           note="over cost; the gross margin is 84.5 %"),
    Target("B3", "nodes by each phase's rate", 226.75, "nodes", DAY6,
           lambda env: 608e9 / 86400 / 73.7e3 + 168e9 / 86400 / 14.8e3, gate=2e-3),
    Target("B4 in", "prefill of a million tokens", 0.0603, "$/Mtok", DAY6,
           lambda env: e.dollars_per_mtoken(16.0, 73.7e3), gate=2e-3),
    Target("B4 out", "decode of a million tokens", 0.300, "$/Mtok", DAY6,
           lambda env: e.dollars_per_mtoken(16.0, 14.8e3), gate=2e-3),
    Target("B4 all", "the whole day over its answers", 0.518, "$/Mtok", DAY6, lambda env: 87_072 / 168e9 * 1e6, gate=2e-3),
    Target("B1 in", "prefill, 8 H800, EP32, 56.3 % cached", 73_700, "tok/s", DAY6, _day6_prefill,
           {"imbalance": "1.0..1.1..1.4", "overlap": "0.5..0.9..1.0", **RANGES}, tables="infersim", kind="prediction",
           note="published is a mean over 24 h"),
    Target("B1 out", "decode, 8 H800, EP144, 4,989 cached", 14_800, "tok/s", DAY6, _day6_decode,
           {"b": "64..96..128", "imbalance": "1.0..1.1..1.4", "overlap": "0.5..0.9..1.0", **RANGES}, tables="infersim",
           kind="prediction", note="published is a mean over 24 h; its batch is not stated"),
    Target("B5 in", "prefill, H800, EP32, 4k prompts, balanced", 7_839, "tok/s", PROFILE, _profile_prefill, RANGES,
           gate=0.12, tables="infersim", kind="prediction",
           note="InferSim's own error: +15.2 %; the model's with DeepEP's release of 2025-04: +16.0 %"),
    Target("B5 out", "decode, H800, EP128, 128 a GPU, 4k cached", 2_324, "tok/s", PROFILE, _profile_decode, RANGES, gate=0.12,
           tables="infersim", kind="prediction", note="InferSim's own error: +15.1 %"),
    Target("B7 in", "prefill, 8 H100, EP32, 2,000-token prompts", 52_300, "tok/s", LMSYS,
           lambda env, **x: _sglang_prefill(env, 2000, **x),
           {"overlap": "0.5..1.0..1.0", "imbalance": "1.0..1.0..1.3", **TABLED}, gate=0.2, tables="aic",
           kind="prediction"),
    Target("B7 out", "decode, 8 H100, EP72, 2,000 cached", 22_300, "tok/s", LMSYS, _sglang_decode,
           {"b": "256", "overlap": "0.0..0.5..1.0", "imbalance": "1.0..1.0..1.3", **TABLED}, gate=0.2,
           tables="aic", kind="prediction", note="how much of decode's communication is hidden is not stated: 0 to 1"),
    Target("B7 $", "a node-hour of decode over its tokens", 0.20, "$/Mtok", LMSYS,
           lambda env: e.dollars_per_mtoken(8 * 2.0, 22_300), gate=0.02, note="decode nodes alone, at $2 a GPU-hour"),
    Target("B8", "prefill, 8 H100, EP32, 4k prompts, balanced", 50_302, "tok/s", LMSYS,
           lambda env, **x: _sglang_prefill(env, 4096, imbalance=1.0, **x),
           {"overlap": "0.5..1.0..1.0", **TABLED}, gate=0.2, tables="aic", kind="prediction"),
    Target("B9", "decode, GB200, FP8, 2,000-token prompts", 7_583, "tok/s", "lmsys.org, GB200 part I",
           lambda env: _limit(env, "gb200", 2050), kind="limit"),
    Target("B10 in", "prefill, GB200, NVFP4 experts", 26_156, "tok/s", "lmsys.org/blog/2025-09-25-gb200-part-2",
           lambda env: _limit(env, "gb200", 2000, experts="nvfp4", prefill=True), kind="limit"),
    Target("B10 out", "decode, GB200, FP8 attention, NVFP4 experts", 13_386, "tok/s", "lmsys.org/blog/2025-09-25-gb200-part-2",
           lambda env: _limit(env, "gb200", 2050, cache="fp8", experts="nvfp4"), kind="limit"),
    Target("B10 fp8", "decode, GB200, BF16 attention, FP8 experts", 9_087, "tok/s", "lmsys.org/blog/2025-09-25-gb200-part-2",
           lambda env: _limit(env, "gb200", 2050), kind="limit"),
    Target("B11 GB300", "requests of 128k + 8k a GPU at DEP8", 40, "requests", "lmsys.org, GB300 long context",
           lambda env, s, gb: _fits(env, "gb300", round(s), "fp8", gb), {"s": CONTEXT, "gb": "279..288..298"},
           gate=0.1, kind="prediction"),
    Target("B11 GB200", "the same on GB200", 24, "requests", "lmsys.org, GB300 long context",
           lambda env, s, gb: _fits(env, "gb200", round(s), "fp8", gb), {"s": CONTEXT, "gb": "186..192..198.7"},
           gate=0.1, kind="prediction"),
    Target("B12", "offline, GB300, 804 in / 4,043 out", 8_661, "tok/s", "MLPerf Inference v6.0",
           lambda env: _limit(env, "gb300", 804 + 2022, cache="fp8", experts="nvfp4"), kind="limit"),
    Target("B13", "offline, GB300, a year before", 5_833, "tok/s", "MLPerf Inference v5.1",
           lambda env: _limit(env, "gb300", 804 + 2022, cache="fp8", experts="nvfp4"), kind="limit"),
    Target("B19 in", "gross margin on $1.35 in at cost $0.226", 83, "%", IX,
           lambda env: 100 * e.gross_margin(1.35, 0.226), gate=0.01),
    Target("B19 out", "gross margin on $5.40 out at cost $2.955", 45, "%", IX,
           lambda env: 100 * e.gross_margin(5.40, 2.955), gate=0.01),
    Target("B24", "V3's training at $2 an H800-hour", 5.576e6, "$", V3_REPORT,
           lambda env: e.training_dollars(2.788e6, 2.0), gate=1e-9),
    Target("B24 MFU", "FLOP/s of its pre-training over the bf16 peak", 34.7, "%", V3_REPORT,
           lambda env: 100 * e.achieved_share(e.training_flops(37e9, 14.8e12), 2.664e6, env.chips["h800"].need("flops_bf16")),
           gate=0.01),
    Target("B26 step", "Llama-3-70B int8, 8 TPU v5e, batch 32, 8k cached", 17e-3, "s", "jax-ml/scaling-book",
           lambda env: _book(env), gate=0.05),
    Target("B26", "its tokens/s", 1_882, "tok/s", "jax-ml/scaling-book", lambda env: 32 / _book(env), gate=0.05),
    Target("B27 B200", "gross margin at $40,000 and COGS $6,400", 84, "%", "siliconanalysts.com",
           lambda env: 100 * e.gross_margin(40_000, 6_400), gate=0.01),
    Target("B27 H100", "gross margin at $28,000 and COGS $3,320", 88, "%", "siliconanalysts.com",
           lambda env: 100 * e.gross_margin(28_000, 3_320), gate=0.01),
)
OPEN = {  # published figures whose setup does not suffice for a prediction
    "B6": "Qwen3-30B-A3B and Qwen3-8B on H20: batch and parallelism are not stated",
    "B17": "MTP is one of several changes between the two prices",
    "B18": "needs NVFP4 kernels of TRT-LLM at every batch on the same image; `kernomics pareto --tables aic` draws the curve",
    "B20": "ratios over several engines and precisions",
    "B21": "gpt-oss-120B is no family of the inventory",
    "B22": "an input: chips.toml holds it",
    "B23": "needs Llama-70B measured on both chips with each vendor's engine",
    "B25": "the $/h behind the two prices is not stated",
}


def _book(env):
    """(cache + weights) / bandwidth of the chips, int8 throughout."""
    model, chip = env.model("llama-3.1-70b", weights="fp8"), env.chips["tpu-v5e"]
    return (model.total_params + 32 * 8192 * model.kv_bytes_per_token("fp8")) / (8 * chip.need("bytes_per_s"))


@dataclass(frozen=True)
class Outcome:
    target: Target
    predicted: float | None  # None: not run
    low: float | None = None  # p10 and p90 over the inputs' ranges
    high: float | None = None
    why: str = ""

    @property
    def error(self):
        return None if self.predicted is None else self.predicted / self.target.published - 1

    @property
    def verdict(self):
        t = self.target
        if self.predicted is None:
            return "not run"
        if t.kind == "limit":
            return "within the limit" if t.published <= self.predicted else "EXCEEDED"
        if t.gate is None:
            return "inside p10-p90" if self.inside else "outside p10-p90"
        return "met" if abs(self.error) <= t.gate else f"MISSED (gate {100 * t.gate:g} %)"

    @property
    def inside(self):
        """Whether the published figure lies between p10 and p90; None without ranges."""
        return None if self.low is None else self.low <= self.target.published <= self.high


def validate(env, samples=200, only=None, each=None):
    """[Outcome] of every target, or of those whose id starts with ``only``."""
    from kernomics.cost import uncertainty

    chosen = [t for t in TARGETS if not only or t.id.split()[0] == only or t.id == only]
    if not chosen:
        raise wrong("target", only, ", ".join(t.id for t in TARGETS))
    found = []
    for t in chosen:
        if each:
            each(t)
        if not env.has(t.tables):
            found.append(Outcome(t, None, why=f"needs the tables of {t.tables}"))
            continue
        try:
            middle = t.predict(env, **{k: centre(v) for k, v in t.inputs.items()})
            inputs = {k: uncertainty.parse(v) for k, v in t.inputs.items()}
            if not inputs:
                found.append(Outcome(t, middle))
                continue
            spread = uncertainty.monte_carlo(lambda t=t, **x: t.predict(env, **x), inputs, n=samples, seed=0)
            found.append(Outcome(t, middle, spread.p10, spread.p90))
        except CostError as error:
            found.append(Outcome(t, None, why=str(error)))
    return found


def centre(text):
    """The stated value of an input: a number, the mode of "lo..mode..hi", the middle of "lo..hi", a median."""
    if isinstance(text, dict):
        return text["median"]
    ends = [float(x) for x in text.split("..")]
    return ends[1] if len(ends) == 3 else sum(ends) / len(ends)
