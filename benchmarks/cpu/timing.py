"""Candidates that take turns in one process, the ratios of their times, and the machine's own peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from deit_fast.kernels import cpu

Candidates = dict[str, Callable[[], object]]
Times = dict[str, list[float]]  # seconds of each candidate in each round
_clock = time.perf_counter


def count_cpu_time() -> None:
    """Times are CPU time of the process from now on, which others on the machine hardly disturb: for one thread."""
    global _clock
    _clock = time.process_time


def now() -> float:
    """Seconds on the clock in use."""
    return _clock()


def take_turns(candidates: Candidates, rounds: int, calls: int = 1) -> Times:
    """Seconds of each candidate in each round, after two rounds to warm up.

    A turn is `calls` calls in a row and counts as the median of its second half. Several are for calls of a few
    milliseconds: the threads of ONNX Runtime and OpenVINO spin for a while after a call, on the cores of whoever is next.
    """
    times: Times = {name: [] for name in candidates}
    for index in range(rounds + 2):
        for name, call in candidates.items():
            turn = []
            for _ in range(calls):
                start = now()
                call()
                turn.append(now() - start)
            if index >= 2:
                times[name].append(statistics.median(turn[calls // 2:]))
    return times


def median(times: Times, name: str) -> float:
    """Seconds of a candidate's turn."""
    return statistics.median(times[name])


def ratio(times: Times, baseline: str, ours: str) -> float:
    """The median over rounds of baseline / ours: how many times faster ours is."""
    return statistics.median(b / o for b, o in zip(times[baseline], times[ours]))


def peaks(threads: int) -> dict[torch.dtype, float]:
    """FLOP/s from registers, per dtype; prints them beside torch.mm's. The best of seven: others share the machine."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        rate = max(cpu.module.multiply_rate(dtype == torch.bfloat16, threads, 2_000_000) for _ in range(7))
        a, b = torch.randn(2, 1024, 1024).to(dtype)
        seconds = min(take_turns({"mm": lambda: a @ b}, 10)["mm"])
        print(f"peak {str(dtype)[6:]:9s} {rate / 1e9:7.0f} GFLOP/s from registers, "
              f"{2 * 1024**3 / seconds / 1e9:7.0f} torch.mm")
        found[dtype] = rate
    return found


def fastest(times: Times, ours: str = "ours") -> str:
    """The candidate of the smallest median time whose name does not begin with `ours`."""
    return min((name for name in times if not name.startswith(ours)), key=lambda name: statistics.median(times[name]))
