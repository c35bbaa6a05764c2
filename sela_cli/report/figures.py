"""Figures of a run, by matplotlib: in the page as SVG, for papers as PNG.

F filters of C channels, h x w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sela_cli import formats, outputs
from sela_cli.errors import BadData, CannotCreate
from sela_cli.report.contents import Contents, Trace

_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    # Text stays text, and one run always gives the same bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "sela",
}
_DOTS_PER_INCH = 200


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def loss(contents: Contents) -> Figure:
    """Training loss of every step and its mean over an epoch; ticks where labels changed."""
    figure, axes = _axes("epoch", "loss")
    losses = contents.checkpoint.losses
    if len(losses):
        epochs = np.arange(1, len(losses) + 1) / contents.steps_per_epoch
        axes.plot(epochs, losses, lw=0.5, alpha=0.5, color="C0", label="step")
        width = min(len(losses), max(1, round(contents.steps_per_epoch)))
        # Differences of sums: an epoch may have thousands of steps.
        sums = np.cumsum(np.concatenate([[0.0], losses]))
        mean = (sums[width:] - sums[:-width]) / width
        axes.plot(epochs[width - 1 :], mean, lw=1.5, color="C0", label="mean of an epoch")
        for number, row in enumerate(contents.rounds[1:]):
            label = "new labels" if number == 0 else None
            axes.axvline(row["epoch"], ymax=0.04, lw=0.8, color="C3", label=label)
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def relabel(contents: Contents) -> Figure:
    """Share of the labels that each round changed."""
    figure, axes = _axes("epoch", "labels changed")
    rows = contents.rounds[1:]
    axes.plot([row["epoch"] for row in rows], [row["churn"] for row in rows], "o-", ms=3, lw=1.2)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    return figure


def agreement(contents: Contents) -> Figure | None:
    """Agreement of the clusters with the true classes by round, mean over the heads."""
    if contents.truth_N is None or "nmi" not in contents.rounds[0]:
        return None
    figure, axes = _axes("epoch", "agreement with the classes")
    for name in ("nmi", "ari"):
        axes.plot(
            [row["epoch"] for row in contents.rounds],
            [row[name] for row in contents.rounds],
            "o-",
            ms=3,
            lw=1.2,
            label=name.upper(),
        )
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.legend()
    return figure


def residuals(contents: Contents) -> Figure:
    """Residual of the label solve by iteration: a line a round and head, coloured by round."""
    figure, axes = _axes("iteration", "residual")
    # Without the yellow end, which is hardly seen on white.
    viridis = ListedColormap(colormaps["viridis"](np.linspace(0, 0.85, 256)))
    colours = ScalarMappable(Normalize(1, max(2, len(contents.traces) - 1)), viridis)
    drawn: set[bytes] = set()
    for number, heads in enumerate(contents.traces):
        for trace in heads:
            # Labels of one head carry the solves of the others along.
            solve = b"".join(values.tobytes() for values in trace.values())
            if solve in drawn:
                continue
            drawn.add(solve)
            axes.plot(
                trace["iteration"],
                trace["residual"],
                lw=0.8,
                color=colours.to_rgba(np.array(number)),
            )
    _residual_axis(axes, contents.labels.heads[0].attributes["tol"])
    if len(axes.get_legend_handles_labels()[0]):
        axes.legend(loc="upper right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    ticks = MaxNLocator(6, integer=True)
    figure.colorbar(colours, ax=axes, label="round", ticks=ticks)
    return figure


def trace(traces: Sequence[Trace], tol: float) -> Figure:
    """Convergence of one labels file: the residual of each head by iteration and by time."""
    figure = Figure(figsize=(7.5, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, head in enumerate(traces):
        if not _solved(head):
            continue
        for axes, name in ((left, "iteration"), (right, "seconds")):
            label = f"head {number}" if len(traces) <= 10 else None
            axes.plot(head[name], head["residual"], "o-", ms=2, lw=1, label=label)
    left.set(xlabel="iteration", ylabel="residual")
    right.set(xlabel="seconds")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        _residual_axis(axes, tol)
    lines, names = right.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right upper")
    return figure


def _residual_axis(axes: Axes, tol: float) -> None:
    axes.set_yscale("log")
    if np.isfinite(tol):
        axes.axhline(tol, lw=0.8, ls="--", color="0.4", label="tolerance")


def sizes(contents: Contents) -> Figure:
    """Histogram of the cluster sizes, relative to N/K so that heads can be compared."""
    figure, axes = _axes("cluster size / (N/K)", "share of the clusters")
    relative = [
        head.usage_K * (len(head.usage_K) / len(head.labels_N)) for head in contents.labels.heads
    ]
    most = max(2.0, *(values.max() for values in relative))
    bins = np.linspace(0, most, 41).tolist()
    for number, values in enumerate(relative):
        # At most ten heads are told apart; the rest are one colour.
        name = f"{number}: {len(values)}" if len(relative) <= 10 else None
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=weights, histtype="step", lw=1.3, label=name)
    axes.yaxis.set_major_formatter("{x:.0%}")
    if len(relative) <= 10:
        axes.legend(title="head: clusters", loc="upper right")
    return figure


def filters(contents: Contents) -> Figure:
    """The first layer's filters, each stretched to its own range."""
    kernels_FChw = first_layer(contents.checkpoint.model)
    tiles_Fhwc = kernels_FChw.transpose(0, 2, 3, 1).astype(np.float64)
    low = tiles_Fhwc.min(axis=(1, 2, 3), keepdims=True)
    high = tiles_Fhwc.max(axis=(1, 2, 3), keepdims=True)
    tiles_Fhwc = (tiles_Fhwc - low) / np.maximum(high - low, np.finfo(np.float64).tiny)
    count, height, width, _ = tiles_Fhwc.shape
    # Half as wide again as high.
    columns = math.ceil(math.sqrt(1.5 * count))
    lines = -(-count // columns)
    sheet = np.ones((lines * (height + 1) + 1, columns * (width + 1) + 1, 3))
    for number, tile in enumerate(tiles_Fhwc):
        top = number // columns * (height + 1) + 1
        left = number % columns * (width + 1) + 1
        sheet[top : top + height, left : left + width] = tile
    figure = Figure(figsize=(4.0, 4.0 * sheet.shape[0] / sheet.shape[1]), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(sheet, interpolation="nearest")
    axes.axis("off")
    return figure


def first_layer(model: dict[str, np.ndarray]) -> np.ndarray:
    """Weights (F, 3, h, w) of the convolution that sees the colours."""
    return next(
        array for _, array in sorted(model.items()) if array.ndim == 4 and array.shape[1] == 3
    )


FIGURES: dict[str, tuple[Callable[[Contents], Figure | None], str]] = {
    "loss": (loss, "Loss"),
    "relabel": (relabel, "Labels changed by each round"),
    "residuals": (residuals, "Residual of the label solve"),
    "sizes": (sizes, "Cluster sizes"),
    "agreement": (agreement, "NMI and ARI by round"),
    "filters": (filters, "First-layer filters"),
}


def draw(contents: Contents) -> dict[str, Figure]:
    """Every figure that this run has data for, by name."""
    with matplotlib.rc_context(_STYLE):
        drawn = {name: function(contents) for name, (function, _) in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def svg(figure: Figure) -> str:
    """A figure as an <svg> element."""
    stream = StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def write_png(figure: Figure, path: str, force: bool = False) -> None:
    """A figure as a PNG for print."""
    with matplotlib.rc_context(_STYLE), outputs.replacing(path, force) as partial:
        figure.savefig(partial, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def write_pngs(figures: dict[str, Figure], folder: Path, force: bool = False) -> None:
    """NAME.png of each figure in `folder`, which need not be there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreate(f"{folder}: {error.strerror}", "choose another --png") from error
    for name, figure in figures.items():
        write_png(figure, str(folder / f"{name}.png"), force)


def _solved(trace: Trace) -> bool:
    return len(trace.get("iteration", ())) > 0


def write_trace(labels_path: str, output: str, force: bool = False) -> None:
    """The convergence of a labels file as a PNG. Raises BadData where there is none."""
    labels = formats.read_labels(labels_path)
    traces = [head.trace for head in labels.heads]
    if not any(map(_solved, traces)):
        how = labels.heads[0].attributes["assign"]
        raise BadData(f"{labels_path}: no trace in it: {how} labels are not solved for")
    with matplotlib.rc_context(_STYLE):
        figure = trace(traces, labels.heads[0].attributes["tol"])
    write_png(figure, output, force)
