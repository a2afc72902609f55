"""Right results on a GPU: the parity table, and every op replayed from a CUDA graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cases import CASES, Maker
from deit_fast import ops
from deit_fast.backend import OPS

from .machine import Machine, Row, captured, forward_backward

ROOT = Path(__file__).resolve().parents[2]


PARITY_SECONDS = 8 * 60


def parity(machine: Machine) -> Iterator[Row]:
    """The parity table, a skip of Triton counted as a failure; a process per op, so that kernels compile side by side."""
    native = sorted(name for name, op in OPS.items() if "triton" in op.offers and name != "augment")
    rows = {"attention": "triton and attention and fp32 and 3x7"} if machine.rehearse else {
        name: f"triton and {name}" for name in native}
    with ThreadPoolExecutor(len(rows)) as pool:
        jobs = {pool.submit(_parity_of, selection): name for name, selection in rows.items()}
        for job in as_completed(jobs):
            yield f"tests/test_parity.py {jobs[job]}", job.result()


def _parity_of(selection: str) -> dict:
    """pytest's closing line and failures for a selection of the table."""
    command = [sys.executable, "-m", "pytest", "tests/test_parity.py", "-q", "-k", selection, "-p", "no:cacheprovider"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PARITY_SECONDS, check=False,
                                env={**os.environ, "DEIT_FAST_REQUIRE": "triton",
                                     "PYTHONPATH": os.pathsep.join(sys.path[:2])})
    except subprocess.TimeoutExpired as cut:
        return {"exit": "none", "result": f"cut off after {cut.timeout:.0f} s", "failed": []}
    lines = result.stdout.strip().splitlines()
    return {"exit": result.returncode, "result": lines[-1] if lines else result.stderr[-300:],
            "failed": [line for line in lines if line.startswith("FAILED")][:40]}


def graphs(machine: Machine) -> Iterator[Row]:
    """Every op, forward and backward, replayed from a CUDA graph on new inputs: the same bits as eager."""
    for case in CASES:
        if not case.compiled or not case.grads or "triton" not in OPS[case.op].offers:
            continue
        inputs = case.inputs(machine.variant, machine.device)
        other = case.make(Maker(1, machine.variant, machine.device))
        op = partial(getattr(ops, case.op), backend="triton")
        call = forward_backward(op, inputs, case.grads)
        results: list[Tensor] = []

        def keep() -> None:
            results[:] = call()

        replay = keep if machine.rehearse else captured(keep)
        with torch.no_grad():
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    value.copy_(other[name])
        replay()
        expected = forward_backward(op, other, case.grads)()
        yield case.id, {"equal": all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))}
