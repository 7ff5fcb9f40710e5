"""What the commands of the cost model print, and write as JSON and CSV."""

import csv
import inspect
import io
import json
from dataclasses import asdict
from math import isfinite

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from kernomics.cost import CostError, economics, wrong
from kernomics.cost import compare as answers
from kernomics.cost import tco as costs
from kernomics.cost import vendor as stack
from kernomics.cost.measured import MARKS
from kernomics.cost.report import SIGN, WIDTH, money, seconds_text, si
from kernomics.cost.scenario import ALLOCATED, DAY6, DAY6_NODES
from kernomics.cost.serving import UNCOUNTED

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


def rent_text(chip, dollars, source):
    """How the $/h of a chip that is owned comes about; nothing where it is rented or given."""
    if source in ("given", "rented"):
        return ""
    return f"{chip.key}: owned at ${dollars:.3f} an available hour, by the scenario's [tco]" if source == "owned" else source


def tier_text(a):
    """What the tier of a chip's prefix cache does."""
    s, tier = a.service, a.service.workload.tier
    return (f"{a.chip.key}: a hit is loaded from {tier.name} in {seconds_text(s.load)}; an instance of {s.prefill.plan.chips} "
            f"keeps {s.prefixes:,} of them, at ${money(a.tier_rent)} a chip-hour more" +
            (f"; loading keeps the chips waiting for {100 * s.waits / s.prefill_seconds:.0f} % of prefill" if s.waits else ""))


def money_heads(rows):
    """{column: kind of token}: what is in, cached where there is any, out, and the blend of all."""
    cached = any(a.service and a.service.workload.tokens["cached"] for a in rows)
    return {f"$/Mtok\n{kind}": kind for kind in ("in", *["cached"] * cached, "out", "all")}


def money_cells(a, kinds):
    return [money(a.dollars if kind == "all" else a.mtoken.get(kind)) for kind in kinds.values()]


def answer_dict(a):
    """One answer, SI units and dollars."""
    known = {"chip": a.chip.key, "dollars_per_hour": a.dollars_per_hour,
             "dollars_are": "; ".join(dict.fromkeys(a.rent_sources)) if None not in a.rents else "unknown", "why": a.why}
    if a.chip.mixed:
        known |= dict(zip(("prefill_dollars_per_hour", "decode_dollars_per_hour"), a.rents))
    s = a.service
    if s is None:
        return known
    return {**known, "allocation": a.allocation, "dollars_per_mtoken_in": a.dollars_in,
            "dollars_per_mtoken_cached": a.dollars_cached, "dollars_per_mtoken_out": a.dollars_out,
            "dollars_per_mtoken": a.dollars, "decode_plan": s.decode.plan.text(), "prefill_plan": s.prefill.plan.text(),
            "sequences_per_group": s.decode.b, "tokens_per_s_per_user": s.speed, "tokens_per_s_per_chip": s.tokens_per_s_per_chip,
            "step_s": s.decode.seconds, "mark": s.mark, "prefill_tokens_per_s_per_chip": s.prefill.tokens_per_s_per_chip,
            "first_token_s": s.first, "prefill_share_of_chips": s.prefill_share,
            "joules_per_token_out": a.joules_out, "tokens_per_s_per_mw": a.tokens_per_s_per_mw,
            **a.margins, "share": {k: v for k, v in a.share.items() if v}, **(move_dict(s) if s.move else {}),
            **(tier_dict(a) if s.workload.tier else {}), **(fleet_dict(a.fleet) if a.fleet else {}),
            **(day_dict(a.day) if a.day else {})}


def beside_dict(a, best):
    """How a chip does beside the cheapest one."""
    pair = a.service and best.service and a.beside(best)
    return dict(zip(("performance_over_cheapest", "break_even_performance"), pair)) if pair else {}


def move_dict(s):
    return {"kv_bytes": s.move.bytes, "kv_move_s": s.move.seconds, "kv_source": s.move.source, "kv_stalls_s": sum(s.stalls)}


def tier_dict(a):
    s = a.service
    return {"tier": s.workload.tier.name, "tier_load_s": s.load, "tier_prefixes": s.prefixes,
            "tier_dollars_per_hour": a.tier_rent, "tier_waits_s": s.waits}


def fleet_dict(f):
    return {"requests_per_s": f.requests_per_s, "prefill_chips": f.prefill, "decode_chips": f.decode, "nodes": f.nodes,
            "fleet_dollars_per_hour": f.dollars_per_hour, "fleet_dollars_per_mtoken": f.dollars}


def day_dict(d):
    return {"chips_by_hour": d.chips, "peak_chips": d.peak, "mean_utilisation": d.utilisation,
            "owned_dollars_per_day": d.owned_dollars, "rented_dollars_per_day": d.rented_dollars,
            "break_even_rental": d.break_even}


def show_compare(scenario, rows):
    out, table = console(), Table(box=None, padding=(0, 1, 0, 0))
    first = "" if scenario.first == float("inf") else f", first token within {scenario.first:g} s"
    out.print(f"[bold]{scenario.model}[/], {scenario.tokens_in:,} tokens in ({100 * scenario.hit:.0f} % cached), "
              f"{scenario.tokens_out:,} out, at least {scenario.speed:g} tokens/s a user{first}", highlight=False)
    kinds = money_heads(rows)
    heads = ("chip", "decodes on", "tok/s\nuser", "tok/s\nchip", "first\ntoken", "$/h", *kinds, "J/tok\nout", "the times are")
    for head in heads:
        table.add_column(head, justify="left" if head in ("chip", "decodes on", "the times are") else "right",
                         no_wrap=head not in ("the times are", "decodes on"))
    for a in rows:
        s = a.service
        if s is None:
            continue
        table.add_row(a.chip.key, s.decode.plan.text(), f"{s.speed:.0f}", si(s.tokens_per_s_per_chip), seconds_text(s.first),
                      "+".join(map(money, dict.fromkeys(a.rents))), *money_cells(a, kinds), money(a.joules_out), shares(a.share))
    out.print(table)
    out.print(ALLOCATED[scenario.named_allocation], style="dim", highlight=False)
    for a in (a for a in rows if a.margins):
        out.print(f"{a.chip.key}: gross margin {100 * a.margins['gross_margin']:.1f} %, margin over cost "
                  f"{100 * a.margins['margin_over_cost']:.1f} %, at what tokens sell for", style="dim", highlight=False)
    for a in (a for a in rows if a.service and scenario.tier):
        out.print(tier_text(a), style="dim", highlight=False, markup=False)
    moved = [(a.chip.key, a.service) for a in rows if a.service and a.service.move]
    for key, s in moved:
        if any(s.stalls):
            out.print(f"{key}: the links between the pools set the pace: {s.move.source}", style="dim", highlight=False,
                      markup=False)
    loose = [key for key, s in moved if s.move.source == UNCOUNTED]
    if loose:
        out.print(f"Scale-out links unknown, so moving the KV cache between the pools is not counted: {', '.join(loose)}",
                  style="dim", highlight=False)
    if scenario.load:
        show_fleets(scenario, rows)
    if scenario.day is not None:
        show_days(scenario, rows)
    for a in rows:
        if a.why:
            out.print(f"{a.chip.key}: {a.why}", style="red", highlight=False, markup=False)
    for line in dict.fromkeys(rent_text(c, *known) for a in rows for c, *known in zip(a.chip.pools, a.rents, a.rent_sources)):
        if line:
            out.print(line, style="dim", highlight=False, markup=False)
    unpriced = [c.key for a in rows if a.service for c, rent in zip(a.chip.pools, a.rents) if rent is None]
    unpriced = list(dict.fromkeys(unpriced))
    best = next((a for a in rows if a.dollars is not None), None)
    if best:
        out.print(f"\nCheapest: [bold]{best.chip.key}[/] at ${money(best.dollars_in)} per million tokens in and "
                  f"${money(best.dollars_out)} out. Follow it down with `kernomics explain --chip {best.chip.key}` "
                  "and the same options.",
                  highlight=False)
        pairs = [(a.chip.key, a.beside(best)) for a in rows if a is not best]
        if any(pair for _, pair in pairs):
            out.print(f"Requests/s of a chip over {best.chip.key}'s, and from which ratio it is the cheaper one: " + ", ".join(
                f"{key} {pair[0]:.2f} ({pair[1]:.2f})" for key, pair in pairs if pair), style="dim", highlight=False)
    if unpriced:
        out.print(f"$/h unknown: {', '.join(unpriced)}; give it with --dollars-per-hour {unpriced[0]}=...", style="dim",
                  highlight=False)
    weak = [a.chip.key for a in rows if a.service and a.bound]
    if weak:
        out.print(f"Mostly bounds, so that the chip will be slower: {', '.join(weak)}. One with measurements looks worse "
                  "beside it.", style="dim", highlight=False)
    out.print(LEGEND, style="dim", highlight=False)


def show_fleets(scenario, rows):
    """Chips for the scenario's load, whole instances."""
    out, table = console(), Table(box=None, padding=(0, 2, 0, 0))
    out.print(f"\nA fleet for {scenario.load}, each chip busy {100 * scenario.utilisation:.0f} % of the time", highlight=False)
    for head in ("chip", "prefill on", "chips", "decode on", "chips", "all", "nodes", "$/h", "$/Mtok all"):
        table.add_column(head, justify="left" if head in ("chip", "prefill on", "decode on") else "right", no_wrap=True)
    for a in (a for a in rows if a.service):
        f, s = a.fleet, a.service
        table.add_row(a.chip.key, s.prefill.plan.text() if f.prefill else "the same", f"{f.prefill:,}", s.decode.plan.text(),
                      f"{f.decode:,}", f"{f.chips:,}", "?" if f.nodes is None else f"{f.nodes:,}", money(f.dollars_per_hour),
                      money(f.dollars))
    out.print(table)
    out.print("Whole instances of the plans above; a node is a scale-up domain.", style="dim", highlight=False)


def show_days(scenario, rows):
    """Fleets by the hour, and what a day costs owned and rented."""
    rows = [a for a in rows if a.day]
    out, hours, table = console(), Table(box=None, padding=(0, 2, 0, 0)), Table(box=None, padding=(0, 2, 0, 0))
    out.print(f"\nA day with a mean of {scenario.load}, chips by the hour", highlight=False)
    for head in ("hour", "load", *(a.chip.key for a in rows)):
        hours.add_column(head, justify="right", no_wrap=True)
    for h, load in enumerate(scenario.profile):
        hours.add_row(str(h), f"{100 * load:.0f} %", *(f"{a.day.chips[h]:,}" for a in rows))
    out.print(hours)
    for head in ("chip", "peak chips", "used", "owned $/day", "rented $/day", "even at"):
        table.add_column(head, justify="left" if head == "chip" else "right", no_wrap=True)
    for a in rows:
        d = a.day
        table.add_row(a.chip.key, f"{d.peak:,}", f"{100 * d.utilisation:.1f} %", money(d.owned_dollars), money(d.rented_dollars),
                      "-" if d.break_even is None else f"{d.break_even:.2f} x $/h")
    out.print(table)
    shape = ""
    if scenario.day == DAY6:
        mean, peak = DAY6_NODES
        shape = f" {DAY6}: mean {mean:g} and peak {peak:g} nodes are published, the hours between are a cosine, hour 0 the peak."
    out.print("Owned: the peak of each pool, paid all day at $/h above. Rented: the chips of each hour at the hourly rental "
              f"(given, or that of chips.toml); both cost the same at the rental in the last column.{shape}", style="dim",
              highlight=False)


def stream_dict(x):
    return {"chips_at_least": x.fewest, "plan_alone": x.point.plan.text(), "tokens_per_s_alone": x.point.tokens_per_s_per_user,
            "dollars_per_mtoken_alone": x.dollars, "communication_counted": not x.uncounted}


def show_streams(streams):
    """What SRAM-only machines are bought for: one user's speed, and its price."""
    out, table = console(), Table(box=None, padding=(0, 2, 0, 0))
    out.print("\nOne user alone, on the plan that serves him fastest", highlight=False)
    for head in ("chip", "chips that hold\nmodel and user", "fastest plan", "tok/s\nalone", "$/Mtok out\nalone"):
        table.add_column(head, justify="left" if head in ("chip", "fastest plan") else "right", no_wrap=True)
    for x in streams:
        table.add_row(x.chip.key, f"{x.fewest:,}", x.point.plan.text(), si(x.point.tokens_per_s_per_user), money(x.dollars))
    out.print(table)
    loose = [x.chip.key for x in streams if x.uncounted]
    if loose:
        out.print(f"Links unknown, so communication is not counted: {', '.join(loose)}. Stages are taken as equal.", style="dim",
                  highlight=False)


# ---------------------------------------------------------------- sweep


def lengths(text):
    """[tokens] of a list as ``1k,4k,16k``."""
    found = []
    for part in text.split(","):
        number, k = part.strip().removesuffix("k"), part.strip().endswith("k")
        if not number.isdecimal() or not int(number):
            raise wrong("context", text, "integers of at least 1, k for 1024, as 1k,4k,16k")
        found.append(int(number) * (1024 if k else 1))
    return found


def show_sweep(scenario, chip, found):
    out, table = console(), Table(box=None, padding=(0, 1, 0, 0))
    out.print(f"[bold]{scenario.model}[/] on [bold]{chip.key}[/], {scenario.tokens_out:,} tokens out, at least "
              f"{scenario.speed:g} tokens/s a user", highlight=False)
    kinds = money_heads([a for _, a in found])
    for head in ("tokens\nin", "tok/s\nuser", "tok/s\nchip", "first\ntoken", *kinds, "users", "users\nat most", "decodes on",
                 "times"):
        table.add_column(head, justify="left" if head in ("decodes on", "times") else "right",
                         no_wrap=head not in ("decodes on", "times"))
    for tokens, a in found:
        s = a.service
        if s:
            table.add_row(f"{tokens:,}", f"{s.speed:.0f}", si(s.tokens_per_s_per_chip), seconds_text(s.first),
                          *money_cells(a, kinds), f"{s.decode.users:,}", f"{s.most_users:,}",
                          s.decode.plan.text(), shares(a.share))
    out.print(table)
    for tokens, a in found:
        if a.why:
            out.print(f"{tokens:,}: {a.why}", style="red", highlight=False, markup=False)
    out.print(f"{ALLOCATED[scenario.named_allocation]} Users of one instance; at most: what its memory holds.", style="dim",
              highlight=False)


# ---------------------------------------------------------------- pareto


def show_pareto(scenario, chip, rows):
    out, table = console(), Table(box=None, padding=(0, 1, 0, 0))
    if rows[0].why:
        out.print(f"{chip.key}: {rows[0].why}", style="red", highlight=False, markup=False)
        return
    where = "pools of their own" if scenario.disaggregated else "the same chips"
    out.print(f"[bold]{scenario.model}[/] on [bold]{chip.key}[/], {scenario.tokens_in:,} tokens in ({100 * scenario.hit:.0f} % "
              f"cached), {scenario.tokens_out:,} out, prefill and decode on {where}: no plan beats these in both speeds",
              highlight=False)
    kinds = money_heads(rows)
    for head in ("tok/s\nuser", "tok/s\nchip", "step", *kinds, "users", "decodes on", "times"):
        table.add_column(head, justify="left" if head in ("decodes on", "times") else "right",
                         no_wrap=head != "decodes on")
    top = max(a.service.tokens_per_s_per_chip for a in rows)
    table.add_column("tok/s/chip", no_wrap=True)
    for a in rows:
        s, p = a.service, a.service.decode
        bar = Text("█" * max(1, round(10 * s.tokens_per_s_per_chip / top)), style="cyan")
        table.add_row(f"{s.speed:.1f}", si(s.tokens_per_s_per_chip), seconds_text(p.seconds), *money_cells(a, kinds),
                      f"{p.users:,}", p.plan.text(), mark_text(s.mark), bar)
    out.print(table)
    out.print(ALLOCATED[scenario.named_allocation], style="dim", highlight=False)


# ---------------------------------------------------------------- explain


def show_explain(answer, least=0.01):
    """The tree; operators below ``least`` of the whole are summed up."""
    root = answers.explain(answer)
    out = console()

    def label(node, whole):
        dollars = "" if node.dollars is None else f"  ${money(node.dollars)}/Mtok"
        text = Text(f"{100 * node.seconds / whole:5.1f}%  {seconds_text(node.seconds) if node.seconds else '0s':>7}{dollars}  ")
        text.append(node.name, style="bold" if node.children else "")
        if node.note:
            text.append(f"  {node.note}", style="dim")
        if node.mark and not node.children:
            text.append("  ").append_text(mark_text(node.mark)).append(f"  {node.source}" if node.source else "", style="dim")
        return text

    def grow(tree, node):
        small = 0.0
        for child in sorted(node.children, key=lambda n: -n.seconds):
            if child.seconds < least * root.seconds and not any(c.children for c in node.children):
                small += child.seconds
            else:
                grow(tree.add(label(child, root.seconds)), child)
        if small:
            tree.add(Text(f"{100 * small / root.seconds:5.1f}%  {seconds_text(small):>7}  the rest", style="dim"))

    tree = Tree(label(root, root.seconds))
    grow(tree, root)
    out.print(tree)
    s = answer.service
    first = [("hit loaded", s.load), ("prefill", s.first - s.load - (s.move.seconds if s.move else 0.0)),
             ("KV cache moved", s.move.seconds if s.move else 0.0)]
    out.print(f"First token after {seconds_text(s.first)}: " + ", ".join(f"{n} {seconds_text(x)}" for n, x in first if x),
              highlight=False)
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


def numbers(entries, option="set", allowed="field=number"):
    """{name: number} of an option's ``name=number`` texts."""
    found = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            raise wrong(option, entry, allowed) from None
    return found


def show_vendor(name, vendor, form=None):
    rows = stack.steps(vendor)
    if form:
        print(write([{"part": n, "dollars": v, "dollars_so_far": total} for n, v, total in rows], form))
        return
    out, table = console(), Table(box=None, padding=(0, 2, 0, 0))
    out.print(f"[bold]{name}[/], $ of one package", highlight=False)
    for head in ("part", "$", "sum", "of the price"):
        table.add_column(head, justify="left" if head == "part" else "right", no_wrap=True)
    table.add_column("")
    price = stack.end_price(vendor)
    for n, v, total in rows:
        margin = vendor.margins.get(n)
        label = f"{n}, {100 * margin:g} % margin" if margin is not None else n.replace("hbm_margin", "margin on HBM")
        if v or margin is not None:
            table.add_row(label, f"{v:,.2f}", f"{total:,.2f}", f"{100 * v / price:.1f} %",
                          Text("█" * round(40 * v / price), style="cyan"))
        if n == stack.PARTS[-1]:
            table.add_row(Text("cost to build", style="bold"), "", Text(f"{total:,.2f}", style="bold"))
    table.add_row(Text("end price", style="bold"), "", Text(f"{price:,.2f}", style="bold"))
    out.print(table)
    good = economics.die_yield(vendor.die_mm2, vendor.defects_per_cm2, vendor.yield_model, vendor.alpha)
    dies, built = economics.dies_per_wafer(vendor.die_mm2, vendor.wafer_mm), stack.cost(vendor)
    out.print(f"{dies:.1f} dies a wafer, {100 * good:.1f} % of them good: ${vendor.wafer_dollars / dies / good:,.2f} a good die",
              style="dim", highlight=False)
    out.print(f"all sellers together: gross margin {100 * economics.gross_margin(price, built):.1f} %, margin over cost "
              f"{100 * economics.margin_over_cost(price, built):.1f} %", style="dim", highlight=False)


def show_tco(name, tco, form=None, rental=None):
    parts = costs.price_breakdown(tco)
    if form:
        rows = [{"part": n, "dollars_per_hour": v} for n, v in parts.items()]
        print(write({"parts": rows, "rental": rental} if rental and form == "json" else [rental] if rental else rows, form))
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
    if rental:
        rate = "no rate of return" if rental["irr"] is None else f"{100 * rental['irr']:.1f} % a year on the money"
        years = rental["payback_years"]
        back = "never paid back" if years == float("inf") else f"paid back in {years:.1f} years"
        out.print(f"rented out at {rental['rent_dollars_per_hour']:g} $/h: {rental['dollars_per_year']:,.0f} $ of profit "
                  f"in a year at this rent, {rate}, {back}", highlight=False)
        out.print("$ of each year: " + ", ".join(f"{x:,.0f}" for x in rental["flows"]), style="dim", highlight=False)
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
        t, short = o.target, len(o.why) <= 40  # longer ones below the table
        error = "" if o.error is None or t.kind == "limit" else f"{100 * o.error:+.1f}%"
        spread = "" if o.low is None else f"{three(o.low)}..{three(o.high)}"
        style = {"M": "red", "E": "red", "o": "yellow", "n": "dim"}.get(o.verdict[0], "green")
        at_most = "<= " if t.kind == "limit" else ""
        table.add_row(t.id, t.what, "-" if o.predicted is None else at_most + three(o.predicted), spread,
                      f"{three(t.published)} {t.unit}", error, Text(short and o.why or o.verdict, style=style))
    out.print(table)
    inside = [o.inside for o in outcomes if o.inside is not None]
    if inside:
        out.print(f"{sum(inside)} of {len(inside)} predictions with ranges have the published figure between p10 and p90.",
                  highlight=False)
    for o in outcomes:
        if len(o.why) > 40:
            out.print(f"{o.target.id}: {o.why}", style="red", highlight=False, markup=False)
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
        both = [{"id": c.id, "claim": f"{c.first} / {c.second}", "result": c.supports, "verdict": "the source contradicts itself",
                 "file": c.file} for c in contradictions or ()]
        print(write([dict(zip(("id", "claim", "result", "verdict", "decided by"), r)) | claim_dict(e)
                     for r, e in zip(rows, evaluations)] + both, form))
        return
    out, table = console(), Table(box=None, padding=(0, 1, 0, 0))
    for head in ("id", "claim", "result", "verdict", "decided by"):
        table.add_column(head, no_wrap=head in ("id", "verdict"))
    styles = {"reproduced": "green", "holds only if": "yellow", "contradicted": "red", "not testable": "dim"}
    for id, claim, result, verdict, decided in rows:
        table.add_row(id, claim, result, Text(verdict, style=styles.get(verdict, "")), decided)
    out.print(table)
    if len(evaluations) == 1:
        show_claim(out, evaluations[0])
    if contradictions:
        out.print("\nWhere the sources contradict themselves:", style="bold")
        for c in contradictions:
            out.print(f"{c.id}: {c.first} / {c.second} ({c.file})\n    {c.supports}", highlight=False)


def claim_dict(e):
    """What a claim's verdict stands on: its file, the number, and every input with its origin."""
    return {"file": e.claim.file, "value": e.result.value, "unit": e.result.unit, "note": e.result.words,
            "inputs": {name: {"value": e.values[name], "origin": x.origin} for name, x in e.claim.inputs.items()}}


def show_claim(out, e):
    """What one claim's verdict stands on, with the formula as it runs."""
    lines = [f"\nfrom {e.claim.file}" + (f": {e.result.words}" if e.claim.check and e.result.words else "")]
    lines += [f"{name} = {e.values[name]:.6g}  ({x.origin})" for name, x in e.claim.inputs.items()]
    out.print("\n".join(lines), highlight=False, markup=False)
    if e.claim.check:
        out.print("\n" + inspect.getsource(e.claim.check).rstrip(), style="dim", highlight=False, markup=False)


# ---------------------------------------------------------------- files


def write(rows, form):
    """Rows (dicts) as ``json`` or ``csv`` text; nested values are JSON in a CSV cell."""
    if form == "json":
        return json.dumps(_finite(rows), indent=1)
    if form != "csv":
        raise CostError(f"format is {form!r}, allowed: json, csv")
    rows = [rows] if isinstance(rows, dict) else rows
    flat = [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in r.items()} for r in rows]
    names = list(dict.fromkeys(k for r in flat for k in r))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().rstrip("\n")


def _finite(x):
    """x with null in place of infinities, which JSON does not know."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not isfinite(x) else x


def tree_dict(node):
    """The tree of ``explain`` for JSON."""
    return {k: v for k, v in asdict(node).items() if v not in ("", None, ())}


def tree_rows(node, above=""):
    """The tree of ``explain`` for CSV: each node after what it is part of, which ``part_of`` names."""
    path = f"{above} / {node.name}" if above else node.name
    yield {"part_of": above, **{k: v for k, v in vars(node).items() if k != "children"}}
    for child in node.children:
        yield from tree_rows(child, path)
