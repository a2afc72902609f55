"""The Triton kernels on a CPU: the parity table in Triton's interpreter, and dropout masks bit by bit.

The interpreter is chosen when a kernel is decorated, before anything can be compiled in the same process; hence a
process of its own per group of rows, so that two cores share them. fp32 and fp16 only, batch 2 at most, no
`slow_interpreted` rows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest

from cases import CASES

ROOT = Path(__file__).resolve().parents[1]


def _version(module: ModuleType) -> tuple[int, int]:
    major, minor, *_ = module.__version__.split(".")
    return int(major), int(minor)



triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.skipif(
    _version(triton) < (3, 8) and _version(numpy) >= (2, 4),
    reason=f"Triton {triton.__version__}'s interpreter needs int(array), which numpy {numpy.__version__} refuses")

# fp16 repeats the kernels of fp32 but for roundings: of the rows that take seconds it runs those with tiles of its own
SLOW_IN_FP16 = ("fp16-transposed", "fp16-dropout", "fp16-droppath", "fp16-2x65", "fp16-1x300", "fp16-1x260",
                "fp16-2x31x63", "fp16-2x18x48", "fp16-7of33x17", "fp16-9of28x40")
SLOW = sorted({case.name for case in CASES if case.slow_interpreted})

GROUPS = {
    "attention": "attention",
    "linear": "layernorm_linear or linear_residual",
    "mlp": "layernorm_mlp",
    "block": "encoder_block",
    "loss": "distillation_loss",
    "augment": "augment",
}


def interpreted(*arguments: str) -> subprocess.CompletedProcess:
    """A Python process in which Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment.pop("DEIT_FAST_REQUIRE", None)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_augment() -> None:
    """What `test_triton_augment.py` asserts, all of it but the replay of a CUDA graph."""
    result = interpreted("-m", "pytest", "tests/test_triton_augment.py", "-q", "-p", "no:cacheprovider", "-k",
                         "not gpu")
    last = result.stdout.strip().splitlines()[-1:]
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in last[0] and "skipped" not in last[0], last


@pytest.mark.parametrize("group", GROUPS)
def test_parity(group: str) -> None:
    """Forward and every gradient within the oracle's budget."""
    dtypes = "fp32 or fp16 or autocast" if group == "loss" else "fp32 or fp16"  # autocast leaves the loss in fp32
    rows = f"({GROUPS[group]}) and test_eager and triton and ({dtypes})"
    rows += "".join(f" and not {row}" for row in (*SLOW_IN_FP16, *SLOW))
    result = interpreted("-m", "pytest", "tests/test_parity.py", "-q", "-p", "no:cacheprovider", "-k", rows)
    last = result.stdout.strip().splitlines()[-1:]
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in last[0] and "skipped" not in last[0], last


def test_masks_and_refusals() -> None:
    """What `triton_interpreted_checks.py` asserts."""
    result = interpreted("tests/triton_interpreted_checks.py")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
