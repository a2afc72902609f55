"""Skips with a reason, and failures in their place where someone said that a backend must be there.

`DEIT_FAST_REQUIRE=cuda,triton` turns the skips of those backends into failures.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

REQUIRED = set(filter(None, os.environ.get("DEIT_FAST_REQUIRE", "").split(",")))


def skip_or_fail(backend: str, reason: str) -> NoReturn:
    """Skips the test with the reason, or fails it where the backend is required."""
    if backend in REQUIRED:
        pytest.fail(f"{backend} is required (DEIT_FAST_REQUIRE): {reason}")
    pytest.skip(reason)
