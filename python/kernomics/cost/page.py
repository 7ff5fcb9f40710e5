"""``kernomics report``: one self-contained HTML page of a scenario's answers, figures drawn by plotly."""

import html

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from kernomics.cost import CostError, uncertainty, wrong
from kernomics.cost import compare as answers
from kernomics.cost.console import LEGEND
from kernomics.cost.measured import BOUND, DERATED, IMPORTED, INTERPOLATED, MEASURED, TRANSFERRED
from kernomics.cost.report import money, seconds_text, si

INK, GREY, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = ("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#a68a00", "#495057", "#1098ad", "#5c940d", "#a0522d")
MARK_COLORS = {MEASURED: "#2b8a3e", INTERPOLATED: "#94b447", IMPORTED: "#1098ad", TRANSFERRED: "#862e9c", DERATED: "#4263eb",
               BOUND: "#b0b9c3"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1080px; margin: 2em auto; padding: 0 1.2em }
h1 { font-size: 1.6em; margin-bottom: 0 } h2 { font-size: 1.15em; margin: 2.2em 0 .3em } p { max-width: 46em; margin: .4em 0 }
.dim { color: #7b8794 } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .92em; margin: .6em 0; font-variant-numeric: tabular-nums }
th { text-align: right; font-weight: 600; border-bottom: 2px solid #1f2933; padding: .25em .7em; vertical-align: bottom }
td { text-align: right; border-bottom: 1px solid #e4e7eb; padding: .22em .7em; white-space: nowrap }
th:first-child, td:first-child, td.text, th.text { text-align: left } td.text { white-space: normal }
a { color: #0b6e99 }
"""


def page(scenario, sources, chips):
    """The page's text: answers, Pareto fronts, costs by part, times by operator, rooflines, chips, and what is uncertain."""
    rows = answers.compare(scenario, sources, chips)
    served = [a for a in rows if a.service]
    if not served:
        raise CostError("; ".join(a.why for a in rows))
    model, chips = scenario.load_model(), list({c.key: c for chip in chips for c in chip.pools}.values())
    parts = [_head(scenario, model, served[0]), _section("Chips side by side", _answers(rows), _why(rows)),
             _section("Throughput against the speed of a user", _figure(_fronts(scenario, sources, served)),
                      "Decode points that no other plan or batch beats in both. Right and up is better; every point is a plan. "
                      "Hover for it."),
             _section(f"Where the money goes: {served[0].chip.key}", _figure(_waterfall(served[0])),
                      "Chip time of a request by layer, at the $/h of the chip."),
             _section("Where the time goes", _figure(_times(served)),
                      "Chip-seconds of a request by operator; the colour says how the time is known."),
             _section("Rooflines", _figure(_rooflines(sources, served, chips)),
                      "Lines: FP8 peak and memory bandwidth of each chip. Diamonds: the model's products on the cheapest "
                      "one. Dots: calls measured here.")]
    if scenario.uncertain:
        parts.append(_section(f"What the price of {served[0].chip.key} hangs on",
                              _figure(_tornado(scenario, sources, served[0])), "Each input alone from its p10 to its p90."))
    parts.append(_section("The chips' figures", _chips(chips), "Status and source of each figure: hover."))
    parts.append(f'<p class="dim">{html.escape(LEGEND)}</p>')
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>kernomics: {html.escape(scenario.model)}</title>'
            f"<style>{STYLE}</style><script>{get_plotlyjs()}</script><body>{''.join(parts)}</body></html>\n")


def _head(scenario, model, best):
    bound = " Its times are mostly roofline bounds: it will be dearer." if best.bound else ""
    price = "no price known" if best.dollars is None else (f"${money(best.dollars_in)} per million tokens in, "
                                                           f"${money(best.dollars_out)} out")
    return (f"<h1>{html.escape(scenario.model)}</h1><p class=dim>{html.escape(model.text())}; {scenario.tokens_in:,} tokens in, "
            f"{scenario.tokens_out:,} out, at least {scenario.speed:g} tokens/s a user</p>"
            f"<p>Cheapest: <b>{html.escape(best.chip.key)}</b>, {price}, at {best.service.speed:.0f} tokens/s a user.{bound}</p>")


def _section(title, body, note=""):
    return f"<h2>{html.escape(title)}</h2><p class=dim>{note}</p><div class=wide>{body}</div>"


def _figure(figure):
    """As HTML; the library comes once, in the head."""
    figure.update_layout(template="simple_white", font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
                         margin={"l": 10, "r": 10, "t": 30, "b": 10}, width=1040, height=figure.layout.height or 440,
                         legend={"orientation": "h", "y": -0.18})
    figure.update_xaxes(automargin=True, gridcolor=GRID, showgrid=True)
    figure.update_yaxes(automargin=True, gridcolor=GRID, showgrid=True)
    return to_html(figure, full_html=False, include_plotlyjs=False, config={"displaylogo": False})


def _table(heads, rows, text=()):
    def cells(tag, values):
        return "".join(f"<{tag}{' class=text' if i in text else ''}>{v}</{tag}>" for i, v in enumerate(values))

    body = "".join(f"<tr>{cells('td', r)}</tr>" for r in rows)
    return f"<table><tr>{cells('th', heads)}</tr>{body}</table>"


def _answers(rows):
    heads = ("chip", "decodes on", "prefills on", "tok/s<br>a user", "tok/s<br>a chip", "first<br>token", "$/h", "$/Mtok<br>in",
             "$/Mtok<br>out", "$/Mtok<br>all", "J/token<br>out", "times")
    lines = []
    for a in (r for r in rows if r.service):
        s = a.service
        share = ", ".join(f"{100 * v:.0f}\u00a0% {m}" for m, v in a.share.items() if v >= 0.005)
        lines.append((html.escape(a.chip.name), s.decode.plan.text(), s.prefill.plan.text(), f"{s.speed:.0f}",
                      si(s.decode.tokens_per_s_per_chip), seconds_text(s.first), money(a.dollars_per_hour), money(a.dollars_in),
                      money(a.dollars_out), money(a.dollars), money(a.joules_out), share))
    return _table(heads, lines, text=(1, 2, 11))


def _why(rows):
    return "<br>".join(html.escape(f"{a.chip.key}: {a.why}") for a in rows if a.why)


def _fronts(scenario, sources, served):
    figure = go.Figure()
    for i, a in enumerate(served):
        found = answers.pareto(scenario, sources, a.chip)
        points = [x.service for x in found]
        words = [f"{s.decode.plan.text()}<br>{s.decode.b} sequences a group<br>step {seconds_text(s.decode.seconds)}<br>"
                 f"${money(x.dollars_out)}/Mtok out, {money(x.dollars)} of all<br>{s.mark}" for x, s in zip(found, points)]
        dash = "dot" if all(x.bound for x in found) else "solid"
        color = COLORS[i % len(COLORS)]
        figure.add_scatter(x=[p.tokens_per_s_per_user for p in points], y=[p.tokens_per_s_per_chip for p in points],
                           mode="lines+markers", name=a.chip.key + (" (bound)" if dash == "dot" else ""), hovertext=words,
                           hoverinfo="text+x+y", line={"color": color, "dash": dash}, marker={"size": 6})
    if scenario.speed:
        heights = [y for trace in figure.data for y in trace.y]
        figure.add_scatter(x=[scenario.speed] * 2, y=[min(heights), max(heights)], mode="lines", name="asked for",
                           line={"color": GREY, "dash": "dash"}, hoverinfo="skip")
    ticks = [m * 10**e for e in range(5) for m in (1, 2, 5)]  # plotly would write 20 as 2
    figure.update_xaxes(type="log", title="tokens/s a user", tickvals=ticks, ticktext=[f"{t:,}" for t in ticks])
    figure.update_yaxes(type="log", title="tokens/s a chip", dtick=1)
    return figure


def _waterfall(answer):
    root = answers.explain(answer)
    names, values, measure = [], [], []
    priced = None not in answer.rents
    for phase, rent in zip(root.children, answer.rents):
        unit = 1e3 / 3600 * rent / answer.utilisation if priced else 1.0  # $ per thousand requests
        label = phase.name.split(",")[0]
        for layer in (x for x in phase.children if x.seconds):
            names.append(f"{label}<br>{layer.name}")
            values.append(layer.seconds * unit)
            measure.append("relative")
    names.append("a request")
    values.append(0)
    measure.append("total")
    figure = go.Figure(go.Waterfall(x=names, y=values, measure=measure, connector={"line": {"color": GRID}},
                                    increasing={"marker": {"color": COLORS[0]}}, totals={"marker": {"color": INK}},
                                    text=[*map(money, values[:-1]), ""], textposition="outside"))
    figure.update_yaxes(title="$ per thousand requests" if priced else "chip-seconds a request")
    return figure


def _times(served):
    figure, shown = go.Figure(), set()
    for a in reversed(served):
        leaves = [x for phase in answers.explain(a).children for layer in phase.children for x in layer.children]
        total, rest = sum(x.seconds for x in leaves), {}
        merged = {}
        for x in leaves:
            key = (x.name, x.mark)
            merged[key] = merged.get(key, 0.0) + x.seconds
        for (name, mark), seconds in sorted(merged.items(), key=lambda kv: -kv[1]):
            if seconds < 0.03 * total:
                rest[mark] = rest.get(mark, 0.0) + seconds
                continue
            _bar(figure, a.chip.key, name, mark, seconds, shown)
        for mark, seconds in rest.items():
            _bar(figure, a.chip.key, "rest", mark, seconds, shown)
    figure.update_layout(barmode="stack", height=160 + 64 * len(served))
    figure.update_xaxes(title="chip-seconds a request")
    return figure


def _bar(figure, chip, name, mark, seconds, shown):
    figure.add_bar(y=[chip], x=[seconds], orientation="h", name=mark, legendgroup=mark, showlegend=mark not in shown,
                   marker={"color": MARK_COLORS[mark], "line": {"color": "white", "width": 1}}, text=name, textangle=0,
                   insidetextanchor="middle", hovertext=f"{name}: {seconds_text(seconds)}, {mark}", hoverinfo="text")
    shown.add(mark)


def _rooflines(sources, served, chips):
    figure, order = go.Figure(), [a.chip.key for a in served]  # a chip has the colour of its front
    chips = sorted(chips, key=lambda c: order.index(c.key) if c.key in order else len(order))
    for i, chip in enumerate(chips):
        peak, bandwidth = chip.get("flops_fp8"), chip.get("bytes_per_s")
        if peak and bandwidth:
            x = [0.3, peak / bandwidth, 1e5]
            figure.add_scatter(x=x, y=[min(peak, bandwidth * v) for v in x], mode="lines", name=chip.key,
                               line={"color": COLORS[i % len(COLORS)]})
        records = [r for r in sources.measured.of(chip.key) if r.get("flops") and r.get("bytes")]
        if records:
            figure.add_scatter(x=[r["flops"] / r["bytes"] for r in records],
                               y=[r["flops"] / r["seconds_median"] for r in records], mode="markers",
                               name=f"{chip.key}, measured", marker={"size": 7, "color": COLORS[i % len(COLORS)]},
                               hovertext=[f"{r['op']} {r['dims']}" for r in records], hoverinfo="text+x+y")
    best = served[0]
    steps = (("decode", best.service.decode), ("prefill", best.service.prefill))
    for phase, point in steps:
        model_rows = best.service.decode_rows() if phase == "decode" else best.service.prefill_rows()
        times = {(p.layer, p.name): p.seconds for p in point.step.parts}
        kept = [r for r in model_rows if r.dtype and (r.layer, r.name) in times]
        figure.add_scatter(x=[r.work.flops / r.work.bytes for r in kept],
                           y=[r.work.flops / times[r.layer, r.name] for r in kept], mode="markers",
                           name=f"{best.chip.key}, {phase}", hovertext=[r.name for r in kept], hoverinfo="text+x+y",
                           marker={"size": 9, "symbol": "diamond" if phase == "decode" else "diamond-open", "color": INK})
    figure.update_xaxes(type="log", title="FLOP per byte of memory traffic", dtick=1)
    figure.update_yaxes(type="log", title="FLOP/s", dtick=1)
    return figure


def _tornado(scenario, sources, answer):
    inputs, price = answers.inputs_of(scenario, answer), answers.held(scenario, sources, answer)
    bars, middle = uncertainty.tornado(price, inputs), price(**{n: i.median for n, i in inputs.items()})
    figure = go.Figure()
    names = [b[0] for b in reversed(bars)]
    for label, at, color in (("input at its p10", 1, COLORS[0]), ("input at its p90", 2, COLORS[1])):
        figure.add_bar(y=names, x=[b[at] - middle for b in reversed(bars)], base=middle, orientation="h", name=label,
                       marker={"color": color})
    figure.add_vline(x=middle, line={"color": INK})
    figure.update_layout(barmode="overlay", height=140 + 34 * len(bars))
    figure.update_xaxes(title="$/Mtok of all tokens")
    return figure


FIGURES = (("flops_bf16", "bf16", "FLOP/s"), ("flops_fp8", "FP8", "FLOP/s"), ("bytes_per_s", "memory", "B/s"),
           ("memory_bytes", "capacity", "B"), ("scale_up_bytes_per_s", "scale-up", "B/s"), ("scale_up_domain", "domain", ""),
           ("scale_out_bytes_per_s", "scale-out", "B/s"), ("tdp_watts", "TDP", "W"), ("dollars_per_hour", "$/h", ""))


def _chips(chips):
    rows = []
    for c in chips:
        cells = [html.escape(c.name)]
        for name, _, unit in FIGURES:
            figure = c.figures.get(name)
            if figure is None or figure.value is None:
                cells.append("<span class=dim>unknown</span>")
                continue
            words = html.escape(f"{figure.status}; {figure.source}; {figure.date}" + (f"; {figure.note}" if figure.note else ""))
            value = f"{figure.value:g}" if not unit else si(figure.value, unit)
            cells.append(f'<span title="{words}">{value}</span>')
        rows.append(cells)
    return _table(["chip", *(f"{label}" for _, label, _ in FIGURES)], rows)


def write(path, text):
    """The path; a CostError where nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise wrong("out", str(path), f"a file that can be written ({error.strerror})") from None
    return path

