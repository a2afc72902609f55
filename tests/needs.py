"""Skips with a reason, and failures in their place where someone said that a backend must be there.

`DEIT_FAST_REQUIRE=cuda,triton` turns the skips of those backends into failures.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest
import torch

from deit_fast.kernels import cpu

REQUIRED = set(filter(None, os.environ.get("DEIT_FAST_REQUIRE", "").split(",")))

# Marks for tests and modules; what is required runs all the same, and fails.
needs_cpu = pytest.mark.skipif(cpu.why_not() is not None and "cpu" not in REQUIRED, reason=str(cpu.why_not()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() and not REQUIRED & {"triton", "cuda"},
                               reason="there is no CUDA GPU")


def skip_or_fail(backend: str, reason: str) -> NoReturn:
    """Skips the test with the reason, or fails it where the backend is required."""
    if backend in REQUIRED:
        pytest.fail(f"{backend} is required (DEIT_FAST_REQUIRE): {reason}")
    pytest.skip(reason)
