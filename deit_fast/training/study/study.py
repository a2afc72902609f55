"""A study from its flags to its report: plan, check what is there, train what is missing, write the page."""

from __future__ import annotations

from pathlib import Path

from deit_fast.errors import ConfigError
from deit_fast.training import build
from deit_fast.training.config import warnings
from deit_fast.training.device import resolve_device
from deit_fast.training.progress import Log
from deit_fast.training.study.content import write_report
from deit_fast.training.study.runs import check_folder, planned
from deit_fast.training.study.schedule import train_all
from deit_fast.training.study.settings import Study


def run(study: Study, log: Log) -> Path:
    """The report's page, after training every run that is not finished. Refuses before it writes anything."""
    runs = planned(study)
    missing = [run.title for run in runs if not run.finished]
    if study.report_only and missing:
        raise ConfigError(
            f"--report-only: {len(missing)} of {len(runs)} runs in {study.output_dir} are missing or not finished "
            f"({'; '.join(missing)}). Leave the flag out to train them, or ask for other --models and --seeds."
        )
    for text in sorted(set.intersection(*(set(warnings(run.config)) for run in runs))):
        log(f"WARNING: {text}")
    first = runs[0].config
    data = build.load_data(first, build.check_model(first), resolve_device(first.run.device), log)
    for run in runs:
        check_folder(run, data.fingerprint)
    train_all(study, runs, log)
    return write_report(study, data, log)
