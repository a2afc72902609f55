"""What a check measures and how it lands on disk: figures of a contender in a row of a section, in one JSON file.

    {section: {"environment": {...}, "rows": {row: {contender: {figure: value}}}, "clocks": {...}, "left out": [...]}}

Each section says where it was measured, so that figures of two machines cannot be taken for one another's. A later
call on the same machine, versions and sources measures only what is missing, what failed before at the end; on another
it starts the section anew.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from deit_fast.training.files import atomic_write

Figures = dict[str, Any]
OURS = ("ours", "triton", "cuda", "four ops")  # how the names of our contenders begin, up to a comma
UNFINISHED = ("error", "skipped", "cut off")  # figures of what a later call tries again


class Refused(Exception):
    """A contender that does not take what it is asked for: its figure is the reason."""


class Lost(Exception):
    """After the last contender this process can measure nothing more; a new one can."""


@dataclass(frozen=True)
class Contender:
    """One contender of a row, and the call that measures it.

    rank: jobs of a lower one come first, so that what compiles for minutes waits. process: it runs in a process of its
    own, beside others of its kind, before anything is timed.
    """

    row: str
    who: str
    measure: Callable[[], Figures]
    rank: int = 0
    process: bool = False


class Device(Protocol):
    """What running jobs needs to know of a machine (machine.py)."""

    failures: tuple[type[Exception], ...]

    def left(self) -> float:
        """Seconds in which something new may start."""

    def clocks(self) -> str:
        """What the processor runs at now."""

    def settle(self) -> None:
        """Forgets what the last job left behind; Lost where that cannot be done."""


class Results:
    """The file of all figures, written after each contender."""

    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        self.path, self.environment = path, environment
        self.sections: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def open(self, section: str) -> None:
        """Keeps the rows of a section that were measured here and of this code, and no others."""
        found = self.sections.get(section, {})
        if not same_environment(found.get("environment", {}), self.environment):
            found = {}
        self.sections[section] = {"environment": self.environment, "rows": found.get("rows", {}),
                                  "clocks": found.get("clocks", {}), "left out": []}

    def figures(self, section: str, job: Contender) -> Figures | None:
        """What was written of a job, be it that it failed or was refused."""
        return self.sections[section]["rows"].get(job.row, {}).get(job.who)

    def has(self, section: str, job: Contender) -> bool:
        """Whether the figures of a job are there."""
        figures = self.figures(section, job)
        return figures is not None and not any(name in figures for name in UNFINISHED)

    def add(self, section: str, job: Contender, figures: Figures, clocks: str) -> None:
        """Writes the figures of a job."""
        self.sections[section]["rows"].setdefault(job.row, {})[job.who] = figures
        self.sections[section]["clocks"][f"{job.row}: {job.who}"] = clocks
        self.write()

    def leave_out(self, section: str, jobs: Iterable[Contender]) -> None:
        """Writes which jobs the time was too short for."""
        self.sections[section]["left out"] = [f"{job.row}: {job.who}" for job in jobs]
        self.write()

    def write(self) -> None:
        """The file anew, completely or not at all."""
        atomic_write(self.path, lambda file: file.write(json.dumps(self.sections, indent=1).encode()))

    def errors(self) -> int:
        """How many contenders ended in an error, a failed test or other bits than expected."""
        return sum("error" in figures or bool(figures.get("failed")) or not figures.get("equal", True)
                   for section in self.sections.values() for row in section["rows"].values()
                   for figures in row.values())


def same_environment(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether figures of two environments belong together: the digest of the sources says what ran, not the commit."""
    def lasting(environment: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in environment.items() if name not in ("date", "commit")}

    return lasting(one) == lasting(other)


def run(section: str, jobs: Iterable[Contender], results: Results, device: Device) -> None:
    """Measures what the results lack of a section: processes side by side, then the rest by rank.

    Nothing is started when the device's time is over. A job that fails leaves its error in the place of its figures,
    and one that takes the process with it "cut off"; both come last the next time. Lost if the device is.
    """
    results.open(section)
    missing = sorted((job for job in jobs if not results.has(section, job)),
                     key=lambda job: (results.figures(section, job) is not None, job.rank))
    processes = [job for job in missing if job.process]
    with ThreadPoolExecutor(max(1, 3 * (os.cpu_count() or 1) // 4)) as pool:
        running = {pool.submit(_measured, job, device): job for job in processes}
        for done in as_completed(running):
            _keep(section, running[done], done.result(), results, device)
    try:
        for job in filter(lambda job: not job.process, missing):
            figures = _measured(job, device, partial(results.add, section, job, {"cut off": "while it ran"}, ""))
            if figures is None:
                break
            _keep(section, job, figures, results, device)
            device.settle()
    finally:
        results.leave_out(section, (job for job in missing if results.figures(section, job) is None))


def _measured(job: Contender, device: Device, started: Callable[[], None] = lambda: None) -> Figures | None:
    """The figures of a job or its error; None if it is too late to start it. `started` is called before it starts."""
    if device.left() <= 0:
        return None
    started()
    start = time.monotonic()
    try:
        figures = job.measure()
    except ImportError as error:
        return {"skipped": str(error)}
    except Refused as error:
        return {"refused": str(error)}
    except device.failures as error:
        traceback.print_exc()
        return {"error": one_line(error)}
    return {**figures, "took s": round(time.monotonic() - start, 1)}


def one_line(error: Exception) -> str:
    """Its name and the beginning of its text, fit for a cell of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _keep(section: str, job: Contender, figures: Figures | None, results: Results, device: Device) -> None:
    if figures is None:
        return
    results.add(section, job, figures, device.clocks())
    print(f"{section}: {job.row}: {job.who}: {figures}", flush=True)


def ratios(row: dict[str, Figures]) -> dict[str, dict[str, tuple[float, str]]]:
    """Our contender -> milliseconds of what -> (how many times faster than the fastest baseline, which one that is)."""
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for who in filter(is_ours, row):
        for name in filter(_is_time, row[who]):
            baselines = [(figures[name], other) for other, figures in row.items()
                         if not is_ours(other) and name in figures]
            if baselines:
                fastest, other = min(baselines)
                found.setdefault(who, {})[name] = (fastest / row[who][name], other)
    return found


def is_ours(who: str) -> bool:
    """Whether a contender is ours; the others are what ours is held against."""
    return who.partition(",")[0] in OURS


def _is_time(name: str) -> bool:
    return name == "ms" or name.endswith(" ms")


def table(sections: dict[str, dict], order: Iterable[str]) -> Iterator[str]:
    """The lines of a Markdown table for each section, a line per contender."""
    for name in filter(sections.__contains__, order):
        section = sections[name]
        yield f"\n### {name}\n"
        yield ", ".join(f"{key} {value}" for key, value in section["environment"].items() if value)
        if seen := sorted(set(filter(None, section["clocks"].values()))):
            yield f"clocks seen: {'; '.join(seen if len(seen) < 4 else (seen[0], '...', seen[-1]))}"
        if section["left out"]:
            yield f"left out, time was over: {'; '.join(section['left out'])}"
        yield "\n| | | figures | times faster than the fastest baseline |\n|---|---|---|---|"
        for row, contenders in section["rows"].items():
            faster = ratios(contenders)
            for who, figures in contenders.items():
                cells = ", ".join(f"{key} {_short(value)}" for key, value in figures.items() if key != "took s")
                times = ", ".join(f"{key.removesuffix('ms').strip()} {ratio:.3g} ({other})".strip()
                                  for key, (ratio, other) in faster.get(who, {}).items())
                yield f"| {row} | {who} | {cells} | {times} |"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
