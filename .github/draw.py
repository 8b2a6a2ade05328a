"""Draws README's pictures from results.json, for light and for dark pages; it needs matplotlib."""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator, ScalarFormatter

HERE = Path(__file__).parent
TABLES = json.loads((HERE / "results.json").read_text())["tables"]
NAMES = {"vicreg": "VICReg", "vicreg-ctr": "VICReg-ctr", "simclr": "SimCLR"}
STYLE = {"font.size": 11, "axes.titlesize": 14, "axes.titleweight": "bold", "svg.fonttype": "none"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "duality"}
STYLE["font.sans-serif"] = ["DejaVu Sans", "Verdana", "Arial"]  # a browser takes what it has
ROWS, COLUMNS, OURS, FAINT = "C0", "C1", "C2", "C3"  # dimensions, images, duality.py's time, notes
PAGES = {  # the colour of text, and those four
    "light": ("#1f2328", "#0969da", "#bc4c00", "#1a7f37", "#59636e"),
    "dark": ("#f0f6fc", "#4493f8", "#f0883e", "#3fb950", "#9198a1"),
}
BOLD = dict(size=14, weight="bold")


def draw_matrix(axes, x, y, matrix, color, title, diagonal=FAINT):
    """A cell of 15 x 15 for each entry, the more colour the larger, about the point (x, y)."""
    height, width = matrix.shape
    for (i, j), entry in np.ndenumerate(matrix):
        corner = x + 15 * (j - width / 2), y + 15 * (i - height / 2)
        ink = diagonal if i == j else color
        face = ink, abs(entry) / abs(matrix).max()
        axes.add_patch(Rectangle(corner, 15, 15, facecolor=face, edgecolor=(ink, 0.6), lw=0.7))
    axes.text(x, y - 7.5 * height - 12, title, size=16, ha="center")


def draw_theorem(axes):
    """K, its two products and their sums of squares."""
    k = np.random.default_rng(0).integers(-3, 4, (5, 9))
    axes.text(0, 18, "Two products, one sum of squares", **BOLD)
    draw_matrix(axes, 80, 138, k, FAINT, "embeddings $K$")
    axes.add_patch(Rectangle((12.5, 115.5), 135, 15, fill=False, edgecolor=ROWS, lw=2))
    axes.add_patch(Rectangle((102.5, 100.5), 15, 75, fill=False, edgecolor=COLUMNS, lw=2))
    axes.text(12, 194, "a row: one of D dimensions", color=ROWS)
    axes.text(12, 211, "a column: one of N images", color=COLUMNS)
    axes.text(0, 249, "sum of squares: coloured")
    axes.text(0, 267, "pushed down by")
    axes.text(0, 285, "sum of squares: grey (norms)")
    axes.plot((0, 550), (291, 291), color=FAINT, lw=0.7)
    axes.text(0, 308, "sum of squares: all")
    note = "With all norms fixed, so are the grey sums: the coloured ones fall together."
    axes.text(0, 333, note)
    for x, color, gram, title, cell, by in (
        (275, ROWS, k @ k.T, "$K K^T$: D x D", "row times row", "VICReg, Barlow Twins"),
        (468, COLUMNS, k.T @ k, "$K^T K$: N x N", "column times column", "SimCLR, DCL"),
    ):
        draw_matrix(axes, x, 138, gram, color, title)
        norms, squares = (gram.diagonal() ** 2).sum(), (gram**2).sum()
        axes.text(x, 156 + 7.5 * len(gram), f"a cell: {cell}", color=color, ha="center")
        axes.text(x, 249, squares - norms, color=color, ha="center")
        axes.text(x, 267, by, color=color, ha="center")
        axes.text(x, 285, norms, ha="center")
        axes.text(x, 308, squares, ha="center", weight="bold")
    axes.text(372, 308, "=", ha="center")


def draw_chain(axes):
    """The four criteria with their accuracies, and what changes from one to the next."""
    table, baselines = TABLES["chain"], TABLES["baselines"]["rows"]
    axes.text(0, 376, "From one to the other in three steps: accuracy stays", **BOLD)
    changes = "log-sum-exp", "transpose", "negative pairs", ""
    for i, (row, change) in enumerate(zip(table["rows"], changes)):
        x, color = 43 + 155 * i, ROWS if i < 2 else COLUMNS
        axes.add_patch(Rectangle((x - 41, 409), 82, 26, fc=(color, 0.12), ec=color))
        axes.text(x, 426, NAMES.get(row["criterion"], "VICReg-exp"), ha="center", weight="bold")
        axes.text(x, 453, f"{row['linear']} ± {row['linear_deviation']} %", ha="center")
        axes.text(x + 77.5, 403, change, ha="center", color=FAINT)
        if change:
            arrow = dict(arrowstyle="->", ec=FAINT)
            axes.annotate("", (x + 114, 422), (x + 41, 422), arrowprops=arrow)
    note = "linear top-1, small encoder, JPEG copies of CIFAR-10, 40 epochs,"
    axes.text(0, 476, f"{note} {len(table['seeds'])} seeds")
    note = "encoder untrained: {linear} %; ".format(**baselines[0])
    note += "random patches, nothing trained: {linear} %".format(**baselines[1])
    axes.text(0, 492, note)


def beside(axes, x, y, label, color, va="center", size=11):
    at = dict(textcoords="offset points", xytext=(7, 0))
    axes.annotate(label, (x, y), color=color, va=va, size=size, **at)


def draw_speed(axes):
    """Milliseconds over D, of which the last stands beside each line's end."""
    rows = TABLES["speed_over_D"]["rows"]
    d, last = [row["D"] for row in rows], rows[-1]
    for name, label, color, style, width, va in (
        ("lightly", "lightly", FAINT, "-", 1.5, "bottom"),
        ("official", "official code", FAINT, "-", 1.5, "top"),
        ("ours", "duality.py", OURS, "-", 2.5, "bottom"),
        ("bare", "bare products", OURS, "--", 1.5, "top"),
    ):
        axes.loglog(d, [row[name] for row in rows], style, color=color, lw=width)
        beside(axes, d[-1], last[name], f"{label}\n{last[name]:,.0f} ms", color, va)
    ratio, middle = last["official"] / last["ours"], (last["official"] * last["ours"]) ** 0.5
    ends = (d[-1], last["ours"]), (d[-1], last["official"])
    axes.annotate("", *ends, arrowprops=dict(arrowstyle="<->", ec=FAINT))
    beside(axes, d[-1], middle, f"x {ratio:.0f}", OURS, size=14)
    axes.axvline(256, color=FAINT, linestyle=":", lw=1)
    beside(axes, 256, axes.get_ylim()[1], "N = D", FAINT, va="top")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(d[::2], d[::2])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="D, embedding dimensions", ylabel="loss and gradient, ms")
    axes.set_title("Time of VICReg's loss, N = 256 images", x=-0.26, loc="left", pad=33)


def draw_duality():
    figure = Figure((900 / 72, 505 / 72))  # on a page of 900 pixels, a point is a pixel
    left = figure.add_axes((4 / 900, 0, 552 / 900, 1), xlim=(0, 552), ylim=(505, 0))
    left.axis("off")
    draw_theorem(left)
    draw_chain(left)
    draw_speed(figure.add_axes((625 / 900, 0.1, 183 / 900, 0.8)))
    return figure


def draw_figure1():
    figure, table = Figure((900 / 72, 290 / 72), layout="constrained"), TABLES["figure1"]
    figure.suptitle(table["title"], size=11)
    points = [row for row in table["rows"] if row["seeds"] == table["seeds"]]
    sizes = sorted({row["d"] for row in points})
    for axes, name in zip(figure.subplots(1, 3, sharey=True), NAMES):
        color = ROWS if name == "vicreg" else COLUMNS
        for kind, style in (("wide", "o-"), ("narrow", "o--")):
            rows = [row for row in points if (row["criterion"], row["kind"]) == (name, kind)]
            d, mean = ([row[key] for row in rows] for key in ("d", "mean"))
            fill = color if kind == "wide" else "none"
            axes.plot(d, mean, style, color=color, mfc=fill, label=kind)
            of_seeds = [row["linear"][row["lr"]] for row in rows]
            axes.plot(d, of_seeds, ".", color=(color, 0.4), mfc=fill, ms=5)
        axes.legend(frameon=False, loc="lower right")
        axes.set(title=NAMES[name], xscale="log", xlabel="d", ylabel="linear top-1, %")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sizes, sizes)
        axes.label_outer()
    return figure


for page, (ink, *others) in PAGES.items():
    inks = "text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"
    cycle = {"axes.prop_cycle": matplotlib.cycler(color=others)}
    with matplotlib.rc_context(STYLE | cycle | dict.fromkeys(inks, ink)):
        for name, draw in (("duality", draw_duality), ("figure1", draw_figure1)):
            nothing = dict.fromkeys(("Date", "Creator"))  # so that only results change the files
            draw().savefig(HERE / f"{name}-{page}.svg", transparent=True, metadata=nothing)
