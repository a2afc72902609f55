"""A GPU that is too old for the Triton kernels, on a machine without any: what asks PyTorch about it is patched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import deit_fast
from deit_fast import backend, ops
from deit_fast.backend import OPS, BackendError
from deit_fast.kernels import triton

REASON = "Tesla T4 has compute capability 7.5, the kernels need 8.0"


@pytest.fixture
def gpu(monkeypatch):
    """The GPU of a machine with Triton: its capability can be set; asked: which devices' it was asked for."""
    gpu = SimpleNamespace(capability=(7, 5), initialized=True, asked=[])

    def capability(device):
        gpu.asked.append(device)
        return gpu.capability

    monkeypatch.setattr(triton, "INSTALLED", True)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    for name, value in {"is_available": lambda: True, "is_initialized": lambda: gpu.initialized,
                        "current_device": lambda: 3, "get_device_name": lambda _device: "Tesla T4",
                        "get_device_capability": capability}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    triton._too_old.cache_clear()
    yield gpu
    triton._too_old.cache_clear()


def test_too_old(gpu):
    """The oldest that will do is 8.0; each device is asked for once."""
    assert triton.why_not() == triton.why_not() == REASON and gpu.asked == [3]
    for gpu.capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        triton._too_old.cache_clear()
        assert triton.why_not() is None, gpu.capability


def test_nothing_is_asked_before_cuda_is_initialised(gpu):
    """Importing deit_fast must not initialise CUDA."""
    gpu.initialized = False
    assert triton.why_not() is None and gpu.asked == []


def test_a_call_is_refused(gpu, monkeypatch):
    """By name with that reason; the automatic order goes on to the next backend, here `reference`."""
    qkv, op = torch.randn(1, 4, 24), OPS["attention"]
    with pytest.raises(BackendError, match=f"'triton' cannot serve this call: {REASON}. Usable here: reference"):
        ops.attention(qkv, 2, backend="triton")
    assert deit_fast.backends()["attention"]["triton"] == REASON
    monkeypatch.setattr(backend, "BY_NAME_ONLY", ())
    before = op.order
    object.__setattr__(op, "order", lambda *_: ("triton",))
    try:
        assert op.select(None, qkv, 2, None, 0.0, None) == "reference"
    finally:
        object.__setattr__(op, "order", before)


def test_the_device_of_the_tensors_counts(gpu, monkeypatch):
    """Not the current one: a machine can have GPUs of two ages."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from deit_fast.kernels.triton import common

    x = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=SimpleNamespace(index=1))
    monkeypatch.setattr(common, "INTERPRETED", False)
    assert common.refusal("attention", x) == REASON and gpu.asked == [1]
