"""The bench: times are times, no number on a wrong result, records as the cost model reads them."""

import ctypes
import json
import time
from fractions import Fraction

import numpy as np
import pytest
from kernomics.bench import ceilings, run, timing

from kernomics import OPS, _cpu, numpy_ops
from kernomics.contract import Case, ContractError, NoKernel
from kernomics.cost import measured

SMALL = Case(m=2, n=130, k=256, bench="decode, small")


@pytest.fixture
def small(monkeypatch):
    """fp8_gemm with one small bench case, and ceilings that take no time."""
    monkeypatch.setattr(OPS["fp8_gemm"], "cases", [SMALL])
    monkeypatch.setattr(ceilings, "read_buffer", lambda least: np.ones(1 << 16, np.float32))
    for name in ("fma_peak", "read_bandwidth"):
        monkeypatch.setattr(ceilings, name, lambda *args, f=getattr(ceilings, name): f(*args, budget_s=0.001))


def rows_of(folder, **options):
    options = {"ops": ["fp8_gemm"], "quick": True, "peers": False, "records": folder} | options
    rows = run.main(**options)
    return rows, [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_measure_a_sleep():
    t = timing.measure(lambda: time.sleep(0.01), budget_s=0.05)
    assert 0.01 <= t.p10 <= t.median <= t.p90 and t.n >= 5


def test_measure_limits_and_turns():
    calls = []
    timed = [timing.Timed(lambda i=i: calls.append(i) or time.sleep(1e-3), 0.0, 4, 8) for i in range(2)]
    assert [t.n for t in timing.interleave(timed, rounds=2)] == [4, 4]
    switches = sum(a != b for a, b in zip(calls, calls[1:]))
    assert switches == 3  # 0 1 0 1


@pytest.mark.parametrize("seconds, together", ((1e-6, 200), (150e-6, 1), (1e-3, 1)))
def test_fast_calls_are_timed_together(seconds, together, monkeypatch):
    clock = Fraction(0)  # moved by the calls alone; the first is slow, as first calls are
    lasts = Fraction(1)

    def call():
        nonlocal clock, lasts
        clock, lasts = clock + lasts, Fraction(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    timed = timing.Timed(call, 0.01)
    (result,) = timing.interleave([timed], rounds=1)
    assert timed.together == together
    assert result.p10 == result.median == result.p90 == pytest.approx(seconds)


def test_ceilings():
    fma = {isa: ceilings.fma_peak(isa, 1, budget_s=0.05) for isa in _cpu.isas()}
    assert fma["base"] > 1e8
    if "avx2" in fma:
        assert fma["avx2"] > fma["base"]
    buffer = np.ones(1 << 22, np.float32)
    assert ceilings.read_bandwidth(buffer, 1, budget_s=0.02) > 1e8


@pytest.mark.parametrize("size", (0, 1, 31, 1000, 4099))
@pytest.mark.parametrize("threads", (1, 3))
def test_reading_reads_everything(size, threads):
    x = np.arange(size, dtype=np.float32) % 17
    for isa in _cpu.isas():
        before = _cpu.isa()
        _cpu.use_isa(isa)
        assert _cpu.ceiling_read((x.ctypes.data, 0, x.shape), threads) == x.sum()
        _cpu.use_isa(before)


def test_cpu_model():
    assert ceilings.cpu_model("model name : AMD EPYC\ncpu family : 25\nmodel : 1\n") == "amd-epyc-f25m1"
    assert ceilings.cpu_model("model name : AMD EPYC 7763 64-Core Processor\ncpu family : 25\n") == "amd-epyc-7763"
    assert ceilings.cpu_model("model name : Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz\n") == "intel-xeon-platinum-8275cl"


def test_record(small, tmp_path):
    rows, records = rows_of(tmp_path, threads=1)
    assert [r.failed for r in rows] == [""] and len(records) == 1
    r = records[0]
    assert tuple(r) == run.FIELDS
    assert r["chip"] == ceilings.chip_key(_cpu.isa(), 1) and r["dims"] == {"m": 2, "n": 130, "k": 256}
    assert r["dtypes"] == {"a": "fp8", "a_scale": "f32", "b": "fp8", "b_scale": "f32"} and r["scalars"] == {"out_dtype": "bf16"}
    assert 0 < r["p10"] <= r["seconds_median"] <= r["p90"] and r["n"] >= 3
    assert (r["flops"], r["bytes"]) == (OPS["fp8_gemm"].work(**SMALL).flops, OPS["fp8_gemm"].work(**SMALL).bytes)
    assert set(r["ceilings"]) == {"flops_f32", "bytes_read", "memory_bytes"} and r["cache_state"] in ("cold", "warm")
    seconds, mark = measured.Measured(measured.read(tmp_path)).seconds(r["chip"], "fp8_gemm", SMALL)
    assert (seconds, mark) == (r["seconds_median"], "measured")


def test_records_are_replaced(small, tmp_path):
    rows_of(tmp_path)
    _, records = rows_of(tmp_path, isa="all")
    threads = numpy_ops.get_num_threads()
    assert {r["chip"] for r in records} == {ceilings.chip_key(isa, threads) for isa in _cpu.isas()}
    assert len(records) == len(_cpu.isas())


def test_no_number_on_a_wrong_result(small, monkeypatch, tmp_path, capsys):
    kernel = next(k for k in OPS["fp8_gemm"].kernels if k.on == "cpu")
    right = kernel.load()

    def wrong(*args):
        right(*args)
        ctypes.c_uint16.from_address(args[4][0]).value ^= 0x40  # one bit of one result

    monkeypatch.setattr(kernel, "function", wrong)
    monkeypatch.setattr(kernel, "load", lambda: wrong)
    rows, records = rows_of(tmp_path)
    assert rows[0].failed and rows[0].timing is None and not records
    assert "FAILED" in capsys.readouterr().out


def test_refused_calls_are_named(small, monkeypatch, tmp_path):
    def refuse(*args):
        raise NoKernel("fp8_gemm: no kernel takes this call\n  cpu: its `where` excludes these dims")

    monkeypatch.setattr(OPS["fp8_gemm"], "numpy_call", refuse)
    rows, records = rows_of(tmp_path)
    assert "where" in rows[0].failed and not records


@pytest.mark.parametrize("options, words", [
    ({"ops": ["fp8_gem"]}, "op is 'fp8_gem'"), ({"isa": "sse9"}, "isa is 'sse9'"), ({"threads": 0}, "threads is 0"),
])
def test_bad_options(options, words):
    with pytest.raises(ContractError, match=words):
        run.main(**options)


# ---------------------------------------------------------------- peers

PEER_CASES = {
    "fp8_quantize": [Case(m=3, k=256), Case(m=130, k=256, block=(128, 128), x="f32")],
    "fp8_gemm": [Case(m=3, n=130, k=256)],
    "fp8_linear": [Case(m=3, n=130, k=256), Case(m=3, n=130, k=256, bias="bf16")],
    "fp8_grouped_gemm": [Case(t=8, e=3, n=136, k=256, active=2)],
    "fp8_grouped_wgrad": [Case(t=256, e=2, n=16, k=32, active=2)],
    "mla_append_kv": [Case(t=3, p=2, page=4, norm_weight="bf16", cos="f32", sin="f32", kv_cache=c) for c in ("bf16", "u8")],
    "mla_decode": [Case(b=2, q=q, h=4, s=70, page=16, p=12, n=5, softmax_scale=0.1, kv_cache=c) for q in (1, 3)
                   for c in ("bf16", "u8")],
    "mla_decode_sparse": [Case(b=2, q=1, h=4, top_k=33, page=16, p=12, softmax_scale=0.1, kv_cache=c) for c in ("bf16", "u8")],
    "mla_prefill": [Case(b=1, t=40, s=40, h=2, softmax_scale=0.1), Case(b=2, t=6, s=80, h=2, softmax_scale=0.1)],
    "mla_index": [Case(t=3, h=4, s=50)],
    "attention_merge": [Case(lead=(3,), q=2, h=4, d=32)],
    "moe_route": [Case(t=4, e=64, top_k=4, n_group=8, topk_group=4, bias="f32", scaling=2.5)],
    "moe_permute": [Case(t=6, d=1024, top_k=2, n_experts=5)],
    "moe_combine": [Case(t=6, d=32, top_k=2, weights="f32")],
    "swiglu_quantize": [Case(t=5, n=256)],
    "moe_experts": [Case(t=5, d=1024, n=64, e=3, top_k=2, activations="bf16")],
    "moe_experts_bf16": [Case(t=5, d=1024, n=64, e=3, top_k=2)],
}


@pytest.mark.parametrize("name", PEER_CASES)
def test_peers_agree_with_the_definition(name):
    peers = pytest.importorskip("kernomics.bench.peers")
    op, ran = OPS[name], 0
    for case in PEER_CASES[name]:
        inputs, scalars = numpy_ops.sample(op, case)
        args = [*run._own(op, inputs).values(), *scalars.values()]
        result = op.numpy_call(*args, "reference")
        outs = run._results(op, result, dict(zip(op.tensors, args)))
        for build in peers.PEERS[name].values():
            call = build(peers.arguments(run._own(op, inputs), scalars))
            assert run._peer_error(op, outs, call()) <= run.PEER_ERROR
            assert run._peer_error(op, outs, call()) <= run.PEER_ERROR  # and again, as when it is timed
            ran += 1
    assert ran


def test_every_peer_is_tested():
    peers = pytest.importorskip("kernomics.bench.peers")
    assert set(peers.PEERS) == set(PEER_CASES)


def test_a_failing_peer_keeps_its_reason(small, monkeypatch, tmp_path):
    peers = pytest.importorskip("kernomics.bench.peers")

    def raises(x):
        raise RuntimeError("not here\nsecond line")

    good = peers.PEERS["fp8_gemm"]["matmul f32"]
    monkeypatch.setitem(peers.PEERS, "fp8_gemm", {"broken": raises, "wrong": lambda x: lambda: 2 * good(x)(), "matmul": good})
    rows, records = rows_of(tmp_path, peers=True)
    broken, wrong, right = records[0]["peers"]
    assert broken == {"name": "broken", "reason": "RuntimeError: not here"}
    assert "differs" in wrong["reason"] and "seconds_median" not in wrong
    assert right["ratio"] == pytest.approx(right["seconds_median"] / records[0]["seconds_median"])
    assert rows[0].best_peer["name"] == "matmul"


def test_cold_calls_turn_over_copies():
    op = OPS["fp8_gemm"]
    inputs, _ = numpy_ops.sample(op, SMALL)
    work = op.work(**SMALL)
    variants, cold = run.copies(op, SMALL, work, inputs, l3=4 * 130 * 256)
    assert cold and len(variants) > 8 and len({v["b"].ctypes.data for v in variants}) == len(variants)
    assert all(v["a"] is inputs["a"] for v in variants)
    many = op.work(m=256, n=130, k=256)
    assert run.copies(op, SMALL, many, inputs, l3=1 << 25) == ([inputs], False)


@pytest.mark.parametrize("name, label, case", [
    ("fp8_gemm", "torch bf16", Case(m=5, n=130, k=256)),
    ("mla_prefill", "torch SDPA", Case(b=2, t=256, s=256, h=2, t_lens=(128, 128), s_lens=(128, 128), softmax_scale=0.07)),
    ("moe_route", "torch eager", Case(t=9, e=64, top_k=6, n_group=8, topk_group=4, scaling=2.5, bias="f32")),
])
def test_peers_of_gpus_compute_the_same(name, label, case):
    """Those that PyTorch runs on the CPU as well: the first output is the definition's."""
    from types import SimpleNamespace

    import torch
    from kernomics.bench import gpu_peers

    from kernomics.torch_ops import from_numpy

    op = OPS[name]
    inputs, scalars = numpy_ops.sample(op, case)
    want = op.define(**inputs, **scalars)
    want = torch.from_numpy(np.asarray(want[0] if isinstance(want, tuple) else want, np.float64))
    given = {n: x if x is None else from_numpy(x) for n, x in inputs.items()}
    got = gpu_peers.PEERS[name][label](SimpleNamespace(**given, **scalars))().double()
    assert (got - want).norm() < 0.02 * want.norm()
    with pytest.raises(ImportError, match="deep_gemm_of_nobody is not installed"):
        gpu_peers.need("deep_gemm_of_nobody")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["bf16", "u8"])
def test_tokens_seen_are_those_of_the_block_table(causal, layout):
    """For FlashMLA, which reads the 656-byte cache by lists of tokens."""
    from types import SimpleNamespace

    from kernomics.bench import gpu_peers

    from kernomics.torch_ops import from_numpy

    case = Case(b=3, q=3, h=2, lens=(40, 2, 17), page=7, p=11, n=7, softmax_scale=0.07, kv_cache=layout, causal=causal)
    inputs, scalars = numpy_ops.sample(OPS["mla_decode"], case)
    given = {n: from_numpy(inputs[n]) for n in ("q", "kv_cache", "block_table", "seq_lens")}
    indices = gpu_peers.tokens_seen(SimpleNamespace(**given, causal=causal)).numpy()
    assert indices.dtype == np.int32
    want = OPS["mla_decode"].define(**inputs, **scalars)
    got = OPS["mla_decode_sparse"].define(inputs["q"], inputs["kv_cache"], indices, softmax_scale=0.07)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-12)


SMALL_CASES = [pytest.param(op, case, id=f"{op.name}-{case.id}") for op in OPS.values() if op.rows
               for case in op.cases if not case.bench and op.work(**case).flops < 3e6
               and all(0 not in x[1] for x in op.layout(case).values() if x)]


@pytest.mark.parametrize("op, case", SMALL_CASES)
def test_drawn_rows_are_rows_of_the_whole(op, case):
    """The definition of the drawn inputs is what is drawn of the definition."""
    inputs, scalars = numpy_ops.sample(op, case)
    whole = op.define(**inputs, **scalars)
    some, of_whole = numpy_ops.sampled_rows(op, inputs, list(whole if isinstance(whole, tuple) else (whole,)), 4)
    again = op.define(**some, **scalars)
    for a, b in zip(again if isinstance(again, tuple) else (again,), of_whole, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-9, atol=1e-12)


def test_large_gpu_cases_are_judged_on_drawn_rows():
    """A definition over gigabytes takes minutes and tens of GB. Those without rows copy bits."""
    from kernomics.bench import gpu

    large = {name for name, cases in gpu.CASES.items() for c in cases if OPS[name].work(**c).bytes > 3e8}
    assert {name for name in large if OPS[name].rows is None} <= {"moe_permute"}


class Replaced(Exception):
    """A new process is in this one's place."""


@pytest.fixture
def bench_without_gpu(monkeypatch):
    """bench.gpu where CUDA kernels are wrong at once and Triton's right, and the processes that replace this one."""
    import torch
    from kernomics.bench import gpu

    from kernomics import chip

    commands = []

    def replace(python, command):
        commands.append(command[2:])
        raise Replaced

    monkeypatch.setattr(gpu.chip, "current", lambda index: chip.FAMILIES["sm90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "ceilings", lambda: {})
    monkeypatch.setattr(gpu, "answers", lambda: True)
    monkeypatch.setattr(gpu, "compile_all", lambda *args: None)
    monkeypatch.setattr(gpu.os, "execv", replace)
    monkeypatch.setattr(gpu, "bench_case", lambda op, kernel, case, *more: {
        "op": op, "kernel": kernel, "case": case, "work": op.work(**case), "failed": "" if kernel.name == "triton" else "wrong",
        "error": 0.0, "peers": [], "cold": False, "peaks": {"bytes_copy": 4e12, "flops_bf16": 8e14},
        "timing": timing.Timing(1e-5, 1e-5, 1e-5, 40)})
    return gpu, commands


OPS_LEFT = ["--op=moe_route", "--op=moe_combine"]


@pytest.mark.parametrize("peers", [True, False])
def test_a_broken_gpu_costs_one_kernel_alone(peers, bench_without_gpu, monkeypatch, tmp_path, capsys):
    """After an illegal address this process can do no more on the GPU; a new one goes on without the kernel."""
    gpu, commands = bench_without_gpu
    turns = iter([True, True, False])
    monkeypatch.setattr(gpu, "answers", lambda: next(turns))
    with pytest.raises(Replaced):
        gpu.main(["moe_route", "moe_combine"], tmp_path, peers)
    assert commands == [["kernomics.bench.gpu", *OPS_LEFT, f"--results={tmp_path}", *([] if peers else ["--no-peers"]),
                         "--start=3", "--without=moe_route:cuda"]]
    shown = capsys.readouterr().out
    assert "moe_route: cuda broke the GPU for this process" in shown and "records of 1 rows in" in shown
    assert ", cuda: FAILED wrong" in shown and ", triton: 10.0 us" in shown  # a line a row where no progress bar is seen
    (record,) = map(json.loads, (tmp_path / "h200.jsonl").read_text().splitlines())
    assert (record["op"], record["kernel"], record["chip"]) == ("moe_route", "triton", "h200")

    monkeypatch.setattr(gpu, "answers", lambda: True)
    done = gpu.main(["moe_route", "moe_combine"], tmp_path, peers, None, 3, ["moe_route:cuda"])
    expected = list(gpu.rows(["moe_route", "moe_combine"], "sm90"))[3:]
    assert [(r["op"].name, r["kernel"].name, r["case"]) for r in done] == [
        (op.name, k.name, case) for op, k, case in expected if (op.name, k.name) != ("moe_route", "cuda")]


def test_each_op_has_ceilings_of_its_time(bench_without_gpu, monkeypatch, tmp_path):
    """Measured before its first row: a card that has worked for minutes is slower than at the start."""
    gpu, _ = bench_without_gpu
    found, given = iter([{"bytes_copy": 3.0}, {"bytes_copy": 2.0}]), []
    monkeypatch.setattr(gpu, "ceilings", lambda: next(found))
    case = gpu.bench_case
    monkeypatch.setattr(gpu, "bench_case", lambda op, kernel, row, drawn, limits, *more: (
        given.append((op.name, limits["bytes_copy"])), case(op, kernel, row, drawn, limits, *more))[1])
    gpu.main(["moe_route", "moe_combine"], tmp_path, False)
    assert set(given) == {("moe_route", 3.0), ("moe_combine", 2.0)}


@pytest.mark.parametrize("who", ["triton", "a peer"])
def test_a_kernel_that_hangs_costs_itself_alone(who, bench_without_gpu, monkeypatch, tmp_path, capsys):
    import threading

    gpu, commands = bench_without_gpu
    hung, failures, quick = threading.Event(), [], gpu.bench_case

    def hangs(op, kernel, case, drawn, limits, peers, tick, without):
        if kernel.name == "triton":
            if who == "a peer":
                tick(who)
            hung.wait(20)
            raise KeyboardInterrupt  # the process ends here
        return quick(op, kernel, case)

    monkeypatch.setattr(threading, "excepthook", lambda x: (failures.append(x.exc_type), hung.set()))
    monkeypatch.setattr(gpu, "bench_case", hangs)
    monkeypatch.setattr(gpu, "HANGS_S", 2)  # what does not hang takes less, on a busy machine too
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["moe_route", "moe_combine"], tmp_path)
    first = 2 if who == "triton" else 1  # the row of a peer that hangs is timed without it
    assert failures == [Replaced] and commands == [["kernomics.bench.gpu", *OPS_LEFT, f"--results={tmp_path}",
                                                    f"--start={first}", f"--without=moe_route:{who}"]]
    assert f"moe_route: {who} hangs" in capsys.readouterr().out


def test_kernels_of_a_case_are_judged_by_one_definition(monkeypatch):
    """Each case is drawn once, some before their turn, and its kernels are judged by that."""
    from concurrent.futures import ThreadPoolExecutor

    from kernomics.bench import gpu

    op, calls = OPS["moe_combine"], []
    monkeypatch.setattr(op, "define", lambda *args, f=op.define, **named: (calls.append(1), f(*args, **named))[1])
    rows = [(op, kernel, Case(t=3, d=d, top_k=2)) for d in range(4, 12) for kernel in ("cuda", "triton")]
    with ThreadPoolExecutor(2) as pool:
        for at, (row, drawn) in enumerate(gpu.ahead(rows, pool)):
            inputs, scalars, want = drawn.result()
            assert row == rows[at] and inputs["y"].shape[1] == row[2]["d"]
            assert len(calls) <= at // 2 + 1 + gpu.LOOK_AHEAD
            work = op.work(**row[2])
            right = op.define(**inputs, **scalars).astype(np.float32)
            calls.pop()
            for out in (right, right + 1):
                kept = run.judge(op, work, inputs, scalars, [out], want)
                assert bool(kept[0]) == (out is not right)
    assert len(calls) == 8


def test_the_gpu_bench_names_its_ops():
    from kernomics.bench import gpu

    with pytest.raises(ContractError, match="op is 'moe_balance', expected one of fp8_quantize"):
        gpu.dry(["moe_balance"])


def test_a_kernel_that_does_not_compile_fails_alone(monkeypatch, capsys):
    from concurrent.futures import ThreadPoolExecutor

    from kernomics.bench import gpu
    from rich.console import Console

    def compile_op(name):
        if name == "mla_index":
            raise RuntimeError("ptxas died")
        done.append(name)

    done = []
    monkeypatch.setattr(gpu, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    gpu.compile_all([(name, compile_op, (name,)) for name in ("mla_index", "moe_route")], Console())
    assert done == ["moe_route"] and "mla_index does not compile: RuntimeError" in capsys.readouterr().out
