"""The study's diagrams: courses over epochs, confusion matrices, classes, reliability, tokens; each as PNG and SVG.

Colours are from Okabe and Ito's set as in `training/plots.py`; marker and dash repeat what the colour says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deit_fast.training.plots import (
    MARKED_EPOCHS,
    TITLES,
    draw_confusion,
    new_figure,
    number_epochs,
    save_figure,
    shorten,
    tidy,
    turned,
)
from deit_fast.training.study.results import Outcome, Spread

_STYLES = (("#0072b2", "o", "-"), ("#d55e00", "^", "--"), ("#009e73", "s", "-."), ("#cc79a7", "D", ":"))


def save(folder: Path, name: str, figure: Figure) -> None:
    """Writes `<name>.png` and `<name>.svg`."""
    for kind in ("png", "svg"):
        save_figure(folder / f"{name}.{kind}", figure)


def style_of(index: int) -> tuple[str, str, str]:
    """(colour, marker, dash) of the index-th line of a figure."""
    return _STYLES[index % len(_STYLES)]


def _line(axis: Axes, index: int, label: str, positions: Sequence[float], course: Sequence[Spread]) -> None:
    """A mean with a band of one standard deviation where there are several seeds."""
    colour, marker, dash = style_of(index)
    means = np.array([spread.mean for spread in course])
    axis.plot(
        positions,
        means,
        dash,
        color=colour,
        label=label,
        linewidth=1.9,
        markersize=5,
        marker=marker if len(means) <= MARKED_EPOCHS else None,
    )
    if course[0].std is not None:
        deviations = np.array([spread.std for spread in course])
        axis.fill_between(positions, means - deviations, means + deviations, color=colour, alpha=0.18, linewidth=0)


def plot_courses(folder: Path, name: str, metrics: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Draws test metrics over the epochs, one panel each, a line per model."""
    figure = new_figure(5.6 * len(metrics), 4.4)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics):
        for index, outcome in enumerate(outcomes):
            course = outcome.course(metric)
            _line(axis, index, outcome.variant.label, range(1, len(course) + 1), course)
        axis.set_title(TITLES[metric], fontsize=12)
        number_epochs(axis)
        axis.set_ylabel("on the test set")
        tidy(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3)
    save(folder, name, figure)


def plot_confusions(folder: Path, name: str, outcomes: Sequence[Outcome], classes: Sequence[str]) -> None:
    """Draws a confusion matrix per model, all seeds added up."""
    size = min(max(4.4, 1.6 + 0.34 * len(classes)), 12.0)
    figure = new_figure(size * len(outcomes) * 0.93, size + 0.2)
    for index, (axis, outcome) in enumerate(zip(figure.subplots(1, len(outcomes), squeeze=False)[0], outcomes)):
        counts = sum(np.asarray(result.summary["test_of_best"]["confusion"]) for result in outcome.results)
        draw_confusion(axis, counts, classes, 72 * (size - 1.6) / len(classes))
        correct = np.trace(counts) / counts.sum()
        axis.set_title(f"{outcome.variant.label}: {correct:.1%} correct", fontsize=12)
        axis.set_xlabel("predicted class", fontsize=11)
        axis.set_ylabel("true class" if index == 0 else "", fontsize=11)
    save(folder, name, figure)


def plot_classes(folder: Path, name: str, outcomes: Sequence[Outcome], classes: Sequence[str]) -> None:
    """Draws bars of every class's F1, one per model, with the standard deviation over seeds."""
    inches = min(max(8.0, 2.0 + 0.3 * len(outcomes) * len(classes)), 40.0)
    figure = new_figure(inches, 4.4)
    axis = figure.subplots()
    width = 0.8 / len(outcomes)
    places = np.arange(len(classes))
    for index, outcome in enumerate(outcomes):
        values = np.array(
            [result.summary["test_of_best"]["per_class"]["f1"] for result in outcome.results]
        )  # (seeds, K)
        errors = values.std(axis=0, ddof=1) if len(values) > 1 else None
        axis.bar(
            places + (index - (len(outcomes) - 1) / 2) * width,
            values.mean(axis=0),
            width * 0.92,
            yerr=errors,
            color=style_of(index)[0],
            label=outcome.variant.label,
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    names = [shorten(name) for name in classes]
    for tick in axis.set_xticks(places, names, **turned(names, 10, 72 * (inches - 1) / len(classes), 35)):
        tick.label1.set_parse_math(False)
    axis.set_ylabel("F1 on the test set")
    axis.set_ylim(0, 1)
    axis.set_xlim(-0.6, len(classes) - 0.4)
    tidy(axis)
    axis.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=len(outcomes), frameon=False)
    save(folder, name, figure)


def plot_reliability(folder: Path, name: str, calibrations: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draws accuracy against confidence per model, with the number of images in each bin below.

    calibrations: label -> {"confidence", "accuracy", "count": per bin, "ece": number}.
    """
    figure = new_figure(4.2 * len(calibrations), 5.2)
    axes = figure.subplots(2, len(calibrations), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for index, (label, bins) in enumerate(calibrations.items()):
        top, bottom = axes[0][index], axes[1][index]
        colour, marker, _ = style_of(index)
        count = np.array(bins["count"])
        edges = np.linspace(0, 1, len(count) + 1)
        filled = count > 0
        top.plot([0, 1], [0, 1], color="#808080", linewidth=1, linestyle="--")
        top.plot(
            np.array(bins["confidence"])[filled],
            np.array(bins["accuracy"])[filled],
            marker=marker,
            color=colour,
            linewidth=1.9,
            clip_on=False,  # a bin in which all images are right is on the edge
            zorder=3,
        )
        top.set_title(f"{label}\nECE {bins['ece']:.3f}", fontsize=12)
        top.set_xlim(0, 1)
        top.set_ylim(0, 1)
        bottom.bar(edges[:-1], count / count.sum(), np.diff(edges), align="edge", color=colour, alpha=0.75)
        bottom.set_xlabel("confidence")
        for axis in (top, bottom):
            tidy(axis)
    axes[0][0].set_ylabel("share correct")
    axes[1][0].set_ylabel("share of images")
    save(folder, name, figure)


def plot_cosines(folder: Path, name: str, cosines: Mapping[str, Sequence[Spread]]) -> None:
    """Draws the cosine between the two tokens' embeddings; label -> a Spread for the input and for every layer."""
    figure = new_figure(7.2, 4.4)
    axis = figure.subplots()
    for index, (label, course) in enumerate(cosines.items()):
        _line(axis, index, label, range(len(course)), course)
    layers = len(next(iter(cosines.values())))
    axis.set_xticks(range(layers), ["input", *map(str, range(1, layers))])
    axis.set_xlabel("after layer")
    axis.set_ylabel("cosine of the two tokens")
    lowest = min(spread.mean - (spread.std or 0.0) for course in cosines.values() for spread in course)
    axis.set_ylim(min(-0.05, math.floor(lowest * 10) / 10), 1.03)
    tidy(axis)
    axis.legend(loc="best", handlelength=3, facecolor="white", edgecolor="none", framealpha=1)
    save(folder, name, figure)
