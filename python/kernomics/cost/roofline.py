"""The roofline plot: this machine's measured calls under its ceilings, and a model's operators under the chips'."""

import numpy as np

from kernomics.cost import CostError

INK, GREY, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = ("#0b6e99", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#a68a00", "#495057", "#1098ad", "#5c940d", "#a0522d",
          "#4263eb", "#e64980", "#12b886", "#343a40")
LEGEND = {"loc": "upper left", "bbox_to_anchor": (0, -0.11), "ncols": 4, "frameon": False, "fontsize": 8.5, "borderaxespad": 0,
          "alignment": "left", "columnspacing": 1.2, "handletextpad": 0.3}
MARKERS = "osD^vP<>Xphd*8"


def plot(path, chips, measured, steps):
    """Write the PNG and return its path; left out is whatever has neither measurements nor known figures."""
    try:
        import matplotlib
    except ImportError:
        raise CostError("the plot needs matplotlib: pip install 'kernomics[report]', or pass --plot ''") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    machine = next((c for c in chips if c.key.startswith("cpu-")), None)
    points = _points(measured.of(machine.key)) if machine else {}
    used = {row.op for rows in steps.values() for row in rows}
    known = [c for c in chips if c is not machine and all(map(c.get, ("bytes_per_s", "flops_fp8", "flops_bf16")))]
    panels = [(_machine_panel, machine, points, used)] * bool(points) + [(_chips_panel, known, steps)] * bool(known)
    if not panels:
        raise CostError("nothing to plot: no measurements, and no chip with known figures")
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.edgecolor": GREY, "axes.labelcolor": INK,
                         "xtick.color": GREY, "ytick.color": GREY, "axes.titlelocation": "left", "axes.titlesize": 11,
                         "axes.titleweight": "bold", "axes.titlepad": 10}):
        figure, axes = plt.subplots(1, len(panels), figsize=(8.2 * len(panels), 6.8), squeeze=False, dpi=150)
        for ax, (draw, *what) in zip(axes[0], panels, strict=True):
            _frame(ax)
            draw(ax, *what)
        figure.tight_layout(w_pad=3)
        for ax in axes[0]:
            _place_labels(figure, ax)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)
    return path


def _points(records):
    """op -> [(FLOP/byte, FLOP/s, label)], the fastest record of each call of a forward op that computes something."""
    best = {}
    for r in records:
        if r.get("flops") and r.get("bytes") and not r["op"].endswith("_backward"):
            key = r["op"], _label(r)
            speed = r["flops"] / r["seconds_median"]
            if speed > best.get(key, (0, 0))[1]:
                best[key] = (r["flops"] / r["bytes"], speed)
    points = {}
    for (op, label), (x, y) in sorted(best.items()):
        points.setdefault(op, []).append((x, y, label))
    return points


def _label(record):
    d = record["dims"]
    if {"m", "n", "k"} <= set(d):
        return f"{d['m']}x{d['n']}x{d['k']}"
    names = [n for n in ("b", "q", "t", "m", "s", "k", "e") if n in d and not (n == "q" and d[n] == 1)]
    return " ".join(f"{n}={d[n]}" for n in names)


def _frame(ax):
    ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP per byte of memory traffic", ylabel="FLOP/s")
    ax.grid(True, which="major", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.yaxis.set_major_formatter(_prefixed)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.minorticks_off()


def _prefixed(y, _):
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if y >= size:
            return f"{y / size:.3g} {prefix}"
    return f"{y:g}"


def _machine_panel(ax, machine, points, used):
    """Every measured call; those of the model's own ops are labelled."""
    peak, bandwidth = machine.get("flops_bf16"), machine.get("bytes_per_s")
    at, speed = (np.array([p[i] for ps in points.values() for p in ps]) for i in (0, 1))
    left, right = at.min() / 3, max(at.max() * 4, 4 * (peak or 1) / (bandwidth or 1))
    if peak and bandwidth:
        x = np.array([left, peak / bandwidth, right])
        ax.plot(x, np.minimum(peak, bandwidth * x), color=INK, linewidth=1.8, zorder=2)
        ax.fill_between(x, np.minimum(peak, bandwidth * x), peak * 1e3, color=GRID, alpha=0.45, zorder=0, linewidth=0)
        ax.text(right, peak * 1.12, f"{peak / 1e9:.0f} GFLOP/s FMA peak  ", ha="right", va="bottom", fontsize=9)
        text = ax.annotate(f"{bandwidth / 1e9:.1f} GB/s read", (left * 1.5, bandwidth * left * 1.5), xytext=(-5, 5), fontsize=9,
                           textcoords="offset points", rotation_mode="anchor")
        ax.along = text, x[:2], bandwidth * x[:2]
    for number, (op, ps) in enumerate(sorted(points.items())):
        xs, ys, _ = zip(*ps, strict=True)
        ax.scatter(xs, ys, s=42, edgecolor="white", linewidth=0.8, zorder=3, label=op, **_style(number))
    ax.set(xlim=(left, right), ylim=(speed.min() / 2, max(speed.max(), peak or 0) * 2.5))
    ax.set_title(f"Measured: {machine.key}")
    ax.legend(**LEGEND)
    ax.labels = [(*p, _style(number)["color"]) for number, op in enumerate(sorted(points)) for p in points[op] if op in used]


def _style(number):
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[(number + number // len(COLORS)) % len(MARKERS)]}


def _chips_panel(ax, chips, steps):
    """FP8 rooflines of the chips; on that of the first, the model's products at the bound of their own dtype."""
    first, names, spots = chips[0], {}, []
    for phase, rows in steps.items():
        for row in (r for r in rows if r.dtype and r.layer != "dense"):
            x = row.work.flops / row.work.bytes
            y = min(first.get(f"flops_{row.dtype}"), first.get("bytes_per_s") * x)
            spots.append((x, y, names.setdefault(row.name, len(names)), phase))
    left, right = min(s[0] for s in spots) / 2, max(s[0] for s in spots) * 12
    ends = {}
    for chip in reversed(chips):
        peak, bandwidth = chip.get("flops_fp8"), chip.get("bytes_per_s")
        x = np.array([left, peak / bandwidth, right])
        ax.plot(x, np.minimum(peak, bandwidth * x), color=INK if chip is first else "#b0b9c3", zorder=2,
                linewidth=1.8 if chip is first else 1.1)
        ends.setdefault(peak, []).insert(0, chip.key)
    for peak, keys in ends.items():
        ax.text(right, peak, f"{', '.join(keys)}: {_prefixed(peak, 0)}", ha="right", va="center", fontsize=8.5, zorder=4,
                color=INK if first.key in keys else GREY, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    for x, y, number, phase in spots:
        color, marker = _style(number).values()
        fill, edge, width = (color, "white", 0.8) if phase == "decode" else ("white", color, 1.5)
        ax.scatter([x], [y], s=46, color=fill, marker=marker, edgecolor=edge, linewidth=width, zorder=3)
    keys = [ax.scatter([], [], s=46, label=name, **_style(number)) for name, number in names.items()]
    filled = {"decode": "filled: decode", "prefill": "hollow: prefill"}
    ax.legend(handles=keys, title=", ".join(filled[p] for p in steps), title_fontsize=8.5, **LEGEND)
    ax.set(xlim=(left, right), ylim=(min(s[1] for s in spots) / 3, max(c.get("flops_fp8") for c in chips) * 2))
    ax.set_title(f"Bounds: FP8 rooflines, and the model's products on {first.key}")
    ax.labels = []


def _place_labels(figure, ax):
    """Label the points of ``ax.labels`` where there is room; a label that would cover something is left out."""
    figure.canvas.draw()
    renderer, taken = figure.canvas.get_renderer(), []
    if hasattr(ax, "along"):  # a text that runs along a line
        text, xs, ys = ax.along
        (x0, y0), (x1, y1) = ax.transData.transform(np.column_stack([xs, ys]))
        text.set_rotation(np.degrees(np.arctan2(y1 - y0, x1 - x0)))
    for px, py in ax.transData.transform([xy for drawn in ax.collections for xy in drawn.get_offsets()]):
        taken.append((px - 6, py - 6, px + 6, py + 6))
    taken += [_box(t, renderer) for t in [*ax.texts, ax.get_legend()] if t is not None]
    for line in ax.lines:
        ends = ax.transData.transform(line.get_xydata())
        for (x0, y0), (x1, y1) in zip(ends, ends[1:], strict=False):
            along = zip(np.linspace(x0, x1, 300), np.linspace(y0, y1, 300), strict=True)
            taken += [(x - 3, y - 3, x + 3, y + 3) for x, y in along]
    inside = ax.get_window_extent(renderer)
    for x, y, label, color in sorted(ax.labels, key=lambda p: -p[1]):
        for dx, dy, ha, va in ((8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 8, "center", "bottom"),
                               (0, -8, "center", "top"), (8, 8, "left", "bottom"), (8, -8, "left", "top"),
                               (-8, 8, "right", "bottom"), (-8, -8, "right", "top")):
            text = ax.annotate(label, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, color=color, size=7.5)
            box = _box(text, renderer)
            free = not any(a < box[2] and box[0] < c and b < box[3] and box[1] < d for a, b, c, d in taken)
            if free and box[0] >= inside.x0 and box[2] <= inside.x1 and box[1] >= inside.y0 and box[3] <= inside.y1:
                taken.append(box)
                break
            text.remove()


def _box(artist, renderer):
    b = artist.get_window_extent(renderer)
    return b.x0, b.y0, b.x1, b.y1
