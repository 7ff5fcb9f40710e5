"""A DeepSeek-V3-family model as an inventory of operators: parameters, bytes, and the rows of one step.

Rows take their FLOPs and bytes from ``OPS[op].work``. Work that is no op of ours (bf16 products of the absorbed
attention, the router and the output head) is counted here and is only ever bounded. ``NEGLECTED`` is not counted.
"""

import json
from dataclasses import dataclass, field
from importlib import resources
from math import ceil
from pathlib import Path

from kernomics.contract import OPS, Work
from kernomics.cost import CostError, wrong
from kernomics.cost.economics import expected_active

PRESETS = {"deepseek-v3": "deepseek_v3.json"}
PUBLISHED = {"deepseek-v3": "671B / 37B"}  # DeepSeek-V3 technical report, arXiv:2412.19437, abstract
FAMILY = ("deepseek_v3", "kimi_k2")
NEGLECTED = ("RMSNorm of hidden state and q", "RoPE on q", "residual additions", "embedding look-up", "sampling", "communication",
             "launch and host time", "the MTP module")
PAGE = 64  # tokens a page of the KV cache
APPEND = {"norm_weight": "bf16", "cos": "f32", "sin": "f32", "kv_cache": "bf16"}  # with RMSNorm and RoPE in the same pass
FP8_TOKEN = 656  # bytes a layer and token of the FP8 cache layout
LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128  # widths that the attention ops fix


def _integer(config, name, low=1, fixed=None):
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (fixed and value != fixed):
        raise wrong(f"config.json: {name}", value, f"{fixed} (the layout of the attention ops)" if fixed else
                    f"an integer of at least {low}")
    return value


def _number(config, name, default):
    value = config.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise wrong(f"config.json: {name}", value, "a number")
    return float(value)


def _one_of(config, name, choices, default=None):
    value = config.get(name, default)
    if value not in choices:
        raise wrong(f"config.json: {name}", value, ", ".join(map(str, choices)))
    return value


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


@dataclass(frozen=True)
class Row:
    """One operator of a step: ``count`` calls with these dims. ``op`` is None where no op of ours does it."""

    layer: str  # attention (every layer), dense, moe, head
    name: str
    op: str | None
    dims: dict
    dtype: str | None  # of the matrix units; None: elementwise, bounded by its bytes alone
    count: int
    work: Work  # of one call


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    dense_layers: int
    d: int  # hidden size
    h: int  # attention heads
    q_rank: int | None
    vocab: int
    dense_n: int  # width of the dense MLP
    n: int  # width of an expert
    e: int  # routed experts
    shared: int
    top_k: int
    n_group: int
    topk_group: int
    tied: bool
    mtp_layers: int
    weights: str  # fp8 or bf16
    route: dict = field(default_factory=dict)  # scalars of moe_route

    @staticmethod
    def load(source):
        """From a preset's name, the path of a config.json, or its dict."""
        if isinstance(source, dict):
            return Model.from_config(source)
        if source in PRESETS:
            text = resources.files("kernomics.cost").joinpath("configs", PRESETS[source]).read_text(encoding="utf-8")
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise wrong("model", str(source), f"{', '.join(PRESETS)} or the path of a Hugging Face config.json")
            text = path.read_text(encoding="utf-8")
        try:
            config = json.loads(text)
        except ValueError as error:
            raise CostError(f"{source} is not JSON: {error}") from None
        return Model.from_config(config, str(source))

    @staticmethod
    def from_config(config, name="model"):
        if not isinstance(config, dict):
            raise wrong("config.json", type(config).__name__, "a JSON object")
        _one_of(config, "model_type", FAMILY)
        _one_of(config, "moe_layer_freq", (1,), 1)
        _one_of(config, "attention_bias", (False,), False)
        _one_of(config, "topk_method", ("noaux_tc",), "noaux_tc")
        for key, fixed in (("kv_lora_rank", LATENT), ("qk_rope_head_dim", ROPE), ("qk_nope_head_dim", NOPE),
                           ("v_head_dim", VALUE)):
            _integer(config, key, fixed=fixed)
        layers, e = _integer(config, "num_hidden_layers"), _integer(config, "n_routed_experts")
        top_k, dense_layers = _integer(config, "num_experts_per_tok"), _integer(config, "first_k_dense_replace", 0)
        n_group, topk_group = _integer(config, "n_group"), _integer(config, "topk_group")
        if dense_layers > layers:
            raise wrong("config.json: first_k_dense_replace", dense_layers, f"at most num_hidden_layers = {layers}")
        if e % n_group:
            raise wrong("config.json: n_group", n_group, f"a divisor of n_routed_experts = {e}")
        if topk_group > n_group:
            raise wrong("config.json: topk_group", topk_group, f"at most n_group = {n_group}")
        if top_k > topk_group * e // n_group:
            raise wrong("config.json: num_experts_per_tok", top_k, f"at most {topk_group * e // n_group}")
        return Model(
            name=name, layers=layers, dense_layers=dense_layers, d=_integer(config, "hidden_size"),
            h=_integer(config, "num_attention_heads"),
            q_rank=None if config.get("q_lora_rank") is None else _integer(config, "q_lora_rank"),
            vocab=_integer(config, "vocab_size"), dense_n=_integer(config, "intermediate_size"),
            n=_integer(config, "moe_intermediate_size"), e=e, shared=_integer(config, "n_shared_experts", 0),
            top_k=top_k, n_group=n_group, topk_group=topk_group,
            tied=_one_of(config, "tie_word_embeddings", (True, False), False),
            mtp_layers=_integer({"num_nextn_predict_layers": 0, **config}, "num_nextn_predict_layers", 0),
            weights=_weights(config),
            route={"score": _one_of(config, "scoring_func", ("sigmoid", "softmax"), "sigmoid"),
                   "renormalize": _one_of(config, "norm_topk_prob", (True, False), True),
                   "scaling": _number(config, "routed_scaling_factor", 1.0)},
        )

    # -- parameters

    @property
    def moe_layers(self):
        return self.layers - self.dense_layers

    @property
    def attention_linears(self):
        """name -> (n, k) of the attention block's projections."""
        q = self.h * (NOPE + ROPE)
        if self.q_rank is None:
            first = {"q + kv_a": (q + LATENT + ROPE, self.d)}
        else:
            first = {"q_a + kv_a": (self.q_rank + LATENT + ROPE, self.d), "q_b": (q, self.q_rank)}
        return {**first, "kv_b": (self.h * (NOPE + VALUE), LATENT), "o": (self.d, self.h * VALUE)}

    def mlp_linears(self, n):
        """name -> (n, k) of a SwiGLU MLP of width n."""
        return {"gate + up": (2 * n, self.d), "down": (self.d, n)}

    @property
    def attention_params(self):
        return _params(self.attention_linears) + (self.q_rank or 0) + LATENT + 2 * self.d  # four RMSNorms

    def moe_params(self, experts):
        """Router with its bias, ``experts`` routed experts and the shared ones."""
        return (self.d + 1) * self.e + (experts + self.shared) * _params(self.mlp_linears(self.n))

    def params(self, experts):
        """Parameters with ``experts`` routed experts a layer."""
        body = (self.layers * self.attention_params + self.dense_layers * _params(self.mlp_linears(self.dense_n))
                + self.moe_layers * self.moe_params(experts))
        return body + self.d + self.embedding_params * (1 if self.tied else 2)

    @property
    def embedding_params(self):
        return self.vocab * self.d

    @property
    def total_params(self):
        return self.params(self.e)

    @property
    def active_params(self):
        """Parameters that one token uses, the input embedding counted whole."""
        return self.params(self.top_k)

    @property
    def active_params_no_embedding(self):
        """Parameters that are multiplied for one token: without the input embedding, which is a look-up."""
        return self.active_params - (0 if self.tied else self.embedding_params)

    @property
    def mtp_params(self):
        """One MTP module: a MoE layer, the 2d -> d projection, norms, and its copies of embedding and head."""
        module = self.attention_params + self.moe_params(self.e) + 2 * self.d * self.d + 3 * self.d
        return self.mtp_layers * (module + 2 * self.embedding_params)

    # -- memory

    def kv_bytes_per_token(self, cache="bf16"):
        """byte/token = layer * byte/(layer*token)"""
        return self.layers * (2 * (LATENT + ROPE) if cache == "bf16" else FP8_TOKEN)

    @property
    def weight_bytes(self):
        """Bytes of the weights: projections and experts in fp8 with f32 scales (or bf16), the rest in bf16."""
        expert = self.mlp_linears(self.n)
        quantized = [(self.layers, self.attention_linears), (self.dense_layers, self.mlp_linears(self.dense_n)),
                     (self.moe_layers * (self.e + self.shared), expert)]
        params = sum(count * _params(linears) for count, linears in quantized)
        if self.weights == "bf16":
            return 2 * self.total_params
        scales = sum(count * ceil(n / 128) * ceil(k / 128) for count, linears in quantized for n, k in linears.values())
        return params + 4 * scales + 2 * (self.total_params - params)

    def memory_bytes(self, b, s):
        """byte = weights + sequence * token/sequence * byte/token"""
        return self.weight_bytes + b * s * self.kv_bytes_per_token()

    # -- rows of a step

    def decode(self, b, s):
        """Rows of one decode step: b sequences, one new token each, s tokens cached with it."""
        at, attention = Rows(self, "attention", self.layers), self.attention_linears
        for name in list(attention)[:-2]:
            at.linear(name, b, *attention[name])
        at.op("append KV", "mla_append_kv", t=b, **APPEND)
        at.bmm("absorb W_uk", self.h, b, LATENT, NOPE)
        at.op("MLA decode", "mla_decode", dtype="bf16", b=b, q=1, h=self.h, s=s, page=PAGE, kv_cache="bf16")
        at.bmm("absorb W_uv", self.h, b, VALUE, LATENT)
        at.linear("o", b, *attention["o"])
        return at.rows + self._mlp_rows(b) + self._head_rows(b)

    def prefill(self, t, b=1):
        """Rows of one prefill step: b whole prompts of t/b tokens each."""
        at, attention = Rows(self, "attention", self.layers), self.attention_linears
        for name in list(attention)[:-2]:
            at.linear(name, t, *attention[name])
        at.op("append KV", "mla_append_kv", t=t, **APPEND)
        at.linear("kv_b", t, *attention["kv_b"])
        at.op("MLA prefill", "mla_prefill", dtype="bf16", t=t, s=t, h=self.h, b=b)
        at.linear("o", t, *attention["o"])
        return at.rows + self._mlp_rows(t) + self._head_rows(b)

    def _mlp_rows(self, t):
        dense, moe = Rows(self, "dense", self.dense_layers), Rows(self, "moe", self.moe_layers)
        dense.mlp("MLP", t, self.dense_n)
        moe.bmm("router", 1, t, self.e, self.d)
        moe.op("route", "moe_route", t=t, e=self.e, top_k=self.top_k, n_group=self.n_group,
               topk_group=self.topk_group, bias="f32", **self.route)
        active = round(expected_active(t, self.e, self.top_k))
        moe.op("routed experts", "moe_experts" if self.weights == "fp8" else "moe_experts_bf16", dtype=self.weights,
               t=t, d=self.d, n=self.n, e=self.e, top_k=self.top_k, active=active)
        if self.shared:
            moe.mlp("shared", t, self.shared * self.n)
        return dense.rows + moe.rows

    def _head_rows(self, m):
        head = Rows(self, "head", 1)
        head.bmm("output head", 1, m, self.vocab, self.d)
        return head.rows


class Rows:
    """Collects the rows of one kind of layer."""

    def __init__(self, model, layer, count):
        self.model, self.layer, self.count, self.rows = model, layer, count, []

    def op(self, name, op, dtype=None, **dims):
        if self.count:
            self.rows.append(Row(self.layer, name, op, dims, dtype, self.count, OPS[op].work(**dims)))

    def bmm(self, name, b, m, n, k):
        """b bf16 products [m, k] x [k, n]: no op of ours."""
        if self.count:
            work = Work(2 * b * m * n * k, 2 * b * (m * k + k * n + m * n))
            dims = {"b": b, "m": m, "n": n, "k": k} if b > 1 else {"m": m, "n": n, "k": k}
            self.rows.append(Row(self.layer, name, None, dims, "bf16", self.count, work))

    def linear(self, name, m, n, k):
        """x [m, k] -> [m, n]: quantize and multiply in fp8, or multiply in bf16."""
        if self.model.weights == "bf16":
            return self.bmm(name, 1, m, n, k)
        self.op("quantize", "fp8_quantize", m=m, k=k)
        self.op(name, "fp8_gemm", dtype="fp8", m=m, n=n, k=k)

    def mlp(self, name, t, n):
        d = self.model.d
        self.linear(f"{name} gate + up", t, 2 * n, d)
        if self.model.weights == "bf16":
            return self.bmm(f"{name} down", 1, t, d, n)
        self.op(f"{name} SwiGLU", "swiglu_quantize", t=t, n=n)
        self.op(f"{name} down", "fp8_gemm", dtype="fp8", m=t, n=d, k=n)


def _params(linears):
    return sum(n * k for n, k in linears.values())
