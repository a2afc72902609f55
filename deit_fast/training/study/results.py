"""What finished runs say of themselves: their metrics.csv and summary.json, read and put together over seeds."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass

from deit_fast.errors import CheckpointError
from deit_fast.training.study.runs import Run, Variant
from deit_fast.training.study.settings import Study

# Table 1 of the report, in its order: the name here and there.
COLUMNS = {"top1": "Top-1", "top5": "Top-5", "f1": "F1", "auc": "AUC", "precision": "Precision", "recall": "Recall"}
REPORT = {
    "report-vit": {"top1": 0.639, "top5": 0.967, "f1": 0.642, "auc": 0.938, "precision": 0.655, "recall": 0.639},
    "report-deit": {"top1": 0.639, "top5": 0.967, "f1": 0.675, "auc": 0.949, "precision": 0.679, "recall": 0.676},
    "report-deit-aug": {"top1": 0.707, "top5": 0.976, "f1": 0.706, "auc": 0.957, "precision": 0.707, "recall": 0.707},
}
# On balanced test data recall is top-1, so one of .639 and .676 is wrong; the higher is the bar.
BAR = REPORT | {"report-deit": REPORT["report-deit"] | {"top1": 0.676}}


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, and its standard deviation (n - 1), None of a single seed."""

    mean: float
    std: float | None

    @staticmethod
    def of(values: list[float]) -> Spread:
        """The Spread of one value per seed."""
        mean = sum(values) / len(values)
        if len(values) == 1:
            return Spread(mean, None)
        return Spread(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)))

    def text(self, digits: int = 3) -> str:
        """mean ± std, or the single value."""
        deviation = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation}"


@dataclass(frozen=True)
class Result:
    """A finished run: the rows of its metrics.csv, and its summary."""

    run: Run
    rows: list[dict[str, float]]
    summary: dict

    def row(self, which: str) -> dict[str, float]:
        """The row of the "best" epoch by validation, or of the "last"."""
        return self.rows[-1 if which == "last" else self.summary["best"]["epoch"] - 1]


@dataclass(frozen=True)
class Outcome:
    """All seeds of a variant."""

    variant: Variant
    results: list[Result]

    def metric(self, name: str, which: str) -> Spread:
        """A test metric at the best or last epoch."""
        return Spread.of([result.row(which)[f"{self.prefix}test_{name}"] for result in self.results])

    def course(self, name: str) -> list[Spread]:
        """A test metric after every epoch that all seeds have."""
        return [
            Spread.of([row[f"{self.prefix}test_{name}"] for row in rows])
            for rows in zip(*(result.rows for result in self.results))
        ]

    @property
    def prefix(self) -> str:
        """Of the columns that count: the averaged weights' where the runs keep an average."""
        return "ema_" if "ema_test_top1" in self.results[0].rows[0] else ""

    def mean(self, *keys: str) -> float:
        """The mean over seeds of a number in the summary."""
        total = 0.0
        for result in self.results:
            value = result.summary
            for key in keys:
                value = value[key]
            total += value
        return total / len(self.results)


def read(run: Run) -> Result:
    """The Result of a finished run; CheckpointError when its files are not those that a run leaves."""
    try:
        with open(run.folder / "metrics.csv", newline="") as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        summary = json.loads((run.folder / "summary.json").read_text())
        result = Result(run, rows, summary)
        result.row("best")["test_top1"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{run.folder} is no finished run ({type(error).__name__}: {error}). Remove it, or train it again "
            "with another --output-dir."
        ) from error
    return result


def outcome(variant: Variant, runs: list[Run], study: Study) -> Outcome:
    """The Outcome of a variant, from those of `runs` that are its."""
    return Outcome(variant, [read(run) for run in runs if run.variant.name == variant.name and run.seed in study.seeds])
