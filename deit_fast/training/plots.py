"""The figures of a run, curves.png and confusion.png, and what every figure of the project shares.

matplotlib's objects on an Agg canvas, without pyplot: no global state, no display, safe in threads. Colours are from
Okabe and Ito's set, whose members stay apart for colour-blind readers; marker and dash repeat what the colour says.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from deit_fast.training.files import atomic_write

TITLES = {
    "loss": "Loss", "top1": "Top-1 accuracy", "top5": "Top-5 accuracy", "auc": "AUC (one-vs-rest, macro)",
    "f1": "F1 (macro)", "precision": "Precision (macro)", "recall": "Recall (macro)",
}
# prefix of the column: name in the legend, colour, marker, dash
_LINES = {
    "train": ("training (its objective)", "#4d4d4d", "s", "-"),
    "val": ("validation", "#0072b2", "o", "-"),
    "test": ("test", "#d55e00", "^", "-"),
    "ema_val": ("validation, EMA", "#56b4e9", "o", "--"),
    "ema_test": ("test, EMA", "#e69f00", "^", "--"),
}
MARKED_EPOCHS = 40  # with more epochs, markers would hide the line
_COUNTED_CLASSES = 20  # with more classes, counts would not fit in their cells
_NAMED_CLASSES = 120  # with more classes, every n-th is named
_LABEL_CHARACTERS = 20


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def tidy(axis: Axes) -> None:
    """A light grid behind the data and no frame."""
    axis.grid(color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def number_epochs(axis: Axes) -> None:
    """An x axis of epochs: whole numbers."""
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def save_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Writes a figure in the format that the path's suffix names; "tight": no label can be cut off."""
    kind = os.fspath(path).rpartition(".")[2]
    picture = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None  # no time of day in the file
    figure.savefig(picture, format=kind, bbox_inches="tight", pad_inches=0.2, metadata=metadata)
    atomic_write(path, lambda file: file.write(picture.getvalue()))


def plot_curves(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Draws every metric over the epochs as a PNG, from the rows of `report.write_metrics_csv`."""
    if not rows:
        raise ValueError("plot_curves: there are no epochs to draw")
    figure = new_figure(15, 7.2)
    axes = figure.subplots(2, 4)
    epochs = [row["epoch"] for row in rows]
    handles: dict[str, object] = {}
    for axis, (metric, title) in zip(axes.flat, TITLES.items(), strict=False):
        for prefix, (name, colour, marker, dash) in _LINES.items():
            values = [_number(row.get(f"{prefix}_{metric}")) for row in rows]
            if not np.isfinite(values).any():
                continue
            (handles[name],) = axis.plot(
                epochs, values, dash, color=colour, linewidth=1.8,
                marker=marker if _needs_markers(values) else None, markersize=5,
            )
        axis.set_title(title, fontsize=12)
        number_epochs(axis)
        axis.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        tidy(axis)
        if not axis.lines:
            axis.set_yticks([])
            axis.text(0.5, 0.5, "no finite values", ha="center", va="center", transform=axis.transAxes, color="#666666")
    legend = axes.flat[-1]
    legend.set_axis_off()
    if handles:
        legend.legend(handles.values(), handles.keys(), loc="center", frameon=False, fontsize=13, handlelength=3)
    save_figure(path, figure)


def _number(value: object) -> float:
    """Returns a float that matplotlib can scale an axis by: nan (a gap in the line) for absent and infinite values."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _needs_markers(values: Sequence[float]) -> bool:
    """Says whether a line alone could not be seen (few epochs, or points between gaps)."""
    finite = np.isfinite(values)
    return len(values) <= MARKED_EPOCHS or not (finite[1:] & finite[:-1]).any()


def plot_confusion(
    path: str | os.PathLike[str], confusion: Sequence[Sequence[int]], classes: Sequence[str]
) -> None:
    """Draws the confusion matrix as a PNG: rows are true classes, colour the share of the row, numbers the counts.

    Up to 20 classes every cell shows its count; up to 120 every class is named, beyond that every n-th.
    """
    counts = np.asarray(confusion, dtype=np.int64)  # (K, K)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"plot_confusion: confusion must be {len(classes)} x {len(classes)}, got {counts.shape}")
    size = min(max(6.0, 3.0 + 0.62 * len(classes)), 16.0)  # inches
    cell = 72 * (size - 3.0) / len(classes)  # points of height that one class has
    figure = new_figure(size + 1.2, size, "compressed")
    axis = figure.subplots()
    image = draw_confusion(axis, counts, classes, cell)
    bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    many = len(classes) > _COUNTED_CLASSES
    bar.set_label("share of the true class" + (" (square-root scale)" if many else ""), fontsize=12)
    axis.set_xlabel("predicted class", fontsize=12)
    axis.set_ylabel("true class", fontsize=12)
    correct = np.trace(counts) / max(1, counts.sum())
    missing = int((counts.sum(axis=1) == 0).sum())
    note = f"; grey: {missing} without samples" if missing else ""
    axis.set_title(f"{counts.sum():,} samples, {correct:.1%} correct{note}", fontsize=12)
    save_figure(path, figure)


def draw_confusion(axis: Axes, counts: np.ndarray, classes: Sequence[str], cell: float) -> AxesImage:
    """The picture of counts (K, K) on an axis, with the classes' names; a class has `cell` points of height."""
    support = counts.sum(axis=1, keepdims=True)
    shares = np.where(support > 0, counts / np.maximum(support, 1), np.nan)
    many = len(classes) > _COUNTED_CLASSES
    # Without counts the colour alone must show a confusion of 1 %: the square root lifts it to a tenth of the scale.
    scale = PowerNorm(0.5 if many else 1.0, vmin=0, vmax=1)
    image = axis.imshow(np.ma.masked_invalid(shares), cmap="Blues", norm=scale, interpolation="nearest")
    axis.set_facecolor("#dddddd")  # shows through where a class has no sample
    step = 1 if len(classes) <= _NAMED_CLASSES else math.ceil(len(classes) / 50)
    ticks = range(0, len(classes), step)
    font = min(11.0, 0.8 * cell * step)
    labels = [shorten(classes[index]) for index in ticks]
    axis.set_xticks(ticks, labels, fontsize=font, **turned(labels, font, cell * step, 90 if many else 45))
    axis.set_yticks(ticks, labels, fontsize=font)
    for text in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        text.set_parse_math(False)  # a class may be called "$5_bill$"
    if not many:
        _write_counts(axis, counts, shares, cell)
    return image


def _write_counts(axis: Axes, counts: np.ndarray, shares: np.ndarray, cell: float) -> None:
    """Writes the counts (K, K) into the cells, white on the dark ones; rows without samples stay empty."""
    digits = max(3, len(str(counts.max())))
    font = min(11.0, 1.4 * cell / digits)
    for row, column in np.argwhere(np.isfinite(shares)):
        count = counts[row, column]
        colour = "white" if shares[row, column] > 0.55 else "#b0b0b0" if count == 0 else "black"
        axis.text(column, row, str(count), ha="center", va="center", fontsize=font, color=colour)


def turned(labels: Sequence[str], font: float, room: float, angle: int) -> dict[str, object]:
    """How labels of `font` points stand below an axis: upright where each fits into `room` points, else by an angle."""
    if max(map(len, labels)) * 0.65 * font <= room:
        return {}
    return {"rotation": angle} | ({} if angle == 90 else {"ha": "right", "rotation_mode": "anchor"})


def shorten(name: str) -> str:
    """A class's name, cut to fit beside an axis."""
    return name if len(name) <= _LABEL_CHARACTERS else f"{name[: _LABEL_CHARACTERS - 3]}..."
