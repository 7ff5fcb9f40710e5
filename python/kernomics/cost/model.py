"""A model as an inventory of operators: parameters, bytes, and the rows of one step on one chip.

Rows take their FLOPs and bytes from ``OPS[op].work``. Work that is no op of ours (bf16 products, attention of grouped
heads, the router and the output head) is counted here. ``NEGLECTED`` is not counted.
"""

import json
from dataclasses import dataclass, field, replace
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from kernomics.contract import OPS, Work
from kernomics.cost import CostError, wrong
from kernomics.cost.economics import expected_active, gqa_kv_bytes, mla_kv_bytes
from kernomics.cost.fields import parse

PUBLISHED = {  # total / active parameters as their makers state them
    "deepseek-v2": "236B / 21B",  # arXiv:2405.04434, abstract
    "deepseek-v3": "671B / 37B",  # arXiv:2412.19437, abstract
    "deepseek-r1": "671B / 37B",  # github.com/deepseek-ai/DeepSeek-R1, README
    "deepseek-v3.2": "671B / 37B",  # the V3 body; the checkpoint's 685B hold the MTP module
    "kimi-k2": "1T / 32B",  # github.com/MoonshotAI/Kimi-K2, README
    "qwen3-235b-a22b": "235B / 22B",  # arXiv:2505.09388
    "mixtral-8x7b": "47B / 13B",  # arXiv:2401.04088, abstract
    "llama-3.1-70b": "70B",  # arXiv:2407.21783
}
NEGLECTED = ("embedding look-up", "sampling", "launch and host time")
PAGE = 64  # tokens a page of the KV cache
APPEND = {"norm_weight": "bf16", "cos": "f32", "sin": "f32"}  # with RMSNorm and RoPE in the same pass
LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128  # widths that the MLA ops fix
MLA_BYTES = {"bf16": mla_kv_bytes(1, LATENT, ROPE, 2), "fp8": 656}  # of a cached token and layer
INDEX_BYTES = 128 + 4  # of a cached token and layer of the sparse index: codes and a scale
BYTES = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}  # a weight; of fp8 the 128 x 128 scales are counted apart


# ---------------------------------------------------------------- config.json


class _Config(BaseModel):
    """What all families share; fields that change no work are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    vocab_size: PositiveInt
    intermediate_size: PositiveInt
    tie_word_embeddings: bool = False
    quantization_config: dict | None = None


class _Latent(_Config):
    """DeepSeek V2, V3, R1, V3.2 and Kimi K2."""

    model_type: Literal["deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"]
    attention_bias: Literal[False] = False
    moe_layer_freq: Literal[1] = 1
    kv_lora_rank: Literal[512]
    qk_rope_head_dim: Literal[64]
    qk_nope_head_dim: Literal[128]
    v_head_dim: Literal[128]
    q_lora_rank: PositiveInt | None = None
    first_k_dense_replace: int = Field(0, ge=0)
    n_routed_experts: PositiveInt
    n_shared_experts: int | None = Field(None, ge=0)
    moe_intermediate_size: PositiveInt
    num_experts_per_tok: PositiveInt
    n_group: PositiveInt
    topk_group: PositiveInt
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(1.0, gt=0, allow_inf_nan=False)
    num_nextn_predict_layers: int = Field(0, ge=0)
    index_n_heads: PositiveInt | None = None
    index_head_dim: Literal[128] = 128
    index_topk: PositiveInt | None = None

    @model_validator(mode="after")
    def _consistent(self):
        for name, value, ok, allowed in (
            ("first_k_dense_replace", self.first_k_dense_replace, self.first_k_dense_replace <= self.num_hidden_layers,
             f"at most num_hidden_layers = {self.num_hidden_layers}"),
            ("n_group", self.n_group, self.n_routed_experts % self.n_group == 0,
             f"a divisor of n_routed_experts = {self.n_routed_experts}"),
            ("topk_group", self.topk_group, self.topk_group <= self.n_group, f"at most n_group = {self.n_group}"),
            ("num_experts_per_tok", self.num_experts_per_tok,
             self.num_experts_per_tok <= self.topk_group * self.n_routed_experts // self.n_group,
             f"at most {self.topk_group * self.n_routed_experts // self.n_group}"),
            ("index_topk", self.index_topk, self.model_type != "deepseek_v32" or (self.index_topk and self.index_n_heads),
             "an integer, with index_n_heads, in a deepseek_v32"),
        ):
            if not ok:
                raise wrong(f"config.json: {name}", value, allowed)
        return self

    def blocks(self):
        index = Index(self.index_n_heads, self.index_topk) if self.model_type == "deepseek_v32" else None
        attention = Mla(self.num_attention_heads, self.q_lora_rank, index)
        biased = self.topk_method == "noaux_tc"
        moe = Moe(self.n_routed_experts, self.moe_intermediate_size, self.num_experts_per_tok, self.n_shared_experts or 0,
                  self.n_group, self.topk_group, biased,
                  {"score": self.scoring_func, "group_score": "top2" if biased else "max", "renormalize": self.norm_topk_prob,
                   "scaling": self.routed_scaling_factor})
        dense = self.first_k_dense_replace
        return [Block("dense", dense, attention, Mlp(self.intermediate_size)),
                Block("moe", self.num_hidden_layers - dense, attention, moe)]


class _Grouped(_Config):
    """Attention of grouped heads."""

    num_key_value_heads: PositiveInt
    head_dim: PositiveInt | None = None
    sliding_window: None = None
    attention_bias: Literal[False] = False

    @model_validator(mode="after")
    def _heads(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise wrong("config.json: num_key_value_heads", self.num_key_value_heads,
                        f"a divisor of num_attention_heads = {self.num_attention_heads}")
        return self

    def attention(self, norms=False):
        return Gqa(self.num_attention_heads, self.num_key_value_heads,
                   self.head_dim or self.hidden_size // self.num_attention_heads, norms)


class _Llama(_Grouped):
    model_type: Literal["llama"]
    mlp_bias: Literal[False] = False

    def blocks(self):
        return [Block("dense", self.num_hidden_layers, self.attention(), Mlp(self.intermediate_size))]


class _Mixtral(_Grouped):
    model_type: Literal["mixtral"]
    num_local_experts: PositiveInt
    num_experts_per_tok: PositiveInt

    def blocks(self):
        moe = Moe(self.num_local_experts, self.intermediate_size, self.num_experts_per_tok,
                  route={"score": "softmax", "renormalize": True})
        return [Block("moe", self.num_hidden_layers, self.attention(), moe)]


class _Qwen3Moe(_Grouped):
    model_type: Literal["qwen3_moe"]
    head_dim: PositiveInt
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    norm_topk_prob: bool = True
    decoder_sparse_step: Literal[1] = 1
    mlp_only_layers: list = Field(default_factory=list, max_length=0)

    def blocks(self):
        moe = Moe(self.num_experts, self.moe_intermediate_size, self.num_experts_per_tok,
                  route={"score": "softmax", "renormalize": self.norm_topk_prob})
        return [Block("moe", self.num_hidden_layers, self.attention(norms=True), moe)]


FAMILIES = {"deepseek_v2": _Latent, "deepseek_v3": _Latent, "deepseek_v32": _Latent, "kimi_k2": _Latent, "llama": _Llama,
            "mixtral": _Mixtral, "qwen3_moe": _Qwen3Moe}


def _weights(config):
    """"fp8" with 128 x 128 scales, or "bf16" where the checkpoint is not quantized."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return "bf16"
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        got = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise wrong("config.json: quantization_config.quant_method", got, "fp8, or no quantization_config (bf16)")
    if quantization.get("weight_block_size") != [128, 128]:
        raise wrong("config.json: quantization_config.weight_block_size", quantization.get("weight_block_size"), "[128, 128]")
    return "fp8"


def presets():
    """The models that ship, by name."""
    folder = resources.files("kernomics.cost").joinpath("configs")
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))


# ---------------------------------------------------------------- parts of a model


@dataclass(frozen=True)
class Index:
    """The indexer of sparse attention: ``h`` heads score every cached token, the best ``top_k`` are attended to."""

    h: int
    top_k: int


@dataclass(frozen=True)
class Mla:
    """Attention over one compressed vector a token."""

    h: int
    q_rank: int | None
    index: Index | None = None

    def linears(self, d, tp=1):
        """name -> (n, k) of the projections on one of ``tp`` chips."""
        q, h = self.h // tp * (NOPE + ROPE), self.h // tp
        first = ({"q + kv_a": (q + LATENT + ROPE, d)} if self.q_rank is None else
                 {"q_a + kv_a": (self.q_rank + LATENT + ROPE, d), "q_b": (q, self.q_rank)})
        more = {"index q": (self.index.h * 128, self.q_rank or d)} if self.index else {}
        return {**first, **more, "kv_b": (h * (NOPE + VALUE), LATENT), "o": (d, h * VALUE)}

    def others(self, d):
        """Parameters kept in bf16: norms, and the indexer's key, its norm's weight and bias, and head weights."""
        return (self.q_rank or 0) + LATENT + (d * 128 + 2 * 128 + d * self.index.h if self.index else 0)

    def kv_bytes(self, cache, tp=1):
        return MLA_BYTES[cache] + (INDEX_BYTES if self.index else 0)  # every chip of a TP group holds it all


@dataclass(frozen=True)
class Gqa:
    """Attention of ``h`` heads that share ``kv_heads`` keys and values."""

    h: int
    kv_heads: int
    head_dim: int
    norms: bool = False  # RMSNorm of each head's q and k

    def linears(self, d, tp=1):
        h, kv_heads = self.h // tp, max(1, self.kv_heads // tp)
        return {"qkv": ((h + 2 * kv_heads) * self.head_dim, d), "o": (d, h * self.head_dim)}

    def others(self, d):
        return 2 * self.head_dim if self.norms else 0

    def kv_bytes(self, cache, tp=1):
        return gqa_kv_bytes(1, max(1, self.kv_heads // tp), self.head_dim, 2 if cache == "bf16" else 1)


@dataclass(frozen=True)
class Mlp:
    """SwiGLU of width n."""

    n: int


@dataclass(frozen=True)
class Moe:
    """``e`` SwiGLU experts of width n, ``top_k`` a token, beside ``shared`` that every token uses."""

    e: int
    n: int
    top_k: int
    shared: int = 0
    n_group: int = 1
    topk_group: int = 1
    bias: bool = False
    route: dict = field(default_factory=dict, hash=False)  # scalars of moe_route

    @property
    def router(self):
        """Router parameters for each of the d inputs, and beside."""
        return self.e, self.e if self.bias else 0


@dataclass(frozen=True)
class Block:
    """``count`` layers alike."""

    name: str
    count: int
    attention: object
    mlp: object


@dataclass(frozen=True)
class Shard:
    """One chip's part of a step.

    ``tp`` chips share a layer's heads and widths; ``ep`` chips share the routed experts, ``redundant`` of them held twice;
    ``imbalance`` is the load of the busiest chip's experts over the mean.
    """

    tp: int = 1
    ep: int = 1
    redundant: int = 0
    imbalance: float = 1.0
    cache: str = "bf16"

    def __post_init__(self):
        for name, value, ok, allowed in (
            ("tp", self.tp, self.tp >= 1, "an integer of at least 1"), ("ep", self.ep, self.ep >= 1, "an integer of at least 1"),
            ("redundant", self.redundant, self.redundant >= 0, "an integer of at least 0"),
            ("imbalance", self.imbalance, self.imbalance >= 1, "a number of at least 1: the busiest over the mean"),
            ("cache", self.cache, self.cache in ("bf16", "fp8"), "bf16, fp8"),
        ):
            if not ok:
                raise wrong(name, value, allowed)


WHOLE = Shard()


PROJECTIONS, CORE, SHARED, ROUTED = SLOTS = ("projections", "core", "shared", "routed")


@dataclass(frozen=True)
class Row:
    """One operator of a step: ``count`` calls with these dims. ``op`` is None where no op of ours does it.

    ``kind``, ``units`` and ``lookup`` name the call as imported tables do (see ``tables.py``). ``slot`` is the part of a MoE
    layer it belongs to where two batches alternate: up to the core of attention, from there to the router, shared experts,
    routed ones. ``part`` is what a table of routed experts may have measured with them: activation, permutation.
    """

    layer: str  # attention (every layer), dense, moe, head
    name: str
    op: str | None
    dims: dict
    dtype: str | None  # of the matrix units; None: elementwise, bounded by its bytes alone
    count: int
    work: Work  # of one call
    kind: str | None = None
    units: str = ""  # dtype in a table's words
    lookup: dict = field(default_factory=dict)
    variants: tuple = ()  # of a table, best first; then the table's own choice
    slot: str = ""
    part: str = ""


@dataclass(frozen=True)
class Model:
    name: str
    d: int  # hidden size
    vocab: int
    tied: bool
    blocks: tuple
    mtp_layers: int
    weights: str  # of projections: fp8 or bf16
    experts: str  # of routed experts: fp8, bf16 or nvfp4

    @staticmethod
    def load(source, weights=None, experts=None):
        """From a preset's name, the path of a config.json, or its dict; ``weights`` and ``experts`` override its dtypes."""
        if isinstance(source, dict):
            return Model.from_config(source, "model", weights, experts)
        if source in presets():
            text = resources.files("kernomics.cost").joinpath("configs", f"{source}.json").read_text(encoding="utf-8")
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise wrong("model", str(source), f"{', '.join(presets())} or the path of a Hugging Face config.json")
            text = path.read_text(encoding="utf-8")
        try:
            config = json.loads(text)
        except ValueError as error:
            raise CostError(f"{source} is not JSON: {error}") from None
        return Model.from_config(config, str(source), weights, experts)

    @staticmethod
    def from_config(config, name="model", weights=None, experts=None):
        if not isinstance(config, dict):
            raise wrong("config.json", type(config).__name__, "a JSON object")
        family = FAMILIES.get(config.get("model_type"))
        if family is None:
            raise wrong("config.json: model_type", config.get("model_type"), ", ".join(FAMILIES))
        c = parse(family, config, "config.json")
        weights = weights or _weights(config)
        experts = experts or weights
        for what, value, allowed in (("weights", weights, ("bf16", "fp8")), ("experts", experts, tuple(BYTES))):
            if value not in allowed:
                raise wrong(what, value, ", ".join(allowed))
        return Model(name, c.hidden_size, c.vocab_size, c.tie_word_embeddings, tuple(b for b in c.blocks() if b.count),
                     getattr(c, "num_nextn_predict_layers", 0), weights, experts)

    def renamed(self, name):
        return replace(self, name=name)

    # -- shape

    @property
    def layers(self):
        return sum(b.count for b in self.blocks)

    @property
    def attention(self):
        return self.blocks[-1].attention

    @property
    def moe(self):
        """The experts of a MoE model, else None."""
        return next((b.mlp for b in self.blocks if isinstance(b.mlp, Moe)), None)

    @property
    def h(self):
        return self.attention.h

    def text(self):
        """The shape in a line."""
        parts = [f"{self.layers} layers", f"hidden {self.d}", f"{self.h} heads"]
        dense = sum(b.count for b in self.blocks if isinstance(b.mlp, Mlp))
        if self.moe:
            parts[0] += f" ({dense} dense)" if dense else ""
            parts.append(f"{self.moe.e} experts of {self.moe.n}, {self.moe.top_k} per token")
        return ", ".join(parts)

    # -- parameters

    @property
    def embedding_params(self):
        return self.vocab * self.d

    def params(self, experts=None):
        """Parameters with ``experts`` routed experts a layer; None: all."""
        body = sum(b.count * self.block_params(b, experts) for b in self.blocks)
        return body + self.d + self.embedding_params * (1 if self.tied else 2)

    def block_params(self, block, experts=None):
        """Parameters of one layer: projections, norms, MLP or router and experts."""
        count = _params(block.attention.linears(self.d)) + block.attention.others(self.d) + 2 * self.d
        if isinstance(block.mlp, Mlp):
            return count + _params(mlp_linears(self.d, block.mlp.n))
        each, bias = block.mlp.router
        routed = block.mlp.e if experts is None else experts
        return count + each * self.d + bias + (routed + block.mlp.shared) * _params(mlp_linears(self.d, block.mlp.n))

    @property
    def total_params(self):
        return self.params()

    @property
    def active_params(self):
        """Parameters that one token uses, the input embedding counted whole."""
        return self.params(self.moe.top_k if self.moe else None)

    @property
    def active_params_no_embedding(self):
        """Parameters that are multiplied for one token: without the input embedding, which is a look-up."""
        return self.active_params - (0 if self.tied else self.embedding_params)

    @property
    def mtp_params(self):
        """MTP modules: a layer as the last, the 2d -> d projection, norms, and copies of embedding and head."""
        module = self.block_params(self.blocks[-1]) + 2 * self.d * self.d + 3 * self.d
        return self.mtp_layers * (module + 2 * self.embedding_params)

    # -- memory

    def kv_bytes_per_token(self, cache="bf16", tp=1, drafts=False):
        """byte/token = layer * byte/(layer*token), on each chip of a TP group; with the MTP module's layer where it drafts."""
        last = self.blocks[-1].attention.kv_bytes(cache, tp) if drafts else 0
        return sum(b.count * b.attention.kv_bytes(cache, tp) for b in self.blocks) + last

    @property
    def weight_bytes(self):
        return self.chip_weight_bytes(WHOLE)

    def chip_weight_bytes(self, shard):
        """Bytes of the weights that one chip holds: projections and experts in their dtypes, f32 scales, the rest bf16."""
        tp, total = shard.tp, 0.0
        for b in self.blocks:
            layer = _bytes(b.attention.linears(self.d, tp), self.weights) + 2 * (b.attention.others(self.d) + 2 * self.d)
            if isinstance(b.mlp, Mlp):
                layer += _bytes(mlp_linears(self.d, b.mlp.n // tp), self.weights)
            else:
                each, bias = b.mlp.router
                layer += 2 * (each * self.d + bias) + _bytes(mlp_linears(self.d, b.mlp.shared * b.mlp.n // tp), self.weights)
                layer += self.experts_held(b.mlp, shard) * _bytes(mlp_linears(self.d, b.mlp.n), self.experts)
            total += b.count * layer
        return total + 2 * self.d + 2 * self.embedding_params * (1 if self.tied else 2) / tp

    @staticmethod
    def experts_held(moe, shard):
        """Routed experts of one layer on a chip; a share where they are cut by TP."""
        return (moe.e + shard.redundant) / shard.ep if shard.ep > 1 else moe.e / shard.tp

    def memory_bytes(self, b, s):
        """byte = weights + sequence * token/sequence * byte/token"""
        return self.weight_bytes + b * s * self.kv_bytes_per_token()

    # -- rows of a step

    def decode(self, b, s, q=1, shard=WHOLE):
        """Rows of one decode step on a chip: b sequences, q new tokens each, s tokens cached with them."""
        return self._step(b * q, b, q, s, shard, decode=True)

    def prefill(self, t, b=1, prefix=0, shard=WHOLE):
        """Rows of one prefill step on a chip: b prompts of t/b new tokens each, behind ``prefix`` cached ones."""
        return self._step(t, b, t // b, prefix + t // b, shard, decode=False)

    def check(self, shard):
        """A CostError where heads, widths or experts do not divide by the chips that share them."""
        moe = self.moe
        for name, value, count, what in (
            ("tp", shard.tp, self.h, "heads"), ("ep", shard.ep, moe.e + shard.redundant if moe else None, "experts held"),
            ("tp", shard.tp, moe.n if moe and shard.ep == 1 else None, "an expert's width"),
        ):
            if count is None and value > 1 and name == "ep":
                raise wrong("ep", value, f"1: {self.name} has no experts")
            if count is not None and count % value:
                raise wrong(name, value, f"a divisor of {count}, {what}")

    def _step(self, t, b, q, s, shard, decode):
        self.check(shard)
        rows = []
        attention = Rows(self, "attention", self.layers, shard)
        (attention.latent if isinstance(self.attention, Mla) else attention.grouped)(self.attention, t, b, q, s, decode)
        rows += attention.rows
        for block in self.blocks:
            at = Rows(self, block.name, block.count, shard)
            if isinstance(block.mlp, Mlp):
                at.mlp("MLP", t, block.mlp.n // shard.tp)
            else:
                at.moe(block.mlp, t, "decode" if decode else "prefill")
            rows += at.rows
        head = Rows(self, "head", 1, shard)
        head.bmm("output head", 1, t if decode else b, self.vocab // shard.tp, self.d)
        return rows + head.rows


def token_bytes(d, dtype="fp8"):
    """Bytes of a token's hidden state: codes and a scale per 128 in fp8, two bytes a value in bf16."""
    return d + 4 * ceil(d / 128) if dtype == "fp8" else 2 * d


def mlp_linears(d, n):
    """name -> (n, k) of a SwiGLU MLP of width n."""
    return {"gate + up": (2 * n, d), "down": (d, n)} if n else {}


class Rows:
    """Collects the rows of one kind of layer."""

    def __init__(self, model, layer, count, shard):
        self.model, self.layer, self.count, self.shard, self.rows = model, layer, count, shard, []
        self.slot = self.part = ""  # of the rows that follow

    def add(self, name, op, dims, dtype, work, kind=None, units="", lookup=(), variants=()):
        self.rows.append(Row(self.layer, name, op, dims, dtype, self.count, work, kind, units, dict(lookup), variants,
                             self.slot, self.part))

    def pass_over(self, name, size):
        """An elementwise pass that reads and writes ``size`` bytes in all: no op of ours."""
        self.add(name, None, {"bytes": round(size)}, None, Work(0, size))

    def op(self, name, op, dtype=None, kind=None, units="", lookup=(), variants=(), **dims):
        self.add(name, op, dims, dtype, OPS[op].work(**dims), kind, units, lookup, variants)

    def bmm(self, name, b, m, n, k):
        """b bf16 products [m, k] x [k, n]: no op of ours."""
        work = Work(2 * b * m * n * k, 2 * b * (m * k + k * n + m * n))
        dims = {"b": b, "m": m, "n": n, "k": k} if b > 1 else {"m": m, "n": n, "k": k}
        self.add(name, None, dims, "bf16", work, *(("gemm", "bf16", dims) if b == 1 else ()))

    def linear(self, name, m, n, k):
        """x [m, k] -> [m, n]: quantize and multiply in fp8, or multiply in bf16."""
        if self.model.weights == "bf16":
            return self.bmm(name, 1, m, n, k)
        self.op("quantize", "fp8_quantize", m=m, k=k)
        self.product(name, m, n, k)

    def product(self, name, m, n, k):
        dims = {"m": m, "n": n, "k": k}
        self.op(name, "fp8_gemm", dtype="fp8", kind="gemm", units="fp8_block", lookup=dims, **dims)

    def mlp(self, name, t, n):
        d = self.model.d
        self.linear(f"{name} gate + up", t, 2 * n, d)
        if self.model.weights == "bf16":
            return self.bmm(f"{name} down", 1, t, d, n)
        self.op(f"{name} SwiGLU", "swiglu_quantize", t=t, n=n)
        self.product(f"{name} down", t, d, n)

    # -- attention

    def latent(self, a, t, b, q, s, decode):
        """MLA: absorbed where it decodes (each query sees all keys), expanded where it prefills."""
        h, cache, linears = a.h // self.shard.tp, self.shard.cache, a.linears(self.model.d, self.shard.tp)
        tensor = "bf16" if cache == "bf16" else "u8"
        self.slot = PROJECTIONS
        self.norms(t)
        for name in [n for n in linears if n not in ("kv_b", "o", "index q")]:
            self.linear(name, t, *linears[name])
        self.pass_over("q norm and RoPE", 2 * t * (2 * (a.q_rank or 0) + 2 * h * ROPE))
        self.op("append KV", "mla_append_kv", t=t, kv_cache=tensor, **APPEND)
        if a.index:
            self.index(a, t, s, linears)
        if decode or a.index:
            self.bmm("absorb W_uk", h, t, LATENT, NOPE)
            self.slot = CORE
            if a.index:
                keys = min(s, a.index.top_k)
                self.op("MLA decode", "mla_decode_sparse", dtype="bf16", b=b, q=q, h=h, top_k=keys, page=PAGE,
                        p=ceil(b * s / PAGE), kv_cache=tensor, kind="mla_decode", units=cache,
                        lookup={"b": t, "h": h, "s": keys})
            else:
                # q queries do the work of q times the heads
                self.op("MLA decode", "mla_decode", dtype="bf16", b=b, q=q, h=h, s=s, page=PAGE, kv_cache=tensor,
                        kind="mla_decode", units=cache, lookup={"b": b, "h": q * h, "s": s})
            self.bmm("absorb W_uv", h, t, VALUE, LATENT)
        else:
            self.linear("kv_b", b * s, *linears["kv_b"])  # of the prefix too
            self.pass_over("assemble K", 2 * b * s * h * (NOPE + (NOPE + ROPE)))
            self.slot = CORE
            self.op("MLA prefill", "mla_prefill", dtype="bf16", t=t, s=b * s, h=h, b=b, kind="mla_prefill", units="bf16",
                    lookup={"b": b, "t": q, "prefix": s - q, "h": h})
        self.linear("o", t, *linears["o"])

    def norms(self, t):
        """Before attention and before the MLP: add the residual and normalise, two tensors in and two out."""
        self.pass_over("residual and norms", 2 * 4 * 2 * t * self.model.d)

    def index(self, a, t, s, linears):
        """Scores of every cached token, and the best of them."""
        d = self.model.d
        self.linear("index q", t, *linears["index q"])
        self.bmm("index k + weights", 1, t, 128 + a.index.h, d)
        self.op("index scores", "mla_index", dtype="fp8", t=t, h=a.index.h, s=s)

    def grouped(self, a, t, b, q, s, decode):
        tp, hd = self.shard.tp, a.head_dim
        h, kv_heads, linears = a.h // tp, max(1, a.kv_heads // tp), a.linears(self.model.d, tp)
        self.slot = PROJECTIONS
        self.norms(t)
        self.linear("qkv", t, *linears["qkv"])
        self.pass_over("RoPE and append KV", 2 * t * (2 * h + 3 * kv_heads) * hd)
        size = 2 if self.shard.cache == "bf16" else 1
        pairs = b * (q * (s - q) + q * (q + 1) / 2)  # query-key pairs of a head
        work = Work(4 * h * hd * pairs, 2 * size * b * s * kv_heads * hd + 4 * t * h * hd)
        shape = {"b": b, "h": h, "kv_heads": kv_heads, "head_dim": hd}
        self.slot = CORE
        if decode:
            self.add("GQA decode", None, {**shape, "q": q, "s": s}, "bf16", work, "gqa_decode", self.shard.cache,
                     {**shape, "h": q * h, "s": s})
        else:
            self.add("GQA prefill", None, {**shape, "t": q, "s": s}, "bf16", work, "gqa_prefill", self.shard.cache,
                     {**shape, "t": q, "prefix": s - q})
        self.linear("o", t, *linears["o"])

    # -- experts

    def moe(self, moe, t, phase):
        """Router, routed experts and shared ones. ``t``: tokens of this chip; its experts see those of all EP chips."""
        shard, d = self.shard, self.model.d
        self.slot = CORE
        self.bmm("router", 1, t, moe.e, d)
        self.op("route", "moe_route", t=t, e=moe.e, top_k=moe.top_k, n_group=moe.n_group, topk_group=moe.topk_group,
                **({"bias": "f32"} if moe.bias else {}), **moe.route)
        self.slot = ROUTED
        everyone = t * shard.ep / shard.tp if shard.ep > 1 else t  # tokens of the group; TP chips hold the same ones
        variants = (f"balanced_{phase}",)
        if shard.ep > 1:  # tokens as DeepEP delivers them
            variants = (f"deepep_{phase}_uniform", *variants)
        lookup = {"t": round(everyone * shard.imbalance), "d": d, "n": moe.n, "e": moe.e, "top_k": moe.top_k,
                  "tp": shard.tp if shard.ep == 1 else 1, "ep": shard.ep}
        if shard.ep == 1:
            active = round(expected_active(t, moe.e, moe.top_k))
            dims = dict(t=t, d=d, n=moe.n // shard.tp, e=moe.e, top_k=moe.top_k, active=active)
        else:
            held = ceil(self.model.experts_held(moe, shard))
            rows = max(1, round(everyone * moe.top_k / shard.ep * shard.imbalance))
            share = held / (moe.e + shard.redundant)  # a token's chance to reach one of these, spread over copies
            active = max(1, min(held, rows, round(held * (1 - (1 - moe.top_k * share / held) ** everyone))))
            dims = dict(t=rows, d=d, n=moe.n, e=held, top_k=1, active=active)
            self.part = "permutation"
            self.pass_over("to expert order", rows * 2 * token_bytes(d))
            self.pass_over("from expert order", rows * 2 * 2 * d)
            self.part = "activation"
            self.op("expert SwiGLU", "swiglu_quantize", t=rows, n=moe.n)
            self.part = ""
        experts = self.model.experts
        if experts == "nvfp4":
            work = OPS["moe_experts_bf16"].work(**dims)
            params = dims["active"] * _params(mlp_linears(d, dims["n"]))
            self.add("routed experts", None, dims, "fp4", Work(work.flops, work.bytes - 2 * params + params * BYTES["nvfp4"]),
                     "moe", "nvfp4", lookup, variants)
        else:
            self.op("routed experts", "moe_experts" if experts == "fp8" else "moe_experts_bf16", dtype=experts, kind="moe",
                    units="fp8_block" if experts == "fp8" else "bf16", lookup=lookup, variants=variants, **dims)
        if moe.shared:
            self.slot = SHARED
            self.mlp("shared", t, moe.shared * moe.n // shard.tp)


def _params(linears):
    return sum(n * k for n, k in linears.values())


def _bytes(linears, dtype):
    scales = 4 * sum(ceil(n / 128) * ceil(k / 128) for n, k in linears.values()) if dtype == "fp8" else 0
    return BYTES[dtype] * _params(linears) + scales
