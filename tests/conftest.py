"""Settings of the whole test run, and the header that shows what ran where.

Inductor's on-disk cache is off: after a fake implementation is mended it still serves code made for the old one (torch 2.14).
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic tests on a GPU need it before cuBLAS starts

import pytest  # noqa: E402
import torch  # noqa: E402

import deit_fast  # noqa: E402
from deit_fast.kernels import cpu  # noqa: E402
from deit_fast.kernels.cpu import launch  # noqa: E402


def pytest_report_header() -> list[str]:
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU kernels: {cpu.isa or cpu.why_not()}, "
             f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"]
    for op, row in deit_fast.backends().items():
        lines.append(f"  {op}: {', '.join(name for name, reason in row.items() if reason is None)}")
    return lines


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    """Every test starts from the same seed, takes every thread for the smallest call, and leaves no compiled graph."""
    torch.manual_seed(0)
    monkeypatch.setattr(launch, "GRAIN", 1)
    yield
    torch._dynamo.reset()
    if (common := sys.modules.get("deit_fast.kernels.triton.common")) is not None:
        common.FAILED.clear()  # a kernel that does not compile must not fail the tests behind it
