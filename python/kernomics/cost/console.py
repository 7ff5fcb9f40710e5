"""What ``compare``, ``pareto`` and ``explain`` print, and write as JSON and CSV."""

import csv
import io
import json
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from kernomics.cost import CostError, wrong
from kernomics.cost import compare as answers
from kernomics.cost import tco as costs
from kernomics.cost.economics import dollars_per_mtoken
from kernomics.cost.measured import MARKS
from kernomics.cost.report import SIGN, WIDTH, money, seconds_text, si

LEGEND = ("● measured here  ◐ between two measured points  ■ imported measurement  □ transferred from another dtype or shape  "
          "◌ roofline with a named latency or share of bandwidth  ○ roofline bound")


def console():
    return Console() if Console().is_terminal else Console(width=WIDTH)


def progress():
    """A bar on standard error that goes away when it is done."""
    return Progress(TextColumn("{task.description:<24.24}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
                    console=Console(stderr=True), transient=True)


def mark_text(mark):
    sign, style = SIGN[mark]
    return Text(f"{sign} {mark}", style=style)


def shares(share):
    """'62% imported, 38% bound', styled by the weakest of them."""
    parts = [(m, share[m]) for m in MARKS if share[m] >= 0.005]
    return Text(", ".join(f"{100 * v:.0f}% {m}" for m, v in parts), style=SIGN[parts[-1][0]][1])


# ---------------------------------------------------------------- compare


def answer_dict(a):
    """One answer, SI units and dollars."""
    known = {"chip": a.chip.key, "dollars_per_hour": a.dollars_per_hour, "why": a.why}
    s = a.service
    if s is None:
        return known
    return {**known, "dollars_per_mtoken_in": a.dollars_in, "dollars_per_mtoken_out": a.dollars_out,
            "dollars_per_mtoken": a.dollars, "decode_plan": s.decode.plan.text(), "prefill_plan": s.prefill.plan.text(),
            "sequences_per_group": s.decode.b, "tokens_per_s_per_user": s.speed,
            "tokens_per_s_per_chip": s.decode.tokens_per_s_per_chip, "prefill_tokens_per_s_per_chip":
            s.prefill.tokens_per_s_per_chip, "first_token_s": s.first, "prefill_share_of_chips": s.prefill_share,
            "joules_per_token_out": a.joules_out, "tokens_per_s_per_mw": a.tokens_per_s_per_mw,
            "share": {k: v for k, v in a.share.items() if v}}


def show_compare(scenario, rows):
    out, table = console(), Table(box=None, padding=(0, 1, 0, 0))
    first = "" if scenario.first == float("inf") else f", first token within {scenario.first:g} s"
    out.print(f"[bold]{scenario.model}[/], {scenario.tokens_in:,} tokens in ({100 * scenario.hit:.0f} % cached), "
              f"{scenario.tokens_out:,} out, at least {scenario.speed:g} tokens/s a user{first}", highlight=False)
    heads = ("chip", "decodes on", "tok/s\nuser", "tok/s\nchip", "first\ntoken", "$/h", "$/Mtok\nin", "$/Mtok\nout",
             "$/Mtok\nall", "J/tok\nout", "the times are")
    for head in heads:
        table.add_column(head, justify="left" if head in ("chip", "decodes on", "the times are") else "right",
                         no_wrap=head not in ("the times are", "decodes on"))
    for a in rows:
        s = a.service
        if s is None:
            continue
        table.add_row(a.chip.key, s.decode.plan.text(), f"{s.speed:.0f}", si(s.decode.tokens_per_s_per_chip),
                      seconds_text(s.first), money(a.dollars_per_hour), money(a.dollars_in), money(a.dollars_out),
                      money(a.dollars), money(a.joules_out), shares(a.share))
    out.print(table)
    for a in rows:
        if a.why:
            out.print(f"{a.chip.key}: {a.why}", style="red", highlight=False)
    unpriced = [a.chip.key for a in rows if a.service and a.dollars_per_hour is None]
    best = next((a for a in rows if a.dollars is not None), None)
    if best:
        out.print(f"\nCheapest: [bold]{best.chip.key}[/] at ${money(best.dollars_in)} per million tokens in and "
                  f"${money(best.dollars_out)} out. Follow it down with `kernomics explain --chip {best.chip.key}`.",
                  highlight=False)
    if unpriced:
        out.print(f"$/h unknown: {', '.join(unpriced)}; give it with --dollars-per-hour {unpriced[0]}=...", style="dim",
                  highlight=False)
    weak = [a.chip.key for a in rows if a.service and a.service.mark == "bound"]
    if weak:
        out.print(f"Where times are bounds the chip cannot be faster and will be slower: {', '.join(weak)}. A chip with "
                  "measurements looks worse beside one with bounds alone.", style="dim", highlight=False)
    out.print(LEGEND, style="dim", highlight=False)


# ---------------------------------------------------------------- pareto


def point_dict(chip, dollars, p):
    price = dollars and dollars_per_mtoken(dollars, p.tokens_per_s_per_chip)
    return {"chip": chip.key, "plan": p.plan.text(), "sequences_per_group": p.b,
            "tokens_per_s_per_user": p.tokens_per_s_per_user, "tokens_per_s_per_chip": p.tokens_per_s_per_chip,
            "step_s": p.seconds, "dollars_per_mtoken_out": price, "mark": p.mark}


def show_pareto(scenario, chip, dollars, points):
    out, table = console(), Table(box=None, padding=(0, 2, 0, 0))
    out.print(f"[bold]{scenario.model}[/] decoding on [bold]{chip.key}[/] at {scenario.workload().mean_context:,} cached tokens: "
              "no plan beats these in both speeds", highlight=False)
    for head in ("tok/s/user", "tok/s/chip", "step", "$/Mtok out", "sequences", "plan", "the times are"):
        table.add_column(head, justify="left" if head in ("plan", "the times are") else "right", no_wrap=True)
    top = max(p.tokens_per_s_per_chip for p in points)
    table.add_column("tok/s/chip", no_wrap=True)
    for p in points:
        bar = Text("█" * max(1, round(16 * p.tokens_per_s_per_chip / top)), style="cyan")
        table.add_row(f"{p.tokens_per_s_per_user:.1f}", si(p.tokens_per_s_per_chip), seconds_text(p.seconds),
                      money(point_dict(chip, dollars, p)["dollars_per_mtoken_out"]), str(p.b * p.plan.groups), p.plan.text(),
                      mark_text(p.mark), bar)
    out.print(table)


# ---------------------------------------------------------------- explain


def show_explain(answer, least=0.01):
    """The tree; operators below ``least`` of the whole are summed up."""
    root = answers.explain(answer)
    out = console()

    def label(node, whole):
        dollars = "" if node.dollars is None else f"  ${money(node.dollars)}/Mtok"
        text = Text(f"{100 * node.seconds / whole:5.1f}%  {seconds_text(node.seconds):>7}{dollars}  ")
        text.append(node.name, style="bold" if node.children else "")
        if node.note:
            text.append(f"  {node.note}", style="dim")
        if node.mark and not node.children:
            text.append("  ").append_text(mark_text(node.mark)).append(f"  {node.source}" if node.source else "", style="dim")
        return text

    def grow(tree, node):
        small = 0.0
        for child in sorted(node.children, key=lambda n: -n.seconds):
            if child.seconds < least * root.seconds and not child.children:
                small += child.seconds
            else:
                grow(tree.add(label(child, root.seconds)), child)
        if small:
            tree.add(Text(f"{100 * small / root.seconds:5.1f}%  {seconds_text(small):>7}  the rest", style="dim"))

    tree = Tree(label(root, root.seconds))
    grow(tree, root)
    out.print(tree)
    out.print("Shares and times are chip-seconds of a request; $ are per million prompt tokens below prefill, answer tokens "
              "below decode.", style="dim", highlight=False)
    out.print(LEGEND, style="dim", highlight=False)


# ---------------------------------------------------------------- what is uncertain


def show_sensitivity(answer, spread, tornado, elasticities, form=None):
    rows = [{"input": n, "at_p10": low, "at_p90": high, "elasticity": elasticities.get(n)} for n, low, high in tornado]
    if form:
        print(write({"chip": answer.chip.key, "p10": spread.p10, "p50": spread.p50, "p90": spread.p90, "inputs": rows}
                    if form == "json" else rows, form))
        return
    out, table = console(), Table(box=None, padding=(0, 2, 0, 0))
    out.print(f"[bold]{answer.chip.key}[/]: $/Mtok of all tokens {money(spread.p10)} (p10), [bold]{money(spread.p50)}[/] (p50), "
              f"{money(spread.p90)} (p90), plans held", highlight=False)
    for head in ("input alone", "$/Mtok at its p10", "at its p90", "1 % of it is"):
        table.add_column(head, justify="left" if head == "input alone" else "right", no_wrap=True)
    table.add_column("")
    widest = max((abs(r["at_p90"] - r["at_p10"]) for r in rows), default=0) or 1
    for r in rows:
        bar = "█" * max(1, round(30 * abs(r["at_p90"] - r["at_p10"]) / widest))
        slope = r["elasticity"]
        table.add_row(r["input"], money(r["at_p10"]), money(r["at_p90"]), "-" if slope is None else f"{slope:+.2f} %",
                      Text(bar, style="cyan"))
    out.print(table)


# ---------------------------------------------------------------- ownership


def numbers(entries):
    """{field: number} of ``field=number`` texts."""
    found = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            raise wrong("set", entry, "field=number") from None
    return found


def show_tco(name, tco, form=None):
    parts = costs.price_breakdown(tco)
    if form:
        print(write([{"part": n, "dollars_per_hour": v} for n, v in parts.items()], form))
        return
    out, table = console(), Table(box=None, padding=(0, 2, 0, 0))
    out.print(f"[bold]{name}[/], $ per chip-hour", highlight=False)
    table.add_column("part")
    table.add_column("$/h", justify="right")
    table.add_column("")
    total = costs.price_per_hour(tco)
    for n, v in parts.items():
        if v:
            table.add_row(n, f"{v:.4f}", Text("█" * round(40 * v / total), style="cyan"))
    table.add_row(Text("price of an hour sold", style="bold"), Text(f"{total:.4f}", style="bold"))
    out.print(table)
    out.print(f"owned {costs.cost_per_hour(tco):.4f}, available {costs.cost_per_available_hour(tco):.4f}, "
              f"used {costs.cost_per_used_hour(tco):.4f} $/h", style="dim", highlight=False)
    assumed = [f"{n} {getattr(tco, n):g}" for n in type(tco).model_fields if n not in tco.model_fields_set]
    out.print("assumed: " + ", ".join(assumed), style="dim", highlight=False)


# ---------------------------------------------------------------- what is checked


def show_validate(outcomes, open_figures=None, form=None):
    if form:
        print(write([{"id": o.target.id, "what": o.target.what, "predicted": o.predicted, "p10": o.low, "p90": o.high,
                      "published": o.target.published, "unit": o.target.unit, "error": o.error, "verdict": o.verdict,
                      "source": o.target.source, "tables": o.target.tables, "note": o.target.note, "why": o.why}
                     for o in outcomes], form))
        return
    out = console()
    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in ("target", "what", "predicted", "p10..p90", "published", "error", "verdict"):
        table.add_column(head, justify="left" if head in ("target", "what", "verdict") else "right", no_wrap=head != "what")
    for o in outcomes:
        t = o.target
        error = "" if o.error is None or t.kind == "limit" else f"{100 * o.error:+.1f}%"
        spread = "" if o.low is None else f"{three(o.low)}..{three(o.high)}"
        style = {"M": "red", "E": "red", "o": "yellow", "n": "dim"}.get(o.verdict[0], "green")
        at_most = "<= " if t.kind == "limit" else ""
        table.add_row(t.id, t.what, "-" if o.predicted is None else at_most + three(o.predicted), spread,
                      f"{three(t.published)} {t.unit}", error, Text(o.why or o.verdict, style=style))
    out.print(table)
    inside = [o.inside for o in outcomes if o.inside is not None]
    if inside:
        out.print(f"{sum(inside)} of {len(inside)} predictions with ranges have the published figure between p10 and p90.",
                  highlight=False)
    for o in outcomes:
        if o.target.note:
            out.print(f"{o.target.id}: {o.target.note}", style="dim", highlight=False)
    for id, why in (open_figures or {}).items():
        out.print(f"{id}: not predicted: {why}", style="dim", highlight=False)


def three(x):
    """Three significant digits with the thousands marked."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def show_claims(evaluations, contradictions=None, form=None):
    from kernomics.cost import claims

    rows = claims.table(evaluations)
    if form:
        print(write([dict(zip(("id", "claim", "result", "verdict", "decided by"), r)) for r in rows], form))
        return
    out, table = console(), Table(box=None, padding=(0, 1, 0, 0))
    for head in ("id", "claim", "result", "verdict", "decided by"):
        table.add_column(head, no_wrap=head in ("id", "verdict"))
    styles = {"reproduced": "green", "holds only if": "yellow", "contradicted": "red", "not testable": "dim"}
    for id, claim, result, verdict, decided in rows:
        table.add_row(id, claim, result, Text(verdict, style=styles.get(verdict, "")), decided)
    out.print(table)
    if contradictions:
        out.print("\nWhere the sources contradict themselves:", style="bold")
        for c in contradictions:
            out.print(f"{c.id}: {c.first} / {c.second}\n    {c.supports}", highlight=False)


# ---------------------------------------------------------------- files


def write(rows, form):
    """Rows (dicts) as ``json`` or ``csv`` text; nested values are JSON in a CSV cell."""
    if form == "json":
        return json.dumps(rows, indent=1)
    if form != "csv":
        raise CostError(f"format is {form!r}, allowed: json, csv")
    rows = [rows] if isinstance(rows, dict) else rows
    flat = [{k: json.dumps(v) if isinstance(v, dict) else v for k, v in r.items()} for r in rows]
    names = list(dict.fromkeys(k for r in flat for k in r))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().rstrip("\n")


def tree_dict(node):
    """The tree of ``explain`` for JSON."""
    return {k: v for k, v in asdict(node).items() if v not in ("", None, ())}
