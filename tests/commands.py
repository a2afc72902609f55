"""The training command in processes of its own that start in milliseconds, forked from one that imported everything.

They are real processes, so they can be killed. `Death` says where: at the n-th call of a function.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["deit_fast.train", "deit_fast.training.run", "sklearn.datasets"])

# The digits at their own 8 x 8 pixels (6 tokens), 10 batches an epoch: about a second.
TINY = ("--data-set", "digits", "--input-size", "8", "--batch-size", "128", "--device", "cpu", "--log-interval", "4")
VIT = ("--preset", "report-vit", *TINY)


@dataclass(frozen=True)
class Death:
    """A signal to itself and its workers at call number `call` of `target`, "module:name.in.it"."""

    target: str
    call: int
    signum: int = signal.SIGKILL

    def arm(self) -> None:
        os.setpgrp()  # signals reach this process and its workers, as from a terminal or a job scheduler
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        owner = functools.reduce(getattr, parents, importlib.import_module(module))
        original, calls = getattr(owner, name), []

        def counting(*args, **kwargs):
            calls.append(None)
            if len(calls) == self.call:
                # by another process: torch's workers treat signals from their parent differently
                subprocess.run(["kill", f"-{self.signum}", "--", f"-{os.getpgrp()}"], start_new_session=True)
            return original(*args, **kwargs)

        setattr(owner, name, counting)


STEP = "deit_fast.training.steps:Learner.learn"
EVALUATION = "deit_fast.training.metrics:Evaluation.update"
WRITING = "deit_fast.training.files:_RememberingFile.write"
RENAMING = "deit_fast.training.files:os.replace"


@dataclass(frozen=True)
class Result:
    code: int  # negative: died of that signal
    output: str


def train(*flags: str, death: Death | None = None, kill_after: float | None = None, file_limit: int | None = None,
          environment: dict[str, str] | None = None) -> Result:
    """Runs `deit_fast.train` with one thread to its end, or kills it `kill_after` seconds after its start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "output")
        settings = list(map(str, flags)), str(path), death, file_limit, environment or {}
        process = CONTEXT.Process(target=_child, args=settings)
        process.start()
        process.join(120 if kill_after is None else kill_after)
        if process.is_alive():
            process.kill()
            process.join()
            assert kill_after is not None, f"still running after two minutes:\n{path.read_text()}"
        return Result(process.exitcode, path.read_text() if path.exists() else "")


def _child(flags: list[str], path: str, death: Death | None, file_limit: int | None,
           environment: dict[str, str]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # loader workers as in a process started from a shell
    torch.set_num_threads(1)
    if file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if death is not None:
        death.arm()
    from deit_fast.train import main

    sys.exit(main(flags))


def random_death(dice: random.Random) -> Death:
    """SIGKILL somewhere in the first steps, evaluations or writes of a process."""
    target, most = dice.choice([(STEP, 12), (EVALUATION, 3), (WRITING, 400), (RENAMING, 6)])
    return Death(target, dice.randint(1, most))
