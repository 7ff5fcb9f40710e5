"""The inventory of models: hand-derived parameter counts, work, sharding, and the errors of wrong configs."""

import json
from importlib import resources

import pytest

from kernomics.contract import OPS
from kernomics.cost import CostError, economics
from kernomics.cost.model import BYTES, Mla, Model, Shard, presets

V3 = Model.load("deepseek-v3")


def config(name="deepseek-v3", **changes):
    text = resources.files("kernomics.cost").joinpath("configs", f"{name}.json").read_text()
    return {**json.loads(text), **changes}


# ---------------------------------------------------------------- counts by hand


def latent(d, h, layers, dense, dense_n, e, n, top_k, shared, vocab, bias, index=0):
    """(total, active) of MLA models with q rank 1536, latent 512, heads of 128 + 64."""
    attention = d * 1536 + 1536 + 1536 * h * 192 + d * 576 + 512 + 512 * h * 256 + h * 128 * d + 2 * d + index
    expert, router = 3 * d * n, e * d + (e if bias else 0)
    rest = layers * attention + dense * 3 * d * dense_n + (layers - dense) * (router + shared * expert) + 2 * vocab * d + d
    return rest + (layers - dense) * e * expert, rest + (layers - dense) * top_k * expert


def grouped(d, h, kv, hd, layers, n, vocab, e=0, top_k=0, norms=False):
    attention = d * (h + 2 * kv) * hd + h * hd * d + 2 * d + (2 * hd if norms else 0)
    rest = layers * (attention + e * d) + 2 * vocab * d + d
    return rest + layers * max(e, 1) * 3 * d * n, rest + layers * max(top_k, 1) * 3 * d * n


V3_INDEX = 1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64
BY_HAND = {  # (total, active), and KV bytes a token in bf16
    "deepseek-v2": (latent(5120, 128, 60, 1, 12288, 160, 1536, 6, 2, 102400, False), 60 * 1152),
    "deepseek-v3": (latent(7168, 128, 61, 3, 18432, 256, 2048, 8, 1, 129280, True), 61 * 1152),
    "deepseek-r1": (latent(7168, 128, 61, 3, 18432, 256, 2048, 8, 1, 129280, True), 61 * 1152),
    "deepseek-v3.2": (latent(7168, 128, 61, 3, 18432, 256, 2048, 8, 1, 129280, True, V3_INDEX), 61 * (1152 + 132)),
    "kimi-k2": (latent(7168, 64, 61, 1, 18432, 384, 2048, 8, 1, 163840, True), 61 * 1152),
    "qwen3-235b-a22b": (grouped(4096, 64, 4, 128, 94, 1536, 151936, 128, 8, True), 94 * 2 * 4 * 128 * 2),
    "mixtral-8x7b": (grouped(4096, 32, 8, 128, 32, 14336, 32000, 8, 2), 32 * 2 * 8 * 128 * 2),
    "llama-3.1-70b": (grouped(8192, 64, 8, 128, 80, 28672, 128256), 80 * 2 * 8 * 128 * 2),
}
CHECKPOINTS = {  # parameters of the published checkpoints, without MTP modules
    "deepseek-v2": 235.74e9, "deepseek-v3": 671.03e9, "deepseek-r1": 671.03e9, "kimi-k2": 1026.4e9, "qwen3-235b-a22b": 235.09e9,
    "mixtral-8x7b": 46.70e9, "llama-3.1-70b": 70.55e9,
}


@pytest.mark.parametrize("name", presets())
def test_counts_by_hand(name):
    model, ((total, active), kv) = Model.load(name), BY_HAND[name]
    assert (model.total_params, model.active_params, model.kv_bytes_per_token()) == (total, active, kv)
    if name in CHECKPOINTS:
        assert total == pytest.approx(CHECKPOINTS[name], rel=1e-3)


@pytest.mark.parametrize("name", presets())
def test_decode_multiplies_every_active_parameter_once(name):
    """Products of weights take two FLOPs per active parameter and token; what is left multiplies no matrix."""
    model = Model.load(name)
    flops = sum(r.count * r.work.flops for r in model.decode(4, 300) if r.dtype and r.kind != "mla_decode" and "GQA" not in r.name
                and r.name != "index scores")
    assert flops / 8 == pytest.approx(model.active_params_no_embedding, rel=1e-4)
    assert flops / 8 <= model.active_params_no_embedding


@pytest.mark.parametrize("name", presets())
def test_shards_sum_to_the_whole(name):
    """Heads, widths and experts cut over tp chips do the work of one; replicated parts are done by each."""
    model, tp = Model.load(name), 4
    whole, part = model.decode(64, 1000), model.decode(64, 1000, shard=Shard(tp=tp))
    replicated = ("router", "q_a + kv_a", "index q", "index k + weights", "index scores")
    for a, b in zip(whole, part, strict=True):
        if a.dtype:
            assert b.work.flops * (1 if a.name in replicated else tp) == pytest.approx(a.work.flops, rel=0.01), a.name
    assert model.chip_weight_bytes(Shard(tp=tp)) * tp == pytest.approx(model.weight_bytes, rel=0.05)


def test_expert_parallel_chips_share_experts_and_tokens():
    ep = Shard(ep=32)
    rows = {r.name: r for r in V3.decode(128, 4096, shard=ep)}
    experts = rows["routed experts"]
    assert experts.dims["e"] == 8 and experts.dims["t"] == 128 * 8  # each chip gets as many rows as its tokens send
    assert experts.lookup == {"t": 128 * 32, "d": 7168, "n": 2048, "e": 256, "top_k": 8, "tp": 1, "ep": 32}
    busy = {r.name: r for r in V3.decode(128, 4096, shard=Shard(ep=32, imbalance=1.5))}["routed experts"]
    assert busy.work.flops == pytest.approx(1.5 * experts.work.flops)
    assert V3.experts_held(V3.moe, Shard(ep=144, redundant=32)) == 2
    held = 58 * 9 * 3 * 7168 * 2048  # 32 chips: 8 experts and one more each
    more = V3.chip_weight_bytes(Shard(ep=32, redundant=32)) - V3.chip_weight_bytes(Shard(ep=32))
    assert more == pytest.approx(held / 9, rel=1e-3)


@pytest.mark.parametrize("name, shard, field", [("deepseek-v3", Shard(tp=3), "tp"), ("deepseek-v3", Shard(ep=48), "ep"),
                                               ("llama-3.1-70b", Shard(ep=8), "ep")])
def test_shards_that_do_not_divide(name, shard, field):
    with pytest.raises(CostError, match=f"{field} is "):
        Model.load(name).decode(1, 8, shard=shard)


@pytest.mark.parametrize("bad", [dict(tp=0), dict(ep=0), dict(redundant=-1), dict(imbalance=0.9), dict(cache="int4")])
def test_bad_shards(bad):
    with pytest.raises(CostError, match=next(iter(bad))):
        Shard(**bad)


def test_verifying_drafts_multiplies_tokens_and_not_keys():
    one, two = ({r.name: r for r in V3.decode(8, 4096, q)} for q in (1, 2))
    assert two["o"].work.flops == 2 * one["o"].work.flops
    assert two["MLA decode"].work.bytes < 1.1 * one["MLA decode"].work.bytes
    assert two["MLA decode"].work.flops == pytest.approx(2 * one["MLA decode"].work.flops, rel=1e-3)


def test_sparse_attention_reads_the_best_keys_alone():
    model = Model.load("deepseek-v3.2")
    assert isinstance(model.attention, Mla) and model.attention.index.top_k == 2048
    short, long = ({r.name: r for r in model.decode(1, s)} for s in (1 << 14, 1 << 17))
    assert short["MLA decode"].work == long["MLA decode"].work
    assert long["index scores"].work.flops == pytest.approx(8 * short["index scores"].work.flops, rel=0.01)


def test_weights_and_experts_in_other_dtypes():
    llama = Model.load("llama-3.1-70b", weights="fp8")
    assert llama.weight_bytes == pytest.approx(llama.total_params, rel=0.04)
    assert "fp8_gemm" in {r.op for r in llama.decode(1, 8)}
    four = Model.load("deepseek-v3", experts="nvfp4")
    routed = 58 * 256 * 3 * 7168 * 2048
    assert V3.weight_bytes - four.weight_bytes == pytest.approx(routed * (1 + 4 / 128**2 - BYTES["nvfp4"]))
    assert "fp4" in {r.dtype for r in four.decode(1, 8)}
    with pytest.raises(CostError, match="experts is 'int3'"):
        Model.load("deepseek-v3", experts="int3")


def test_prefill_behind_a_prefix_attends_to_it():
    plain, behind = ({r.name: r for r in V3.prefill(512, prefix=p)} for p in (0, 3584))
    assert behind["o"].work == plain["o"].work
    pairs = 512 * 3584 + 512 * 513 / 2
    assert behind["MLA prefill"].work.flops == pytest.approx(2 * 128 * 320 * pairs, rel=1e-6)


# ---------------------------------------------------------------- DeepSeek-V3


def test_memory_of_v3():
    assert V3.kv_bytes_per_token() == 576 * 2 * 61 == 70_272
    assert V3.kv_bytes_per_token("fp8") == 656 * 61
    assert V3.total_params < V3.weight_bytes < 1.01 * V3.total_params  # one byte each, but for 1.9e9 bf16 ones and scales
    assert V3.memory_bytes(2, 1000) == V3.weight_bytes + 2 * 1000 * 70_272
    assert Model.load(config(quantization_config=None)).weight_bytes == 2 * V3.total_params


def products(rows):
    """FLOPs of the matrix products that hold weights."""
    return sum(r.count * r.work.flops for r in rows if r.dtype and not r.name.startswith("MLA"))


@pytest.mark.parametrize("b", [1, 64])
def test_decode_flops_are_two_per_active_parameter_and_attention(b):
    rows = V3.decode(b, 4096)
    vectors = 61 * (1536 + 512 + 2 * 7168) + 7168 + 58 * 256  # norms and router biases multiply no matrix
    assert products(rows) == 2 * b * (V3.active_params_no_embedding - vectors)
    attention = sum(r.count * r.work.flops for r in rows if r.name == "MLA decode")
    assert attention == pytest.approx(61 * 2 * b * 128 * 4096 * (576 + 512), rel=0.02)


def test_prefill_flops_are_those_of_as_many_tokens():
    rows, head = V3.prefill(256), 2 * 129280 * 7168
    vectors = 61 * (1536 + 512 + 2 * 7168) + 7168 + 58 * 256
    want = 256 * (2 * (V3.active_params_no_embedding - vectors) - head) + head  # the head sees the last token alone
    assert products(rows) == want
    attention = sum(r.count * r.work.flops for r in rows if r.name == "MLA prefill")
    assert attention == pytest.approx(61 * 2 * 128 * (192 + 128) * 256 * 257 / 2, rel=0.05)


def test_rows_take_their_work_from_the_rooms():
    for row in V3.decode(16, 1024) + V3.prefill(512):
        if row.op:
            assert row.work == OPS[row.op].work(**row.dims)
        assert row.work.bytes > 0 and row.count in (61, 3, 58, 1)


def test_a_decode_step_reads_each_weight_in_use_once():
    rows = V3.decode(1, 1)
    read_bytes = sum(r.count * r.work.bytes for r in rows)
    unread = 58 * 248 * 3 * 7168 * 2048 + 2 * 129280 * 7168  # idle experts, the embedding table
    absorbed = 61 * 128 * 512 * 256  # W_uk and W_uv in bf16: a byte more each
    assert read_bytes == pytest.approx(V3.weight_bytes - unread + absorbed, rel=0.01)


def test_expected_active_experts():
    assert economics.expected_active(1, 256, 8) == pytest.approx(8)
    assert economics.expected_active(2, 256, 8) == pytest.approx(8 + 8 - 8 * 8 / 256)
    assert economics.expected_active(10**5, 256, 8) == pytest.approx(256)


def test_other_configs_of_the_family():
    plain = Model.load(config(q_lora_rank=None, first_k_dense_replace=0, n_shared_experts=0, num_nextn_predict_layers=0))
    assert "q + kv_a" in [r.name for r in plain.decode(1, 8)] and plain.mtp_params == 0
    assert not [r for r in plain.decode(1, 8) if r.layer == "dense" or r.name.startswith("shared")]
    half = Model.load(config(quantization_config=None))
    assert {r.op for r in half.decode(1, 8)} == {None, "mla_append_kv", "mla_decode", "moe_route", "moe_experts_bf16"}
    assert products(half.decode(4, 8)) == products(V3.decode(4, 8))


@pytest.mark.parametrize("field, value, allowed", [
    ("model_type", "gpt2", "deepseek_v3"), ("kv_lora_rank", 256, "512"), ("hidden_size", None, "integer"),
    ("num_hidden_layers", True, "integer"), ("first_k_dense_replace", 62, "61"), ("n_group", 7, "256"), ("topk_group", 9, "8"),
    ("num_experts_per_tok", 200, "128"), ("moe_layer_freq", 2, "1"), ("scoring_func", "tanh", "sigmoid"),
    ("quantization_config", {"quant_method": "awq"}, "fp8"), ("tie_word_embeddings", "no", "boolean"),
    ("routed_scaling_factor", "big", "number"),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}, "[128, 128]"),
])
def test_a_bad_config_names_field_value_and_allowed(field, value, allowed):
    with pytest.raises(CostError) as error:
        Model.load(config(**{field: value}))
    text = str(error.value)
    bad = next(iter(value.values())) if isinstance(value, dict) and "awq" in str(value) else value
    assert field in text and allowed in text and (isinstance(bad, dict) or repr(bad) in text)
    assert "hidden_size" not in text or field == "hidden_size"  # not the whole file


def test_a_missing_or_broken_config_file(tmp_path):
    with pytest.raises(CostError, match="model is .*allowed: .*deepseek-v3"):
        Model.load("deepseek-v9")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CostError, match="not JSON"):
        Model.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert Model.load(tmp_path).total_params == V3.total_params


