"""Serving: memory, communication, steps, drafts, operating points, workloads. Chips here are made up; laws hold on any."""

import datetime
import time
from dataclasses import replace

import numpy as np
import pytest

from kernomics.cost import CostError, Unknown, comm, serving
from kernomics.cost.chips import Chip, Figure, Pair
from kernomics.cost.model import SLOTS, Model
from kernomics.cost.price import Sources
from kernomics.cost.serving import DoesNotFit, Plan, Tier, Workload
from kernomics.cost.tables import Table, Tables

V3 = Model.load("deepseek-v3")
LLAMA = Model.load("llama-3.1-70b", weights="fp8")
SOURCES = Sources()


def chip(key="made-up", **figures):
    known = {"flops_bf16": 1e15, "flops_fp8": 2e15, "bytes_per_s": 4e12, "memory_bytes": 140e9, "scale_up_bytes_per_s": 400e9,
             "scale_up_domain": 8, "scale_out_bytes_per_s": 50e9, **figures}
    day = datetime.date(2026, 1, 1)
    return Chip(key, key, {n: Figure(v, "estimate", "test", day) for n, v in known.items() if v is not None})


CHIP = chip()


# ---------------------------------------------------------------- communication


def test_distinct_destinations():
    assert comm.expected_distinct(1, 8) == 1
    assert comm.expected_distinct(10**9, 8) == pytest.approx(8)
    assert comm.expected_distinct(2, 2) == pytest.approx(1.5)  # 1 with chance 1/2, else 2


def test_tokens_go_once_to_each_domain_and_once_to_each_chip():
    inside = comm.exchange_bytes(10, 100, 8, 8, 8)
    assert inside == (pytest.approx(10 * 100 * 7 / 8 * comm.expected_distinct(8, 8)), 0)
    up, out = comm.exchange_bytes(10, 100, 8, 64, 8)
    assert out == pytest.approx(10 * 100 * comm.expected_distinct(8, 8) * 7 / 8)
    assert up + out == pytest.approx(10 * 100 * comm.expected_distinct(64, 8) * 63 / 64)
    assert comm.exchange_bytes(10, 100, 8, 64, 1)[0] == pytest.approx(0)  # no domain: all over scale-out
    assert comm.exchange_bytes(10, 100, 1, 2, 2)[0] == pytest.approx(500)  # one draw of two chips: half stay


def test_groups_of_experts_keep_a_token_to_fewer_places():
    rng, e = np.random.default_rng(0), 256
    for places in (2, 4, 8, 64):  # V3: 8 experts of 4 of 8 groups, which lie one after another on the places
        drawn = [np.concatenate([np.arange(32) + 32 * g for g in rng.choice(8, 4, replace=False)]) for _ in range(3000)]
        seen = [len(set(rng.choice(experts, 8, replace=False) * places // e)) for experts in drawn]
        assert comm.expected_places(places, 8, 8, 4) == pytest.approx(np.mean(seen), rel=0.04)
    assert comm.expected_places(8, 8) == comm.expected_distinct(8, 8)  # without groups
    up, out = comm.exchange_bytes(10, 100, 8, 64, 8, 8, 4)  # a group a domain: 4 of 8 at most, each missed by 3 of 4 draws
    assert out == pytest.approx(10 * 100 * 4 * (1 - 0.75**8) * 7 / 8)


def test_links_work_at_the_same_time_and_unknown_ones_are_refused():
    links = comm.Links(8, 400e9, 50e9, alpha=1e-6)
    assert links.seconds(400e3, 50e3) == pytest.approx(1e-6 + 1e-6)
    assert links.seconds(400e3, 100e3) == pytest.approx(1e-6 + 2e-6)
    with pytest.raises(Unknown, match="scale_out"):
        comm.Links(8, 400e9, None).seconds(1, 1)


def test_all_reduce():
    links = comm.Links(8, 400e9, 50e9)
    assert comm.all_reduce_seconds(links, 1e6, 1) == 0
    assert comm.all_reduce_seconds(links, 1e6, 8) == pytest.approx(2e6 * 7 / 8 / 400e9)
    slow = comm.Links(8, 400e9, 5e9)
    assert comm.all_reduce_seconds(slow, 1e6, 16) == pytest.approx(2e6 / 8 / 2 / 5e9)  # the chips of a domain share the sums


def test_alpha_and_beta_are_found_again():
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    assert comm.fit_alpha_beta(sizes, [5e-6 + s / 300e9 for s in sizes]) == (pytest.approx(5e-6), pytest.approx(300e9))


# ---------------------------------------------------------------- memory


def test_what_does_not_fit_is_refused_with_its_bytes():
    with pytest.raises(DoesNotFit, match=r"weights 673\.\d GB.*KV cache.*reserve 14\.0 GB; .* of 140\.0 GB a chip"):
        serving.decode_point(V3, CHIP, SOURCES, Plan(), 1, 4096)
    plan = Plan(tp=1, ep=8)
    most = serving.most_sequences(V3, CHIP, plan, 4096)
    serving.decode_point(V3, CHIP, SOURCES, plan, most, 4096)
    with pytest.raises(DoesNotFit):
        serving.decode_point(V3, CHIP, SOURCES, plan, most + 1, 4096)


def test_chips_of_a_tp_group_each_hold_the_latent_cache():
    for tp in (1, 8):
        assert serving.memory_parts(V3, CHIP, Plan(tp=tp, ep=8), 4, 1000, 4)["KV cache"] == 4 * 1000 * 70_272
    whole, cut = (serving.memory_parts(LLAMA, CHIP, Plan(tp=tp), 4, 1000, 4)["KV cache"] for tp in (1, 8))
    assert whole == 8 * cut


# ---------------------------------------------------------------- a step


def point(plan, b=16, s=4096, on=CHIP, model=V3):
    return serving.decode_point(model, on, SOURCES, plan, b, s)


def test_a_step_is_the_sum_of_its_parts():
    x = point(Plan(tp=2, ep=16)).step
    assert x.seconds == pytest.approx(sum(p.total for p in x.parts))
    assert x.exposed == pytest.approx(sum(p.total for p in x.parts if p.layer == "communication"))
    assert {p.name for p in x.parts if p.layer == "communication"} == {"all-reduce", "dispatch", "combine"}
    assert x.mark == "bound" and x.share["bound"] == 1


def slots(x, comm_share=0.0):
    """Seconds of one half in a MoE layer, by slot, and of its dispatch and combine."""
    found = dict.fromkeys(SLOTS, 0.0)
    for p in x.parts:
        if p.slot:
            found[p.slot] += p.seconds / (1 - comm_share)
    return *found.values(), *(p.seconds for p in x.parts if p.name in ("dispatch", "combine"))


def serial(x, layers):
    """Seconds of two halves one after the other, without those of ``layers`` MoE layers."""
    return sum(p.total for p in x.parts) - layers * 2 * sum(slots(x))


def test_two_batches_alternate_in_decode():
    plan, layers = Plan(ep=64, micro_batches=2), 58
    plain, halves = point(replace(plan, micro_batches=1), 64).step, point(plan, 64).step
    projections, core, shared, routed, dispatch, combine = slots(halves)
    layer = 2 * (max(shared + projections, dispatch) + routed + max(core, combine))
    assert halves.seconds == pytest.approx(serial(halves, layers) + layers * layer)
    assert halves.exposed == pytest.approx(layers * 2 * (max(0, dispatch - shared - projections) + max(0, combine - core)))
    work = [sum(p.total for p in x.parts if p.layer != "communication") for x in (plain, halves)]
    assert work[1] > work[0]  # weights are read twice
    hidden = sum(p.total for p in halves.parts) - halves.seconds
    assert hidden > 0
    half = point(replace(plan, overlap=0.5), 64).step
    assert half.seconds == pytest.approx(halves.seconds + hidden / 2)


@pytest.mark.parametrize("link", (1e9, 50e9, 1e12))
def test_two_batches_alternate_in_prefill(link):
    plan, layers = Plan(ep=64, micro_batches=2, comm_share=24 / 132), 58
    on = chip(scale_out_bytes_per_s=link)
    x = serving.prefill_point(V3, on, SOURCES, plan, 8192, 4096).step
    projections, core, shared, routed, dispatch, combine = slots(x, 24 / 132)
    attention = projections + core
    layer = max(attention + shared, combine) + max(attention, dispatch) + max(routed, dispatch) + max(routed + shared, combine)
    rest = sum(p.total for p in x.parts if not p.slot and p.layer != "communication")
    rest += sum(p.total for p in x.parts if p.layer == "attention") * 3 / 61  # of the dense layers
    assert x.seconds == pytest.approx(rest / (108 / 132) + layers * layer)


def test_two_batches_without_experts_hide_the_shorter():
    x = point(Plan(tp=8, micro_batches=2), 64, model=LLAMA).step
    work, moves = (sum(p.total for p in x.parts if (p.layer == "communication") == c) for c in (False, True))
    assert x.seconds == pytest.approx(max(work, moves))


# ---------------------------------------------------------------- what tables of experts include


def tabled(includes):
    """V3's experts on a chip of a table, 1 ms a call."""
    t = 2 ** np.arange(0, 18)
    dims = {"t": t, **{n: np.full(len(t), v) for n, v in dict(d=7168, n=2048, e=256, top_k=8, tp=1, ep=8).items()}}
    return Sources(None, [Tables([Table("made-up", "moe", "fp8_block", dims, np.full(len(t), 1e-3), "test", includes=includes)])])


@pytest.mark.parametrize("includes, left", [
    ((), {"expert SwiGLU", "to expert order", "from expert order"}), (None, {"to expert order", "from expert order"}),
    (("activation", "permutation"), set()),
])
def test_what_a_table_of_experts_includes_is_not_counted_twice(includes, left):
    rows = {p.name: p for p in serving.decode_point(V3, CHIP, tabled(includes), Plan(ep=8), 64, 1024).step.parts}
    parts = ("expert SwiGLU", "to expert order", "from expert order")
    assert rows["routed experts"].seconds == 1e-3 and {n for n in parts if rows[n].seconds} == left
    gone = [rows[n] for n in parts if n not in left]
    assert all((p.mark, p.source) == ("imported", "within routed experts: test") for p in gone)
    assert all(rows[n].seconds > 0 for n in ("MLP SwiGLU", "shared SwiGLU"))  # of other experts


def test_imbalance_slows_the_experts():
    even, skewed = (point(Plan(ep=32, imbalance=i), 128).step for i in (1.0, 1.5))
    experts = [sum(p.total for p in x.parts if "expert" in p.name) for x in (even, skewed)]
    assert skewed.seconds - even.seconds == pytest.approx(experts[1] - experts[0])
    assert 1 < experts[1] / experts[0] <= 1.5


def test_drafts_gain_where_they_are_accepted():
    plan = Plan(ep=8)
    plain = point(plan)
    sure, never = (point(replace(plan, drafts=1, acceptance=a)) for a in (1.0, 0.0))
    assert sure.tokens_per_s_per_user == pytest.approx(2 * never.tokens_per_s_per_user)
    assert never.tokens_per_s_per_user < plain.tokens_per_s_per_user < sure.tokens_per_s_per_user
    assert "MTP" in {p.layer for p in sure.step.parts}
    assert Plan(drafts=2, acceptance=0.5).tokens_per_step == 1 + 0.5 + 0.25


def test_the_drafting_layer_has_a_cache_a_prefill_and_traffic():
    plain, drafting = Plan(ep=8), Plan(ep=8, drafts=1)
    kept = [serving.memory_parts(V3, CHIP, plan, 64, 4096, 64)["KV cache"] for plan in (plain, drafting)]
    assert kept[1] / kept[0] == pytest.approx(62 / 61)
    assert serving.move_cache(V3, serving.Workload(), plain, drafting, CHIP).bytes == pytest.approx(62 * 4096 * 576 * 2)
    for decode, share in ((True, 1 / 2), (False, 1)):
        found = serving.step(V3, CHIP, Sources(), drafting, decode=decode, b=16, s=4096)
        assert {p.count for p in found.parts if p.layer == "communication"} == {58 + share}
        attention = sum(p.total for p in found.parts if p.layer == "attention") / 61
        experts = sum(p.total for p in found.parts if p.layer == "moe") / 58
        head = sum(p.total for p in found.parts if p.layer == "head") * decode
        assert sum(p.total for p in found.parts if p.layer == "MTP") == pytest.approx(share * (attention + experts + head))


def test_stages_share_memory_and_keep_throughput():
    flat, deep = point(Plan(ep=8)), point(Plan(ep=8, pp=2))
    assert deep.plan.chips == 16
    assert deep.tokens_per_s_per_chip == pytest.approx(flat.tokens_per_s_per_chip, rel=0.02)
    assert deep.step.memory["weights"] == pytest.approx(flat.step.memory["weights"] / 2)


@pytest.mark.parametrize("stages, wave, share", [(1, 1, 1.0), (2, 1, 1 / 2), (2, 4, 4 / 5), (4, 16, 16 / 19), (4, 0, 16 / 19)])
def test_prefill_fills_and_empties_the_stages(stages, wave, share):
    """m microbatches pass p stages in m + p - 1 turns; by default m = 4 p."""
    plan = Plan(ep=8, pp=stages, wave=wave)
    found = serving.prefill_point(V3, CHIP, SOURCES, plan, 8192, 4096)
    endless = serving.prefill_point(V3, CHIP, SOURCES, replace(plan, wave=10**9), 8192, 4096)
    assert found.tokens_per_s_per_chip == pytest.approx(share * endless.tokens_per_s_per_chip) and plan.filled == share
    assert found.seconds == endless.seconds and found.tokens_per_s_per_user == endless.tokens_per_s_per_user


def test_decode_needs_a_batch_for_every_stage():
    four = Plan(ep=8, pp=4)
    speeds = [serving.decode_point(V3, CHIP, SOURCES, replace(four, flight=f), 16, 4096).tokens_per_s_per_chip
              for f in (1, 2, 3, 4, 0)]
    assert speeds == pytest.approx([speeds[-1] * x for x in (0.25, 0.5, 0.75, 1, 1)])
    small = chip(memory_bytes=50e9)  # weights of a fourth of V3 on 8 chips, and few long sequences
    plan, s = replace(four, flight=1), 131_072
    most = serving.most_sequences(V3, small, plan, s)
    assert 0 < most
    for p in serving.decode_points(V3, small, SOURCES, s, chips=32, base=Plan(pp=4)):
        if p.plan.ep == 8 and p.plan.tp == 1:
            assert p.plan.flight == min(4, most // p.b) and p.users == p.b * 8 * p.plan.flight


def test_stages_are_chips_of_an_instance():
    assert {p.pp for p in serving.plans(V3, CHIP, chips=32, base=Plan(pp=4))} == {4}
    assert max(p.chips for p in serving.plans(V3, CHIP, chips=32, base=Plan(pp=4))) == 32
    for chips, pp in ((2, 4), (64, 62)):
        with pytest.raises(CostError, match=f"pp is {pp}, allowed: 1 to {min(chips, 61)}"):
            serving.plans(V3, CHIP, chips=chips, base=Plan(pp=pp))


def test_prefill_in_chunks_sees_what_came_before():
    whole = serving.prefill_point(V3, CHIP, SOURCES, Plan(ep=8), 8192, 8192)
    chunks = serving.prefill_point(V3, CHIP, SOURCES, Plan(ep=8), 2048, 8192)
    flops = [sum(p.total for p in x.step.parts if p.name == "MLA prefill") / x.step.tokens for x in (whole, chunks)]
    assert flops[1] == pytest.approx(flops[0], rel=0.1)


def test_missing_figures_are_named():
    with pytest.raises(Unknown, match="made-up: scale_out_bytes_per_s is unknown"):
        point(Plan(ep=64), on=chip(scale_out_bytes_per_s=None))
    with pytest.raises(Unknown, match="flops_fp8"):
        point(Plan(ep=8), on=chip(flops_fp8=None))


def test_a_figure_that_roomy_plans_lack_is_named_before_plans_without_room():
    for points in (lambda on: serving.decode_points(V3, on, SOURCES, 4096, chips=16),  # one chip or two do not fit
                   lambda on: serving.prefill_points(V3, on, SOURCES, Workload(), chips=16)):
        with pytest.raises(Unknown, match="made-up: flops_bf16 is unknown"):
            points(chip(flops_bf16=None))
        with pytest.raises(DoesNotFit, match="16 chips"):
            points(chip(memory_bytes=20e9, flops_bf16=None))


# ---------------------------------------------------------------- SRAM alone


def sram(gb, links=False):
    known = {} if links else {"scale_up_bytes_per_s": None, "scale_up_domain": None, "scale_out_bytes_per_s": None}
    return replace(chip("made-up", memory_bytes=gb * 1e9, bytes_per_s=1e15, **known), memory="sram")


def test_stages_hold_the_model_by_hand():
    wafer, plan = sram(44), Plan(tp=1)
    # 71.4 GB of fp8 weights and 8k tokens of 327,680 B in 39.6 GB a wafer: one is too small, two hold it
    assert LLAMA.chip_weight_bytes(plan.shard) / 39.6e9 < 2 and serving.stages(LLAMA, wafer, plan, 8192) == 2
    assert [(p.tp, p.pp) for p in serving.plans(LLAMA, wafer, s=8192)] == [(1, 2)]  # links unknown: the fewest chips a stage
    assert len(serving.plans(LLAMA, sram(44, links=True), s=8192)) > 1
    small = serving.stages(LLAMA, sram(1.2), plan, 1)  # 1.08 GB a chip
    assert small == -(-LLAMA.chip_weight_bytes(plan.shard) // 1.08e9)
    assert serving.stages(LLAMA, sram(0.5), plan, 1) == LLAMA.layers  # not enough, and refused
    with pytest.raises(DoesNotFit, match="PP80"):
        serving.decode_points(LLAMA, sram(0.05), SOURCES, 4096, chips=1)


def test_a_stream_is_as_fast_on_any_stages_and_full_stages_pay():
    points = serving.decode_points(LLAMA, sram(44), SOURCES, 4096, chips=8)
    alone = next(p for p in points if p.b == 1)
    whole = serving.decode_point(LLAMA, sram(200), SOURCES, Plan(tp=1), 1, 4096)
    assert alone.tokens_per_s_per_user == pytest.approx(whole.tokens_per_s_per_user)  # layer after layer, wherever they lie
    assert (alone.plan.flight, alone.users) == (2, 2)
    assert alone.tokens_per_s_per_chip == pytest.approx(alone.tokens_per_s_per_user)
    half = serving.decode_point(LLAMA, sram(44), SOURCES, replace(alone.plan, flight=1), 1, 4096)
    assert half.tokens_per_s_per_chip == pytest.approx(alone.tokens_per_s_per_chip / 2)  # one of two stages always waits
    memory = [serving.memory_parts(LLAMA, sram(44), replace(alone.plan, flight=f), 1, 4096, 1)["KV cache"] for f in (1, 2)]
    assert memory == [4096 * 327_680 / 2, 4096 * 327_680]  # half the layers of one batch, or of two


def test_unknown_links_of_sram_machines_are_not_counted_and_say_so():
    x = serving.decode_points(V3, sram(2), SOURCES, 1024, chips=64)[0].step
    moves = [p for p in x.parts if p.layer == "communication"]
    assert moves and all((p.seconds, p.source, p.mark) == (0.0, serving.UNCOUNTED, "bound") for p in moves)
    counted = serving.decode_points(V3, sram(2, links=True), SOURCES, 1024, chips=64)[0].step
    assert all(p.seconds > 0 for p in counted.parts if p.layer == "communication")


def test_chunks_follow_each_other_through_the_stages():
    points = serving.prefill_points(LLAMA, sram(44), SOURCES, Workload(4096, 64), chips=1)
    chunk = next(p for p in points if p.step.tokens == 256)
    assert (chunk.plan.pp, chunk.plan.flight) == (2, 1)  # one prompt's chunks fill both stages
    assert serving._first(LLAMA, chunk, Workload(4096, 64)) == pytest.approx((1 + 15 / 2) * chunk.seconds)


@pytest.mark.parametrize("bad", [dict(pp=0), dict(flight=2), dict(wave=-1), dict(drafts=-1), dict(acceptance=1.1),
                                 dict(micro_batches=3),
                                 dict(comm_share=1.0), dict(overlap=1.5), dict(dispatch="int8"), dict(ep=6, tp=4), dict(tp=0),
                                 dict(memory_share=0.0), dict(imbalance=0.5)])
def test_bad_plans(bad):
    with pytest.raises(CostError, match=next(iter(bad))):
        Plan(**bad)


# ---------------------------------------------------------------- operating points and workloads


def test_the_front_falls_and_is_found_quickly():
    start = time.perf_counter()
    points = serving.decode_points(V3, CHIP, Sources(), 4096, chips=64)
    assert time.perf_counter() - start < 5
    kept = serving.front(points)
    speeds, chips = [p.tokens_per_s_per_user for p in kept], [p.tokens_per_s_per_chip for p in kept]
    assert speeds == sorted(speeds, reverse=True) and chips == sorted(chips) and len(kept) > 5
    for p in points:
        assert any(k.tokens_per_s_per_user >= p.tokens_per_s_per_user and k.tokens_per_s_per_chip >= p.tokens_per_s_per_chip
                   for k in kept)


@pytest.mark.parametrize("model", (V3, LLAMA), ids=("v3", "llama"))
@pytest.mark.parametrize("disaggregated", (True, False))
def test_a_faster_service_costs_more(model, disaggregated):
    slow, fast = (serving.serve(model, CHIP, SOURCES, Workload(4096, 1024, speed=v), chips=32, disaggregated=disaggregated)
                  for v in (20, 60))
    assert fast.speed >= 60 and slow.speed >= 20 and fast.chip_seconds > slow.chip_seconds
    assert 0 < slow.prefill_share < 1


def test_cache_hits_save_prefill():
    none, half = (serving.serve(LLAMA, CHIP, SOURCES, Workload(8192, 256, hit=h), chips=8) for h in (0.0, 0.5))
    assert half.decode_seconds == none.decode_seconds
    assert 0.4 * none.prefill_seconds < half.prefill_seconds < 0.7 * none.prefill_seconds  # half, behind a longer prefix


def tiered(gb=1.0, gb_per_s=1.0, dollars=0.73, hit=0.5, **more):
    return Workload(4096, 1024, hit=hit, tier=Tier("ssd", gb * 1e9, gb_per_s * 1e9, dollars), **more)


def test_a_tier_by_hand():
    service = serving.serve(V3, CHIP, SOURCES, tiered(), chips=8)
    plain = serving.serve(V3, CHIP, SOURCES, Workload(4096, 1024, hit=0.5), chips=8)
    size, plan = 2048 * 70_272, service.prefill.plan  # the latent cache of a hit, on every chip of a group
    assert service.load == pytest.approx(size / 1e9) == pytest.approx(0.1439, abs=1e-4)
    assert service.prefixes == 6 * plan.groups  # 1 GB holds six hits of 0.144 GB
    work = 2048 * service.prefill.chip_seconds_per_token
    assert service.waits == pytest.approx(max(0, size / 1e9 * plan.tp - work)) and service.prefill_seconds == work + service.waits
    assert service.first >= service.load and service.decode_seconds == plain.decode_seconds
    assert tiered().tier.dollars_per_hour == pytest.approx(0.001)  # 1 GB at $0.73 a month of 730 h
    quick = serving.serve(V3, CHIP, SOURCES, tiered(gb_per_s=1e4), chips=8)
    assert quick.waits == 0 and quick.prefill_seconds == plain.prefill_seconds
    assert quick.first == pytest.approx(plain.first + size / 1e13)


def test_a_slow_tier_sets_the_pace_of_prefill():
    service = serving.serve(V3, CHIP, SOURCES, tiered(gb_per_s=0.01), chips=8)
    plan = service.prefill.plan
    assert service.prefill_seconds == pytest.approx(2048 * 70_272 / 1e7 * plan.tp)  # 14.4 s of a group
    with pytest.raises(CostError, match="first token within 10 s"):
        serving.serve(V3, CHIP, SOURCES, tiered(gb_per_s=0.01, first=10), chips=8)


# ---------------------------------------------------------------- the cache between pools


def moved(work=Workload(4096, 1024), on=CHIP, fill=Plan(ep=8), decode=Plan(ep=8), model=V3):
    return serving.move_cache(model, work, fill, decode, on)


def test_the_cache_moves_by_hand():
    move = moved()
    assert move.bytes == 4096 * 70_272 and "50 GB/s a chip (made-up: estimate, test, 2026-01-01)" == move.source
    assert move.seconds == pytest.approx(move.bytes / 50e9) == pytest.approx(5.757e-3, rel=1e-3)
    assert (move.sending, move.receiving) == (move.seconds, move.seconds)
    assert moved(Workload(4096, 1024, kv_bytes_per_s=25e9)).seconds == pytest.approx(2 * move.seconds)
    assert moved(Workload(4096, 1024, hit=0.5)).bytes == move.bytes  # what was found must be there, too
    assert moved(fill=Plan(ep=8, cache="fp8"), decode=Plan(ep=8, cache="fp8")).bytes == 4096 * 656 * 61


def test_every_chip_of_a_group_takes_what_it_keeps():
    latent, grouped = (moved(decode=Plan(tp=8, ep=e), fill=Plan(tp=4, ep=f), model=m)
                       for m, e, f in ((V3, 8, 8), (LLAMA, 1, 1)))
    assert latent.bytes == 8 * 4096 * 70_272 and grouped.bytes == 4096 * 327_680
    assert latent.seconds == pytest.approx(latent.bytes / 4 / 50e9)  # four chips send, eight receive
    assert latent.sending == latent.receiving == pytest.approx(latent.bytes / 50e9)
    two = moved(decode=Plan(ep=8, pp=2))
    assert two.bytes == 4096 * 70_272 and two.seconds == pytest.approx(two.bytes / 50e9)  # one sends, each of two takes half


def test_the_first_token_waits_for_the_cache():
    fast, slow = (serving.serve(V3, CHIP, SOURCES, Workload(4096, 1024, kv_bytes_per_s=x), chips=8) for x in (1e15, 10e9))
    assert slow.first - fast.first == pytest.approx(4096 * 70_272 / 10e9, rel=1e-3)
    assert (slow.prefill_seconds, slow.decode_seconds) == (fast.prefill_seconds, fast.decode_seconds) and slow.stalls == (0, 0)
    with pytest.raises(CostError, match="first token within 10 s"):
        serving.serve(V3, CHIP, SOURCES, Workload(4096, 1024, first=10, kv_bytes_per_s=1e7), chips=8)
    one = serving.serve(V3, CHIP, SOURCES, Workload(4096, 1024), chips=32, disaggregated=False)
    assert one.move is None


def test_a_slow_link_sets_the_pace_of_both_pools():
    work = Workload(4096, 64, kv_bytes_per_s=1e8)
    service = serving.serve(V3, CHIP, SOURCES, work, chips=8)
    plan = service.decode.plan
    busy = 4096 * 70_272 * plan.tp / 1e8  # 2.9 chip-seconds of links a request
    assert service.prefill_seconds == pytest.approx(busy) and service.decode_seconds == pytest.approx(busy)
    assert service.tokens_per_s_per_chip == pytest.approx(64 / busy) and service.mark == "bound"
    assert all(x > 0 for x in service.stalls)
    quick = serving.serve(V3, CHIP, SOURCES, replace(work, kv_bytes_per_s=1e12), chips=8)
    assert quick.chip_seconds < service.chip_seconds and quick.stalls == (0, 0)


def test_the_slower_end_of_a_pair_counts_and_an_unknown_link_is_said():
    slow, fast = chip("slow", scale_out_bytes_per_s=10e9), chip("fast", scale_out_bytes_per_s=40e9)
    move = moved(on=Pair(slow, fast))
    assert move.seconds == pytest.approx(move.bytes / 10e9) == pytest.approx(moved(on=Pair(fast, slow)).seconds)
    assert (move.sending, move.receiving) == (pytest.approx(move.bytes / 10e9), pytest.approx(move.bytes / 40e9))
    loose = moved(on=chip(scale_out_bytes_per_s=None))
    assert (loose.seconds, loose.sending, loose.source) == (0, 0, serving.UNCOUNTED) and loose.bytes == move.bytes
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(CostError, match="kv_bytes_per_s is .*, allowed: byte/s above 0"):
            Workload(kv_bytes_per_s=bad)


def test_a_tier_too_small_for_a_hit_is_refused():
    with pytest.raises(DoesNotFit, match=r"a hit of 2,048 tokens does not fit in ssd: 0.14 of 0.10 GB a chip"):
        serving.serve(V3, CHIP, SOURCES, tiered(gb=0.1), chips=8)
    # of grouped heads a chip keeps its own: 2,048 * 327,680 B = 0.67 GB whole, 0.08 GB on one of 8
    assert serving.serve(LLAMA, CHIP, SOURCES, tiered(gb=0.1), chips=8).prefill.plan.tp == 8


@pytest.mark.parametrize("bad, name", [(dict(gb=0), "bytes"), (dict(gb_per_s=-1), "bytes_per_s"),
                                       (dict(dollars=-1), "dollars_per_gb_month"), (dict(hit=0.0), "hit")])
def test_bad_tiers(bad, name):
    with pytest.raises(CostError, match=f"{name} is .*, allowed"):
        tiered(**bad)


def test_pools_are_matched_in_whole_instances():
    service = serving.serve(V3, CHIP, SOURCES, Workload(4096, 1024, speed=20), chips=32)
    fill, decode = service.fleet(1000)
    assert fill % service.prefill.plan.chips == 0 and decode % service.decode.plan.chips == 0
    assert fill / (fill + decode) == pytest.approx(service.prefill_share, rel=0.1)
    assert sum(service.fleet(1000, utilisation=0.5)) == pytest.approx(2 * (fill + decode), rel=0.1)


def test_one_pool_does_both():
    service = serving.serve(V3, CHIP, SOURCES, Workload(4096, 1024, speed=20), chips=32, disaggregated=False)
    chips = service.decode.plan.chips
    fill, both = service.fleet(1000)
    assert (fill, both % chips) == (0, 0) and both - chips < 1000 * service.chip_seconds <= both
    assert service.tokens_per_s_per_chip == pytest.approx(1024 / service.chip_seconds)
    x, steps = service.decode, 1024  # a step makes a token; meanwhile 1/1024 of each answer's prompt is prefilled
    between = x.b * service.prefill_seconds / x.plan.tp / steps
    assert service.speed == pytest.approx(1 / (x.seconds + between))


def test_speeds_out_of_reach_are_refused():
    with pytest.raises(CostError, match="no plan gives a user 1e\\+06 tokens/s.* the fastest gives"):
        serving.serve(LLAMA, CHIP, SOURCES, Workload(speed=1e6), chips=8)
    with pytest.raises(CostError, match="first token within 1e-09"):
        serving.serve(LLAMA, CHIP, SOURCES, Workload(first=1e-9), chips=8)
    with pytest.raises(DoesNotFit):
        serving.serve(V3, chip(memory_bytes=10e9), SOURCES, Workload(), chips=8)


@pytest.mark.parametrize("bad", [dict(tokens_in=0), dict(tokens_out=0), dict(hit=1.0), dict(speed=-1), dict(first=0)])
def test_bad_workloads(bad):
    with pytest.raises(CostError, match=next(iter(bad))):
        Workload(**bad)
