"""Pictures of a benchmark as PNG files in memory, drawn through matplotlib's objects, so that nothing global changes."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metamoe.common.curve import LOSS, RATE, VALIDATION_ACCURACY, VALIDATION_LOSS
from metamoe.common.events import Event
from metamoe.simulations.benchmark.tables import REFERENCE, Record, mean_and_deviation, paired_difference

ORACLE = "oracle"  # it is told which domain an image is of, so nothing that can be used competes with it
DPI = 200
WIDTH = 7.6  # inches

# From the palette of Okabe and Ito, which colour-blind readers can tell apart; the marker's form says the same again.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
GREY, PALE, INK = "#8a8f98", "#eef0f3", "#22262b"
# What the legend says, in its order: marker, its edge, its face.
KINDS = {
    f"{REFERENCE}, the unified model": ("o", BLUE, BLUE),
    "no private sample leaves a client": ("o", INK, INK),
    "pools private data": ("D", VERMILION, "white"),
    "is told each image's domain": ("s", GREY, "white"),
}
LINES = (BLUE, ORANGE, GREEN, VERMILION, "#cc79a7", "#56b4e9", "#f0e442", INK)
_MARKED = 50
"""From so many points on, a line has no dots."""
SELECTIONS = {
    "random": ("at random", ORANGE),
    "relevance": ("by relevance alone", GREEN),
    "dpp": ("by DPP: relevant and diverse", BLUE),
}

# If one difference is above this many points, the axis is logarithmic beyond one point: the small ones could not be told from
# zero otherwise.
WIDEST_LINEAR = 8.0

Points = Sequence[tuple[float, float]]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the values and its 95% interval by Student's t; the interval of one value is infinite."""
    return paired_difference([0.0] * len(values), values)


def mean_routing(record: Record) -> dict[str, np.ndarray]:
    """For each test set, shares [layers that decide, experts] as means over the seeds; empty if the method does not route."""
    seeds = [routing for routing in record.routing if routing]
    return {test: np.mean([routing[test] for routing in seeds], axis=0) for test in seeds[0]} if seeds else {}


def accuracy_picture(methods: Mapping[str, Record], evaluated_on: str) -> bytes:
    """Average accuracy of each method on test or validation data with its 95% interval, the best on top."""
    ranked = sorted(methods.items(), key=lambda item: mean_and_deviation(item[1].average)[0])
    figure = Figure(figsize=(WIDTH, 1.3 + 0.27 * len(ranked)), layout="constrained")
    axes = _rows(figure, [name for name, _ in ranked])
    drawn = [_kind(name, record) for name, record in ranked]
    for row, (name, record) in enumerate(ranked):
        if name == REFERENCE:
            axes.axhspan(row - 0.5, row + 0.5, color="#dcecf7", zorder=0)
        _estimate(axes, row, mean_interval(record.average), "", *KINDS[drawn[row]])
    for kind, (marker, edge, face) in KINDS.items():
        if kind in drawn:
            axes.scatter([], [], s=42, marker=marker, facecolors=face, edgecolors=edge, linewidths=1.4, label=kind)
    axes.set_xlabel(f"average accuracy on {evaluated_on} data, %")
    axes.margins(x=0.03)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    return _png(figure)


def gains_picture(ablations: Mapping[str, Record], reference: Record) -> bytes:
    """By how much the reference is better than each ablation, with the 95% interval of the paired difference, by group."""
    rows: list[tuple[str, Record | None]] = []
    for group in dict.fromkeys(record.group for record in ablations.values()):
        rows.append((group, None))
        rows.extend((name, record) for name, record in ablations.items() if record.group == group)
    rows.reverse()
    figure = Figure(figsize=(WIDTH, 1.2 + 0.25 * len(rows)), layout="constrained")
    axes = _rows(figure, [name.removeprefix(f"{record.group}: ") if record else "" for name, record in rows])
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    widest = 0.0
    for row, (name, record) in enumerate(rows):
        if record is None:
            axes.axhspan(row - 0.45, row + 0.45, color=PALE, zorder=1.5)
            text = _label(name or "ablations", 90)
            axes.text(0.008, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10, weight="bold")
            continue
        mean, low, high = paired_difference(record.average, reference.average)
        widest = max(widest, abs(mean), *(abs(end) for end in (low, high) if math.isfinite(end)))
        sure = low > 0 or high < 0
        _estimate(axes, row, (mean, low, high), "+", "o", BLUE, BLUE if sure else "white")
    note = ""
    if widest > WIDEST_LINEAR:
        axes.set_xscale("symlog", linthresh=1)
        ticks = [step for step in (0.5, 1, 3, 10, 30) if step <= 1.3 * widest]
        ticks = [-step for step in ticks if -step >= axes.get_xlim()[0]] + [0, *ticks]
        axes.set_xticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
        axes.minorticks_off()
        note = " (logarithmic beyond 1)"
    axes.set_xlabel(f"{REFERENCE} is better by, points{note}")
    return _png(figure)


def routing_picture(record: Record) -> bytes:
    """Share of the tokens at each expert, for each test set and each layer that decides; mean over the seeds."""
    tests = mean_routing(record)
    return share_picture(np.concatenate(list(tests.values())), list(tests), record.expert_names)


def share_picture(shares: np.ndarray, tests: Sequence[str], experts: Sequence[str]) -> bytes:
    """Shares of tokens as a heat map, a row for each test set and, below each other, each layer that decides.

    Args:
        shares: [tests x layers, experts].
        tests, experts: their names.
    """
    rows, columns = shares.shape
    layers = rows // len(tests)
    names = [_label(name, 24) for name in experts]
    labels = [f"{test} · {layer + 1}" if layers > 1 else test for test in tests for layer in range(layers)]
    figure = Figure(figsize=(min(WIDTH, 2.2 + 0.75 * columns), 1.3 + 0.3 * rows), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=9.5, color="white" if share > 0.55 else INK)
    for row in range(1, rows):
        axes.axhline(row - 0.5, color="white", linewidth=1 if row % layers else 4 if layers > 1 else 2)
    for column in range(1, columns):
        axes.axvline(column - 0.5, color="white", linewidth=2)
    axes.set_yticks(range(rows), [_label(label, 40) for label in labels], fontsize=10)
    slanted = max(map(len, names), default=0) > 9 or columns > 8
    axes.set_xticks(range(columns), names, fontsize=10, rotation=35 if slanted else 0, ha="left" if slanted else "center")
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("expert")
    axes.set_ylabel("test set" if layers == 1 else "test set · layer")
    axes.spines[:].set_visible(False)
    return _png(figure)


def curve_picture(curves: Mapping[str, Sequence[Event]], unit: str) -> bytes:
    """Trainings in one picture: their loss, dashed that on validation samples, and beside it validation accuracy, or without
    one the learning rate.

    Args:
        curves: of each training its events, which have metrics.
        unit: what is counted along the axis: epochs or steps.
    """
    looked = any(VALIDATION_ACCURACY in event.metrics for events in curves.values() for event in events)
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    losses, others = figure.subplots(1, 2)
    for axes, drawn, title in (
        (losses, {LOSS: "-", VALIDATION_LOSS: "--"}, "loss" + (", dashed: validation" if looked else "")),
        (others, {VALIDATION_ACCURACY: "-"}, "validation accuracy, %") if looked else (others, {RATE: "-"}, "learning rate"),
    ):
        for number, (name, events) in enumerate(curves.items()):
            for metric, line in drawn.items():
                having = [event for event in events if metric in event.metrics]
                label = _label(name, 20) if metric == LOSS and len(curves) <= len(LINES) else None
                x, y = [event.done for event in having], [event.metrics[metric] for event in having]
                axes.plot(x, y, line, marker="." if len(x) < _MARKED else "", color=LINES[number % len(LINES)], label=label)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#dfe3e8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(curves) <= len(LINES):
        figure.legend(loc="outside lower center", ncols=min(5, len(curves)), frameon=False, fontsize=10)
    return _png(figure)


def proxies_picture(private: Points, chosen: Mapping[str, Points]) -> bytes:
    """A client's private samples in grey and its proxies in colour, one panel for each of the ``SELECTIONS``."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharex=True, sharey=True, squeeze=False)[0]
    grey = np.asarray(private, dtype=float)
    for axes, (selection, points) in zip(panels, chosen.items(), strict=True):
        proxies = np.asarray(points, dtype=float)
        title, colour = SELECTIONS[selection]
        axes.scatter(*grey.T, s=9, color="#9aa0a8", alpha=0.6, linewidths=0)
        axes.scatter(*proxies.T, s=13, color=colour, alpha=0.85, edgecolors="white", linewidths=0.3)
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_box_aspect(1)
        axes.spines[:].set_color("#cfd4da")
    return _png(figure)


def _rows(figure: Figure, labels: Sequence[str]) -> Axes:
    """Axes with one row for each label, the first at the bottom."""
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), [_label(label, 44) for label in labels], fontsize=10)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dfe3e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    return axes


def _kind(name: str, record: Record) -> str:
    """What the legend calls a method."""
    metamoe, private, pools, told = KINDS
    return metamoe if name == REFERENCE else told if name == ORACLE else private if record.private else pools


def _estimate(axes: Axes, row: int, estimate: tuple[float, float, float], sign: str, marker: str, edge: str, face: str) -> None:
    """A mean with its interval: drawn, and written to the right of the axes."""
    mean, low, high = estimate
    text = f"{mean:{sign}.2f}"
    if math.isfinite(low):
        axes.plot([low, high], [row, row], color=edge, linewidth=2, solid_capstyle="butt", zorder=2)
        text += f"  [{low:{sign}.2f}, {high:{sign}.2f}]"
    axes.scatter([mean], [row], s=42, marker=marker, facecolors=face, edgecolors=edge, linewidths=1.4, zorder=3)
    axes.text(1.015, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10)


def _label(text: str, width: int) -> str:
    """A name as matplotlib should show it: not too long, and without reading dollar signs as mathematics."""
    line = " ".join(text.split())
    return (line if len(line) <= width else line[: width - 1] + "…").replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()
