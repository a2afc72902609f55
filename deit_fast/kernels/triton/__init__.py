"""The Triton backend: one program per tile of rows, attention head or image, all between two reads on chip.

Importing this package needs no Triton and touches no GPU; the kernel modules are imported only where `why_not()` is
None. With `TRITON_INTERPRET=1` in the environment (read when a kernel is decorated, so set it before the first import)
the kernels run on the CPU in Triton's interpreter: slow, for tests, fp32 and fp16 only.

A kernel that turns out not to compile here, or not to fit into the GPU's shared memory, makes the automatic order step
down within the call that meets it. In code made by `torch.compile` it cannot: the backend was chosen when the code was
traced, and the saved tensors that backward expects are that backend's. There the call ends with a BackendError, as if
the backend had been asked for by name; the reason is known from then on, so the next call is traced anew and served by
another backend. One call without `torch.compile` beforehand, forward and backward, finds such kernels.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

OLDEST = (8, 0)  # compute capability: bf16 and tf32 tensor cores, asynchronous copies

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not() -> str | None:
    """Why no Triton kernel can run on this machine, or None.

    The GPU's age is asked for only where CUDA is already initialised, since asking initialises it, which importing
    deit_fast must not; every call asks again (`common.refusal`).
    """
    if not INSTALLED:
        return "Triton is not installed: pip install triton (Linux)"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    if torch.cuda.is_initialized():
        return too_old(torch.cuda.current_device())
    return None


def too_old(device: int) -> str | None:
    """Why this GPU is too old for the kernels, or None; None while Dynamo traces, which cannot ask a GPU."""
    return None if torch.compiler.is_compiling() else _too_old(device)


@lru_cache
def _too_old(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need {OLDEST[0]}.{OLDEST[1]}"
