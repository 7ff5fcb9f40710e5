"""The ``kernomics`` command: each subcommand imports what it needs when it runs."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False,
                  help="The attention/MoE core of DeepSeek-class models: check it, time it, price it.")


@app.callback()
def root():
    """Kernels plus economics."""


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
        typer.echo(f"kernomics price: {error}", err=True)
        raise typer.Exit(2) from None


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
        typer.echo(f"kernomics bench: {error}", err=True)
        raise typer.Exit(2) from None
    if any(row.failed for row in rows):
        raise typer.Exit(1)
