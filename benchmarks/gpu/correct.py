"""Right results on a GPU: the parity table, and every op replayed from a CUDA graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cases import CASES, VARIANTS, Case, Maker
from deit_fast import ops
from deit_fast.backend import OPS

from .machine import Machine, forward_backward
from .results import Contender, Figures

ROOT = Path(__file__).resolve().parents[2]


def parity(machine: Machine) -> Iterator[Contender]:
    """The parity table by op and dtype, a skip of Triton, or of CUDA where it is built, counted as a failure.

    Processes, so that kernels compile side by side. augment, whose bits have tests of their own, has only a dtype.
    """
    if machine.rehearse:
        rows = {("attention", "triton", "fp32"): "attention-triton-fp32-3x7"}
    else:
        rows = {(name, backend, variant.name): f"{name}-{backend}-{variant.name}-"
                for variant in VARIANTS for name, op in sorted(OPS.items()) for backend in ("triton", "cuda")
                if backend in op.offers and (name != "augment" or variant in VARIANTS[:3])}
    yield augment_bits(machine)
    for (op, backend, variant), selection in rows.items():
        yield Contender(op, f"{backend}, {variant}", process=True,
                        measure=partial(table_tested, machine, op, backend, selection))


def augment_bits(machine: Machine) -> Contender:
    """The tests of augment's bits; they replay a CUDA graph too."""
    cuda = OPS["augment"].why_not_here("cuda")
    arguments = ["tests/test_triton_augment.py", *(["-k", "slices"] if machine.rehearse else ["tests/test_augment.py"])]
    return Contender("augment: bits", "triton" if cuda else "triton and cuda", process=True,
                     measure=partial(tested, machine, arguments, "triton" if cuda else "triton,cuda"))


def table_tested(machine: Machine, op: str, backend: str, selection: str) -> Figures:
    """What pytest says of a part of the parity table."""
    if backend == "cuda" and (reason := OPS[op].why_not_here("cuda")):
        return {"skipped": reason}
    return tested(machine, ["tests/test_parity.py", "-k", selection], backend)


def tested(machine: Machine, arguments: Sequence[str], required: str) -> Figures:
    """What pytest says of these tests; required: backends whose skips are failures. Cut off with the section's time."""
    command = [sys.executable, "-u", "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "DEIT_FAST_REQUIRE": required, "TORCHINDUCTOR_COMPILE_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
                                timeout=None if machine.rehearse else max(1.0, machine.left() + 15))
    except subprocess.TimeoutExpired as cut:
        return {"cut off": f"after {cut.timeout:.0f} s", **outcomes((cut.stdout or b"").decode(errors="replace"))}
    found = outcomes(result.stdout)
    if not (found["passed"] or found["failed"]):
        found["error"] = " ".join((result.stderr or result.stdout).split())[-300:]
    return {"exit": result.returncode, **found}


def outcomes(output: str) -> Figures:
    """How many tests passed and which failed, by what `pytest -v` has written so far."""
    words = [line.split(" ") for line in output.splitlines() if "::" in line.partition(" ")[0]]
    named = {status: [line[0].rpartition("::")[2] for line in words if line[1:2] == [status]]
             for status in ("PASSED", "SKIPPED", "FAILED", "ERROR")}
    return {"passed": len(named["PASSED"]), "skipped tests": len(named["SKIPPED"]),
            "failed": (named["FAILED"] + named["ERROR"])[:40]}


def graphs(machine: Machine) -> Iterator[Contender]:
    """Every op, forward and backward, replayed from a CUDA graph on new inputs: the same bits as eager."""
    for case in CASES:
        if case.compiled and case.grads and "triton" in OPS[case.op].offers:
            yield Contender(case.id, "triton", partial(_replayed, machine, case))


def _replayed(machine: Machine, case: Case) -> Figures:
    inputs = case.inputs(machine.variant, machine.device)
    other = case.make(Maker(1, machine.variant, machine.device))
    op = partial(getattr(ops, case.op), backend="triton")
    call = forward_backward(op, inputs, case.grads)
    results: list[Tensor] = []

    def keep() -> None:
        results[:] = call()

    recorder = machine.recorder()
    recorder.warm_up(keep)
    replay = recorder.record(keep)
    with torch.no_grad():
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                value.copy_(other[name])
    replay()
    expected = forward_backward(op, other, case.grads)()
    return {"equal": all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))}
