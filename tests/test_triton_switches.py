"""Triton kernels for layers without biases, for frozen parameters and inputs, with and without dropout.

What is absent is a pointer of None, on which kernels branch at compile time. The interpreter runs only the branch that
is taken; the compiler also compiles what follows a `return` there and both sides of a run-time `if`. So each pattern of
absent arguments and flags in the parity table is compiled for one GPU, which need not be there.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import cubins  # noqa: E402

from cases import CASES, VARIANTS, Case  # noqa: E402
from deit_fast import ops  # noqa: E402
from deit_fast.kernels.triton import INTERPRETED  # noqa: E402
from deit_fast.kernels.triton.common import Launch  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: this process interprets and cannot compile")

MIXED = next(variant for variant in VARIANTS if variant.name == "bf16mixed")
DIFFERENTIABLE = sorted({case.op for case in CASES if case.grads})


def table_launches(case: Case) -> list[Launch]:
    """What a row of the parity table launches, with all gradients and with each alone (frozen others)."""
    bound = inspect.signature(getattr(ops, case.op)).bind(**case.inputs(MIXED, "meta"))
    bound.apply_defaults()
    call = tuple(value for name, value in bound.arguments.items() if name != "backend")
    given = [call[i] is not None for i in cubins.native_op(case.op).grads]
    alone = [[i == j for j in range(len(given))] for i, present in enumerate(given) if present]
    return [launch for needs in (given, *alone) for launch in cubins.launches_of(case.op, call, needs)]


def switches(launch: Launch) -> tuple:
    """The kernel and what its code branches on at compile time: absent arguments, flags, dropout."""
    flags = {name: value for name, value in launch.arguments.items() if value is None or isinstance(value, (bool, str))}
    dropouts = tuple(launch.arguments.get(name, 0) > 0 for name in ("THRESHOLD", "ATTN_THRESHOLD"))
    return launch.kernel.__name__, tuple(sorted(flags.items())), dropouts


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_every_pattern_compiles(op: str) -> None:
    """For sm_90, each once, in the first shape of the table that has it, and within its shared memory."""
    patterns: dict[tuple, Launch] = {}
    for case in CASES:
        for launch in table_launches(case) if case.op == op else ():
            patterns.setdefault(switches(launch), launch)
    for launch in patterns.values():
        usage = cubins.compile_launch(launch, 90)
        assert usage.shared <= cubins.SHARED_LIMIT[90], (launch.kernel.__name__, usage)
