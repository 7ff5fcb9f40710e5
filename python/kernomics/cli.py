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
    "chip": (list[str], "A chip of chips.toml, of the bench records, or a TOML file of your own; repeatable."),
    "tokens_in": (int, "Prompt tokens of a request [4096]."),
    "tokens_out": (int, "Answer tokens of a request [1024]."),
    "hit": (float, "Share of the prompt found in the prefix cache [0]."),
    "speed": (float, "Tokens/s that a user gets at least [0]."),
    "first": (float, "Seconds to the first token at most."),
    "disaggregated": (bool, "Prefill and decode on pools of their own [yes]."),
    "chips": (int, "Chips of an instance at most [64]."),
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
    "memory_share": (float, "Share of a chip's memory for weights and cache [0.9]."),
    "dollars_per_hour": (list[str], "h200=2.5, repeatable. Default: the rental of chips.toml."),
    "utilisation": (float, "Share of the paid hours that serve [1]."),
    "records": (str, "Bench records: a .jsonl file or a folder. Default: the installed ones."),
    "tables": (list[str], "Imported measurements: aic, infersim:<folder>, or a .csv or .parquet file; repeatable."),
}


def _refuse(command, error):
    typer.echo(f"kernomics {command}: {error}", err=True)
    raise typer.Exit(2) from None


def scenario_command(function):
    """Register ``function(scenario, **own options)`` as a command with the options of SCENARIO before its own."""
    own = [p.replace(kind=p.KEYWORD_ONLY) for n, p in inspect.signature(function).parameters.items() if n != "scenario"]

    def command(**options):
        from kernomics.cost import CostError, scenario

        mine = {p.name: options.pop(p.name) for p in own}
        try:
            return function(scenario.from_options(**options), **mine)
        except CostError as error:
            _refuse(function.__name__, error)

    shared = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind,
                                default=typer.Option([] if kind == list[str] else None, help=text))
              for name, (kind, text) in SCENARIO.items()]
    command.__signature__ = inspect.Signature([*shared, *own])
    command.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    app.command()(command)
    return function


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
    if format:
        print(console.write([console.answer_dict(a) for a in rows], format))
    else:
        console.show_compare(scenario, rows)


@scenario_command
def pareto(scenario, format: str = FORMAT):
    """Throughput of a chip against the speed of a user: the decode plans and batches that no other beats in both."""
    from kernomics.cost import compare as answers
    from kernomics.cost import console

    sources, measured = scenario.sources()
    rows = []
    for chip in scenario.load_chips(measured):
        points = answers.pareto(scenario, sources, chip)
        rows += [console.point_dict(chip, scenario.dollars(chip), p) for p in points]
        if not format:
            console.show_pareto(scenario, chip, scenario.dollars(chip), points)
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
        print(console.write(console.tree_dict(answers.explain(answer)), format))
    else:
        console.show_explain(answer)
@scenario_command
def report(scenario, out: str = typer.Option("out/report.html", help="Where to write the page.")):
    """One HTML page: chips side by side, Pareto fronts, where money and time go, rooflines, what is uncertain."""
    from pathlib import Path

    from kernomics.cost import page

    sources, measured = scenario.sources()
    print(page.write(Path(out), page.page(scenario, sources, scenario.load_chips(measured))))


@app.command()
def price(
    model: str = typer.Option("deepseek-v3", help="deepseek-v3, or the path of a Hugging Face config.json of its family."),
    chip: list[str] = typer.Option([], help="A chip of chips.toml, or this; repeatable. Default: this machine and six more."),
    dollars_per_hour: list[str] = typer.Option([], help="h200=2.5, or a number for every chip; repeatable."),
    batch: list[int] = typer.Option([1, 64], help="Sequences per decode step; repeatable, the first is shown by layer."),
    context: int = typer.Option(4096, help="Tokens in cache per sequence, the new one included."),
    chunk: list[int] = typer.Option([1024, 16384], help="Tokens of a prompt, prefilled in one step; repeatable likewise."),
    phase: str = typer.Option("both", help="decode, prefill or both."),
    records: str = typer.Option(None, help="Bench records: a .jsonl file or a folder. Default: the installed ones."),
    plot: str = typer.Option("out/roofline.png", help="Where to write the roofline plot; an empty string writes none."),
    json: bool = typer.Option(False, "--json", help="Print JSON instead of tables, and write no plot."),
):
    """What a million tokens cost: seconds per layer from this machine's bench and from rooflines, then $/Mtoken."""
    from kernomics.cost import CostError, report

    try:
        report.main(model, chip, dollars_per_hour, batch, context, chunk, phase, records, None if json else plot, json)
    except CostError as error:
        _refuse("price", error)


@app.command()
def bench(
    op: list[str] = typer.Option([], help="Only this op; repeatable."),
    isa: str = typer.Option(None, help="base, avx2, avx512, or all to compare them. Default: the best this machine runs."),
    threads: int = typer.Option(None, help="Threads of kernels and peers. Default: all."),
    quick: bool = typer.Option(False, "--quick", help="One decode and one prefill case of the main ops, in about a minute."),
    peers: bool = typer.Option(True, help="Time what PyTorch offers for the same call, too."),
    record: bool = typer.Option(False, "--record", help="Write the records to bench/results instead of out/bench.jsonl."),
    results: str = typer.Option(None, help="Write the records to this folder, one file a chip."),
):
    """Judge every CPU kernel against its definition, then time it beside this machine's limits and PyTorch."""
    from kernomics.bench import run
    from kernomics.contract import ContractError

    try:
        rows = run.main(op or None, None, isa, threads, quick, results or record or None, peers)
    except ContractError as error:
        _refuse("bench", error)
    if any(row.failed for row in rows):
        raise typer.Exit(1)
