"""Running what is not finished: one process per run, `--jobs` of them at a time.

A process of its own gives each run its own peak memory and its own crash. The processes are forked from a server that
has imported everything and started no thread (`forkserver`): a run starts in milliseconds and OpenMP survives. A run
that outlived a killed study would go on writing beside the one of the next attempt, so each watches its parent and goes
with it.

The teacher, and the logits of every epoch's plan, are made first, by one process: runs at the same time would each make
their own, and the first run's time would contain them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess

import torch
from rich.console import Console

from deit_fast.errors import TrainingError, UserError
from deit_fast.training.config import to_dict
from deit_fast.training.files import atomic_write
from deit_fast.training.interrupt import Interrupted, StopSignals
from deit_fast.training.progress import Log
from deit_fast.training.study.prepare import plan_of, prepare
from deit_fast.training.study.runs import Run
from deit_fast.training.study.settings import Study

POLL_SECONDS = 0.2


def train_all(study: Study, runs: list[Run], log: Log) -> None:
    """Trains every run that is not finished; TrainingError names those that failed, Interrupted passes a signal on."""
    pending = [run for run in runs if not run.finished]
    if len(pending) < len(runs):
        log(f"study: {len(runs) - len(pending)} of {len(runs)} runs are finished already")
    if not pending:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deit_fast.training.study.schedule", "sklearn.datasets"])
    taught = {plan_of(run.config): run for run in pending if run.config.model.distilled}
    with StopSignals() as signals:
        for run in taught.values():
            _finish(signals, [_start(context, _prepare, run, study, "preparing: ")])
        _train(context, study, pending, signals, log)


def _train(context, study: Study, pending: list[Run], signals: StopSignals, log: Log) -> None:
    """Keeps `--jobs` processes busy until all runs are done."""
    waiting, failed = list(reversed(pending)), []
    busy: list[tuple[Run, BaseProcess]] = []
    while waiting or busy:
        while waiting and len(busy) < study.jobs and not failed:
            run = waiting.pop()
            log(f"study: run {len(pending) - len(waiting)} of {len(pending)}, {run.title}")
            busy.append((run, _start(context, _run, run, study, f"{run.title}: " if study.jobs > 1 else "")))
        for _, process in busy:
            process.join(POLL_SECONDS / len(busy))
        if signals.arrived is not None:
            _finish(signals, [process for _, process in busy])
        failed += [run.title for run, process in busy if process.exitcode]
        busy = [(run, process) for run, process in busy if process.exitcode is None]
        if failed and not busy:
            raise TrainingError(
                f"{'; '.join(failed)}: the run ended with an error, see above. What is finished is kept; "
                "mend the cause and give the command again."
            )


def _finish(signals: StopSignals, processes: list[BaseProcess]) -> None:
    """Waits for processes, and passes a signal on to them; TrainingError when one fails."""
    told = False
    while any(process.exitcode is None for process in processes):
        if signals.arrived is not None and not told:
            told = True
            for process in processes:
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGTERM)
        for process in processes:
            process.join(POLL_SECONDS)
    if signals.arrived is not None:
        raise Interrupted(signals.arrived)
    if any(process.exitcode for process in processes):
        raise TrainingError("the teacher could not be prepared, see above. Mend the cause and give the command again.")


def _start(context, work: Callable, run: Run, study: Study, title: str) -> BaseProcess:
    threads = max(1, torch.get_num_threads() // study.jobs)
    process = context.Process(target=_child, args=(work, run, study, title, threads))
    process.start()
    return process


def _child(work: Callable, run: Run, study: Study, title: str, threads: int) -> None:
    """What a process does: the work, with the exit codes of `deit_fast.train`."""
    threading.Thread(target=_go_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    log = _TitledLog(title) if title else Log()
    try:
        work(run, study, log)
    except UserError as error:
        print(f"error: {title}{error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _go_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(run: Run, study: Study, log: Log) -> None:
    from deit_fast.training.run import run as train

    train(replace(run.config, explicit=frozenset()), log)


def _prepare(run: Run, study: Study, log: Log) -> None:
    report = prepare(run.config, log)
    name = f"teacher-{report['teacher']['model']}-{report['plan']}.json"
    text = json.dumps(report | {"config": to_dict(run.config)}, indent=2)
    atomic_write(study.output_dir / "teachers" / name, lambda file: file.write(f"{text}\n".encode()))


class _TitledLog(Log):
    """A Log whose lines begin with a run's name; without a live bar, for there may be several at a time."""

    def __init__(self, title: str) -> None:
        super().__init__(Console(soft_wrap=True, force_terminal=False))
        self.title = title

    def __call__(self, text: str) -> None:
        super().__call__(f"{self.title}{text}")
