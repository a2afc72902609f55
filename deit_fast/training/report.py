"""What a run leaves behind for people and tools: config.yaml, metrics.csv, summary.json.

Every file is rewritten whole and atomically from the history that the checkpoint carries. Appending a line per epoch
would be cheaper by microseconds, and would leave a row twice, or half of one, when a killed run resumes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence

import yaml

from deit_fast.training.files import atomic_write
from deit_fast.training.metrics import METRICS

SPLITS = ("val", "test")
COLUMNS = ("epoch", "lr", "train_loss", *(f"{split}_{name}" for split in SPLITS for name in METRICS))
EMA_COLUMNS = tuple(f"ema_{split}_{name}" for split in SPLITS for name in METRICS)
LAST_COLUMNS = ("images_per_second", "seconds")


def write_config(path: str | os.PathLike[str], config: Mapping) -> None:
    """Writes the resolved settings as YAML, in the order given."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    atomic_write(path, lambda file: file.write(text.encode()))


def write_metrics_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Writes one line per epoch; the columns do not depend on the run, but for the ema_ ones, which need EMA.

    A value that is absent or None is an empty field, nan is `nan`; floats keep all their digits.
    """
    ema = EMA_COLUMNS if any(name in row for row in rows for name in EMA_COLUMNS) else ()
    columns = (*COLUMNS, *ema, *LAST_COLUMNS)
    unknown = {name for row in rows for name in row} - set(columns)
    if unknown:
        raise ValueError(f"write_metrics_csv: unknown columns {sorted(unknown)}; known are {', '.join(columns)}")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def write_summary(path: str | os.PathLike[str], summary: Mapping) -> None:
    """Writes JSON; nan and infinity, which JSON has not, become null."""
    text = json.dumps(_finite(summary), indent=2, allow_nan=False, ensure_ascii=False)
    atomic_write(path, lambda file: file.write(f"{text}\n".encode()))


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
