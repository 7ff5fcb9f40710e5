"""The ``kernomics`` command: each subcommand imports what it needs when it runs."""

import inspect

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False,
                  help="The attention/MoE core of DeepSeek-class models: check it, time it, price it.")

SCENARIO = {  # an option for each field of cost.scenario.Scenario, where its default and range stand
    "scenario": (str, "A TOML file with the fields below; options override it."),
    "model": (str, "deepseek-v2, -v3, -r1, -v3.2, kimi-k2, qwen3-235b-a22b, mixtral-8x7b, llama-3.1-70b, or a config.json."),
    "weights": (str, "dtype of projections: fp8 or bf16. Default: as the checkpoint."),
    "experts": (str, "dtype of routed experts: fp8, bf16 or nvfp4. Default: as --weights."),
    "chip": (list[str], "A chip of chips.toml, of the bench records, or a TOML file of your own; h100+h200 prefills on "
                        "the one and decodes on the other; repeatable."),
    "tokens_in": (int, "Prompt tokens of a request [4096]."),
    "tokens_out": (int, "Answer tokens of a request [1024]."),
    "hit": (float, "Share of the prompt found in the prefix cache [0]."),
    "tier": (str, "Memory beside the chips that keeps the prefix cache, as host or ssd; needs the three below. Default: hits lie "
                  "in the chips' memory."),
    "tier_gb": (float, "GB of it a chip."),
    "tier_gb_per_s": (float, "GB/s from it into a chip."),
    "tier_dollars_per_gb_month": (float, "$ of a GB of it and month."),
    "speed": (float, "Tokens/s that a user gets at least [0]."),
    "first": (float, "Seconds to the first token at most."),
    "kv_gb_per_s": (float, "GB/s at which a chip moves the KV cache from the prefill to the decode pool. Default: its scale-out "
                           "link."),
    "disaggregated": (bool, "Prefill and decode on pools of their own [yes]."),
    "chips": (int, "Chips of an instance at most; where SRAM is the only memory, of a stage of layers [64]."),
    "pp": (int, "Stages of layers, each on chips of its own; where SRAM is the only memory as many as it takes [1]."),
    "wave": (int, "Microbatches of prefill that follow each other before the stages run empty [4 a stage]."),
    "cache": (str, "dtype of the KV cache: bf16 or fp8 [bf16]."),
    "drafts": (int, "Tokens drafted a step by the MTP module [0]."),
    "acceptance": (float, "Chance that a draft is right [0.85]."),
    "imbalance": (float, "Expert load of the busiest chip over the mean [1]."),
    "micro_batches": (int, "2: one half's communication beside the other's compute [1]."),
    "comm_share": (float, "Share of the compute units lost to communication, 0.15 for 20 of 132 SMs [0]."),
    "overlap": (float, "Share of the hideable communication that two batches hide [1]."),
    "alpha": (float, "Seconds a message where no table knows [0]."),
    "step_overhead": (float, "Seconds a step of host and launch time [0]."),
    "call_latency": (float, "Seconds that a call nobody measured takes beyond its roofline [0: a bound]."),
    "bandwidth_share": (float, "Share of the memory bandwidth that such calls reach [1: a bound]."),
    "kernel_times": (float, "Factor on the times of records and tables, which may be off [1]."),
    "memory_share": (float, "Share of a chip's memory for weights and cache [0.9]."),
    "dollars_per_hour": (list[str], "h200=2.5, repeatable. Default: the rental of chips.toml."),
    "tco": (list[str], "Own the chips: a field of the tco command, as server_dollars=25000; repeatable. In a file: [tco], and "
                       "[tco.h200] of one chip. $/h is then what an hour costs an owner."),
    "uncertain": (list[str], "Range of an input: bandwidth_share=0.7..0.9, dollars_per_hour=1.5..2..3; repeatable."),
    "allocation": (str, "Who pays: time (chip time of each kind of token), price (what it sells for), pool (each its own pool). "
                        "Default: pool; time where prefill and decode share one."),
    "sold": (list[str], "$/Mtoken that tokens sell for, of the allocation by price: in=0.55, cached=0.14, out=2.19; repeatable."),
    "load": (str, "A load to size a fleet for: '20 requests/s', or '50k tokens/s' of answers."),
    "day": (str, "The load's shape over a day, --load its mean: 24 numbers as 1,1,2,..., or day-6, DeepSeek's. Fleets by the "
                 "hour, owned and rented."),
    "utilisation": (float, "Share of the paid hours that serve [1]."),
    "records": (str, "Bench records: a .jsonl file or a folder. Default: the installed ones."),
    "tables": (list[str], "Imported measurements: aic, infersim:<folder>, deepep (H800), a .csv or .parquet file; repeatable."),
}


VENDOR = {  # an option for each field of cost.vendor.Vendor, where its range stands
    "die_mm2": (float, "mm2 of one compute die. Default: the chip's, shared out among --dies."),
    "dies": (int, "Compute dies in the package [1]."),
    "wafer_dollars": (float, "$ of a processed wafer."),
    "wafer_mm": (float, "mm across the wafer [300]."),
    "defects_per_cm2": (float, "Defects per cm2."),
    "yield_model": (str, "poisson, murphy or negative_binomial [negative_binomial]."),
    "alpha": (float, "Clustering of defects, of negative_binomial only [3]."),
    "hbm_gb": (float, "GB of HBM in the package. Default: the chip's memory, 0 where it is no HBM."),
    "hbm_dollars_per_gb": (float, "$ per GB that the vendor pays, supplier's margin within."),
    "hbm_margin": (float, "Gross margin of the HBM supplier, share of its price [0]."),
    "packaging_dollars": (float, "$ of interposer, substrate and bonding."),
    "test_dollars": (float, "$ of tests."),
    "assembly_dollars": (float, "$ of module and board."),
    "margins": (list[str], "Gross margin, from the chip up to the end price: partner=0.1, vendor=0.75, cloud=0.4, api=0.5 ...; "
                           "repeatable, in order."),
}


def _refuse(command, error):
    typer.echo(f"kernomics {command}: {error}", err=True)
    raise typer.Exit(2) from None


def _command(function, table, read):
    """Register ``function(read(**options of table), **own options)`` as a command, the table's options before its own."""
    _, *own = (p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(function).parameters.values())

    def command(**options):
        from kernomics.cost import CostError

        mine = {p.name: options.pop(p.name) for p in own}
        try:
            return function(read(**options), **mine)
        except CostError as error:
            _refuse(function.__name__, error)

    # rich would take [tco] in a text for markup
    shared = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind,
                                default=typer.Option([] if kind == list[str] else None, help=text.replace("[", "\\[")))
              for name, (kind, text) in table.items()]
    command.__signature__ = inspect.Signature([*shared, *own])
    command.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    app.command()(command)
    return function


def scenario_command(function):
    """Register ``function(scenario, **own options)`` as a command with the options of SCENARIO."""
    def read(**options):
        from kernomics.cost import scenario

        return scenario.from_options(**options)

    return _command(function, SCENARIO, read)


FORMAT = typer.Option(None, "--format", help="json or csv in place of tables.")


@scenario_command
def compare(scenario, format: str = FORMAT):
    """Chips side by side: the cheapest service of a workload on each, tokens/s, $/Mtoken, J/token."""
    from kernomics.cost import compare as answers
    from kernomics.cost import console

    sources, measured = scenario.sources()
    chips = scenario.load_chips(measured)
    with console.progress() as bar:
        task = bar.add_task("", total=len(chips))
        rows = answers.compare(scenario, sources, chips, lambda c: bar.update(task, description=c.key, advance=1))
    sram = any(c.memory == "sram" for a in rows if a.service for c in a.chip.pools)  # bought for the speed of one user
    streams = {a.chip.key: answers.stream(scenario, sources, a) for a in rows if a.service and sram}
    if format:
        alone = {key: console.stream_dict(x) for key, x in streams.items()}
        print(console.write([{**console.answer_dict(a), **console.beside_dict(a, rows[0]), **alone.get(a.chip.key, {})}
                             for a in rows], format))
    else:
        console.show_compare(scenario, rows)
        if streams:
            console.show_streams(streams.values())


@scenario_command
def pareto(scenario, format: str = FORMAT):
    """Throughput of a chip against the speed of a user: the plans and batches that no other beats in both, and their $."""
    from kernomics.cost import CostError, console
    from kernomics.cost import compare as answers

    sources, measured = scenario.sources()
    rows, chips = [], scenario.load_chips(measured)
    for chip in chips:
        try:
            found = answers.pareto(scenario, sources, chip)
        except CostError as error:
            if len(chips) == 1:
                raise
            found = [answers.refused(scenario, chip, error)]
        rows += [console.answer_dict(a) for a in found]
        if not format:
            console.show_pareto(scenario, chip, found)
    if format:
        print(console.write(rows, format))


@scenario_command
def sweep(scenario, context: str = typer.Option("1k,4k,16k,64k", help="Prompt tokens, k for 1024."), format: str = FORMAT):
    """How price, speed and room for users change with the length of the prompts, chip by chip."""
    from kernomics.cost import compare as answers
    from kernomics.cost import console

    sources, measured = scenario.sources()
    contexts, rows = console.lengths(context), []
    for chip in scenario.load_chips(measured):
        found = answers.sweep(scenario, sources, chip, contexts)
        rows += [{"tokens_in": s, **console.answer_dict(a)} for s, a in found]
        if not format:
            console.show_sweep(scenario, chip, found)
    if format:
        print(console.write(rows, format))


@scenario_command
def explain(scenario, format: str = FORMAT):
    """Where each microsecond and each cent of a request goes on the first chip, as a tree down to the kernel records."""
    from kernomics.cost import CostError, console
    from kernomics.cost import compare as answers

    sources, measured = scenario.sources()
    (answer,) = answers.compare(scenario, sources, scenario.load_chips(measured)[:1])
    if answer.service is None:
        raise CostError(answer.why)
    if format:
        root = answers.explain(answer)
        print(console.write([*console.tree_rows(root)] if format == "csv" else console.tree_dict(root), format))
    else:
        console.show_explain(answer)


@scenario_command
def report(scenario, out: str = typer.Option("out/report.html", help="Where to write the page.")):
    """One HTML page: chips side by side, Pareto fronts, where money and time go, rooflines, what is uncertain."""
    from pathlib import Path

    from kernomics.cost import CostError

    try:
        from kernomics.cost import page
    except ImportError as error:
        raise CostError(f"the page needs plotly ({error}): pip install 'kernomics[report]'") from None
    sources, measured = scenario.sources()
    print(page.write(Path(out), page.page(scenario, sources, scenario.load_chips(measured))))


@scenario_command
def sensitivity(scenario, samples: int = typer.Option(1000, min=10, help="Draws."), seed: int = 0, format: str = FORMAT):
    """How uncertain $/Mtoken is on the first chip, and which input moves it most: --uncertain gives the ranges."""
    from kernomics.cost import CostError, console, uncertainty
    from kernomics.cost import compare as answers

    sources, measured = scenario.sources()
    (answer,) = answers.compare(scenario, sources, scenario.load_chips(measured)[:1])
    if answer.service is None:
        raise CostError(answer.why)
    inputs = answers.inputs_of(scenario, answer)
    if not inputs:
        raise CostError("nothing is uncertain: give ranges with --uncertain bandwidth_share=0.7..0.9")
    price = answers.held(scenario, sources, answer)
    with console.progress() as bar:
        task = bar.add_task("draws", total=samples)
        spread = uncertainty.monte_carlo(price, inputs, samples, seed, lambda done, n: bar.update(task, completed=done))
    slopes = uncertainty.elasticities(price, inputs, 0.01)  # less may change no whole token of a prompt
    console.show_sensitivity(answer, spread, uncertainty.tornado(price, inputs), slopes, format)


@scenario_command
def payback(
    scenario,
    before: str = typer.Argument(help="Bench records before: a .jsonl file or a folder."),
    after: str = typer.Argument(help="And after."),
    op: str = typer.Argument(help="The op that became faster."),
    fleet: int = typer.Option(1000, min=1, help="Chips that serve the workload all year."),
    engineering: float = typer.Option(0.0, min=0, help="$ that the improvement cost."),
    format: str = FORMAT,
):
    """What a faster kernel is worth a year: two bench records, the op's share of the workload on the first chip, a fleet."""
    from kernomics.cost import CostError, console, economics, measured
    from kernomics.cost import compare as answers

    gain = answers.speedup(measured.read(before), measured.read(after), op)
    sources, records = scenario.sources()
    (answer,) = answers.compare(scenario, sources, scenario.load_chips(records)[:1])
    if answer.service is None or answer.dollars_per_hour is None:
        raise CostError(answer.why or f"{answer.chip.key}: $/h is unknown")
    share, year = answers.share_of(answer, op), fleet * economics.yearly_dollars(answer.dollars_per_hour)
    saved, months = economics.kernel_payback(share, gain, year, engineering)
    row = {"op": op, "chip": answer.chip.key, "speedup": gain, "share": share, "fleet_dollars_per_year": year,
           "dollars_per_year": saved, "payback_months": months}
    if format:
        print(console.write(row, format))
    else:
        print(f"{op} is {gain:.3f} x as fast and takes {100 * share:.1f} % of the workload's chip time on {answer.chip.key}.\n"
              f"{fleet:,} chips cost ${year:,.0f} a year: ${saved:,.0f} of it saved" +
              (f", paid back in {months:.1f} months." if engineering and saved > 0 else "."))


@app.command()
def tco(
    chip: str = typer.Argument(help="A chip of chips.toml, or a TOML file of your own."),
    fields: list[str] = typer.Option([], "--set", help="A cost: server_dollars=25000, watts=1730, rate=0.1 ...; repeatable."),
    rent: float = typer.Option(None, help="$/h it is rented out at: profit, rate of return and payback of its life."),
    decline: float = typer.Option(0.0, help="Fall of that rent: exp(-decline) a year."),
    format: str = FORMAT,
):
    """What an hour of a chip costs its owner, part by part, and what it must be sold at; what renting it out earns."""
    from kernomics.cost import CostError, chips, console
    from kernomics.cost import tco as costs

    try:
        owned = costs.from_chip(chips.find(chip), **console.numbers(fields))
        console.show_tco(chips.find(chip).name, owned, format, None if rent is None else costs.rental(owned, rent, decline))
    except CostError as error:
        _refuse("tco", error)


def vendor(fields, chip: str = typer.Argument(None, help="A chip of chips.toml, or a TOML file of your own."),
           format: str = FORMAT):
    """What a chip costs to build, part by part, and who earns how much up to the end price."""
    from kernomics.cost import chips, console
    from kernomics.cost import vendor as stack

    given = {k: v for k, v in fields.items() if v is not None and v != []}
    if "margins" in given:
        given["margins"] = console.numbers(given["margins"], "margins", "name=share, as vendor=0.75")
    known = chips.find(chip) if chip else None
    read = stack.from_chip(known, **given) if known else stack.read(given)
    console.show_vendor(known.name if known else "A chip", read, format)


_command(vendor, VENDOR, dict)


@app.command()
def validate(
    only: str = typer.Option(None, help="One target, as B5 or B7."),
    infersim: str = typer.Option(None, envvar="KERNOMICS_INFERSIM", help="Folder of InferSim's bench_data."),
    aic: str = typer.Option(None, envvar="KERNOMICS_AIC", help="Folder of aiconfigurator's tables. Default: as installed."),
    samples: int = typer.Option(200, min=10, help="Draws from the inputs' ranges."),
    format: str = FORMAT,
):
    """Published figures beside the model's: predicted, published, error, and what it stands on. Nothing is fitted."""
    from kernomics.cost import CostError, console
    from kernomics.cost import validate as targets

    try:
        with console.progress() as bar:
            task = bar.add_task("", total=len(targets.TARGETS))
            outcomes = targets.validate(targets.Env(infersim, aic), samples, only,
                                        lambda t: bar.update(task, description=t.id, advance=1))
        console.show_validate(outcomes, None if only else targets.OPEN, format)
    except CostError as error:
        _refuse("validate", error)
    if any(o.verdict.startswith(("MISSED", "EXCEEDED")) for o in outcomes):
        raise typer.Exit(1)


@app.command()
def claims(id: str = typer.Argument(None, help="One claim, as Q22."), format: str = FORMAT):
    """Claims about chips and models, each computed by the model: the verdict, and the assumption that decides it."""
    from kernomics.cost import CostError, console
    from kernomics.cost import claims as entries

    try:
        console.show_claims(entries.evaluate(id), None if id else entries.CONTRADICTIONS, format)
    except CostError as error:
        _refuse("claims", error)


@app.command()
def price(
    model: str = typer.Option("deepseek-v3", help="deepseek-v3, or the path of a Hugging Face config.json of its family."),
    chip: list[str] = typer.Option([], help="A chip of chips.toml, or this; repeatable. Default: this machine and six more."),
    dollars_per_hour: list[str] = typer.Option([], help="h200=2.5, or a number for every chip; repeatable."),
    batch: list[int] = typer.Option([1, 64], help="Sequences per decode step; repeatable, the first is shown by layer."),
    context: int = typer.Option(4096, help="Tokens in cache per sequence, the new one included."),
    chunk: list[int] = typer.Option([1024, 16384], help="Tokens of a prompt, prefilled in one step; repeatable likewise."),
    phase: str = typer.Option("both", help="decode, prefill or both."),
    tokens_in: int = typer.Option(None, help="Prompt tokens of a request [4096]."),
    tokens_out: int = typer.Option(None, help="Answer tokens of a request [1024]."),
    hit: float = typer.Option(None, help="Share of the prompt found in the prefix cache [0]."),
    allocation: str = typer.Option(None, help="Who pays for a request: time (chip time of each kind of token), price (what it "
                                              "sells for), pool (each its own pool). Default: pool."),
    sold: list[str] = typer.Option([], help="$/Mtoken that tokens sell for, of the allocation by price: in=0.55, cached=0.14, "
                                            "out=2.19; repeatable."),
    records: str = typer.Option(None, help="Bench records: a .jsonl file or a folder. Default: the installed ones."),
    plot: str = typer.Option("out/roofline.png", help="Where to write the roofline plot; an empty string writes none."),
    json: bool = typer.Option(False, "--json", help="Print JSON instead of tables, and write no plot."),
):
    """What a million tokens cost: seconds per layer from this machine's bench and from rooflines, then $/Mtoken."""
    from kernomics.cost import CostError, report

    try:
        request = {"tokens_in": tokens_in, "tokens_out": tokens_out, "hit": hit, "allocation": allocation, "sold": sold}
        report.main(model, chip, dollars_per_hour, batch, context, chunk, phase, records, None if json else plot, json,
                    {k: v for k, v in request.items() if v not in (None, [])})
    except CostError as error:
        _refuse("price", error)


def _bench_gpu(ops, results, peers, dry):
    try:
        import torch

        from kernomics.bench import gpu
        from kernomics.contract import ContractError
    except ImportError as error:
        _refuse("bench --gpu", error)
    if not dry and not torch.cuda.is_available():
        _refuse("bench --gpu", "torch sees no GPU; --dry lists the rows")
    try:
        if dry:
            gpu.dry(ops)
        elif any(row["failed"] for row in gpu.main(ops, results, peers)):
            raise typer.Exit(1)
    except ContractError as error:
        _refuse("bench --gpu", error)


@app.command()
def bench(
    op: list[str] = typer.Option([], help="Only this op; repeatable."),
    isa: str = typer.Option(None, help="base, avx2, avx512, or all to compare them. Default: the best this machine runs."),
    threads: int = typer.Option(None, help="Threads of kernels and peers. Default: all."),
    quick: bool = typer.Option(False, "--quick", help="One decode and one prefill case of the main ops, in about a minute."),
    peers: bool = typer.Option(True, help="Time what PyTorch offers for the same call, too."),
    record: bool = typer.Option(False, "--record", help="Write the records to bench/results instead of out/bench.jsonl."),
    results: str = typer.Option(None, help="Write the records to this folder, one file a chip."),
    gpu: bool = typer.Option(False, "--gpu", help="The kernels of this machine's GPU in place of the CPU's."),
    dry: bool = typer.Option(False, "--dry", help="With --gpu: list the rows and load each kernel, without a GPU."),
):
    """Judge every kernel against its definition, then time it beside this machine's limits, PyTorch and other libraries."""
    from kernomics.contract import ContractError

    if gpu:
        _bench_gpu(op or None, results, peers, dry)
        return
    from kernomics.bench import run

    try:
        rows = run.main(op or None, None, isa, threads, quick, results or record or None, peers)
    except ContractError as error:
        _refuse("bench", error)
    if any(row.failed for row in rows):
        raise typer.Exit(1)


@app.command()
def warmup(
    model: str = typer.Option("deepseek-v3", help="A shipped model or a config.json."),
    chip: str = typer.Option(None, help="sm80, sm90, sm100, sm120, gfx942 or gfx950: needs no GPU. Default: the GPU at hand."),
    tokens: str = typer.Option(None, help="Tokens of a step, as 1,64,4096. Default: twenty counts from 1 to 8192."),
):
    """Compile every Triton kernel that a model's steps use into Triton's cache, so that no request waits for a compiler."""
    try:
        import torch
        from rich.progress import track

        from kernomics import chip as chips
        from kernomics.cost.model import Model
        from kernomics.triton_kernels import warmup as warm
    except ImportError as error:
        _refuse("warmup", error)
    if chip is not None and chip not in chips.FAMILIES:
        _refuse("warmup", f"chip is {chip!r}, expected one of {', '.join(chips.FAMILIES)}")
    if chip is None and not torch.cuda.is_available():
        _refuse("warmup", "torch sees no GPU; name one, as --chip sm90")
    if tokens is not None and not all(t.isdigit() and int(t) for t in tokens.split(",")):
        _refuse("warmup", f"tokens is {tokens!r}, expected positive ints, as 1,64,4096")
    counts = tuple(map(int, tokens.split(","))) if tokens else warm.TOKENS
    target = chips.FAMILIES[chip] if chip else chips.current(torch.cuda.current_device())
    jobs = warm.jobs(Model.load(model), target, counts)
    for launch in track(jobs.values(), f"{len(jobs)} kernels for {target.family}"):
        warm.compiled(launch, target if chip else None)
